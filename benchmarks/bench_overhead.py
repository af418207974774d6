"""What patching costs in Python: a step of tiny pipelines, and what is done once in a forward.

Tiny pipelines save nothing, so what a patched step takes longer than stock's is Python's time. The
parts are timed on SDXL's UNet with all of its modules, in a width that costs no memory: each row is
one of what a forward does once. Times are CPU time of one thread. ``python -m benchmarks.overhead``
counts calls instead.
"""

from __future__ import annotations

import copy
import time
from itertools import count

import pytest
import tiny
import tiny_hosts
import torch

import pag_fast
from benchmarks.overhead import PIPELINES
from pag_fast import PatchConfig
from pag_fast.analysis.published import CARDS
from pag_fast.runtime.compatibility import Compatibility
from pag_fast.runtime.installation import Installation

STEPS, REPEATS = 10, 100
_NARROW = {
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 256 + 32,
}
# at most so many milliseconds each, on one CPU core
PARTS = {"on and off": 0.1, "kept modules": 0.2, "what others put on": 0.3, "joined weights": None}


def cpu_seconds(call, device):
    """CPU time of this thread: other work on the machine makes it wait, which is not counted."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PIPELINES)
def test_step(name, compare):
    made = tiny if name in tiny.PIPELINES else tiny_hosts
    stock = made.build(name)
    layers = None if made is tiny else tiny_hosts.HOSTS[name].layers["middle"]
    patched = copy.copy(stock)
    patched.scheduler = copy.copy(stock.scheduler)
    pag_fast.patch(patched, layers)
    calls = {
        variant: lambda pipe=pipe: pipe(**made.call_kwargs(name, pipe, steps=STEPS))
        for variant, pipe in (("stock", stock), ("patched", patched))
    }
    compare(
        calls,
        suite="overhead",
        case=f"a step of a tiny {name}",
        settings={"pipeline": name, "steps": STEPS, "threads": 1},
        dtype="float32",
        rounds=20,
        clock=cpu_seconds,
        per_call=STEPS,
    )


@pytest.fixture(scope="module")
def parts():
    """What a patched forward of SDXL's UNet does once, by name, and how many things it looks at."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {**CARDS["StableDiffusionXLPAGPipeline"].config, **_NARROW}
    unet = tiny.randomise(UNet2DConditionModel(**config))
    with torch.no_grad():
        installed = Installation(unet, ["mid"], PatchConfig(layers=["mid"]), eager=True)
        patch = installed.patch(fused=True)
    weights = next(iter(installed.invariants.values()))._weights
    others, steps = Compatibility(), count(1)
    modules = sum(1 for _ in unet.modules())
    things = {
        "on and off": len(patch.entries),
        "kept modules": len(installed.invariants),
        "what others put on": modules,
        "joined weights": sum(group.packed.joined for group in installed.fusion.groups),
    }
    calls = {
        "on and off": lambda: patch.off(patch.on()),
        "kept modules": lambda: weights.look(next(steps)),
        "what others put on": lambda: others.look(unet),
        "joined weights": installed.fusion.refresh,
    }
    return calls, things


@pytest.mark.parametrize("part", PARTS)
def test_part_of_a_forward(part, parts, compare):
    calls, things = parts
    call = calls[part]

    @torch.no_grad()
    def repeated():
        for _ in range(REPEATS):
            call()

    compare(
        {"patched": repeated},
        suite="overhead",
        case=f"SDXL's modules: {part}",
        settings={"things": things[part], "at most, ms": PARTS[part], "threads": 1},
        dtype="float32",
        rounds=30,
        clock=cpu_seconds,
        per_call=REPEATS,
    )
