"""One denoising step of each family, and of the model that ships with the package."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.cases import CPU, GPU, emoji_call, emoji_pipeline, real_call, real_pipeline
from pag_fast import PatchConfig
from pag_fast.tools.bench.variants import compare_outputs, variants

CASES = GPU if torch.cuda.is_available() else CPU


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def measure(compare, compiled, graphs, device):
    """A function that checks the variants of a pipeline against each other, then times a step."""

    def run(pipe, call, layers, *, case, rounds, **settings):
        ways = variants(pipe, PatchConfig(layers=list(layers)), compiled=compiled, graphs=graphs)

        def latents(name):
            output = ways[name](**call)
            return output.frames if hasattr(output, "frames") else output.images

        outputs = {name: latents(name) for name in ways}
        assert torch.isfinite(outputs["stock"]).all()
        # few steps leave most of the noise: only what they change counts
        change = outputs["stock"] - call["latents"]
        peak = (change.max() - change.min()).item()
        psnrs = compare_outputs(outputs, peak=peak)
        for name in psnrs.keys() & {"patched", "patched graphs"}:
            assert psnrs[name] > (80 if device == "cpu" else 30), name
        # PAG changes the result far more than the patch does
        without = compare_outputs({**outputs, "patched": outputs["no PAG"]}, peak=peak)
        assert psnrs["patched"] > without["patched"] + (20 if device == "cpu" else 3)
        steps = call["num_inference_steps"]
        settings |= {"latents": list(call["latents"].shape), "layers": list(layers), "steps": steps}
        compare(
            {name: partial(latents, name) for name in ways},
            suite="step",
            case=case,
            settings=settings,
            dtype=str(pipe.dtype).removeprefix("torch."),
            rounds=rounds,
            psnrs=psnrs,
            warm=True,
            per_call=steps,
        )

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_step(case, measure, device, pytestconfig):
    case = replace(case, steps=pytestconfig.getoption("--steps") or case.steps)
    pipe = real_pipeline(case, device)
    call = real_call(case, pipe)
    measure(
        pipe,
        call,
        case.layers,
        case=case.name,
        rounds=case.rounds,
        pipeline=case.pipeline,
        config=case.config,
    )


@pytest.mark.parametrize("case", ["emoji batch 8", "emoji batch 8, CFG off"])
def test_emoji(case, measure, device):
    pipe = emoji_pipeline(device)
    call = emoji_call(pipe, cfg="off" not in case)
    measure(pipe, call, pipe.pag_applied_layers, case=case, rounds=10, pipeline="emoji")
