"""``HiDreamImageTransformer2DModel``: HiDream-I1, blocks with a mixture of experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..processors import PerturbedHiDreamAttention
from ..sharing.dit_plan import plan_dit
from ..sharing.layout import IMAGE, IMAGE_THEN_TEXT, TEXT, Layout, Stream
from .description import Checkpoint, ModelDescription
from .tensors import Latent, NewTensors, patches

_LAYOUT = Layout(
    ("double_stream_blocks", "single_stream_blocks"),
    ("attn1",),
    # between two blocks the text of an encoder's next layer takes the place of the last one's
    whole_between=True,
    inner="block",
)
_LLAMA = "encoder_hidden_states_llama3"  # [layers of the encoder, rows, tokens, channels]
_TEXT_TOKENS, _ENCODER_LAYERS = 128, 32
_I1: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": [64, 32, 32],
    "llama_layers": [*range(32), *[31] * 16],
}


def _inputs(model: Any, new: NewTensors, rows: int, latent: Latent) -> dict[str, Any]:
    config = model.config
    t5, llama = config.caption_channels[:2]
    layers = max(_ENCODER_LAYERS, 1 + max(config.llama_layers))
    return {
        "hidden_states": new(rows, config.in_channels, *latent[1:]),
        "timesteps": new(rows),
        "encoder_hidden_states_t5": new(rows, _TEXT_TOKENS, t5),
        _LLAMA: new(layers, rows, _TEXT_TOKENS, llama),
        "pooled_embeds": new(rows, config.text_emb_dim),
    }


def _sequence(model: Any, call: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    latents, llama = call["hidden_states"], call[_LLAMA]
    if latents.ndim == 3:
        image = latents.shape[1]
    elif latents.shape[-2] == latents.shape[-1]:
        image = patches(model, (1, *latents.shape[-2:]))
    else:  # as many as the largest picture has, which the model's own attention sees as well
        image = model.max_seq
    each = (llama[0] if isinstance(llama, list) else llama).shape[-2]
    # of the one encoder, of the other's last layer, and of its layer that belongs to the block
    return (call["encoder_hidden_states_t5"].shape[1] + 2 * each,), image


def _countable(model: Any) -> None:
    model.patchify = partial(_with_known_sizes, model, model.patchify)
    for module in model.modules():
        if type(module).__name__ == "MOEFeedForwardSwiGLU":
            module.moe_infer = partial(_as_many_experts, module)


def _with_known_sizes(model: Any, own: Any, latents: torch.Tensor) -> tuple[Any, ...]:
    """``patchify``, with sizes in numbers where they are in a tensor."""
    patch = model.config.patch_size
    tokens, mask, _, ids = own(latents)
    return tokens, mask, [tuple(n // patch for n in latents.shape[-2:])] * len(latents), ids


def _as_many_experts(module: Any, x: torch.Tensor, chosen: Any, weights: Any) -> torch.Tensor:
    """Every token through as many experts, whichever they are: all of them cost the same."""
    tokens = x.repeat_interleave(module.num_activated_experts, 0)
    made: torch.Tensor = module.experts[0](tokens)
    return made[: len(x)]


_FUSABLE = frozenset({"HiDreamAttnProcessor"})

DESCRIPTION = ModelDescription(
    "HiDreamImageTransformer2DModel",
    PerturbedHiDreamAttention,
    partial(plan_dit, layout=_LAYOUT),
    _inputs,
    blocks={
        "HiDreamImageTransformerBlock": IMAGE_THEN_TEXT,
        "HiDreamImageSingleTransformerBlock": (Stream("hidden_states", (IMAGE, TEXT)),),
    },
    layout=_LAYOUT,
    replaces=_FUSABLE,
    fusable_processors=_FUSABLE,
    sequence=_sequence,
    rows_second=(_LLAMA,),
    countable=_countable,
    checkpoints=(Checkpoint("HiDreamImagePipeline", "HiDream-I1", _I1),),
)
