"""What anybody puts on a model is known or runs unshared: hooks, classes, weights, processors."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from strangers import WEIGHTS, answers_of, flux, no_gradients, unet, wrap  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize

from pag_fast.runtime.compatibility import (
    UNKNOWN,
    Answer,
    Compatibility,
    combined,
    look,
    refuse,
    row_wise,
)
from pag_fast.runtime.compatibility.origins import is_row_wise
from pag_fast.sharing.replacement import Replacement
from pag_fast.sharing.rows import BranchState

# ---- hooks, forwards, classes ----


class _Cached:
    """A callable object in place of a forward."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def _replace_class(module: nn.Module) -> None:
    base: Any = type(module)

    class Faster(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    module.__class__ = Faster


def _bound(module: Any) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    module.forward = forward.__get__(module)


UNKNOWNS = {
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _, args: None),
    "pre-hook with keywords": lambda m: m.register_forward_pre_hook(
        lambda _, args, kwargs: None, with_kwargs=True
    ),
    "hook": lambda m: m.register_forward_hook(lambda _, args, out: None),
    "partial hook": lambda m: m.register_forward_hook(functools.partial(lambda *a: None)),
    "object as a hook": lambda m: m.register_forward_hook(_Cached(lambda *a: None)),
    "wrapped forward": wrap,
    "bound forward": _bound,
    "object as a forward": lambda m: setattr(m, "forward", _Cached(m.forward)),
    "partial": lambda m: setattr(m, "forward", functools.partial(_Cached(m.forward))),
    "class": _replace_class,
}


@pytest.mark.parametrize("how", UNKNOWNS)
@pytest.mark.parametrize("where", ["", "mid_block", "mid_block.attentions.0.proj_in"])
def test_what_is_unknown_runs_unshared(how: str, where: str) -> None:
    model = unet()
    watch = Compatibility()
    assert watch.look(model) == ()
    UNKNOWNS[how](model.get_submodule(where))
    (finding,) = look(model)
    # torch's hooks of the model itself see every row: what they hand on is compared again
    outermost = UNKNOWN if where or "hook" not in how else Answer.KEEP_ROWS | Answer.SEES_ROWS
    if outermost != UNKNOWN and "pre-hook" in how:
        outermost |= Answer.RECHECK | Answer.WEIGHTS_APART | Answer.NOTHING_KEPT
    assert finding.answer == outermost
    assert finding.where == (where or "the model itself")
    assert ("strangers" if how == "wrapped forward" else "test_compatibility") in finding.what
    assert watch.look(model) == (finding,)


def test_function_put_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, watch = unet(), Compatibility()
    assert watch.look(model) == ()
    cls: Any = type(model.mid_block)
    own = cls.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", forward)
        (finding,) = watch.look(model)
        assert finding.answer == UNKNOWN and finding.where == "mid_block"
    assert watch.look(model) == ()


def test_wrapper_module_and_renamed_classes() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model = unet()
    model.mid_block = Wrapper(model.mid_block)
    assert [f.answer for f in look(model)] == [UNKNOWN]
    model = unet()
    base: Any = type(model.mid_block)
    model.mid_block.__class__ = type("Renamed", (base,), {})
    assert look(model) == ()


def test_global_hook() -> None:
    model, watch = unet(), Compatibility()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert combined(watch.look(model)) == UNKNOWN == combined(look(model))
    finally:
        handle.remove()
    assert watch.look(model) == ()


class _Twice(Replacement):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def test_our_own_replacements_are_none_of_others() -> None:
    model: Any = unet()
    model.mid_block.forward = _Twice(BranchState(), model.mid_block)
    assert look(model) == ()
    add_hook_to_module(model.mid_block, ModelHook())  # captures ours
    assert look(model) == ()
    wrap(model.conv_in)
    ours = _Twice(BranchState(), model.conv_in)
    ours.displace(vars(model.conv_in)["forward"])
    model.conv_in.forward = ours  # on top of another's
    assert [f.where for f in look(model)] == ["conv_in"]


