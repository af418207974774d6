"""Autocast: every patched pipeline runs in it, and errs as stock fused attention does."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative

import pag_fast
from pag_fast import ops
from pag_fast.ops.autocast import lowered

# of each denoiser one: what it rounds does not depend on the loop
CASES = [(tiny, name) for name in tiny.FAMILIES]
CASES += [(tiny_hosts, n) for n, spec in tiny_hosts.HOSTS.items() if spec.brings_a_model]


def _layers(module, name):
    return (module.PIPELINES if module is tiny else module.HOSTS)[name].layers["middle"]


def _latents(module, name, autocast, **options):
    pipe = module.build(name)
    pag_fast.patch(pipe, _layers(module, name), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return module.latents(pipe, module.call_kwargs(name, pipe))


@pytest.mark.parametrize(("module", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_every_denoiser(module, name):
    """Shared and unshared differ by rounding alone, which is that of autocast itself."""
    exact = _latents(module, name, False)
    shared = _latents(module, name, True)
    apart = _latents(module, name, True, share_branches=False, cache_conditioning=False)
    rounding = relative(apart, exact)
    assert 0 < rounding < 0.2
    assert relative(shared, apart) < 2 * rounding + 1e-3


@pytest.mark.parametrize(
    ("name", "perturbation"),
    # packed latents have no grid to blur a map on
    [
        *(("QwenImagePipeline", how) for how in ("soft", "blur", "noise")),
        *(("Lumina2Pipeline", how) for how in ("soft", "blur", "blur_map", "noise")),
    ],
)
def test_perturbations_of_normalised_queries(name, perturbation):
    exact = _latents(tiny_hosts, name, False, perturbation=perturbation)
    assert relative(_latents(tiny_hosts, name, True, perturbation=perturbation), exact) < 0.2


def test_lowered_is_what_autocast_does():
    wide, half = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8).bfloat16()
    mask, whole = torch.ones(4, dtype=torch.bool), wide.double()
    assert lowered(wide, mask)[0] is wide
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lowered(wide, half, whole, mask, None)
        assert [x if x is None else x.dtype for x in found] == [
            torch.bfloat16, torch.bfloat16, torch.float64, torch.bool, None
        ]  # fmt: skip
        assert ops.received_attention(wide, half).dtype == torch.float32
