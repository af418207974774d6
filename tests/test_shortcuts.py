"""Diffusers with ``shortcuts.py`` and without it: the same answers, and hooks are found."""

from __future__ import annotations

import copy

import older
import pytest
import tiny
import tiny_hosts
import torch
from diffusers.hooks import group_offloading
from diffusers.models import modeling_utils
from shortcuts import is_hooked


def _both(function, *args):
    """What the shorter way and diffusers' own return."""
    return function(*args), function.__wrapped__(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", "SanaPAGPipeline", "WanPipeline"])
def test_the_dtype_of_a_model(name, dtype):
    """Parts of Wan stay in fp32."""
    made = tiny_hosts if name in tiny_hosts.HOSTS else tiny
    model = getattr(made.build(name, dtype=dtype), "unet" if "Stable" in name else "transformer")
    for kept in model._keep_in_fp32_modules or ():
        for part, parameter in model.named_parameters():
            if kept in part:
                parameter.data = parameter.data.float()
    assert _both(modeling_utils.get_parameter_dtype, model) == (dtype, dtype)
    assert not is_hooked(model)


def test_what_has_no_numbers():
    """Buffers decide where there are no parameters, and integers where there is nothing else."""
    model = torch.nn.Module()
    model.register_buffer("table", torch.zeros(2, dtype=torch.float16))
    assert _both(modeling_utils.get_parameter_dtype, model) == (torch.float16, torch.float16)
    model = torch.nn.Module()
    model.register_parameter(
        "codes", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    )
    assert _both(modeling_utils.get_parameter_dtype, model) == (torch.int8, torch.int8)


def test_layerwise_casting_is_found():
    model = tiny.sd3()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    copied = copy.deepcopy(model)
    for hooked in (model, copied):
        assert is_hooked(hooked)
        found, own = _both(modeling_utils.get_parameter_dtype, hooked)
        assert found == own == torch.float32


@older.newest(older.GROUP_OFFLOADING)
def test_offloading_by_group_is_found():
    model = tiny.sd3()
    get = group_offloading._get_top_level_group_offload_hook
    assert _both(get, model) == (None, None)
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_type="leaf_level")
    found, own = _both(get, model)
    assert found is own is not None
    assert group_offloading._get_group_onload_device(model) == device