def test_what_is_said_to_be_row_wise() -> None:
    model: Any = unet()
    block = model.mid_block
    block.register_forward_hook(row_wise(lambda *a: None))
    block.register_forward_pre_hook(row_wise(functools.partial(lambda *a: None)))
    block.forward = row_wise(_Cached(block.forward))
    model.conv_in = row_wise(type("Mine", (nn.Conv2d,), {"forward": _forward}))(4, 8, 3)
    assert look(model) == ()
    attention = block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(row_wise(_Store()))
    # of what it computes keys is not said
    assert [f.answer for f in look(model)] == [Answer.NOTHING_KEPT]
    marked = row_wise(lambda *a: None)

    @functools.wraps(marked)
    def wrapper(*args: Any) -> None:
        marked(*args)

    block.register_forward_hook(wrapper)  # a wrapper is another thing
    assert {f.answer for f in look(model)} == {Answer.NOTHING_KEPT, UNKNOWN}


def test_row_wise_goes_by_what_a_thing_is_not_by_what_it_equals() -> None:
    first, second = _Settings(), _Settings()  # equal, and without a hash
    assert row_wise(first) is first and is_row_wise(first) and not is_row_wise(second)
    assert row_wise(first.__call__) == first.__call__ and is_row_wise(second.__call__)
    with pytest.raises(ValueError, match=r"mark its class, row_wise\(_Slotted\)"):
        row_wise(_Slotted())
    with pytest.raises(ValueError, match="row_wise takes what can be referred to weakly"):
        row_wise(3)
    assert not is_row_wise(_Slotted())
    row_wise(_Slotted)
    assert is_row_wise(_Slotted())


@dataclass
class _Settings:
    strength: float = 1.0

    def __call__(self, *args: Any) -> None:
        pass


class _Slotted:
    __slots__ = ("x",)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def test_entry_of_a_patched_model_and_that_of_another() -> None:
    model: Any = unet()
    model._compiled_call_impl = _Twice(BranchState(), model)
    assert look(model) == ()
    model._compiled_call_impl = _Cached(model._call_impl)
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and "a call replaced by" in finding.what


# ---- weights ----


def test_adapters_are_fine() -> None:
    from peft import LoraConfig

    model, watch = flux(), Compatibility()
    assert watch.look(model) == ()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "proj_out"]))
    model.eval()
    assert look(model) == () == watch.look(model)


def test_freeu_and_fused_projections_are_fine() -> None:
    model = unet()
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    model.fuse_qkv_projections()
    assert look(model) == ()


class _Double(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_computed_weights() -> None:
    model, watch = flux(), Compatibility()
    assert watch.look(model) == ()
    parametrize.register_parametrization(model.proj_out, "weight", _Double())
    assert answers_of(model) == {"a parametrized weight": WEIGHTS}
    assert combined(watch.look(model)) == WEIGHTS
    model = flux()
    torch.nn.utils.weight_norm(model.proj_out)
    assert answers_of(model) == {"a normalised or pruned weight": WEIGHTS}


class _Packed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_quantized_weights() -> None:
    model, watch = flux(), Compatibility()
    assert watch.look(model) == ()
    packed = model.proj_out.weight.data.as_subclass(_Packed)  # as torchao's quantize_ does
    model.proj_out.weight = nn.Parameter(packed, requires_grad=False)
    assert answers_of(model) == {"quantized layers": WEIGHTS}
    assert combined(watch.look(model)) == WEIGHTS
    model = flux()
    cls = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.proj_out.__class__ = cls
    assert answers_of(model) == {"quantized layers": WEIGHTS}


# ---- processors ----


class _Store:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return hidden_states


class _Derived(diffusers.models.attention_processor.AttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return hidden_states


@pytest.mark.parametrize("processor", [_Store, _Derived])
def test_unknown_processor(processor: Any) -> None:
    model, watch = unet(), Compatibility()
    assert watch.look(model) == ()
    model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(processor())
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and finding.where.endswith("attn2")
    assert watch.look(model) == (finding,)


def test_processors_that_are_known() -> None:
    model: Any = unet()
    cls = type("CrossFrameAttnProcessor2_0", (), {"__module__": "diffusers.pipelines"})
    model.mid_block.attentions[0].transformer_blocks[0].attn1.processor = cls()
    with pytest.raises(ValueError, match="set_default_attn_processor"):
        refuse(look(model))
    model = flux()
    if hasattr(model, "set_attention_backend"):
        model.set_attention_backend("native")
        assert set(answers_of(model).values()) == {Answer.FINE}
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    assert "context parallelism" in answers_of(model)
