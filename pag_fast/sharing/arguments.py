"""The arguments of a denoiser or ControlNet, and the rows that their tensors have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .rows import ROTARY, UNBATCHED, change_level, is_batched, map_tensors

RESIDUALS = "down_block_additional_residuals"
MID_RESIDUAL = "mid_block_additional_residual"
ADAPTER = "down_intrablock_additional_residuals"
# what ControlNets of transformers add between its blocks
BLOCK_RESIDUALS = frozenset(
    {
        "block_controlnet_hidden_states",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "controlnet_states",
    }
)

ALL_RESIDUALS = BLOCK_RESIDUALS | {RESIDUALS, MID_RESIDUAL, ADAPTER}

# residuals are aligned one by one; timesteps are equal by construction and new in every step
UNCHECKED = UNBATCHED | ROTARY | ALL_RESIDUALS | {"timestep"}
SAMPLE = ("sample", "hidden_states")

# conditioning with one row for each picture in front, whatever the model's class
CONDITIONING = frozenset(
    {
        "additional_t_cond",
        "aspect_ratio",
        "class_labels",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "encoder_hidden_states_llama3",
        "encoder_hidden_states_mask",
        "encoder_hidden_states_t5",
        "guidance",
        "image_embeds",
        "image_meta_size",
        "pooled_embeds",
        "pooled_projections",
        "resolution",
        "style",
        "text_embedding_mask",
        "text_embedding_mask_t5",
        "text_embeds",
        "time_ids",
        "timestep_cond",
    }
)

# sizes, lengths and rates of which a list has one for each row
BY_ROW = frozenset({"fps", "img_shapes", "img_sizes", "shape_list", "txt_seq_lens"})


def latents_of(call: dict[str, Any]) -> torch.Tensor:
    """The latents among a model's arguments, whatever its family calls them.

    Of a class that nobody has described they are its first argument, maybe as a list of rows.
    """
    sample, hidden_states = SAMPLE
    if sample in call:
        return call[sample]
    if hidden_states in call:
        return call[hidden_states]
    found = next(iter(call.values()))
    return torch.stack(found) if isinstance(found, list) else found


def frames_of(call: dict[str, Any]) -> int:
    """Frames of a UNet for videos: its text, and its batch inside, have a row for each."""
    if "sample" not in call or call["sample"].ndim != 5:
        return 1
    return int(call["sample"].shape[2])


def version_of(x: torch.Tensor) -> int:
    """Another number after every write into ``x``; -1 for inference tensors, which do not tell."""
    return -1 if x.is_inference() else x._version


def batched(call: dict[str, Any], rows: int, frames: int) -> dict[str, torch.Tensor]:
    """The tensors among a model's arguments that have the batch's rows, by dotted name."""
    return {n: x for n, x in _tensors("", call) if with_rows(n.split(".")[-1], x, rows, frames)}


def with_rows(name: str, x: torch.Tensor, rows: int, frames: int) -> bool:
    """Whether ``x``, an argument called ``name``, has the batch's rows in front.

    What is known to have none never has, however the numbers fall.
    """
    return x.ndim > 0 and is_batched(name, x) and x.shape[0] in (rows, rows * frames)


def complete_rows(call: dict[str, Any], rows: int, frames: int) -> dict[str, Any]:
    """Arguments whose conditioning has a row for every picture of a batch of ``rows``.

    Pipelines hand one prompt over as one row for several pictures, and the models broadcast it;
    or, of fewer rows than pictures, each stands for as many pictures in a row. Only arguments that
    are declared in :data:`CONDITIONING` are completed. Tensors that are complete stay the objects
    that they are.
    """
    call = dict(call)
    mend_rows(call, rows)
    for name in call:
        value = call[name]
        if name == "added_cond_kwargs" and isinstance(value, dict):
            if "image_embeds" in value:
                refuse_uneven(call, rows)
            call[name] = {
                n: _completed(x, rows, frames) if n in CONDITIONING else x for n, x in value.items()
            }
        elif name in CONDITIONING and value is not None:
            call[name] = _completed(value, rows, frames)
    return call


def _completed(x: Any, rows: int, frames: int) -> Any:
    if not isinstance(x, torch.Tensor) or not x.ndim:
        return x
    have = x.shape[0]
    if not have or have in (rows, rows * frames) or rows % have:
        return x
    return x.repeat_interleave(rows // have, dim=0)


def tensors_of(call: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor among a model's arguments, by dotted name."""
    return _tensors("", call)


