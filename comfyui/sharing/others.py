"""What other nodes have put on a model: whether it acts, and what it remembers.

A patch of another node may look at all rows of a batch, draw random numbers or count its calls. In
each case the layers in front of the fork compute something else in the perturbed pass than in the
main pass, or have to run because something behind the fork waits for them.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from comfy.patcher_extension import WrappersMP

KEY = "pag_fast"
COMPILE_KEY = "torch.compile"  # of comfy_api.torch_helpers, which older engines lack

# whether patches of a kind, at a place if they have one, act at or behind the fork alone
Behind = Callable[[str, Any], bool]
F = TypeVar("F", bound=Callable[..., Any])

# wrappers inside of which, or in front of which, the model is called
_AROUND_THE_MODEL = (
    WrappersMP.PREDICT_NOISE,
    WrappersMP.CALC_COND_BATCH,
    WrappersMP.APPLY_MODEL,
    WrappersMP.DIFFUSION_MODEL,
)
_BETWEEN_THE_PASSES = (
    "sampler_calc_cond_batch_function",
    "sampler_pre_cfg_function",
    "sampler_cfg_function",
    "sampler_post_cfg_function",
)


def ours(function: F) -> F:
    """Mark ``function`` as one of this pack, which nobody has to be wary of."""
    function.pag_fast = True  # type: ignore[attr-defined]
    return function


def _foreign(function: Any) -> bool:
    return not getattr(function, "pag_fast", False)


def signature(model_options: dict[str, Any]) -> list[Any]:
    """Everything in the options that changes what a pass computes, for :func:`same`."""
    to = model_options.get("transformer_options", {})
    return [model_options.get("model_function_wrapper"), *_flat(to, 6)]


def _flat(value: Any, depth: int) -> list[Any]:
    if depth and isinstance(value, dict):
        out: list[Any] = []
        for key in sorted(value, key=str):
            out += [str(key), *_flat(value[key], depth - 1)]
        return out
    if depth and isinstance(value, list | tuple):
        return [len(value), *(leaf for one in value for leaf in _flat(one, depth - 1))]
    return [value]


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two signatures have the same objects, and equal numbers and names."""
    plain = (str, int, float, bool)
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(
        x is y or (type(x) is type(y) and isinstance(x, plain) and x == y) for x, y in pairs
    )


def patches_of(to: dict[str, Any], behind: Behind) -> list[Any]:
    """The functions of other nodes that transformer options ``to`` have called before the fork."""
    found = [to.get("optimized_attention_override")]
    for kind, patches in to.get("patches", {}).items():
        if not behind(kind, None):
            found += [one[1] if isinstance(one, tuple) else one for one in patches]
    for kind, replaced in to.get("patches_replace", {}).items():
        found += [one for where, one in replaced.items() if not behind(kind, where)]
    return [one for one in found if one is not None and _foreign(one)]


def act_on(to: dict[str, Any], behind: Behind) -> bool:
    """Whether other nodes' wrappers act on the model, or their patches in front of the fork."""
    wrappers = to.get("wrappers", {})
    return bool(patches_of(to, behind)) or any(
        functions and key not in (KEY, COMPILE_KEY)
        for kind in _AROUND_THE_MODEL
        for key, functions in wrappers.get(kind, {}).items()
    )


def act_between(model_options: dict[str, Any]) -> bool:
    """Whether functions of other nodes run between the main pass and the perturbed one."""
    for name in _BETWEEN_THE_PASSES:
        value = model_options.get(name) or []
        if any(_foreign(one) for one in (value if isinstance(value, list) else [value])):
            return True
    return False


def without_compilation(model_options: dict[str, Any]) -> dict[str, Any]:
    """Options that run the model as it is where ComfyUI's node has compiled it.

    It compiles without guards on patches, so that a graph of the main pass would run in place of
    the perturbed pass of the same shape.
    """
    to = model_options.get("transformer_options", {})
    around = to.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    if COMPILE_KEY not in around:
        return model_options
    around = {key: functions for key, functions in around.items() if key != COMPILE_KEY}
    wrappers = {**to["wrappers"], WrappersMP.APPLY_MODEL: around}
    return {**model_options, "transformer_options": {**to, "wrappers": wrappers}}


def random_state(device: torch.device) -> list[Any]:
    """The states of the random generators that everybody shares."""
    states: list[Any] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if "numpy" in sys.modules:
        _, key, *rest = sys.modules["numpy"].random.get_state()
        states += [key.tobytes(), *rest]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state().cpu().numpy().tobytes())
    return states


class Memory:
    """What the patches of other nodes hold, as far as it can be seen, to see it change.

    A patch that changes what it holds in front of the fork cannot be left out there: its next
    call, or a patch behind the fork, would find something else.
    """

    def __init__(self, to: dict[str, Any], behind: Behind) -> None:
        self.patches = patches_of(to, behind)
        self.before: list[Any] | None = None

    @torch.compiler.disable
    def begin(self) -> None:
        """The first layer is about to run."""
        self.before = self._look()

    @torch.compiler.disable
    def changed(self) -> bool:
        """Whether anything has changed since the beginning."""
        before, self.before = self.before, None
        return before is not None and not same(before, self._look())

    def _look(self) -> list[Any]:
        out: list[Any] = []
        seen: set[int] = set()
        for patch in self.patches:
            _held(patch, 6, seen, out)
        return out


_MOST = 5000  # objects that are looked at
_FEW = 64  # numbers of a tensor that are looked at
_OPAQUE = (torch.nn.Module, types.ModuleType, type)


def _held(value: Any, depth: int, seen: set[int], out: list[Any]) -> None:
    """Append what ``value`` holds: numbers as they are, objects by identity, and their parts."""
    out.append(value)
    if value is None or isinstance(value, str | int | float | bool | bytes):
        return
    if id(value) in seen or len(seen) > _MOST or not depth or not _foreign(value):
        return
    seen.add(id(value))
    if isinstance(value, torch.Generator):
        out.append(str(value.get_state().tolist()))
    elif isinstance(value, random.Random):
        out.append(str(value.getstate()))
    elif isinstance(value, torch.Tensor):
        if not value.is_inference():
            out.append(value._version)
        elif value.numel() <= _FEW:  # ComfyUI runs in inference mode, which counts no versions
            out.append(str(value.tolist()))
    else:
        for part in _parts(value):
            _held(part, depth - 1, seen, out)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [len(value), *(part for pair in value.items() for part in pair)]
    if isinstance(value, list | tuple | set | frozenset):
        return [len(value), *value]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return [*_variables(value), value.__defaults__, vars(value)]
    if isinstance(value, _OPAQUE) or type(value).__module__.startswith("comfy."):
        return []  # models are what patches work with, not what they remember
    return [vars(value)] if hasattr(value, "__dict__") else []


def _variables(function: types.FunctionType) -> list[Any]:
    """What a function sees of the variables around it."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            cells.append(None)
    around = function.__globals__
    for name in function.__code__.co_names:
        value = around.get(name)
        if isinstance(value, str | int | float | list | dict | set | torch.Generator):
            cells.append(value)
    return cells
