"""The tiny pipelines themselves, unpatched: a parity test is worth what its model can show."""

from __future__ import annotations

import functools
import itertools
import re

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from numerics import observing, relative
from tiny import FAMILIES, PIPELINES, build, call_kwargs, every, latents

NAMES = pytest.mark.parametrize("name", PIPELINES)

# set_pag_applied_layers gives every pipeline the plain identity processors, wrong for these
_OWN_PROCESSORS = ("StableDiffusion3", "HunyuanDiT", "Sana")


@functools.lru_cache(maxsize=1)
def _pipe(name):
    return build(name)


def _run(name, pipe, **kwargs):
    out = latents(pipe, call_kwargs(name, pipe, **kwargs))
    assert out.isfinite().all()
    return out


def _modules(pipe):
    return {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}


def test_every_pag_pipeline_is_here():
    exported = {name for name in dir(diffusers) if re.fullmatch(r"\w+PAG\w*Pipeline", name)}
    assert set(PIPELINES) == exported
    assert len(PIPELINES) == 17


@NAMES
def test_no_parameter_is_zero(name):
    """A module that starts as a no-op would hide what happens before it."""
    zero = [
        f"{part}.{key}"
        for part, module in _modules(_pipe(name)).items()
        for key, parameter in module.named_parameters()
        if not parameter.any()
    ]
    assert not zero


@NAMES
def test_same_seed_same_weights(name):
    one, two, other = build(name), build(name), build(name, seed=1)
    for part, module in _modules(one).items():
        values = module.state_dict()
        twin = getattr(two, part).state_dict()
        assert all(torch.equal(value, twin[key]) for key, value in values.items())
        theirs = getattr(other, part).state_dict()
        assert any(not torch.equal(value, theirs[key]) for key, value in values.items())


@NAMES
def test_layer_sets(name):
    pipe, spec = _pipe(name), PIPELINES[name]
    denoiser = getattr(pipe, spec.denoiser)
    executed = []
    handles = [
        module.register_forward_pre_hook(observing(lambda *_, key=key: executed.append(key)))
        for key, module in denoiser.named_modules()
        if isinstance(module, Attention) and not module.is_cross_attention
    ]
    _run(name, pipe, steps=1, pag_scale=0.0)
    for handle in handles:
        handle.remove()
    assert len(executed) == len(handles)  # each self-attention ran, once

    def matched(layers):
        groups = [[key for key in executed if re.search(layer, key)] for layer in layers]
        assert all(groups), "a layer name matches nothing"
        return [key for key in executed if any(key in group for group in groups)]

    sets = {key: matched(layers) for key, layers in spec.layers.items()}
    assert set(sets) == {"default", "middle", "last", "all"}
    assert spec.layers["default"] == pipe.pag_applied_layers
    assert sets["all"] == executed
    assert sets["last"] == executed[-len(sets["last"]) :]
    assert executed[0] not in sets["middle"]
    assert executed[-1] not in sets["middle"]


@pytest.mark.parametrize(("name", "cfg", "batch"), every([(True, 1)], [(False, 2)]))
def test_runs(name, cfg, batch):
    pipe = _pipe(name)
    out = _run(name, pipe, cfg=cfg, batch=batch)
    assert out.shape[0] == batch
    assert relative(out, _run(name, pipe, cfg=cfg, batch=batch, pag_scale=0.0)) > 1e-3
    if cfg:
        assert torch.equal(out, _run(name, pipe)), "calls are not repeatable"
        assert relative(out, _run(name, pipe, cfg=False)) > 1e-3


# of the others test_parity.py shows as much as it uses
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_set_gives_its_own_picture(name):
    pictures = {"none": _run(name, _pipe(name), pag_scale=0.0)}
    for key, layers in PIPELINES[name].layers.items():
        if name.startswith(_OWN_PROCESSORS):
            pipe = build(name, pag_applied_layers=layers)
        else:
            pipe = build(name)
            pipe.set_pag_applied_layers(layers)
        pictures[key] = _run(name, pipe)
    for one, two in itertools.combinations(pictures, 2):
        assert relative(pictures[one], pictures[two]) > 1e-3, f"{one} equals {two}"


@pytest.mark.parametrize(("name", "dtype"), every([(torch.float32,)], [(torch.bfloat16,)]), ids=str)
def test_three_steps_stay_sane(name, dtype):
    out = _run(name, build(name, dtype=dtype), steps=3)
    assert 0.1 < out.float().std() < 100


@NAMES
def test_decodes(name):
    out = _run(name, _pipe(name), steps=1, output_type="pt")
    assert out.shape[-3] == 3
    assert 0 <= out.min() < out.max() <= 1


@pytest.mark.parametrize("name", [n for n, spec in PIPELINES.items() if spec.controlnet])
def test_controlnet_matters(name):
    pipe = _pipe(name)
    off = _run(name, pipe, controlnet_conditioning_scale=0.0)
    assert relative(_run(name, pipe), off) > 1e-3


_VARIANTS = [
    *((name, {"controlnets": 2}, {}) for name, spec in PIPELINES.items() if spec.controlnet),
    *((name, {"in_channels": 9}, {}) for name, spec in PIPELINES.items() if spec.mask),
    ("StableDiffusionPAGPipeline", {"time_cond_proj_dim": 8}, {}),
    ("StableDiffusionXLPAGPipeline", {"layers_per_block": 2}, {}),
    ("AnimateDiffPAGPipeline", {}, {"num_frames": 3}),
    # stock fails where a perturbed block has a second attention: block 4 has none
    ("StableDiffusion3PAGPipeline", {"sd35": True, "pag_applied_layers": [r"blocks\.4\."]}, {}),
    ("HunyuanDiTPAGPipeline", {"meta_size": True}, {}),
    ("SanaPAGPipeline", {"qk_norm": "rms_norm_across_heads"}, {}),
]


@pytest.mark.parametrize(
    ("name", "overrides", "extra"),
    _VARIANTS,
    ids=[f"{name}-{next(iter(overrides | extra))}" for name, overrides, extra in _VARIANTS],
)
def test_variants(name, overrides, extra):
    pipe = build(name, **overrides)
    without = _run(name, pipe, pag_scale=0.0, **extra)
    assert relative(_run(name, pipe, **extra), without) > 1e-3
