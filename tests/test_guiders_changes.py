"""Guiders: what somebody changes between cond's forward and the perturbed one counts in that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from modular import ALWAYS, case, denoise, differences, perturbed
from numerics import relative

from pag_fast.models.layer_names import resolve
from pag_fast.runtime.compatibility import row_wise

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)
peft = pytest.importorskip("peft")

PAG = guiders.PerturbedAttentionGuidance
LAYERS = {"sd": ["mid"], "sd3": [3], "pixart": [3]}


class _Between:
    """Changes something: ``enter`` in front of the perturbed pass, ``leave`` behind it."""

    def __init__(self, setup):
        self.setup, self.model, self.on = setup, setup.model, False

    def __call__(self, step, branch):
        if (branch == "pred_cond_skip") != self.on:
            self.on = not self.on
            (self.enter if self.on else self.leave)()


class Weights(_Between):
    def enter(self, factor=1.3):
        with torch.no_grad():
            for parameter in self.chosen():
                parameter.mul_(factor)

    def leave(self):
        self.enter(1 / 1.3)

    def chosen(self):
        return [p for p in self.model.parameters() if p.ndim == 2][:20]


class OfTheTime(Weights):
    """No module in front of the fork has them: what those are given changes."""

    def chosen(self):
        named = self.model.named_parameters()
        return [p for name, p in named if "time_" in name or "adaln_single" in name]


class OfTheModel(Weights):
    """Parameters and buffers of the denoiser itself."""

    def chosen(self):
        return list(self.model.parameters(recurse=False))


class Adapter(_Between):
    def __init__(self, setup):
        super().__init__(setup)
        names = ["to_k", "to_v", "to_q"]
        torch.manual_seed(3)
        self.model.add_adapter(
            peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), "default"
        )
        # as small as what has been trained
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.3)

    def enter(self):
        self.model.disable_adapters()

    def leave(self):
        self.model.enable_adapters()


class Scale(Adapter):
    def enter(self, scale=0.2):
        for module in self.model.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.set_scale("default", scale)

    def leave(self):
        self.enter(1.0)


class Prompt(_Between):
    def enter(self, factor=1.5):
        self.setup.pairs["encoder_hidden_states"][0].mul_(factor)

    def leave(self):
        self.enter(1 / 1.5)


class Setting(_Between):
    def enter(self, value=1.3):
        inside = [m for p in LAYERS["sd"] for m in resolve(self.model, [p]).values()]
        for module in self.model.modules():
            if hasattr(module, "rescale_output_factor") and module not in inside:
                module.rescale_output_factor = value

    def leave(self):
        self.enter(1.0)


class Collection(_Between):
    """A setting in a list, which changes in place."""

    def __init__(self, setup):
        super().__init__(setup)
        block = setup.model.down_blocks[0].resnets[0]
        block.scales = self.scales = [1.0]
        block.register_forward_hook(row_wise(lambda m, args, out: m.scales[0] * out))

    def enter(self):
        self.scales[0] = 1.5

    def leave(self):
        self.scales[0] = 1.0


class Written(_Between):
    """A tensor that is neither a parameter nor a buffer, written in place."""

    def __init__(self, setup):
        super().__init__(setup)
        block = setup.model.down_blocks[0].resnets[0]
        block.factor = self.factor = torch.ones(())
        block.register_forward_hook(row_wise(lambda m, args, out: m.factor * out))

    def enter(self):
        self.factor.fill_(1.5)

    def leave(self):
        self.factor.fill_(1.0)


class WrittenOnTheModel(Written):
    """The same of the denoiser itself, in a list."""

    def __init__(self, setup):
        _Between.__init__(self, setup)
        model, self.factor = setup.model, torch.ones(())
        model.factors = [self.factor]
        hook = row_wise(lambda m, args, out: model.factors[0] * out)
        model.down_blocks[0].resnets[0].register_forward_hook(hook)


class Hook(_Between):
    """One that pag_fast knows to treat each row by itself."""

    def enter(self):
        blocks = getattr(self.model, "transformer_blocks", None) or self.model.down_blocks
        module = next(m for m in blocks[0].modules() if isinstance(m, torch.nn.Linear))
        self.handle = module.register_forward_hook(row_wise(lambda m, args, out: 1.2 * out))

    def leave(self):
        self.handle.remove()


@torch.no_grad()
def _truth(setup, between, layers, steps=2):
    """Every pass whole, as many as there are."""
    cond, uncond = ({n: pair[i] for n, pair in setup.pairs.items()} for i in (0, 1))
    x, found, context = setup.sample, [], perturbed(setup, layers)
    for step in range(steps):
        between(step, "pred_cond")
        c = setup(setup.model, x, cond)
        between(step, "pred_uncond")
        u = setup(setup.model, x, uncond)
        between(step, "pred_cond_skip")
        with context():
            p = setup(setup.model, x, cond)
        found.append(u + 7.5 * (c - u) + 2.8 * (c - p))
        x = x - 0.1 * (found[-1] if setup.text is not None else found[-1][:, :4])
    between(steps, "")
    return SimpleNamespace(predictions=found)


CASES = [
    (Weights, "sd"), (Weights, "sd3"), (OfTheTime, "sd"), (OfTheTime, "pixart"),
    (OfTheModel, "pixart"), (Adapter, "sd"), (Adapter, "sd3"), (Scale, "sd3"), (Prompt, "sd"),
    (Prompt, "sd3"), (Setting, "sd"), (Collection, "sd"), (Written, "sd"),
    (WrittenOnTheModel, "sd"), (Hook, "sd"), (Hook, "sd3"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_change_between_the_passes_counts(kind, name):
    setup, layers = case(name), LAYERS[name]
    between = kind(setup)
    expected = _truth(setup, between, layers)
    without = _truth(setup, lambda *_: None, layers)
    assert min(differences(without, expected)) > 1e-3
    guider = PAG(7.5, 2.8, perturbed_guidance_layers=layers, **ALWAYS)
    assert max(differences(denoise(setup, guider, steps=2, before_pass=between), expected)) < 1e-5
    (said,) = guider._warned
    assert "have changed since cond's forward" in said or "they were written into" in said


def test_a_prompt_that_is_written_in_inference_mode():
    setup = case("sd3")
    with torch.inference_mode():
        setup.pairs = {n: tuple(x.clone() for x in pair) for n, pair in setup.pairs.items()}
        between = Prompt(setup)
        expected = _truth(setup, between, [3])
        guider = PAG(7.5, 2.8, perturbed_guidance_layers=[3], **ALWAYS)
        found = denoise(setup, guider, steps=2, before_pass=between)
        assert max(differences(found, expected)) < 1e-5
        guider = PAG(7.5, 2.8, perturbed_guidance_layers=[3], **ALWAYS)
        denoise(setup, guider, steps=2)
        assert not guider._warned


def test_weights_of_inference_mode_do_not_tell():
    setup = case("sd3")
    expected = denoise(setup, PAG(perturbed_guidance_layers=[3], **ALWAYS), steps=2)
    with torch.inference_mode():
        block = setup.model.transformer_blocks[1].ff
        block.net[2].weight = torch.nn.Parameter(block.net[2].weight.clone(), requires_grad=False)
    guider = PAG(perturbed_guidance_layers=[3], **ALWAYS)
    assert max(differences(denoise(setup, guider, steps=2), expected)) < 1e-5
    (said,) = guider._warned
    assert "load the model outside of it" in said


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_lora_without_dropout_is_resumed_though_peft_leaves_it_in_training(dropout):
    setup = case("sd3")
    setup.model.requires_grad_(False)
    config = peft.LoraConfig(
        r=2, target_modules=["to_k", "to_v"], init_lora_weights=False, lora_dropout=dropout
    )
    setup.model.add_adapter(config)
    assert not setup.model.training and any(m.training for m in setup.model.modules())
    guider = PAG(7.5, 2.8, perturbed_guidance_layers=[3], **ALWAYS)
    found = denoise(setup, guider, steps=2)
    if dropout:
        (said,) = guider._warned
        assert "every row has a dropout of its own" in said
    else:
        assert not guider._warned
        expected = _truth(setup, lambda *_: None, [3])
        for a, b in zip(found.predictions, expected.predictions, strict=True):
            assert relative(a, b) < 1e-5
