"""``torch.compile`` for a patched pipeline, and everything that makes it pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ...models.registry import controlnets, find, has_compiled, repeated_blocks
from ...pipelines.registry import denoiser_names
from ...settings.compile_config import CompileConfig
from ...sharing.plan import compiled_call, has_diffusers_hooks
from ..access.entry import NAME, Entry
from ..undoing import undo_after_error, undo_all


class Compilation:
    """The models of one pipeline, compiled in place; :meth:`undo` leaves them as they were found.

    Models that somebody has compiled before stay as they are.

    Raises:
        ValueError: a model that cannot be compiled.
    """

    def __init__(self, pipe: Any, config: CompileConfig) -> None:
        self.config = config
        self.models = _models(pipe)
        for model in self.models:
            _check(model, config)
        self._undo: list[Callable[[], None]] = []
        try:
            for part in _parts(pipe):
                if not has_compiled(part):
                    for model in controlnets(part):
                        self._compile(model)
        except BaseException:
            undo_after_error(self.undo)
            raise
        self._has_compiler = False
        # shapes that the denoiser has been run on ahead of need
        self.warmed: set[Any] = set()

    def _compile(self, model: Any) -> None:
        chosen = list(_repeated(model)) if self.config.regional else [model]
        chosen = [module for module in chosen if compiled_call(module) is None]
        if self.config.channels_last and hasattr(model, "down_blocks"):
            self._undo.append(_channels_last(model))
        mode = "reduce-overhead" if self.config.cuda_graphs else None
        for module in chosen:
            module.compile(fullgraph=True, dynamic=False, backend=self.config.backend, mode=mode)
            self._undo.append(partial(_uncompile, module, compiled_call(module)))

    def covers(self, pipe: Any) -> bool:
        """Whether the pipeline still has the models that were compiled."""
        now = _models(pipe)
        pairs = zip(now, self.models, strict=False)
        return len(now) == len(self.models) and all(a is b for a, b in pairs)

    def undo(self) -> None:
        """Take everything off again."""
        undo, self._undo = reversed(self._undo), []
        undo_all(*undo)

    def check_compiler(self, device: str) -> None:
        """Raises ValueError where nothing could be compiled for ``device``, such as ``"cuda"``."""
        if not self._has_compiler:
            _check_compiler(device, self.config)
            self._has_compiler = True

    def before_step(self) -> None:
        """CUDA graphs keep their outputs in place: what the last step returned is free again."""
        if self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def after_model(self, out: Any) -> Any:
        """A model's output, safe from the next replay: some schedulers keep it for steps."""
        if not self.config.cuda_graphs:
            return out
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, out)


def _uncompile(module: nn.Module, made: Any) -> None:
    """Take off what was ``made`` by compiling; what the user has compiled since stays."""
    found = vars(module).get(NAME)
    if isinstance(found, Entry) and found.displaced is made:
        found.displaced = None
    elif found is made:
        vars(module).pop(NAME)


def enough_graphs(most: int = 64) -> Any:
    """A context in which blocks that share their code may have a graph each, ``most`` in all.

    They differ in widths, in rows before and behind the fork, and in their processors; PyTorch's
    default of 8 graphs is meant to catch functions that are compiled again and again.
    """
    config: Any = torch._dynamo.config
    # until torch 2.6 it was called by what it limits
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    return config.patch(**{name: most})


def _parts(pipe: Any) -> Iterator[Any]:
    yield from (getattr(pipe, name) for name in denoiser_names(pipe))
    if getattr(pipe, "controlnet", None) is not None:
        yield pipe.controlnet


def _models(pipe: Any) -> list[Any]:
    return [model for part in _parts(pipe) for model in controlnets(part)]


def _check(model: Any, config: CompileConfig) -> None:
    name = type(model).__name__
    if model.training:
        raise ValueError(f"{name} is in training mode and is not compiled: call .eval() first.")
    moved = [n or name for n, m in model.named_modules() if has_diffusers_hooks(m)]
    moved += [n for n, m in model.named_modules() if n and hasattr(m, "_hf_hook")]
    if moved:
        raise ValueError(
            f"{name} cannot be compiled, as hooks move or cast the weights of {moved[0]} while it "
            "runs: use enable_model_cpu_offload(), which moves whole models, or compile=False."
        )
    refuse_values(model, "compiled", "compile=False")
    if config.regional and not list(_repeated(model)):
        raise ValueError(f"{name} names no repeated blocks: compile it whole (regional=False).")


def refuse_values(model: Any, what: str, instead: str) -> None:
    """Raises ValueError for a model that no graph holds, as its code waits for values."""
    found = find(model)
    if found is not None and found.countable is not None:
        raise ValueError(
            f"{type(model).__name__} reads values of tensors while it runs, as a mixture of "
            f"experts does, and cannot be {what} as a whole: use {instead}."
        )


def _check_compiler(device: str, config: CompileConfig) -> None:
    if config.backend != "inductor":
        return
    if config.cuda_graphs and device != "cuda":
        raise ValueError(
            f"cuda_graphs needs a CUDA device, and the pipeline is on {device}: move it there, or "
            "use CompileConfig(cuda_graphs=False)."
        )
    if device == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise ValueError(
                "Compiling for a CPU needs a C++ compiler, and none was found: install g++ or "
                "clang, or use compile=False."
            ) from error
    elif device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                "Compiling for a GPU needs Triton, which is not installed or does not support this "
                "GPU: install triton, or use compile=False."
            )


def _repeated(model: Any) -> Iterator[nn.Module]:
    """The blocks that ``model`` repeats, without those inside of other ones."""
    names = repeated_blocks(type(model))
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and any(cls.__name__ in names for cls in type(module).__mro__):
            inside.update(module.modules())
            yield module


def _channels_last(model: nn.Module) -> Callable[[], None]:
    """Convert a model's weights; returns what converts back those that it has changed."""
    images = [p for p in model.parameters() if p.ndim == 4]
    changed = [p for p in images if not p.is_contiguous(memory_format=torch.channels_last)]
    for p in changed:
        p.data = p.data.to(memory_format=torch.channels_last)

    def back() -> None:
        for p in changed:
            p.data = p.data.contiguous()

    return back
