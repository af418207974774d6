"""Hosts that were in the sweep before somebody has described them: built and called as there."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from tiny_hosts.spec import HostSpec

# files of the sweep, and of each the pipelines by the first with their denoiser
_FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "images": {
        "ChromaPipeline": ("ChromaImg2ImgPipeline", "ChromaInpaintPipeline"),
        "CogView4Pipeline": ("CogView4ControlPipeline",),
        "Flux2Pipeline": (
            "Flux2KleinPipeline",
            "Flux2KleinInpaintPipeline",
            "Flux2KleinKVPipeline",
        ),
        "ZImagePipeline": ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
    },
    "single_images": {"Krea2Pipeline": ()},
    "videos": {"WanVACEPipeline": ()},
    "more_images": {"HiDreamImagePipeline": ()},
    "others": {"HunyuanVideo15Pipeline": ()},
}
DENOISERS = {
    "ChromaPipeline": "ChromaTransformer2DModel",
    "CogView4Pipeline": "CogView4Transformer2DModel",
    "Flux2Pipeline": "Flux2Transformer2DModel",
    "HiDreamImagePipeline": "HiDreamImageTransformer2DModel",
    "ZImagePipeline": "ZImageTransformer2DModel",
    "Krea2Pipeline": "Krea2Transformer2DModel",
    "WanVACEPipeline": "WanVACETransformer3DModel",
    "HunyuanVideo15Pipeline": "HunyuanVideo15Transformer3DModel",
}
_ALL = {
    "WanVACEPipeline": "attn1",
    "CogView4Pipeline": "attn1",
    "ZImagePipeline": r"^layers\.",
    "HiDreamImagePipeline": "attn1",
}


def _hosts() -> Any:
    for file, families in _FAMILIES.items():
        specs = {spec.name: spec for spec in import_module(f"sweep.{file}").SPECS}
        for first, others in families.items():
            for name in (first, *others):
                spec, every = specs[name], _ALL.get(first, r"blocks\.\d+\.attn")
                yield HostSpec(
                    name,
                    {"middle": spec.layers, "all": [every]},
                    base=first if name != first else "",
                    cfg=spec.cfg,
                    apart=spec.apart,
                    rows=spec.rows,
                    batches=tuple(sorted({1, spec.batches[0]})),
                    swept=spec,
                )


SPECS = list(_hosts())


def build(spec: HostSpec, **overrides: Any) -> Any:
    """The tiny pipeline; ``overrides`` go to the denoiser's configuration."""
    from sweep.spec import build as made

    own = spec.swept
    if overrides:

        def parts() -> dict[str, Any]:
            found = spec.swept.parts()
            config = {**found["transformer"].config, **overrides}
            return {**found, "transformer": type(found["transformer"]).from_config(config)}

        own = replace(own, parts=parts)
    return made(own)


def call_kwargs(spec: HostSpec, pipe: Any, batch: int, cfg: bool, steps: int) -> dict[str, Any]:
    """Arguments of a call; without CFG one prompt makes several pictures."""
    from sweep.spec import call_kwargs as made

    copies = spec.swept.cases[-1][2] if batch == 1 and not cfg else 1
    cfg = cfg and bool(spec.cfg)
    if spec.swept.before is not None:
        spec.swept.before(pipe, cfg)
    return made(spec.swept, cfg, batch, copies, steps)
