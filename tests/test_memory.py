"""Peak memory of a call, from the allocator's own events."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import PIPELINES, build, call_kwargs, latents
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import pag_fast
from pag_fast.fusion.projections import TimeProjections
from pag_fast.runtime.installation import Installation

NAMES = [
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "AnimateDiffPAGPipeline",
    "StableDiffusion3PAGPipeline",
    "HunyuanDiTPAGPipeline",
    "PixArtSigmaPAGPipeline",
    "SanaPAGPipeline",
]

_UNET_AND_DIT = ["StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline"]


def peak(run, path) -> int:
    """Most bytes allocated at a time while ``run()`` runs, above what was allocated before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(path))
    events = [
        event
        for event in json.loads(path.read_text())["traceEvents"]
        if event.get("name") == "[memory]"
    ]
    events.sort(key=lambda event: event["ts"])
    # what was allocated before may be freed meanwhile, by the garbage collector for one: that would
    # hide as much of the peak
    living: dict[int, int] = {}
    now = highest = 0
    for event in events:
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        now -= living.pop(address, 0)
        if size > 0:
            living[address] = size
            now += size
            highest = max(highest, now)
    assert highest > 0
    return highest


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, layers) for name in NAMES for layers in ("default", "all")),
        *((name, layers) for name in _UNET_AND_DIT for layers in ("middle", "last")),
    ],
)
def test_peak_is_not_above_stock(name, layers, tmp_path):
    # large enough for activations to matter beside bookkeeping
    larger = {"StableDiffusion3PAGPipeline": {"pos_embed_max_size": 32}}
    pipe = build(name, pag_applied_layers=PIPELINES[name].layers[layers], **larger.get(name, {}))
    side = 64 if name.startswith("Sana") else 48  # its pictures are made of 32 × 32
    # HunyuanDiT's rotary embedding takes the factor 8 of its own VAE for granted
    size = {} if name.startswith("Hunyuan") else {"height": side, "width": side}
    if PIPELINES[name].controlnet:
        size["image"] = torch.rand(1, 3, side, side)

    def run():
        latents(pipe, call_kwargs(name, pipe, steps=2, **size))

    stock = peak(run, tmp_path / "stock.json")
    with pag_fast.patched(pipe, cache_conditioning=False, fewer_launches=False):
        assert peak(run, tmp_path / "patched.json") <= stock
    with pag_fast.patched(pipe):
        cached = peak(run, tmp_path / "cached.json")
        assert cached <= stock + kept_bytes(pipe, run)


def kept_bytes(pipe, run) -> int:
    """Size of what is kept from step to step, and of all projections of the time embedding.

    Nothing at real sizes, but not at these.
    """
    sizes, left = [], Installation.left

    def measured(installed):
        session = pipe._pag_fast.session
        if session is None or not hasattr(session, "_kept"):
            return left(installed)
        caches = [c for c in (session._kept, session.controlnets.kept) if c is not None]
        kept = [invariant for cache in caches for invariant in cache.invariants]
        outputs = [output for invariant in kept for output in invariant.kept.values()]
        tensors = [x for output in outputs for x in tree_leaves(output.value)]
        fusions = [installed.fusion, *[f for _, f in pipe._pag_fast._fusions.values()]]
        groups = [group for f in fusions if f is not None for group in f._used]
        times = [group for group in groups if isinstance(group, TimeProjections)]
        held = [x for group in times for x in (group._x, *group._wholes.values())]
        tensors += [x for x in held if x is not None]
        sizes.append(sum(x.nbytes for x in tensors))
        return left(installed)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Installation, "left", measured)
        run()
    assert max(sizes) > 0
    return max(sizes)
