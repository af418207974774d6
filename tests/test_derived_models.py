"""Models and pipelines that diffusers does not have: traced, compared, or refused with a reason."""

from __future__ import annotations

import own_models
import pytest
import torch
from numerics import observing, relative
from own_models import build, prompts, truth

import pag_fast
from pag_fast.runtime.separately import Separately

LAYERS = ["layers.1", "layers.2"]
NAMES = ["layers.1.mixer", "layers.2.mixer"]

MODELS = {
    "text in front": {},
    "text behind": {"text": "last"},
    "text in the middle": {"text": "middle"},
    "padded prompts": {"mask": "keys", "text": "last"},
    "a mask of all pairs": {"mask": "pairs"},
    "grouped queries": {"grouped": True, "attends": "Dispatched"},
    "the dispatcher": {"attends": "Dispatched", "mask": "keys"},
    "a helper": {"attends": "Helped"},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("cfg", "batch"), [(True, 2), (False, 1)])
def test_equals_separate_forwards(options, cfg, batch):
    pipe, call = build(**options), prompts(batch, cfg)
    stock, slow = pipe(**call), truth(pipe, NAMES, call)
    assert relative(slow, stock) > 1e-3
    with pag_fast.patched(pipe, LAYERS):
        fast, again = pipe(**call), pipe(**call)
        assert not pipe._pag_fast.fallbacks
        assert pipe._pag_fast.steps == {"shared": 4}
    assert relative(fast, slow) < 1e-5
    assert torch.equal(fast, again)
    assert torch.equal(pipe(**call), stock)


@pytest.mark.parametrize("order", ["uncond, cond", "cond, uncond", "apart"])
def test_whose_rows_are_whose_is_seen_in_the_prompts(order):
    pipe, call = build(), prompts()
    pipe.order = order
    slow = truth(pipe, NAMES, call)
    with pag_fast.patched(pipe, LAYERS):
        assert relative(pipe(**call), slow) < 1e-5
        assert not pipe._pag_fast.fallbacks


def test_diffusers_order_is_checked_where_prompts_cannot_be_seen():
    pipe, call = build(), prompts()
    pipe.hides = ("prompts",)
    slow = truth(pipe, NAMES, call)
    with pag_fast.patched(pipe, LAYERS):
        assert relative(pipe(**call), slow) < 1e-5
        pipe.order = "cond, uncond"
        with pytest.raises(ValueError, match="in another order than diffusers' pipelines do"):
            pipe(**call)
        pipe.hides = ("prompts", "result")
        for order in ("cond, uncond", "uncond, cond"):
            pipe.order = order
            with pytest.raises(ValueError, match="neither by its prompts nor by what it makes of"):
                pipe(**call)


def test_uncond_first_where_each_has_a_forward_is_refused():
    pipe = build()
    pipe.order = "apart, uncond first"
    with (
        pag_fast.patched(pipe, LAYERS),
        pytest.raises(ValueError, match="uncond ran before cond in this step"),
    ):
        pipe(**prompts())


def test_what_the_loop_makes_of_predictions_is_seen():
    pipe, call = build(), prompts()
    pipe.normalises = True
    with (
        pag_fast.patched(pipe, LAYERS),
        pytest.warns(UserWarning, match="does more to the predictions than to weigh them"),
    ):
        pipe(**call)
    pipe.normalises, pipe.weight = False, 2.0
    with (
        pag_fast.patched(pipe, LAYERS),
        pytest.warns(UserWarning, match="with weights that sum to 2: PAG's difference"),
    ):
        pipe(**call)
    pipe.weight, pipe.hides = -1.0, ("result",)
    with pag_fast.patched(pipe, LAYERS), pytest.warns(UserWarning, match="is taken for linear"):
        pipe(**call)
    # diffusers negates what some models return
    pipe.hides = ()
    with pag_fast.patched(pipe, LAYERS):
        pipe(**call)
        assert not pipe._pag_fast.fallbacks


def test_rows_that_depend_on_each_other_run_apart_or_are_refused():
    """A model whose rows see each other has no right answer: a batch of two is another picture."""
    pipe = build(mixes_rows=True)
    pag_fast.patch(pipe, LAYERS)
    with (
        pytest.warns(UserWarning, match="sharing branches of this model is not exact"),
        pytest.raises(ValueError, match="is not what separate forwards say"),
    ):
        pipe(**prompts())