# no closure that calls itself: as a reference cycle it would keep the tensors alive
def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(
                f"{name}.{index}" if not name.endswith("image_embeds") else name, item
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in UNCHECKED:
                yield from _tensors(f"{name}.{key}" if name else key, item)


def change_arguments(
    call: dict[str, Any],
    change: Callable[[torch.Tensor], torch.Tensor],
    change_rows_of: Callable[[list[Any]], list[Any]] | None = None,
    by_row: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A model's arguments with ``change`` applied to their tensors, but not to residuals.

    ``change_rows_of`` is applied to lists named in ``by_row``, which have something for each row.
    """
    kept = {n: v for n, v in call.items() if n not in ALL_RESIDUALS and n not in by_row}
    changed = map_tensors(kept, change)
    for name in by_row:
        assert change_rows_of is not None
        changed[name] = change_rows_of(call[name])
    return {**call, **changed}


def change_list(rows: list[Any], have: int, want: int) -> list[Any]:
    """A list of ``have`` slabs with ``want`` slabs."""
    unit = len(rows) // have
    return rows[: want * unit] if want < have else rows + rows[-unit:] * (want - have)


def lists_by_row(call: dict[str, Any], rows: int) -> tuple[str, ...]:
    """Names of the arguments that are lists with something for each row, not tensors of all rows.

    Those of :data:`BY_ROW` are; and where a model takes its latents so, its prompts are, too. Lists
    of another name have something for each net, layer or chunk, however the numbers fall.
    """
    latents_are = any(isinstance(x, list) for x in list(call.values())[:1])
    return tuple(
        name
        for name, value in call.items()
        if (latents_are or name in BY_ROW) and isinstance(value, list) and len(value) == rows
    )


def change_rows(
    call: dict[str, Any], rows: int, frames: int, have: int, want: int
) -> dict[str, Any]:
    """Every batched argument with ``want`` slabs in place of ``have``; residuals are left alone.

    Raises:
        ValueError: images that cannot be told apart by rows.
    """
    refuse_uneven(call, rows)

    def change(x: torch.Tensor) -> torch.Tensor:
        return change_level(x, have, want) if x.shape[0] in (rows, rows * frames) else x

    lists = lists_by_row(call, rows)
    return change_arguments(call, change, lambda x: change_list(x, have, want), lists)


def knows_places(call: dict[str, Any]) -> bool:
    """Whether something between a transformer's blocks depends on where a token is."""
    masks = (call.get("cross_attention_kwargs") or {}).get("ip_adapter_masks")
    return bool(masks) or between_blocks(call)


def between_blocks(call: dict[str, Any]) -> bool:
    """Whether residuals of a ControlNet are added between a transformer's blocks."""
    return any(call.get(name) is not None for name in BLOCK_RESIDUALS)


def are_uneven(images: Any, rows: int) -> bool:
    """Whether image embeddings have more rows than a batch; frames come in inside of the model."""
    found = images if isinstance(images, list | tuple) else [images]
    return any(isinstance(x, torch.Tensor) and x.shape[0] > rows for x in found)


def refuse_uneven(call: dict[str, Any], rows: int) -> None:
    """Raises ValueError for images of an IP-Adapter that cannot be told apart by rows."""
    added = call["added_cond_kwargs"] if "added_cond_kwargs" in call else None  # noqa: SIM401
    if added and "image_embeds" in added and are_uneven(added["image_embeds"], rows):
        raise ValueError(
            "The image embeddings of an IP-Adapter have more rows than the denoiser's batch, as "
            "there are several for each picture of it, and with masks or frames they cannot be "
            "told apart here: give ip_adapter_image_embeds one row, which all pictures get, or "
            "run one picture at a time."
        )


def _folded(images: Any, rows: int) -> Any:
    """Images of which each row has several, as the attention processors put them together."""

    def fold(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.ndim < 3 or x.shape[0] % rows:
            return x
        return x if x.shape[0] == rows else x.reshape(rows, -1, *x.shape[2:])

    return type(images)(map(fold, images)) if isinstance(images, list | tuple) else fold(images)


def mend_rows(call: dict[str, Any], rows: int) -> None:
    """Arguments that diffusers hands over with too few or too many rows."""
    added = call["added_cond_kwargs"] if "added_cond_kwargs" in call else None  # noqa: SIM401
    if added and "image_embeds" in added and are_uneven(added["image_embeds"], rows):
        whole = "sample" in call and call["sample"].ndim == 4
        if whole and not (call.get("cross_attention_kwargs") or {}).get("ip_adapter_masks"):
            images = _folded(added["image_embeds"], rows)
            call["added_cond_kwargs"] = {**added, "image_embeds": images}
    cond = call["timestep_cond"] if "timestep_cond" in call else None  # noqa: SIM401
    if cond is not None and cond.shape[0] != rows and rows % cond.shape[0] == 0:
        call["timestep_cond"] = torch.cat([cond] * (rows // cond.shape[0]))
    for name in ("image_meta_size", "style"):
        if name in call and call[name] is not None and call[name].shape[0] > rows:
            call[name] = call[name][:rows]
