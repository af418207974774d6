"""Pipelines for the code of pages: what they load from the hub is a tiny one, which takes text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import tiny
import tiny_hosts

# what pages load, and the pipeline that stands in for it
HUB = {
    "stabilityai/stable-diffusion-xl-base-1.0": ("StableDiffusionXLPAGPipeline", {}),
    "stabilityai/stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline", {"num_layers": 14}),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", {}),
}


def stand_in(name: str, **overrides: Any) -> Any:
    """The tiny pipeline ``name``, on the CPU wherever it is sent.

    It takes any prompt in place of embeddings, and returns latents after two steps.
    """
    made = tiny_hosts if name in tiny_hosts.HOSTS else tiny
    pipe = made.build(name, **overrides)
    cls = type(pipe)

    class StandIn(cls):
        def __call__(self, prompt: str, **given: Any) -> Any:
            assert isinstance(prompt, str)
            return cls.__call__(self, **{**made.call_kwargs(name, self), **given})

        def to(self, *args: Any, **kwargs: Any) -> Any:
            return self if args == ("cuda",) else super().to(*args, **kwargs)

    StandIn.__name__, StandIn.__qualname__ = cls.__name__, cls.__qualname__
    pipe.__class__ = StandIn
    return pipe


def _load(cls: type, source: Any, **kwargs: Any) -> Any:
    name, overrides = HUB[source]
    pipe = stand_in(name, **overrides)
    assert cls.__name__ in (name, "AutoPipelineForText2Image"), f"{source} is no {cls.__name__}"
    return pipe


def _load_modular(cls: type, source: Any, **kwargs: Any) -> Any:
    from test_guiders_modular import _pipeline

    assert HUB[source][0] == "StableDiffusionXLPAGPipeline"
    return _pipeline("StableDiffusionXLAutoBlocks")[0]


@contextmanager
def hub() -> Iterator[None]:
    """Within it, ``from_pretrained`` of pipelines takes the names in ``HUB``, and folders."""
    whole = diffusers.DiffusionPipeline.__dict__["from_pretrained"]

    def load(cls: type, source: Any, **kwargs: Any) -> Any:
        if Path(source).is_dir():
            return whole.__get__(None, cls)(source, **kwargs)
        return _load(cls, source, **kwargs)

    with (
        mock.patch.object(diffusers.DiffusionPipeline, "from_pretrained", classmethod(load)),
        mock.patch.object(
            diffusers.AutoPipelineForText2Image, "from_pretrained", classmethod(_load)
        ),
        mock.patch.object(diffusers.ModularPipeline, "from_pretrained", classmethod(_load_modular)),
    ):
        yield