def test_sharing_that_is_not_exact_is_not_used(monkeypatch):
    """As if a block looked at rows: its branches run apart, and the picture is right."""
    pipe, call = build(), prompts()
    slow = truth(pipe, NAMES, call)
    differs, asked = Separately.differs, []

    def first_time(self, both):
        asked.append(1)
        return "a reason" if len(asked) == 1 else differs(self, both)

    monkeypatch.setattr(Separately, "differs", first_time)
    pag_fast.patch(pipe, LAYERS)
    with pytest.warns(UserWarning, match=r"branches are not shared: .* \(a reason\)"):
        assert relative(pipe(**call), slow) < 1e-5
    assert len(asked) == 3  # both ways in the first step, and the last step
    assert relative(pipe(**call), slow) < 1e-5
    assert pipe._pag_fast.steps["shared"] <= 1


@pytest.mark.parametrize(
    ("attends", "message"),
    [
        ("Twice", r"layers\.0\.mixer: it attends more than once"),
        ("ByHand", r"none was seen that mixes tokens"),
    ],
)
def test_attention_that_cannot_be_perturbed_is_refused(attends, message, snapshot):
    pipe = build(attends=attends)
    stock = pipe(**prompts())
    pag_fast.patch(pipe, LAYERS)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**prompts())
    assert snapshot(pipe) == before
    pag_fast.unpatch(pipe)
    assert torch.equal(pipe(**prompts()), stock)


def test_a_cache_among_the_arguments_is_refused():
    """A trace would leave its NaN there."""
    pipe = build()
    pipe.cache = object()
    pag_fast.patch(pipe, LAYERS)
    with pytest.raises(
        ValueError, match=r"called with cache=object\(…\), which may keep something"
    ):
        pipe(**prompts())


def test_a_model_that_fails_with_nan_is_refused(snapshot):
    pipe = build()

    def picky(module, args):
        if args[0].isnan().any():
            raise RuntimeError("no NaN here")

    pipe.transformer.exit.register_forward_pre_hook(observing(picky))
    pag_fast.patch(pipe, LAYERS)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="cannot be traced: RuntimeError: no NaN here"):
        pipe(**prompts())
    assert snapshot(pipe) == before


def test_a_pipeline_without_a_denoiser_is_refused():
    pipe = own_models.OwnPipeline(None, None)
    with pytest.raises(ValueError, match="OwnPipeline is not a pipeline that pag_fast can patch"):
        pag_fast.patch(pipe, "blocks.1")
    pipe = build()
    del pipe.transformer.layers[:]
    with pytest.raises(ValueError, match="no module with an attention processor as those of"):
        pag_fast.patch(pipe, "blocks.1")


def test_every_choice_of_layers_is_compared(monkeypatch):
    compared, separately = [], Separately.run

    def noted(*args):
        compared.append(args[-1])
        return separately(*args)

    monkeypatch.setattr(Separately, "run", noted)
    pipe, call = build(), prompts()
    pag_fast.patch(pipe, "layers.1")
    for _ in range(2):
        pipe(**call)
    # without a rounding that is known: for the first time
    assert compared.count(None) == 1
    pipe(**call, pag_applied_layers=["layers.2"])
    pipe(**call, pag_applied_layers=["layers.2"], pag_scale=1.0)
    assert compared.count(None) == 2


def test_values_are_the_layers_own():
    """The op may write into the values it gets; the layer uses its own again."""
    pipe, call = build(text="last", attends="Valued"), prompts()
    layers = ["layers.2", "layers.3"]
    slow = truth(pipe, [f"{name}.mixer" for name in layers], call)
    with pag_fast.patched(pipe, layers):
        assert relative(pipe(**call), slow) < 1e-5
        assert pipe._pag_fast.steps == {"shared": 2} and not pipe._pag_fast.fallbacks


def test_lists_of_rows_are_turned():
    from pag_fast.runtime.row_copies import turned

    assert turned([1, 2, 3, 4, 5, 6], 3, 3) == [5, 6, 3, 4, 1, 2]
    x = torch.arange(6)
    assert turned(x, 3, 3).tolist() == turned(x.tolist(), 3, 3)
