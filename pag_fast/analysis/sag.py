"""What a pipeline of Self-Attention Guidance runs, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..config import PatchConfig
from ..fusion import Fusion
from ..models.registry import fusable_processors, has_compiled, uncompiled
from ..sharing.conditioning_cache import invariant_modules
from ..sharing.plan import is_compiled
from .explanation import Explanation, ModelCall

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"


def explain_sag(pipe: Any, *, size: Mapping[str, int]) -> Explanation:
    """The answer of :func:`pag_fast.explain` for ``StableDiffusionSAGPipeline``.

    FLOPs are not predicted: they are stock's but for text keys and values.
    """
    found = getattr(pipe, "_pag_fast", None)
    config = PatchConfig() if found is None else found.config
    model = uncompiled(pipe.unet)
    compiled = has_compiled(pipe.unet) or is_compiled(model)
    eager = not (compiled or model.training)
    side = (model.config.get("sample_size") or 64) * pipe.vae_scale_factor
    keeps = config.cache_conditioning and eager
    return Explanation(
        pipeline=type(pipe).__name__,
        denoiser=type(model).__name__,
        is_patched=found is not None,
        backend=config.backend,
        layers=(),
        fork=None,
        tree=tuple(_passes(keeps)),
        sites=(),
        calls=tuple(ModelCall(type(model).__name__, cfg, 3 if cfg else 2, rows) for cfg, rows in
                    ((True, "2, then 1"), (False, "1, then 1"))),
        flops=(),
        size=(size.get("height", side), size.get("width", side)),
        schedule="",
        steps={} if found is None else dict(found.steps),
        fallbacks={} if found is None else dict(found.fallbacks),
        once=tuple(invariant_modules(model)) if keeps else (),
        launches=tuple(_launches(model, config)) if eager else (),
        notes=(f"Self-Attention Guidance blurs what {ATTENTION} looks at; "
               "how strongly it guides is the call's sag_scale",),
    )  # fmt: skip


def _passes(keeps: bool) -> Iterator[str]:
    yield "guided pass: uncond | cond; CFG off: cond"
    yield "degraded pass: the latents of uncond (CFG off: cond), blurred where attention is"
    if keeps:
        yield "the degraded pass takes text keys and values and the timestep from the guided pass"


def _launches(model: Any, config: PatchConfig) -> Iterator[str]:
    name = type(model).__name__
    yield f"{name}: fused attention in {ATTENTION}, no map stored"
    if config.fewer_launches:
        fusion = Fusion(model, fusable=fusable_processors(model))
        yield from (f"{name}: {line}" for line in fusion.summary())
