"""``degrade_latents``: the op against fp64, the reference against diffusers' pipeline."""

from __future__ import annotations

import diffusers
import pytest
import torch
from numerics import assert_close_as_torch, relative
from torch.utils.flop_counter import FlopCounterMode

from pag_fast import ops
from pag_fast.ops import reference
from pag_fast.ops.degrade_latents import torch_degrade_latents
from pag_fast.sag.schedule import NoiseSchedule

# batch, channels, height, width, map height, map width
SHAPES = [(1, 4, 8, 8, 2, 2), (2, 4, 32, 32, 8, 8), (3, 3, 20, 31, 3, 4), (1, 4, 5, 9, 5, 9)]
WEIGHTS = {"clean": (1.3, -0.4), "noise": (0.2, 0.7)}


def _arguments(shape, dtype):
    batch, channels, height, width, *map_size = shape
    sample, output = torch.randn(2, batch, channels, height, width, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    received = 2 * torch.rand(batch, map_size[0] * map_size[1], dtype=torch.float64)
    blur = reference.gaussian_kernel(channels, dtype=wide)
    return [sample, output, received.to(wide), blur], {"map_size": tuple(map_size), **WEIGHTS}


def _truth(tensors, rest):
    return reference.degrade_latents(*(x.double() for x in tensors), **rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_fp64(shape, dtype):
    tensors, rest = _arguments(shape, dtype)
    out = ops.degrade_latents(*tensors, **rest)
    assert out.dtype == dtype
    assert_close_as_torch(out, reference.degrade_latents(*tensors, **rest), _truth(tensors, rest))


def test_channels_last_model_outputs():
    tensors, rest = _arguments(SHAPES[2], torch.float32)
    expected = ops.degrade_latents(*tensors, **rest)
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    out = ops.degrade_latents(*tensors, **rest)
    assert out.is_contiguous()
    assert torch.allclose(out, expected, atol=1e-6)


SCHEDULERS = {
    "DDIM": lambda kind: diffusers.DDIMScheduler(prediction_type=kind),
    "DDPM": lambda kind: diffusers.DDPMScheduler(prediction_type=kind),
    "DPM": lambda kind: diffusers.DPMSolverMultistepScheduler(prediction_type=kind),
    "UniPC": lambda kind: diffusers.UniPCMultistepScheduler(prediction_type=kind),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_reference_equals_diffusers(scheduler, kind):
    """``sag_masking(pred_x0, …, pred_epsilon)`` of the pipeline, in every step, in fp64."""
    cls = diffusers.StableDiffusionSAGPipeline
    pipe = cls.__new__(cls)
    made = SCHEDULERS[scheduler](kind)
    made.set_timesteps(4)
    made.alphas_cumprod = made.alphas_cumprod.double()
    if hasattr(made, "sigmas"):
        made.sigmas = made.sigmas.double()
    config = type("Config", (), {"attention_head_dim": 1})
    object.__setattr__(pipe, "scheduler", made)
    object.__setattr__(pipe, "unet", type("UNet", (), {"config": config}))
    tensors, rest = _arguments(SHAPES[2], torch.float64)
    sample, output, received, blur = tensors
    # a map of one head whose columns add up to what is received
    attention_map = torch.zeros(3, 12, 12, dtype=torch.float64)
    attention_map[:, 5] = received
    # diffusers makes its blur in the default dtype
    torch.set_default_dtype(torch.float64)
    try:
        for t in made.timesteps:
            original = pipe.pred_x0(sample, output, t)
            noise = pipe.pred_epsilon(sample, output, t)
            expected = pipe.sag_masking(original, attention_map, rest["map_size"], t, noise)
            clean, noise = NoiseSchedule(pipe).weights(t)
            weights = {"map_size": rest["map_size"], "clean": clean, "noise": noise}
            assert relative(reference.degrade_latents(*tensors, **weights), expected) < 1e-10
            assert relative(ops.degrade_latents(*tensors, **weights), expected) < 1e-10
            untouched = reference.degrade_latents(sample, output, 0 * received, blur, **weights)
            assert relative(untouched, expected) > 1e-3
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_schedulers_tables_stay_where_they_are(monkeypatch):
    """``add_noise`` moves tables to the device of what it is given: it is called on a copy."""
    scheduler, asked = diffusers.DDIMScheduler(), []
    scheduler.set_timesteps(4)
    run = diffusers.DDIMScheduler.add_noise
    monkeypatch.setattr(
        diffusers.DDIMScheduler,
        "add_noise",
        lambda self, *args: asked.append(self) or run(self, *args),
    )
    before = dict(vars(scheduler))
    pipe = type("Pipeline", (), {"scheduler": scheduler})()
    NoiseSchedule(pipe).weights(scheduler.timesteps[1])
    assert asked and all(one is not scheduler for one in asked)
    after = vars(scheduler)
    assert after.keys() == before.keys()
    assert all(after[name] is value for name, value in before.items())


def test_unknown_prediction_type():
    scheduler = diffusers.DDIMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="flow")
    pipe = type("Pipeline", (), {"scheduler": scheduler})()
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        NoiseSchedule(pipe).weights(torch.tensor(5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_work_hides_from_the_flop_counter(shape):
    tensors, rest = _arguments(shape, torch.float32)
    with FlopCounterMode(display=False) as outside:
        ops.degrade_latents(*(x.to("meta") for x in tensors), **rest)
    with FlopCounterMode(display=False) as inside:
        torch_degrade_latents(*tensors, **rest)
    assert outside.get_total_flops() == inside.get_total_flops() > 0


def test_opcheck():
    tensors, rest = _arguments(SHAPES[2], torch.float32)
    numbers = (*rest["map_size"], *WEIGHTS["clean"], *WEIGHTS["noise"])
    op = torch.ops.pag_fast.degrade_latents.default
    torch.library.opcheck(op, (*tensors, *numbers, "torch"))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (1, 4, 8, 9), "latents and model output of one shape"),
        (2, (1, 5), r"received must have shape \(1, 4\), batch by tokens of a 2 × 2 map"),
        (3, (3, 1, 9, 9), r"blur must have shape \(4, 1, K, K\) with K odd"),
        (3, (4, 1, 8, 8), r"K odd; got \(4, 1, 8, 8\)"),
        (3, (4, 1, 17, 17), "too small for a blur of 17 × 17"),
    ],
)
def test_bad_arguments(index, shape, message):
    tensors, rest = _arguments(SHAPES[0], torch.float32)
    tensors[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        ops.degrade_latents(*tensors, **rest)
