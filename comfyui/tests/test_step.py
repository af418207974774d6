"""The life of a step: nothing is kept for longer than it is needed, whatever happens."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import tiny
import torch
from flops import Flops
from patched import UNETS_SHARE, compare, costs, holds, pag

# isort: split
import comfy.model_management

from comfyui.sharing import step as steps
from comfyui.sharing import unet


@pytest.fixture
def kept(monkeypatch: Any) -> list[weakref.ref]:
    """Weak references to every tensor that was kept of a main pass."""
    references: list[weakref.ref] = []
    record = unet.UNetPlan.record

    def watched(self: Any, net: Any, entries: Any, options: Any) -> Any:
        to = record(self, net, entries, options)
        (handler,) = (h for _, h in to["patches"][unet.PATCH][:1])

        def handle(*args: Any) -> Any:
            out = handler(*args)
            for entry, _ in entries:
                references.extend(
                    weakref.ref(t) for t in entry.kept.values() if isinstance(t, torch.Tensor)
                )
            return out

        to["patches"][unet.PATCH][0] = (torch.nn.Module, handle)
        return to

    monkeypatch.setattr(unet.UNetPlan, "record", watched)
    return references


def _alive(references: list[weakref.ref]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_nothing_is_alive_after_a_sampling(kept: list[weakref.ref]) -> None:
    model = tiny.build("sd15")
    tiny.sample(model, pag(model.model), steps=2)
    assert kept or not UNETS_SHARE
    assert _alive(kept) == 0


@pytest.mark.parametrize("where", ["main", "perturbed", "callback", "cancelled"])
def test_an_end_in_the_middle_leaves_nothing_and_the_next_run_is_equal(
    where: str, kept: list[weakref.ref], monkeypatch: Any
) -> None:
    model = tiny.build("sd15")
    patched = pag(model.model)
    before = tiny.sample(model, patched, steps=2)
    net, calls = model.model.model.diffusion_model, [0]
    at = {"main": 3, "perturbed": 4}.get(where, 0)

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == at:
            raise RuntimeError("in the middle")

    def callback(*_: Any) -> None:
        if where == "callback":
            raise RuntimeError("in the middle")
        if where == "cancelled":
            raise comfy.model_management.InterruptProcessingException

    handle = net.register_forward_pre_hook(fail)
    try:
        with pytest.raises((RuntimeError, comfy.model_management.InterruptProcessingException)):
            tiny.sample(model, patched, steps=2, callback=callback)
    finally:
        handle.remove()
    assert _alive(kept) == 0
    assert torch.equal(before, tiny.sample(model, patched, steps=2))


def test_outside_the_window_nothing_is_computed_or_kept(kept: list[weakref.ref]) -> None:
    model = tiny.build("sd15")
    with Flops() as plain:
        without = tiny.sample(model, steps=2)
    for widgets in ({"sigma_start": 0.001, "sigma_end": 0.0}, {"scale": 0.0}):
        with Flops() as count:
            out = tiny.sample(model, pag(model.model, **widgets), steps=2)
        assert torch.equal(out, without)
        assert count.total == plain.total
    assert not kept


def test_a_window_guides_the_steps_in_it() -> None:
    model = tiny.build("sd15")
    compared = compare(model, lambda m, **k: pag(m, sigma_start=5.0, **k), steps=4)
    holds(compared)
    costs(compared, 1.3)


def _rows_alone(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
    """Runs each row of a batch alone."""
    x, t, c = args["input"], args["timestep"], args["c"]

    def row(value: Any, i: int) -> Any:
        is_batch = isinstance(value, torch.Tensor) and value.shape[0] == len(x)
        return value[i : i + 1] if is_batch else value

    return torch.cat([
        apply_model(x[i : i + 1], t[i : i + 1], **{k: row(v, i) for k, v in c.items()})
        for i in range(len(x))
    ])  # fmt: skip


def _tiles(apply_model: Any, args: dict[str, Any]) -> torch.Tensor:
    """Runs the left and the right half of a picture alone, with their part of the residuals."""
    x, t, c = args["input"], args["timestep"], args["c"]
    parts = []
    for half in (0, 1):
        control = None
        if c.get("control") is not None:
            control = {
                name: [None if r is None else r.chunk(2, dim=-1)[half] for r in residuals]
                for name, residuals in c["control"].items()
            }
        own = {"transformer_options": dict(c["transformer_options"]), "control": control}
        parts.append(apply_model(x.chunk(2, dim=-1)[half], t, **{**c, **own}))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(
    "wrapper, controlled", [(_rows_alone, False), (_tiles, False), (_tiles, True)]
)
def test_a_wrapper_that_calls_the_model_several_times_gets_the_right_picture(
    wrapper: Any, controlled: bool, caplog: Any
) -> None:
    model = tiny.build("sd15")

    def around(patcher: Any) -> Any:
        patcher = patcher.clone()
        patcher.set_model_unet_function_wrapper(wrapper)
        return patcher

    options: dict[str, Any] = {"shape": (1, 4, 32, 32)} if wrapper is _tiles else {}
    if controlled:
        made = tiny.controlled(model, tiny.controlnet(model))
        options["positive"], options["negative"] = made
    compared = compare(model, pag, around, steps=2, **options)
    holds(compared)
    assert "computes its perturbed pass whole" in caplog.text


def test_latents_written_to_in_between_are_seen(caplog: Any) -> None:
    model = tiny.build("sd15")

    def meddle(args: dict[str, Any]) -> Any:
        args["input"].mul_(1.01)
        return args["conds_out"]

    def around(patcher: Any) -> Any:
        patcher = patcher.clone()
        patcher.set_model_sampler_pre_cfg_function(meddle)
        return patcher

    compared = compare(model, pag, around, steps=1)
    holds(compared)
    assert "other inputs than the main pass" in caplog.text or not UNETS_SHARE


def test_prompts_that_need_several_batches_share_too(monkeypatch: Any) -> None:
    model = tiny.build("sd15")
    monkeypatch.setattr(type(model.model), "get_free_memory", lambda *_: 1.0)
    compared = compare(model, pag, steps=2)
    holds(compared)
    costs(compared, 1.345)


def test_each_reason_is_said_once() -> None:
    report = steps.Report()
    for _ in range(3):
        report.whole("UNetModel", "a reason")
    assert report.said == {"a reason"}
