"""Models that do something else at later timesteps than in the forward that was traced."""

from __future__ import annotations

import pytest
import torch
from modular import Case, denoise, slow
from numerics import relative
from own_models import build, prompts, truth
from own_models_changing import Varying

import pag_fast
from pag_fast.models.traced.turns import Turns
from pag_fast.runtime.separately import Separately
from pag_fast.sharing.sequence import OutOfOrder, Sequence

LAYERS = ["layers.2", "layers.3"]
STEPS = {"num_inference_steps": 4}


def _build(late, **places):
    pipe = build(Varying)
    pipe.transformer.late = late
    vars(pipe.transformer).update(places)
    return pipe


def _names(layers):
    return [f"{name}.mixer" for name in layers]


@pytest.mark.parametrize(
    ("late", "layers", "shared"),
    [
        ("another order", ["layers.1", "layers.2"], False),
        ("another order", ["layers.2"], False),
        ("twice", LAYERS, False),
        ("without 0", LAYERS, False),
        ("without 1", LAYERS, False),
        ("without 0", ["layers.1", "layers.2"], True),
        ("without 1", ["layers.1", "layers.2"], True),
        ("without 3", ["layers.1"], True),
    ],
)
@pytest.mark.parametrize("cfg", [True, False])
def test_another_order_runs_apart(late, layers, shared, cfg):
    """What rests on no module that has changed is shared as before."""
    pipe, call = _build(late), {**prompts(cfg=cfg), **STEPS}
    slow = truth(pipe, _names(layers), call)
    pag_fast.patch(pipe, layers)
    if shared:
        assert relative(pipe(**call), slow) < 1e-5
        assert pipe._pag_fast.steps == {"shared": 4}
        return
    # where the last block in front is left out, it is the model that stumbles
    words = r"layers\.\d.* ran in another order than in the forward|\(RuntimeError: The size of"
    with pytest.warns(UserWarning, match=words):
        assert relative(pipe(**call), slow) < 1e-5
    assert relative(pipe(**call), slow) < 1e-5
    assert pipe._pag_fast.steps["not shared"] >= 5


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": pag_fast.Schedule(stop=5)},
        {"schedule": pag_fast.Schedule(start=1, stop=5)},
        {"schedule": pag_fast.Schedule(adaptive=0.001, stop=5)},
        {"reuse": pag_fast.Reuse(every=3)},
    ],
    ids=["stop", "start", "adaptive", "reuse"],
)
def test_branches_that_part_in_mid_call_go_on_counting_steps(options):
    """That nothing can be shared shows in the middle of a call, whose steps are known."""
    call = {**prompts(), "num_inference_steps": 6}
    pipe = _build("another order")
    with pag_fast.patched(pipe, LAYERS[:1], share_branches=False, **options):
        slow = pipe(**call)
    pag_fast.patch(pipe, LAYERS[:1], **options)
    with pytest.warns(UserWarning, match="ran in another order"):
        fast = pipe(**call)
    assert relative(fast, slow) < 1e-5
    always = pag_fast.patch(_build("another order"), LAYERS[:1])
    with pytest.warns(UserWarning, match="ran in another order"):
        assert relative(always(**call), slow) > 1e-4


def test_blocks_that_end_early_run_apart():
    pipe, call = _build("nothing"), {**prompts(), **STEPS}
    pag_fast.patch(pipe, LAYERS)
    with pytest.warns(UserWarning) as told:
        fast = pipe(**call)
    assert any("blocks did not run that ran in the forward" in str(w.message) for w in told)
    assert any("2 of 2 perturbed layers did not run: the model's own code, or" in str(w.message)
               for w in told)  # fmt: skip
    assert relative(fast, truth(_build("nothing"), _names(LAYERS), call)) < 1e-5


def test_a_fault_of_sharing_alone_runs_apart():
    """Code between two blocks has as many rows as there are, where they are shared."""
    pipe, call = _build("rows by number"), {**prompts(cfg=False), **STEPS}
    pag_fast.patch(pipe, LAYERS)
    with (
        pytest.warns(UserWarning, match="sharing branches of this model is not exact .*size of"),
        pytest.raises(ValueError, match="is not what separate forwards say"),
    ):
        pipe(**call)


