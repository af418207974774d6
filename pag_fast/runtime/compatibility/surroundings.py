"""What holds while a model runs without being on it: autocast, modes, derivatives, global hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter, call
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .answers import UNKNOWN, WEIGHTS, Answer, Finding
from .hooks import torch_hook, unknown
from .origins import TRUSTED, is_row_wise, package

_CHECKPOINTS = (
    "Gradient checkpointing runs layers a second time, behind the forward, and they would not be "
    "perturbed then: call disable_gradient_checkpointing(), or run under torch.no_grad()."
)
_TRANSFORMS = (
    "Inside of torch.func's transforms (grad, vmap, jvp) tensors have no memory by which rows, "
    "prompts and weights are told apart: differentiate by backward() or in a level of "
    "torch.autograd.forward_ad, and give prompts as a batch in place of vmap."
)
# offloaded weights do not show where the model will run
_DEVICES = ("cuda", "cpu", "mps", "xpu")
_ask: Callable[[Any], Any] = call
_AUTOCAST = tuple(partial(torch.is_autocast_enabled, device) for device in _DEVICES)
# each is false nearly always, and all are asked in one call
_MODES = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_REGIONS = (*_AUTOCAST, *_MODES, peek_interpreter_stack)
_training = attrgetter("training")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Surroundings:
    """The circumstances of a forward, as far as they concern one model.

    Args:
        modules: of the model, itself first.
    """

    def __init__(self, modules: list[tuple[str, nn.Module]]) -> None:
        inner = [module for _, module in modules[1:]]
        self._dropouts = [m for m in inner if isinstance(m, _DROPOUTS)]
        self._checkpointed = [m for m in inner if hasattr(m, "gradient_checkpointing")]

    def findings(self, model: nn.Module) -> tuple[Finding, ...]:
        """What holds now."""
        found: list[Finding] = []
        if any(map(_ask, _REGIONS)):
            found += self._of_regions()
        if forward_ad._current_level >= 0:
            sentence = "tangents reach each weight by itself, so none is fused or kept."
            found.append(Finding("forward-mode differentiation", "", WEIGHTS, sentence))
        if torch.are_deterministic_algorithms_enabled():
            sentence = "all of pag_fast's operations give the same bits every time."
            found.append(Finding("deterministic algorithms", "", Answer.FINE, sentence))
        hooks = torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks
        if any(hooks):
            for hook in chain.from_iterable(h.values() for h in hooks):
                answer = torch_hook(hook)
                if answer is not None:
                    what, asks, sentence = answer
                    found.append(Finding(what, "all modules", asks, sentence))
        if torch.is_grad_enabled():
            found += self._of_gradients(model)
        if model.training or (self._dropouts and any(map(_training, self._dropouts))):
            found.append(self._of_training())
        return tuple(dict.fromkeys(found)) if found else ()

    def _of_regions(self) -> Iterator[Finding]:
        if any(map(_ask, _AUTOCAST)):
            sentence = "weights are cast where they are used, so they are not fused or kept."
            yield Finding("torch.autocast", "", WEIGHTS, sentence)
        for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
            cls = type(mode)
            if package(cls.__module__) not in TRUSTED and not is_row_wise(mode):
                what, answer, sentence = unknown(f"a mode of {cls.__module__} ({cls.__name__})")
                yield Finding(what, "", answer, sentence)
        if peek_interpreter_stack() is not None:
            yield Finding("torch.func", "", Answer.REFUSE, _TRANSFORMS)

    def _of_gradients(self, model: nn.Module) -> list[Finding]:
        # diffusers does not ask for training mode
        checkpointed = (model, *self._checkpointed)
        if any(getattr(m, "gradient_checkpointing", False) for m in checkpointed):
            return [Finding("gradient checkpointing", "", Answer.REFUSE, _CHECKPOINTS)]
        if any(p.requires_grad for p in model.parameters()):
            sentence = "gradients reach each weight by itself, so none is fused or kept."
            return [Finding("gradients", "", WEIGHTS, sentence)]
        return []

    def _of_training(self) -> Finding:
        if any(dropout.training and dropout.p > 0.0 for dropout in self._dropouts):
            sentence = "every row has a dropout of its own, so branches are not shared."
            return Finding("training mode with dropout", "", UNKNOWN, sentence)
        sentence = "weights are about to change, so they are not fused or kept."
        return Finding("training mode", "", WEIGHTS, sentence)
