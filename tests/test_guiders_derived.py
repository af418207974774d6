"""Guiders on a denoiser that nobody has described: traced, resumed, compared, or refused."""

from __future__ import annotations

import pytest
import torch
from modular import ALWAYS, Case, denoise, slow
from numerics import relative
from own_models import SIZE, TEXT, build, prompts
from torch.utils.flop_counter import FlopCounterMode

from pag_fast.runtime.recording import Replay

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

PAG = guiders.PerturbedAttentionGuidance
NAMES = ["layers.2.mixer", "layers.3.mixer"]
MODELS = {
    "text in front": {},
    "text in the middle": {"text": "middle"},
    "padded prompts": {"mask": "keys", "text": "last"},
    "a mask of all pairs": {"mask": "pairs"},
    "grouped queries": {"grouped": True, "attends": "Dispatched"},
}


def _case(batch: int = 2, **options) -> Case:
    model, text = build(**options).transformer, prompts(batch)
    words = text["prompt_embeds"], text["negative_prompt_embeds"]
    valid = tuple((x[..., 0] != 0).long() for x in words)
    torch.manual_seed(1)
    sample = torch.randn(batch, 4, SIZE, SIZE)
    fixed = {"when": torch.full((batch,), 500)}
    pairs = {"words": words, "valid": valid}
    return Case(model, pairs, fixed, {}, sample, "pixels", text=("", [0], 0))


def _guider(**options):
    return PAG(2.0, 3.0, perturbed_guidance_layers=["layers.2", "layers.3"], **ALWAYS, **options)


def _truth(setup: Case, steps: int = 2):
    def perturbed():
        return setup.model.perturb(NAMES, SIZE * SIZE, TEXT)

    return slow(setup, perturbed, guidance_scale=2.0, scale=3.0, steps=steps, active=range(steps))


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_equals_whole_forwards_by_dense_masks(options, caplog):
    setup = _case(**options)
    truth = _truth(setup)
    before = {name: id(x) for name, x in setup.model.named_modules()}
    for _ in range(2):
        found = denoise(setup, _guider())
        for a, b in zip(found.predictions, truth.predictions, strict=True):
            assert relative(a, b) < 1e-5
    assert not caplog.records
    assert {name: id(x) for name, x in setup.model.named_modules()} == before
    assert all("forward" not in vars(x) for x in setup.model.modules())


def test_blocks_in_front_run_once_a_step():
    setup, guider, counts = _case(), _guider(), []

    def run(**kwargs):
        with FlopCounterMode(display=False) as counter:
            out = setup.model(**kwargs)
        counts.append(counter.get_total_flops())
        return out

    denoise(setup, guider, steps=3, run=run)
    cond, _, perturbed = counts[3:6]  # the first step is compared, and the last
    assert perturbed < 0.6 * cond


def test_another_length_of_the_prompt_is_traced_anew():
    setup, guider = _case(), _guider()
    denoise(setup, guider)
    words = tuple(x[:, :3] for x in setup.pairs["words"])
    setup.pairs = {"words": words, "valid": tuple(x[:, :3] for x in setup.pairs["valid"])}

    def perturbed():
        return setup.model.perturb(NAMES, SIZE * SIZE, 3)

    truth = slow(setup, perturbed, guidance_scale=2.0, scale=3.0, steps=2, active=range(2))
    found = denoise(setup, guider)
    for a, b in zip(found.predictions, truth.predictions, strict=True):
        assert relative(a, b) < 1e-5


def test_what_was_resumed_wrong_is_seen(monkeypatch, caplog):
    setup = _case()
    truth, run = _truth(setup), Replay.run

    def spoiled(self, *args, **kwargs):
        out = run(self, *args, **kwargs)
        return out + 0.1 if isinstance(out, torch.Tensor) else out

    monkeypatch.setattr(Replay, "run", spoiled)
    found = denoise(setup, _guider())
    for a, b in zip(found.predictions, truth.predictions, strict=True):
        assert relative(a, b) < 1e-5
    (said,) = {record.getMessage() for record in caplog.records}
    assert "what was resumed is not what a whole forward gives" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attends": "ByHand"}, "No attention of OwnDenoiser can be perturbed"),
        ({"attends": "Twice"}, "No attention of OwnDenoiser can be perturbed"),
    ],
)
def test_what_cannot_be_perturbed_is_refused(options, words):
    setup = _case(**options)
    with pytest.raises(ValueError, match=words):
        denoise(setup, _guider())
    assert all("forward" not in vars(x) for x in setup.model.modules())


def test_a_compiled_model_is_refused():
    setup = _case()
    setup.model.compile(backend="eager")
    with pytest.raises(ValueError, match="leave it uncompiled with this guider"):
        denoise(setup, _guider())
