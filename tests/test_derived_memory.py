"""Models that keep something from forward to forward: a trace and a comparison leave none of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from modular import Case, denoise
from numerics import relative
from own_models import build, prompts, truth
from own_models_changing import Remembering

import pag_fast
from pag_fast.models.traced.preserved import preserved, undisturbed

LAYERS = ["layers.1", "layers.2"]
NAMES = ["layers.1.mixer", "layers.2.mixer"]
UNREAD = ["a count", "a list", "a statistic", "a statistic by data", "a norm's statistics"]


def _build(keeps):
    pipe = build(Remembering)
    pipe.transformer.keeps = keeps
    return pipe


def _kept(model):
    own = model.mean, model.norm.running_mean, model.norm.running_var, *model.past
    return [x.clone() for x in own], model.count, set(model.last)


def _equal(one, other):
    return one[1:] == other[1:] and len(one[0]) == len(other[0]) and all(
        map(torch.equal, one[0], other[0])
    )  # fmt: skip


@pytest.mark.parametrize("keeps", UNREAD)
def test_what_nobody_reads_is_a_warning(keeps):
    pipe, call = _build(keeps), prompts()
    stock, slow = pipe(**call), truth(_build(keeps), NAMES, call)
    pipe = _build(keeps)
    pag_fast.patch(pipe, LAYERS)
    with pytest.warns(UserWarning, match="every forward leaves something in the model"):
        assert relative(pipe(**call), slow) < 1e-5
    assert pipe._pag_fast.steps == {"not shared": 2}
    model = pipe.transformer
    # of the two steps, and of no forward besides
    assert model.count in (0, 2) and len(model.past) in (0, 2)
    assert model.norm.num_batches_tracked in (0, 2)
    assert all(x.isfinite().all() for x in _kept(model)[0])
    pag_fast.unpatch(pipe)
    assert torch.equal(pipe(**call), stock)


def test_strict_makes_an_error_of_it():
    pipe = _build("a count")
    pag_fast.patch(pipe, LAYERS, strict=True)
    with pytest.raises(ValueError, match=r"leaves something in the model \(count\)"):
        pipe(**prompts())
    assert pipe.transformer.count == 0


@pytest.mark.parametrize(("keeps", "name"), [("a drift", "mean"), ("a residual", r"last\.tokens")])
def test_what_the_next_forward_reads_is_refused(keeps, name):
    pipe, call = _build(keeps), prompts()
    before = _kept(pipe.transformer)
    pag_fast.patch(pipe, LAYERS)
    with pytest.raises(ValueError, match=rf"leaves in it \({name}\) changes what the next one"):
        pipe(**call)
    assert _equal(_kept(pipe.transformer), before)
    pag_fast.unpatch(pipe)
    assert torch.equal(pipe(**call), _build(keeps)(**call))


def test_what_is_made_once_is_no_reason_not_to_share():
    pipe, call = _build("a table"), prompts()
    slow = truth(pipe, NAMES, call)
    pipe.transformer.table = None
    with pag_fast.patched(pipe, LAYERS):
        assert relative(pipe(**call), slow) < 1e-5
        assert pipe._pag_fast.steps == {"shared": 2} and not pipe._pag_fast.fallbacks
    assert torch.equal(pipe.transformer.table, torch.ones(1))


@pytest.mark.parametrize("keeps", ["a statistic", "a count"])
def test_a_guider_leaves_what_its_passes_leave(keeps, caplog):
    guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

    torch.manual_seed(0)
    model = _build(keeps).transformer
    given = {"words": (torch.randn(2, 5, 12), torch.randn(2, 5, 12))}
    setup = Case(
        model, given, {"when": torch.tensor([500, 500])}, {}, torch.randn(2, 4, 4, 4), "pixels"
    )
    always = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    guider = guiders.PerturbedAttentionGuidance(perturbed_guidance_layers=["layers.1"], **always)
    denoise(setup, guider, steps=2)
    assert "The perturbed pass runs as a whole: every forward leaves something" in caplog.text
    assert model.count in (0, 6) and model.mean.isfinite().all()


class _Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("large", torch.zeros(2**18 + 1))
        self.object = SimpleNamespace(by_name={"x": torch.zeros(2)}, past=[1])
        self.names = {"a"}


def _write(model, given):
    with torch.no_grad():
        model.weight.mul_(2.0)
        model.weight.data.add_(1.0)
    model.large[5:].fill_(7.0)
    model.object.by_name["x"] += 1.0
    model.object.by_name["y"] = 3
    model.object.past.append(2)
    model.object.new = 1
    model.names.add("b")
    given["latents"].add_(1.0)


def test_everything_that_was_written_is_taken_back():
    model, given = _Holder(), {"latents": torch.zeros(4)}
    before, outside = copy.deepcopy(model), model.object.by_name["x"]
    with preserved(model, given) as held:
        _write(model, given)
        assert set(held.changes()) == {
            "an argument", "large", "object.by_name.x", "object.by_name.y", "object.new",
            "object.past", "names", "weight",
        }  # fmt: skip
    assert torch.equal(model.weight, before.weight) and torch.equal(model.large, before.large)
    assert vars(model.object).keys() == {"by_name", "past"} and model.object.past == [1]
    assert model.object.by_name.keys() == {"x"} and model.object.by_name["x"] is outside
    assert not outside.any() and not given["latents"].any() and model.names == {"a"}


def test_it_is_taken_back_in_inference_mode_and_after_an_error():
    with torch.inference_mode():
        model, given = _Holder(), {"latents": torch.zeros(4)}
        state = torch.get_rng_state()
        with pytest.raises(KeyError), undisturbed(model, given):
            _write(model, given)
            torch.rand(1)
            raise KeyError
        assert torch.equal(torch.get_rng_state(), state)
        assert (model.weight == 1.0).all() and not model.large.any()
        assert not given["latents"].any() and model.object.past == [1]
