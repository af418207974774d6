"""PAG added to a pipeline the slow and obvious way: the truth of the tests of hosts."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pag_fast.runtime.compatibility import row_wise
from tiny_hosts.pipelines import HOSTS


@row_wise
class _Identity(TorchFunctionMode):
    """Attention over image tokens is the identity; text queries and text keys are as they were."""

    def __init__(self, text: str, lengths: list[int], image: int) -> None:
        super().__init__()
        self.text, self.lengths, self.image = text, lengths, image

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask")
        kwargs = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, mask = kwargs["query"], kwargs.pop("attn_mask", None)
        rows, _, total, _ = query.shape
        allowed = torch.ones(rows, 1, total, total, dtype=torch.bool)
        for row in range(rows):
            if not self.text:
                image = torch.arange(total)
            elif self.text == "last":
                image = torch.arange(self.image)
            else:
                image = torch.arange(self.image) + self.lengths[row % len(self.lengths)]
            block = torch.zeros(total, total, dtype=torch.bool)
            block[image[:, None], image] = True
            allowed[row, 0] = ~block | torch.eye(total, dtype=torch.bool)
        added = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, float("-inf"))
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
            added = added + mask
        return func(attn_mask=added, **kwargs)


def text_and_image(name: str, call: dict[str, Any]) -> tuple[list[int], int]:
    sample = call.get("hidden_states")
    family = HOSTS[name].family
    if family == "Lumina2Pipeline":
        return call["encoder_attention_mask"].sum(1).tolist(), sample[0, 0].numel() // 4
    text = call.get("encoder_hidden_states")
    length = [0] if text is None else [text.shape[1]]
    if family in ("FluxPipeline", "QwenImagePipeline"):
        # with the tokens of pictures that the pipeline puts behind those that it denoises
        return length, sample.shape[1]
    if family == "CogVideoXPipeline":
        return length, sample.shape[1] * sample[0, 0, 0].numel() // 4
    if family == "HunyuanVideoPipeline" or name.startswith("StableDiffusion3"):
        return length, sample[0, 0].numel() // 4
    return [0], 0


def _linear_identity(attn: Any) -> Any:
    """Sana's linear attention with V in place of its result."""

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))

    return forward


@contextlib.contextmanager
def slow_pag(
    pipe: Any,
    name: str,
    attentions: list[Any],
    pag_scale: Any,
    cfg_scale: float,
    fresh: Any = lambda index, latents: True,
) -> Any:
    """``pipe`` with PAG on ``attentions``: a forward of its own for the perturbed branch.

    ``pag_scale`` is a number, or a function of the step; ``fresh`` says in which steps there is a
    perturbed branch, whose difference the others use again.
    """
    spec = HOSTS[name]
    if spec.swept is not None:
        from sweep.reference import slow_pag as swept

        cfg = bool(spec.cfg) and cfg_scale > spec.swept.scales[1]
        with swept([pipe.transformer], attentions, spec.swept, cfg, pag_scale):
            yield pipe
        return
    batched = not spec.apart
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    own, passes, held = model.forward, [0], [None]

    def forward(*args: Any, **kwargs: Any) -> Any:
        parameters = list(inspect_parameters(model))
        call = {**dict(zip(parameters, args, strict=False)), **kwargs}
        # the model takes residuals of adapters from their list, one by one
        out = own(**{k: list(v) if isinstance(v, list) else v for k, v in call.items()})
        both = batched and cfg_scale > 1
        index = passes[0]
        passes[0] += 1
        if not batched and cfg_scale > 1:
            if index % 2:
                return out  # the uncond pass
            index //= 2
        rows = call["sample" if "sample" in call else "hidden_states"].shape[0]
        frames = call["sample"].shape[2] if "sample" in call and call["sample"].ndim == 5 else 1
        place = len(spec.rows), spec.rows.index("cond")
        cond = {k: rows_of(k, v, rows, frames, *place) for k, v in call.items()} if both else call
        lengths, image = text_and_image(name, cond)
        scale = pag_scale(index) if callable(pag_scale) else pag_scale
        prediction, g = out[0], cfg_scale if cfg_scale > 1 else 1.0
        slabs = list(prediction.chunk(place[0] if both else 1))
        cond_out = slabs[place[1] if both else 0]
        if fresh(index, cond["sample" if "sample" in cond else "hidden_states"]):
            with perturbing(attentions, spec.text, lengths, image):
                held[0] = cond_out - own(**cond)[0]
        slabs[place[1] if both else 0] = cond_out + scale / g * held[0]
        guided = torch.cat(slabs)
        return (guided,) if isinstance(out, tuple) else type(out)(sample=guided)

    model.forward = forward
    try:
        yield pipe
    finally:
        del model.forward


def inspect_parameters(model: Any) -> Any:
    return list(inspect.signature(inspect.unwrap(type(model).forward)).parameters)[1:]


def rows_of(key: str, value: Any, rows: int, frames: int, slabs: int, place: int) -> Any:
    """Of every tensor of the batch the slab at ``place``."""
    if key in ("image_rotary_emb", "img_ids", "txt_ids"):
        return value
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] in (rows, rows * frames):
        return value.chunk(slabs)[place]
    if isinstance(value, list | tuple):
        return type(value)(rows_of("", x, rows, frames, slabs, place) for x in value)
    if isinstance(value, dict):
        return {k: rows_of(k, x, rows, frames, slabs, place) for k, x in value.items()}
    return value


@contextlib.contextmanager
def perturbing(attentions: list[Any], text: str, lengths: list[int], image: int) -> Any:
    undo = []
    for attn in attentions:
        if "Linear" in type(attn.processor).__name__:
            attn.forward = _linear_identity(attn)
            undo.append(lambda attn=attn: vars(attn).pop("forward"))
            continue
        # SD3.5's second attention has no text
        mode = _Identity(text, lengths, image)

        def before(module: Any, args: Any, kwargs: Any, mode: Any = mode) -> None:
            mode.__enter__()

        def after(module: Any, args: Any, out: Any, mode: Any = mode) -> None:
            mode.__exit__(None, None, None)

        undo.append(attn.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.append(attn.register_forward_hook(after).remove)
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
