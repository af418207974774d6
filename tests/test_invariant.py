"""What depends on the conditioning alone runs once per call, and anew when it has changed."""

from __future__ import annotations

from collections import Counter

import older
import pytest
import torch
from numerics import relative
from tiny import PIPELINES, build, call_kwargs, every, latents
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pag_fast
from pag_fast.runtime.access.instance_patch import InstancePatch
from pag_fast.runtime.compatibility import row_wise
from pag_fast.sharing.conditioning_cache import Invariant, invariant_modules
from pag_fast.sharing.rows import BranchState
from pag_fast.sharing.threads import HERE, Thread

UNET = "StableDiffusionPAGPipeline"


@row_wise
class Uses(TorchDispatchMode):
    """How often each parameter goes into an op that is no view."""

    def __init__(self, parameters) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in parameters}
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.partition(".")[0] not in ("t", "transpose", "detach", "view", "unsqueeze"):
            for x in args:
                if isinstance(x, torch.Tensor) and x.data_ptr() in self.names:
                    self.counts[self.names[x.data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def _models(pipe):
    return [pipe.unet if hasattr(pipe, "unet") else pipe.transformer] + (
        [pipe.controlnet] if hasattr(pipe, "controlnet") else []
    )


def _uses(pipe, kwargs):
    parameters = [
        ((index, name, part), parameter)
        for index, model in enumerate(_models(pipe))
        for name, module in invariant_modules(model).items()
        for part, parameter in module.named_parameters()
    ]
    with Uses(parameters) as uses:
        latents(pipe, kwargs)
    return {name: uses.counts[name] for name, _ in parameters}


@pytest.mark.parametrize(
    ("name", "cfg", "layers"),
    every([(True, "middle")], [(True, "default"), (False, "default"), (False, "middle")]),
)
def test_conditioning_runs_once_per_call(name, cfg, layers):
    if name.startswith("HunyuanDiT") and older.TORCH < (2, 7):
        pytest.skip("torch 2.6 reads its table of positions in three operations, which are counted")
    pipe = build(name, pag_applied_layers=PIPELINES[name].layers[layers])
    kwargs = {"cfg": cfg, "steps": 4}
    stock = _uses(pipe, call_kwargs(name, pipe, **kwargs))
    with pag_fast.patched(pipe):
        patched = _uses(pipe, call_kwargs(name, pipe, **kwargs))
    # PyTorch's own multi-head attention slices its weights before it uses them
    used = {key: n for key, n in stock.items() if n}
    assert len(used) > 0.8 * len(stock)
    (steps,) = set(used.values())
    assert steps > 1
    # in each step but the first one module of each model is checked, all of them in turn
    checks = {key[:2]: patched[key] - 1 for key in used}
    for model in {index for index, _, _ in used}:
        of_model = [n for (index, _), n in checks.items() if index == model]
        assert min(of_model) >= 0
        assert max(of_model) - min(of_model) <= 1
        assert sum(of_model) <= steps - 1


def test_every_text_key_is_found():
    found = invariant_modules(build("StableDiffusionXLPAGPipeline").unet)
    model = build("StableDiffusionXLPAGPipeline").unet
    crossing = [n for n, m in model.named_modules() if getattr(m, "is_cross_attention", False)]
    expected = {f"{n}.{part}" for n in crossing for part in ("to_k", "to_v")}
    assert set(found) == expected | {"add_embedding", "add_time_proj"}
    motion = build("AnimateDiffPAGPipeline").unet
    assert not any("motion" in name for name in invariant_modules(motion))


def _with_callback(pipe, name, change):
    def callback(pipe, step, timestep, tensors):
        return (change(pipe, tensors) if step == 1 else None) or tensors

    return call_kwargs(
        name,
        pipe,
        steps=4,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )


def _replaced(pipe, tensors):
    return {"prompt_embeds": -9.0 * tensors["prompt_embeds"]}


def _in_place(pipe, tensors):
    tensors["prompt_embeds"].mul_(0.5)


def _weights(pipe, tensors):
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(99.0)


@pytest.mark.parametrize("change", [_replaced, _in_place, _weights])
def test_changes_by_a_callback_count(change):
    plain = latents(build(UNET), call_kwargs(UNET, build(UNET), steps=4))
    pipe = build(UNET)
    stock = latents(pipe, _with_callback(pipe, UNET, change))
    pipe = pag_fast.patch(build(UNET))
    patched = latents(pipe, _with_callback(pipe, UNET, change))
    assert relative(stock, plain) > 1e-4
    assert relative(patched, stock) < 1e-5


def _by_diffusers(pipe):
    pipe.unet.set_adapters(["one"], [4.0])


def _in_its_dictionary(pipe):
    for module in pipe.unet.modules():
        if hasattr(module, "scaling"):
            module.scaling["one"] *= 4.0


@pytest.mark.parametrize("scale", [_by_diffusers, _in_its_dictionary])
def test_lora_scale_changed_by_a_callback(scale):
    peft = pytest.importorskip("peft")

    def lora():
        pipe = build(UNET)
        torch.manual_seed(1)
        targets = ["to_k", "to_v"]
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name="one")
        return pipe

    def change(pipe, tensors):
        scale(pipe)

    pipe = lora()
    plain = latents(pipe, call_kwargs(UNET, pipe, steps=4))
    stock = latents(pipe, _with_callback(pipe, UNET, change))
    pipe = pag_fast.patch(lora())
    patched = latents(pipe, _with_callback(pipe, UNET, change))
    assert relative(stock, plain) > 1e-4
    assert relative(patched, stock) < 1e-5


def test_an_output_written_into_is_not_handed_out_again():
    pipe = build(UNET)
    to_v = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
    to_v.register_forward_hook(lambda module, args, out: out.mul_(2.0))
    stock = latents(pipe, call_kwargs(UNET, pipe, steps=4))
    assert relative(latents(pag_fast.patch(pipe), call_kwargs(UNET, pipe, steps=4)), stock) < 1e-5


def test_nothing_is_kept_behind_the_last_step():
    pipe = pag_fast.patch(build(UNET))
    kept, decode = [], pipe.vae.decode

    def values():
        installed = pipe._pag_fast.session.installed
        return [o.value for i in installed.invariants.values() for o in i.kept.values()]

    def watched(*args, **kwargs):
        kept.append(len(values()))
        return decode(*args, **kwargs)

    def callback(pipe, step, timestep, tensors):
        kept.append(len(values()))
        return tensors

    pipe.vae.decode = watched
    kwargs = call_kwargs(UNET, pipe, steps=3, callback_on_step_end=callback)
    pipe(**{**kwargs, "output_type": "pt"})
    assert kept == [kept[0], kept[0], 0, 0]
    assert kept[0] == len(invariant_modules(pipe.unet))


def test_off():
    pipe = build(UNET)
    stock = _uses(pipe, call_kwargs(UNET, pipe, steps=3))
    with pag_fast.patched(pipe, cache_conditioning=False):
        assert _uses(pipe, call_kwargs(UNET, pipe, steps=3)) == stock
        assert not pag_fast.explain(pipe, flops=False).once
    with pytest.raises(ValueError, match="cache_conditioning must be True or False"):
        pag_fast.patch(pipe, cache_conditioning=1)


def test_compiled_modules_are_left_to_their_compiler():
    model = build(UNET).unet
    everything = set(invariant_modules(model))
    inside = {name for name in everything if name.startswith("mid_block.")}
    model.mid_block.compile()
    assert inside
    assert set(invariant_modules(model)) == everything - inside
    model.compile()
    assert not invariant_modules(model)


def test_modules_that_diffusers_hooks_into_always_run():
    from diffusers.hooks import HookRegistry, ModelHook

    model = build(UNET).unet
    everything = set(invariant_modules(model))
    name = min(everything)
    registry = HookRegistry.check_if_exists_or_initialize(model.get_submodule(name))
    assert set(invariant_modules(model)) == everything, "an empty registry does nothing"
    registry.register_hook(ModelHook(), "hook")
    assert set(invariant_modules(model)) == everything - {name}


class TestInvariant:
    """One module, without a pipeline around it."""

    def setup_method(self):
        self.state, self.layer = BranchState(), nn.Linear(3, 3)
        self.invariant = Invariant(self.state, self.layer)
        self.patch = InstancePatch([(vars(self.layer), "forward", self.invariant)])

    @torch.no_grad()
    def _step(self, *inputs, changed=False):
        self.state.step += 1
        self.state.epoch += changed
        self.state.thread = HERE.me
        before = self.patch.on()
        try:
            return [self.layer(x) for x in inputs]
        finally:
            self.patch.off(before)
            self.state.thread = None

    def test_hands_out_the_same_tensor(self):
        x = torch.randn(2, 3)
        (first,) = self._step(x)
        assert self._step(x)[0] is first
        assert self._step(x, changed=True)[0] is not first

    def test_what_has_been_written_into_is_computed_anew(self):
        x = torch.randn(2, 3)
        (first,) = self._step(x)
        before = first.clone()
        first.mul_(2.0)
        (again,) = self._step(x)
        assert again is not first and torch.equal(again, before)

    def test_called_twice_in_a_step_it_computes(self):
        x, y = torch.randn(2, 3), torch.randn(2, 3)
        for _ in range(2):
            first, second = self._step(x, y)
            assert torch.equal(first, nn.functional.linear(x, self.layer.weight, self.layer.bias))
            assert torch.equal(second, nn.functional.linear(y, self.layer.weight, self.layer.bias))

    def test_changed_weights_count(self):
        x = torch.randn(2, 3)
        (first,) = self._step(x)
        for change in (
            lambda: self.layer.weight.mul_(2.0),
            lambda: setattr(self.layer, "bias", nn.Parameter(torch.ones(3))),
            lambda: setattr(self.layer.weight, "data", torch.ones(3, 3)),
        ):
            with torch.no_grad():
                change()
            (now,) = self._step(x)
            assert now is not first
            assert torch.equal(now, nn.functional.linear(x, self.layer.weight, self.layer.bias))
            first = now

    def test_another_thread_computes_for_itself(self):
        x, y, seen = torch.randn(2, 3), torch.randn(2, 3), []
        self._step(x)
        self.state.thread = Thread()
        before = self.patch.on()
        seen.append(self.layer(y))
        self.patch.off(before)
        assert torch.equal(seen[0], nn.functional.linear(y, self.layer.weight, self.layer.bias))

    def test_off_the_module_is_as_it_was(self):
        before = self.patch.on()
        assert self.layer.forward is self.invariant
        self.patch.off(before)
        assert "forward" not in vars(self.layer)

    def test_a_forward_set_meanwhile_stays(self):
        before = self.patch.on()
        self.layer.forward = other = lambda x: x
        self.patch.off(before)
        assert self.layer.forward is other

    def test_an_own_forward_runs_and_comes_back(self):
        self.layer.forward = own = lambda x: x + 1
        assert torch.equal(self._step(torch.ones(1))[0], torch.full((1,), 2.0))
        assert self.layer.forward is own

    def test_a_wrapper_that_has_captured_it(self):
        """As accelerate's hooks do, put on in the middle of a forward and taken off much later."""
        x = torch.randn(2, 3)
        self._step(x)
        before = self.patch.on()
        captured = self.layer.forward
        self.layer.forward = lambda x: captured(x) + 1
        self.patch.off(before)
        expected = nn.functional.linear(x, self.layer.weight, self.layer.bias)
        assert torch.equal(self.layer(x), expected + 1)
        assert torch.equal(self._step(x, changed=True)[0], expected + 1)
        self.layer.forward = captured
        assert torch.equal(self.layer(x), expected)
        assert torch.equal(self._step(x, changed=True)[0], expected)
