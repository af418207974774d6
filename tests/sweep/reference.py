"""PAG the slow and obvious way: the denoiser once more, with a dense mask in perturbed layers.

The second forward has all rows of the first, and the perturbed prediction is that of its cond rows:
nothing is sliced, so nothing has to be known about arguments. It shares no code with the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pag_fast.runtime.compatibility import row_wise
from sweep.spec import Spec

PAG_SCALE = 3.0


@row_wise
class _Identity(TorchFunctionMode):
    """Attention over image tokens is the identity; text queries and text keys are as they were."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask")
        kwargs = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        query, key, mask = kwargs["query"], kwargs["key"], kwargs.pop("attn_mask", None)
        rows, queries, keys = query.shape[0], query.shape[-2], key.shape[-2]
        image = self._image(rows, queries, keys)
        # queries of the image alone, in front of keys of text, or as many as there are keys
        asked = image if queries == keys else torch.ones(rows, queries, dtype=torch.bool)
        place = image.cumsum(1)
        own = (asked.cumsum(1)[:, :, None] == place[:, None]) & image[:, None]
        allowed = torch.where(asked[:, :, None] & image[:, None], own, True)[:, None]
        added = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, float("-inf"))
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, float("-inf"))
            added = added + mask
        return func(attn_mask=added, **kwargs)

    def _image(self, rows: int, queries: int, keys: int) -> torch.Tensor:
        if callable(self.spec.text):
            return self.spec.text(rows, queries, keys)
        image = torch.ones(rows, keys, dtype=torch.bool)
        assert keys >= self.spec.image
        if self.spec.text == "first":
            image[:, : keys - self.spec.image] = False
        elif self.spec.text == "last":
            image[:, self.spec.image :] = False
        return image


@contextlib.contextmanager
def perturbing(attentions: list[Any], spec: Spec) -> Iterator[None]:
    undo: list[Callable[[], None]] = []
    for attention in attentions:
        mode = _Identity(spec)

        def before(*_: Any, mode: Any = mode) -> None:
            mode.__enter__()

        def after(*_: Any, mode: Any = mode) -> None:
            mode.__exit__(None, None, None)

        undo.append(attention.register_forward_pre_hook(before).remove)
        undo.append(attention.register_forward_hook(after).remove)
    try:
        yield
    finally:
        for put_back in undo:
            put_back()


def _copied(x: Any) -> Any:
    """Models take residuals of adapters from their list, one by one."""
    return list(x) if isinstance(x, list) else x


def _prediction(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out[0], torch.Tensor) else torch.stack(list(out[0]))


def _replaced(out: Any, prediction: torch.Tensor) -> Any:
    new: Any = prediction if isinstance(out[0], torch.Tensor) else list(prediction.unbind(0))
    if isinstance(out, tuple):
        return (new, *out[1:])
    return dataclasses.replace(out, **{dataclasses.fields(out)[0].name: new})


@contextlib.contextmanager
def slow_pag(
    models: list[Any],
    attentions: list[Any],
    spec: Spec,
    cfg: bool,
    pag_scale: float = PAG_SCALE,
) -> Iterator[None]:
    """The denoisers ``models`` with PAG on ``attentions``."""
    scale = spec.scales[0 if cfg else 1]
    weight = spec.weight(scale) if cfg else 1.0
    rows = spec.rows if cfg else ("cond",)
    step: dict[str, Any] = {"pass": 0, "difference": None}

    def run(own: Any, args: Any, kwargs: Any) -> Any:
        def forward() -> Any:
            return own(*map(_copied, args), **{k: _copied(x) for k, x in kwargs.items()})

        out = forward()
        each = [[row] for row in rows] if spec.apart else [list(rows)]
        each += [["other"]] * spec.others
        branches = each[step["pass"] % len(each)]
        step["pass"] += 1
        slabs = list(_prediction(out).chunk(len(branches)))
        if "cond" in branches:
            at = branches.index("cond")
            with perturbing(attentions, spec):
                perturbed = _prediction(forward()).chunk(len(branches))[at]
            step["difference"] = slabs[at] - perturbed
            if not spec.everywhere:
                slabs[at] = slabs[at] + pag_scale / weight * step["difference"]
        if spec.everywhere:
            slabs = [x + pag_scale * step["difference"] for x in slabs]
        return _replaced(out, torch.cat(slabs))

    def replaced(own: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(own, args, kwargs)

        forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        return forward

    for model in models:
        model.forward = replaced(model.forward)
    try:
        yield
    finally:
        for model in models:
            del model.forward
