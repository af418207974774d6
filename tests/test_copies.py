"""Copies of tiny pipelines are what building them anew would have made, and share nothing."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from copies import duplicate

BUILT = {"StableDiffusionXLControlNetPAGPipeline": tiny, "FluxImg2ImgPipeline": tiny_hosts}


def _modules(pipe):
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    return {(k, name): m for k, part in parts.items() for name, m in part.named_modules()}


def _tensors(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("name", BUILT)
def test_a_copy_is_what_building_makes(name):
    made = BUILT[name]
    first, built, again = made.build(name), made.build.__wrapped__(name), made.build(name)
    after = torch.get_rng_state()
    made.build.__wrapped__(name)
    assert torch.equal(torch.get_rng_state(), after)
    assert first.config == built.config and first.scheduler is not again.scheduler
    modules, others = _modules(built), _modules(again)
    assert modules.keys() == others.keys()
    for key, module in modules.items():
        other = others[key]
        assert type(module) is type(other) and module.training == other.training
        assert vars(module).keys() == vars(other).keys()
        for x, y in zip(_tensors(module), _tensors(other), strict=True):
            assert torch.equal(x, y) and x.requires_grad == y.requires_grad
    assert torch.equal(*(made.latents(p, made.call_kwargs(name, p)) for p in (built, again)))


@pytest.mark.parametrize("name", BUILT)
def test_copies_share_nothing_that_can_be_changed(name):
    made = BUILT[name]
    pipe, other = made.build(name), made.build(name)
    kept = {id(x) for m in _modules(other).values() for x in (m, *_tensors(m))}
    kept |= {id(getattr(m, "processor", other)) for m in _modules(other).values()}
    for module in _modules(pipe).values():
        assert not kept & {id(x) for x in (module, getattr(module, "processor", None))}
        for x in _tensors(module):
            assert id(x) not in kept
            x.data.zero_()
        for value in vars(module).values():
            if isinstance(value, dict):
                value["put here"] = None
    pipe.scheduler.register_to_config(put_here=1)
    for own in (other, made.build(name)):
        assert "put_here" not in own.scheduler.config
        for module in _modules(own).values():
            assert all(x.any() for x in module.parameters())
            assert not any("put here" in v for v in vars(module).values() if isinstance(v, dict))


def test_circles_and_what_is_shared_twice():
    tied = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(tied, torch.nn.Linear(2, 2))
    model[1].weight = tied.weight
    model.register_buffer("part", torch.arange(4.0)[1:3])
    model.others = [model]
    made = duplicate(model, {})
    assert made.others[0] is made and made[1].weight is made[0].weight is not tied.weight
    assert torch.equal(made.part, model.part) and made.part.data_ptr() != model.part.data_ptr()