def test_an_error_of_somebody_else_is_his():
    pipe, call = _build(""), {**prompts(), **STEPS}
    pag_fast.patch(pipe, LAYERS)
    pipe(**call)
    steps = []

    class Broken(RuntimeError):
        pass

    def broken(*_):
        steps.append(1)
        if len(steps) > 2:
            raise Broken

    own = pipe.transformer.through
    pipe.transformer.through = lambda *args: (broken(), own(*args))[1]
    with pytest.raises(Broken):
        pipe(**call)


@pytest.mark.parametrize("places", [{}, {"begins": 1000.0, "ends": 500.0}])
def test_rows_that_mix_later_are_refused(places):
    """In the last step of the first call; those that mix in between, in one of the next calls."""
    pipe = _build("mixed rows", **({"begins": 990.0, "ends": 500.0} if places else {}))
    pag_fast.patch(pipe, LAYERS)
    with (
        pytest.warns(UserWarning, match="steps since the last comparison may have been wrong"),
        pytest.raises(ValueError, match="is not what separate forwards say"),
    ):
        for _ in range(4):
            pipe(**prompts(), **STEPS)


def test_one_step_more_of_each_call_is_compared(monkeypatch):
    pipe, compared, separately = _build(""), [], Separately.run

    def noted(forward, *args):
        compared.append(pipe._pag_fast.session.loop.step)
        return separately(forward, *args)

    monkeypatch.setattr(Separately, "run", noted)
    pag_fast.patch(pipe, LAYERS)
    for _ in range(4):
        pipe(**prompts(), num_inference_steps=7)
    assert compared == [0, 6, 3, 5, 1]
    del compared[:]
    # a window that closes early
    pag_fast.patch(pipe, LAYERS, schedule=pag_fast.Schedule(stop=3))
    pipe(**prompts(), pag_applied_layers=["layers.1"], num_inference_steps=7)
    assert compared == [0, 2]


def test_turns_come_by_everywhere():
    turns = Turns()
    places = [turns.next("a") for _ in range(32)]
    assert places[0] == turns.next("b") == 1.0
    assert {int(10 * place) for place in places[1:]} == set(range(10))


def test_what_a_sequence_lets_pass():
    sequence = Sequence([("a", True, False), ("b", False, True), ("c", True, True)])
    for order in ("abc", "c", "ab", ""):
        sequence.begin()
        for name in order:
            sequence.enter(name)
        sequence.enter("of no interest")
        sequence.end()
    for order in ("b", "ac", "aa", "abb", "ca", "abcb"):
        sequence.begin()
        with pytest.raises(OutOfOrder, match="ran in another order"):
            for name in order:
                sequence.enter(name)
    sequence.begin()
    sequence.enter("a")
    with pytest.raises(OutOfOrder, match="blocks did not run"):
        sequence.end()


@pytest.mark.parametrize("late", ["another order", "twice", "without 0"])
def test_a_guiders_pass_in_another_order(late, caplog):
    """Steps before 600 are one order, and the others another one."""
    guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

    model, layers = _build(late).transformer, ["layers.1", "layers.2"]
    torch.manual_seed(0)
    given = {"words": (torch.randn(2, 5, 12), torch.randn(2, 5, 12))}
    when = torch.tensor([900, 900])
    setup = Case(model, given, {"when": when}, {}, torch.randn(2, 4, 4, 4), "pixels")

    def next_step(step, branch):
        if branch != "pred_uncond" and branch != "pred_cond_skip":
            when.fill_(900 - 200 * step)

    always = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    guider = guiders.PerturbedAttentionGuidance(
        2.0, 3.0, perturbed_guidance_layers=layers, **always
    )
    found = denoise(setup, guider, steps=4, before_pass=next_step)
    steps = iter([step for step in range(4) for _ in range(3)])
    own = model.forward
    model.forward = lambda *args, **kwargs: (next_step(next(steps), ""), own(*args, **kwargs))[1]
    expected = slow(
        setup,
        lambda: model.perturb(_names(layers), 16, 5),
        guidance_scale=2.0,
        scale=3.0,
        steps=4,
        active=range(4),
    )
    for a, b in zip(found.predictions, expected.predictions, strict=True):
        assert relative(a, b) < 1e-5
    said = any("another order than in cond's forward" in x.getMessage() for x in caplog.records)
    assert said == (late == "another order") or late == "twice"
