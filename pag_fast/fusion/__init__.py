"""The same arithmetic in fewer launches, for modules that diffusers runs unperturbed too.

In eager mode a step is a thousand kernels and more, many of them small. Three kinds can go without
a change of the result: divisions by one, separate products of the same input (queries, keys and
values; the projections of the time embedding, one in every resnet), and activations in front of the
latter. What is installed lasts as long as a call; compilers do all of this themselves, and are left
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..sharing.plan import eager_modules, has_diffusers_hooks, replace_forward
from ..sharing.rows import BranchState
from .packed_linears import Joined, is_plain
from .projections import QKV, TimeProjections
from .unit import UNIT

_DIVISORS = ("rescale_output_factor", "output_scale_factor")
# processors of diffusers that project q, k and v of one tensor and take them as views
_PROCESSORS = (
    "AttnProcessor2_0",
    "HunyuanAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
)
_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# modules that do linear(act(temb))
_TIME = {
    "AdaLayerNormContinuous": ("silu", "linear"),
    "AdaLayerNormShift": ("silu", "linear"),
    "AdaLayerNormZero": ("silu", "linear"),
    "ResnetBlock2D": ("nonlinearity", "time_emb_proj"),
    "SD35AdaLayerNormZeroX": ("silu", "linear"),
}


class Lean:
    """What can be left out in one model.

    Args:
        model: a denoiser or ControlNet that is not in training.
        perturbed: its perturbed attentions, and how many of their projections see the same rows.
        traced: join queries, keys and values of compiled modules too. Their compiler sees the one
            product; it would not join the weights itself.
    """

    def __init__(
        self, model: nn.Module, perturbed: Mapping[str, int] | None = None, *, traced: bool = False
    ) -> None:
        self.divisors: list[tuple[Any, str]] = []
        self.qkv: list[tuple[Any, list[Any], int]] = []
        self.time: list[tuple[Any, Any]] = []
        eager = {name for name, _ in eager_modules(model)}
        # weights that hooks move around would be parted in every call
        moves = any("_hf_hook" in vars(m) or has_diffusers_hooks(m) for m in model.modules())
        for name, module in model.named_modules():
            if name in eager:
                self.divisors += [(module, x) for x in _DIVISORS if vars(module).get(x) == 1.0]
                self.time += [] if moves else _time(module)
            if (traced or name in eager) and not moves:
                self.qkv += _qkv(module, (perturbed or {}).get(name, 3))
        # the attention whose processor has to be a known one, and its layers or those of the time
        self._groups: list[tuple[Any, QKV | TimeProjections]] = []

    def summary(self) -> tuple[str, ...]:
        """What is left out, in words."""
        lines = []
        if self.qkv:
            lines.append(f"queries, keys and values as one product: {len(self.qkv)} times")
        if len(self.time) > 1:
            lines.append(f"projections of the time embedding as one: {len(self.time)}")
        if self.divisors:
            lines.append(f"divisions by one left out: {len(self.divisors)}")
        return tuple(lines)

    def install(self, state: BranchState) -> list[Callable[[], None]]:
        """Put everything in place; returns what takes it off again."""
        if not self._groups or not all(group.joined.intact() for _, group in self._groups):
            self._groups = list(self._join())
        undo: list[Callable[[], None]] = []
        for module, attribute in self.divisors:
            own = getattr(module, attribute)
            setattr(module, attribute, UNIT)
            undo.append(partial(setattr, module, attribute, own))
        for attention, group in self._groups:
            group.broken = attention is not None and not _known(attention.processor)
            if isinstance(group, TimeProjections):
                group.state = state
            for module, forward in [] if group.broken else group.members:
                if "forward" not in vars(module):
                    undo.append(replace_forward(module, forward))
            undo.append(group.forget)
        return undo

    def check(self) -> None:
        """A callback may have replaced weights: groups that are no longer joined run apart."""
        for _, group in self._groups:
            group.broken = group.broken or not group.joined.intact()

    def release(self) -> None:
        """Give all weights memory of their own again."""
        for _, group in self._groups:
            group.joined.part()
        self._groups = []

    def _join(self) -> Iterator[tuple[Any, QKV | TimeProjections]]:
        for attention, linears, together in self.qkv:
            if Joined.fits(linears):
                yield attention, QKV(Joined(linears), together)
        layers = [pair for pair in self.time if is_plain(pair[1])]
        linears = [linear for _, linear in layers]
        if Joined.fits(linears):
            yield None, TimeProjections(layers, Joined(linears))


def _qkv(module: Any, together: int) -> Iterator[tuple[Any, list[Any], int]]:
    parts = module._modules
    if vars(module).get("is_cross_attention", True) or parts.get("to_q") is None:
        return
    has_text = all(parts.get(name) is not None for name in _TEXT)
    # image-only perturbed attention projects V on more rows, and into its output
    together = 3 if has_text else together
    if together > 1:
        yield module, [parts.get(name) for name in _IMAGE], together
    if has_text:
        yield module, [parts[name] for name in _TEXT], 3


def _time(module: Any) -> Iterator[tuple[Any, Any]]:
    names = _TIME.get(type(module).__name__)
    if names is None or getattr(module, "skip_time_act", False):
        return
    activation, linear = (getattr(module, name, None) for name in names)
    if type(activation) is nn.SiLU and is_plain(linear):
        yield activation, linear


def _known(processor: Any) -> bool:
    """Whether a processor takes projections that are views of one tensor."""
    from ..processors.rows import PerturbedProcessor

    return isinstance(processor, PerturbedProcessor) or type(processor).__name__ in _PROCESSORS


class Fusion(Lean):
    def __init__(self, model: Any, perturbed: Any = None, *, traced: bool, state: Any) -> None:
        super().__init__(model, perturbed, traced=traced)
        self.state = state
        self._key: Any = None
        self.entries: list[Any] = []

    def refresh(self) -> bool:
        from ..sharing.replacement import Replacement

        if not self._groups or not all(g.joined.intact() for _, g in self._groups):
            self._groups = list(self._join())
        for attention, group in self._groups:
            group.broken = attention is not None and not _known(attention.processor)
            if isinstance(group, TimeProjections):
                group.state = self.state
        key = [g.broken for _, g in self._groups]
        if key == self._key:
            return False
        self._key = key

        class Member(Replacement):
            def __init__(self, state: Any, module: Any, own: Any) -> None:
                super().__init__(state, module)
                self.own = own

            def run(self, *a: Any, **k: Any) -> Any:
                return self.own(*a, **k)

        self.entries = [(vars(m), a, UNIT) for m, a in self.divisors]
        for _, group in self._groups:
            if not group.broken:
                self.entries += [
                    (vars(m), "forward", Member(self.state, m, f)) for m, f in group.members
                ]
        return True

    def forget(self) -> None:
        for _, g in self._groups:
            g.forget()
