"""One pipeline: stock, the slow PAG, patched twice, and stock again."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from numerics import relative

import pag_fast
from sweep.reference import PAG_SCALE, slow_pag
from sweep.spec import Spec, build, models_of, result


def attentions(spec: Spec, models: list[Any]) -> list[Any]:
    """The modules that the layers of a spec name, without what pag_fast thinks of them."""
    found = []
    for model in models:
        for name, module in model.named_modules():
            if callable(getattr(module, "processor", None)) and any(
                re.search(layer, name) for layer in spec.layers
            ):
                found.append(module)
    assert found, f"{spec.layers} names no attention"
    return found


def check(spec: Spec, case: tuple[bool, int, int], pipe: Any = None) -> dict[str, Any]:
    """What has become of one case; raises AssertionError where it is not what the spec says."""
    pipe = pipe or build(spec)
    stock = result(spec, pipe, case)
    assert torch.isfinite(stock).all()
    models = models_of(spec, pipe)
    kind = type(models[0]).__name__
    if spec.refused and spec.refuses(*case[:2]):
        return {"denoiser": kind, "reason": refusal(spec, case, pipe, stock)}
    with slow_pag(models, attentions(spec, models), spec, case[0]):
        truth = result(spec, pipe, case)
    made = relative(truth, stock)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pag_fast.patch(pipe, spec.layers, pag_scale=PAG_SCALE)
        try:
            patched, again = result(spec, pipe, case), result(spec, pipe, case)
            steps, told = dict(pipe._pag_fast.steps), list(pipe._pag_fast.fallbacks)
        finally:
            pag_fast.unpatch(pipe)
    found = {
        "denoiser": kind,
        "difference": made,
        "error": relative(patched, truth),
        "steps": steps,
        "told": told,
    }
    assert found["error"] <= 1e-5, found
    assert made > 1e-3, f"PAG makes no difference: {found}"
    assert torch.equal(patched, again), f"a second call gives another picture: {found}"
    if case[0] or not spec.cfg:
        assert bool(told) == bool(spec.warned), found
    warned = spec.warned or ("" if case[0] else spec.warned_without)
    assert all(warned and re.search(warned, x) for x in told), found
    if spec.shared:
        assert set(steps) == {"shared"}, found
    else:  # the first is tried
        assert steps["not shared"] and steps.get("shared", 0) <= 1, found
    assert torch.equal(result(spec, pipe, case), stock), "unpatching changed the picture"
    return found


def refusal(spec: Spec, case: tuple[bool, int, int], pipe: Any, stock: torch.Tensor) -> str:
    """The sentence with which ``patch`` or the first call refuses."""
    try:
        pag_fast.patch(pipe, spec.layers, pag_scale=PAG_SCALE)
        result(spec, pipe, case)
    except ValueError as error:
        said = str(error)
    else:
        raise AssertionError(f"{spec.name} is not refused")
    finally:
        if hasattr(pipe, "_pag_fast"):
            pag_fast.unpatch(pipe)
    assert re.search(spec.refused, said), said
    assert torch.equal(result(spec, pipe, case), stock), "unpatching changed the picture"
    return said
