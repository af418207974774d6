"""Every family on the Triton backend: the same picture as stock.

In the interpreter on the CPU, and compiled on the device of ``PAG_FAST_TEST_DEVICE``.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import shallow
import torch
from launches import launches  # noqa: F401
from numerics import relative
from tiny import FAMILIES, PIPELINES, call_kwargs, latents
from tiny import build as build_on_cpu

import pag_fast

STEPS = 2
DEVICE = os.environ.get("PAG_FAST_TEST_DEVICE", "cpu")
ATTENTION = "_perturbed_attention_fwd_kernel"
COMBINE = "_combine_guidance_kernel"


@pytest.fixture(autouse=True)
def _no_default_device():
    """As users have it: a default device of CUDA would make schedulers' tables there."""
    before = torch.get_default_device()
    if before.type != "cpu":
        torch.set_default_device(None)
    yield
    if before.type != "cpu":
        torch.set_default_device(before)


def build(name, *, device=DEVICE, **options):
    return build_on_cpu(name, **options).to(device)


# each kind of denoiser with and without CFG, of one image and two; the PyTorch backend is tested
# with every pipeline and combination
CHOICES = [("default", False, 2), ("middle", True, 1)]
CASES = [(name, *choice) for name in FAMILIES for choice in CHOICES]
# a layer at the very beginning: of a UNet, one with several layers to an attention, a transformer
# with text. Motion modules have a sequence for every pixel: those in the middle, where there are
# few pixels, are among the defaults
UNET, XL, SD3 = (f"StableDiffusion{kind}PAGPipeline" for kind in ("", "XL", "3"))
CASES += [(name, "all", True, 1) for name in (UNET, XL, SD3)]


@pytest.mark.parametrize(("name", "layers", "cfg", "batch"), CASES)
def test_patched_equals_stock(name, layers, cfg, batch, launches):  # noqa: F811
    # of shallow models: the interpreter takes a second a layer
    if name == "AnimateDiffPAGPipeline":
        pipe = build(name, pag_applied_layers=PIPELINES[name].layers[layers])
    else:
        chosen = {**shallow.LAYERS[name], "all": ["attn"], "default": None}[layers]
        pipe = shallow.build(name, pag_applied_layers=chosen).to(DEVICE)
    stock = latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=cfg))
    assert launches == []
    pag_fast.patch(pipe, backend="triton")
    patched = latents(pipe, call_kwargs(name, pipe, batch=batch, cfg=cfg))
    assert relative(patched, stock) < 1e-5
    counted = Counter(launches)
    assert counted.pop(COMBINE) == STEPS
    counted.pop("_guidance_moments_kernel", 0)
    assert counted, "no attention kernel was launched"
    assert not pipe._pag_fast.fallbacks


def test_one_launch_per_layer_and_step(launches):  # noqa: F811
    pipe = build("StableDiffusionPAGPipeline", pag_applied_layers=["mid", "up_blocks.1"])
    pag_fast.patch(pipe, backend="triton")
    latents(pipe, call_kwargs("StableDiffusionPAGPipeline", pipe))
    perturbed = len(pag_fast.explain(pipe).layers)
    assert perturbed > 1
    assert Counter(launches) == {ATTENTION: STEPS * perturbed, COMBINE: STEPS}


def test_on_the_cpu_auto_means_pytorch(launches):  # noqa: F811
    pipe = build("StableDiffusionPAGPipeline", device="cpu")
    pag_fast.patch(pipe)
    latents(pipe, call_kwargs("StableDiffusionPAGPipeline", pipe))
    assert launches == []
    launches.append("none wanted")


def test_a_dtype_the_kernels_lack_is_refused(launches):  # noqa: F811
    pipe = build("StableDiffusionPAGPipeline", dtype=torch.float64)
    pag_fast.patch(pipe, backend="triton")
    with pytest.raises(ValueError, match=r"cannot run this call on .* in torch\.float64"):
        latents(pipe, call_kwargs("StableDiffusionPAGPipeline", pipe))
    launches.append("none wanted")


NOISE = "_noisy_attention_fwd_kernel"


@pytest.mark.parametrize(
    ("perturbation", "counts"),
    [
        ("soft", {ATTENTION: 2}),
        # behind the fork, one query in PyTorch
        ("blur", {ATTENTION: 1}),
        ("noise", {NOISE: 2}),
    ],
)
def test_other_perturbations(perturbation, counts, launches):  # noqa: F811
    """A layer at the fork and one behind it: the picture of the PyTorch backend."""
    name = "PixArtSigmaPAGPipeline"
    pipe = build(name)
    kwargs = {"perturbation": perturbation}
    pag_fast.patch(pipe, [2, 3], backend="torch", **kwargs)
    expected = latents(pipe, call_kwargs(name, pipe))
    assert launches == []
    pag_fast.patch(pipe, [2, 3], backend="triton", **kwargs)
    assert relative(latents(pipe, call_kwargs(name, pipe)), expected) < 1e-5
    counted = Counter(launches)
    assert counted.pop(COMBINE) == STEPS
    assert counted == {kernel: STEPS * count for kernel, count in counts.items()}


@pytest.mark.parametrize("perturbation", ["soft", "blur", "noise"])
def test_other_perturbations_of_joint_attention(perturbation, launches):  # noqa: F811
    """SD3, with two branches that begin in the same layer."""
    name = "StableDiffusion3PAGPipeline"
    pipe = build(name)
    branches = [pag_fast.Branch([2, 3], perturbation), pag_fast.Branch(2, "identity", 1.0)]
    made = []
    for backend in ("torch", "triton"):
        assert launches == []
        pag_fast.patch(pipe, branches=branches, backend=backend)
        made.append(latents(pipe, call_kwargs(name, pipe)))
    assert relative(made[1], made[0]) < 1e-5
    assert Counter(launches)[NOISE if perturbation == "noise" else ATTENTION] >= 2 * STEPS
