"""Patches of other nodes that see more than their row, or do more than they return."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from patched import UNETS_SHARE, compare, costs, dit, holds, pag

# isort: split
import comfy.sample
from comfy.patcher_extension import WrappersMP

Node = Callable[[Any], Any]
TOTAL = [0]


def _on(change: Callable[[Any], None]) -> Node:
    """A node that changes a clone; what it remembers begins anew with every clone."""

    def around(patcher: Any) -> Any:
        patcher = patcher.clone()
        change(patcher)
        return patcher

    return around


def _attn1(make: Callable[[], Callable[..., Any]]) -> Node:
    return _on(lambda patcher: patcher.set_model_attn1_patch(make()))


def _louder_beside_others(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
    return q * (1 + 0.2 * len(extra["cond_or_uncond"])), k, v


def _mixed(out: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    return out * 0.9 + 0.1 * out.mean(0, keepdim=True)


def _counting() -> Callable[..., Any]:
    calls = [0]

    def patch(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        calls[0] += 1
        return q * (1 + 0.05 * (calls[0] % 5)), k, v

    return patch


def _counting_in_an_object() -> Callable[..., Any]:
    class Counter:
        calls = 0

        def patch(self, q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
            self.calls += 1
            return q * (1 + 0.05 * (self.calls % 5)), k, v

    return Counter().patch


def _counting_in_a_module() -> Callable[..., Any]:
    def patch(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        TOTAL[0] += 1
        return q * (1 + 0.05 * (TOTAL[0] % 5)), k, v

    return patch


def _counting_in_a_tensor() -> Callable[..., Any]:
    calls = torch.zeros(())

    def patch(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        calls.add_(1)
        return q * (1 + 0.05 * (calls % 5)), k, v

    return patch


def _drawing() -> Callable[..., Any]:
    def patch(q: Any, k: Any, v: Any, extra: dict[str, Any]) -> Any:
        return q * (1 + 0.3 * random.random()), k, v

    return patch


def _bridge(patcher: Any) -> None:
    """From a block in front of every fork to one behind it."""
    held: dict[str, torch.Tensor] = {}

    def down(h: torch.Tensor, to: dict[str, Any]) -> torch.Tensor:
        if to["block"] == ("input", 9):
            held["h"] = h
        return h

    def up(h: torch.Tensor, skip: torch.Tensor, to: dict[str, Any]) -> Any:
        if to["block"] == ("output", 10):
            skip = skip + 0.3 * held["h"].mean((1, 2, 3), keepdim=True)
        return h, skip

    patcher.set_model_input_block_patch(down)
    patcher.set_model_output_block_patch(up)


OUTPUT = {"unet_block": "output", "unet_block_id": 6}
UNET: dict[str, tuple[Node, dict[str, Any]]] = {
    "number of rows": (_attn1(lambda: _louder_beside_others), {}),
    "rows mixed": (_on(lambda patcher: patcher.set_model_attn1_output_patch(_mixed)), {}),
    "calls counted": (_attn1(_counting), {}),
    "calls counted by an object": (_attn1(_counting_in_an_object), {}),
    "calls counted in a module": (_attn1(_counting_in_a_module), {}),
    "calls counted in a tensor": (_attn1(_counting_in_a_tensor), {}),
    "random numbers": (_attn1(_drawing), {}),
    "from the way down to the way up": (_on(_bridge), OUTPUT),
}


def _seeded(model: tiny.Tiny, patcher: Any, **options: Any) -> torch.Tensor:
    """As KSampler does, whose noise seeds the generators of everybody."""
    random.seed(5)
    TOTAL[0] = 0
    comfy.sample.prepare_noise(torch.zeros(1), 5)
    return tiny.sample(model, patcher, **options)


@pytest.mark.parametrize("kind", UNET)
def test_a_patch_that_is_not_of_its_row_alone(kind: str) -> None:
    node, widgets = UNET[kind]
    model = tiny.build("sd15")
    with torch.inference_mode():  # as ComfyUI does
        compared = compare(model, lambda m, **k: pag(m, **widgets, **k), node, _seeded, steps=2)
    holds(compared)


def _core(module: str, name: str, *values: Any) -> Node:
    node = getattr(pytest.importorskip(f"comfy_extras.{module}"), name)

    def around(patcher: Any) -> Any:
        out = node.execute(patcher, *values)
        return out.result[0] if hasattr(out, "result") else out[0]

    return around


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_normalized_attention_guidance(name: str, caplog: Any) -> None:
    """It acts where cond and uncond share a batch: cond's rows of the main pass are others."""
    nag = _core("nodes_nag", "NAGuidance", 5.0, 0.5, 1.5)
    patch = pag if name == "sd15" else (lambda m, **k: dit(m, single_blocks="0", **k))
    holds(compare(tiny.build(name), patch, nag, steps=2))
    assert "compute something else" in caplog.text or (name == "sd15" and not UNETS_SHARE)


@pytest.mark.parametrize("node", ["HyperTile", "ToMe"])
def test_nodes_that_draw_random_numbers(node: str, caplog: Any) -> None:
    around = {
        "HyperTile": lambda: _core("nodes_hypertile", "HyperTile", 64, 4, 2, False),
        "ToMe": lambda: _core("nodes_tomesd", "TomePatchModel", 0.3),
    }[node]()
    holds(
        compare(tiny.build("sd15"), pag, around, _seeded, steps=2, shape=(1, 4, 32, 32)),
    )
    assert "random numbers" in caplog.text


def _meddling(when: float) -> Node:
    """Writes into the latents between the passes, at noise levels below ``when``."""

    def meddle(args: dict[str, Any]) -> Any:
        if float(args["sigma"][0]) < when:
            args["input"].mul_(1.01)
        return args["conds_out"]

    return _on(lambda patcher: patcher.set_model_sampler_pre_cfg_function(meddle))


@pytest.mark.parametrize("when", [1e9, 5.0], ids=["every step", "later steps"])
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_latents_that_are_written_to_between_the_passes(name: str, when: float) -> None:
    patch = pag if name == "sd15" else (lambda m, **k: dit(m, single_blocks="0", **k))
    when = when if name == "sd15" else min(when, 2.0)
    holds(compare(tiny.build(name), patch, _meddling(when), steps=3))


def test_controlnets_see_latents_that_were_written_to() -> None:
    model = tiny.build("sd15")
    positive, negative = tiny.controlled(model, tiny.controlnet(model))
    options: dict[str, Any] = {"positive": positive, "negative": negative}
    holds(compare(model, pag, _meddling(1e9), steps=2, **options))


def _noisy(patcher: Any) -> None:
    """Other latents in every forward, from the third one on."""
    seeds = itertools.count()

    def wrapper(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seed = next(seeds)
        noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
        return executor(x + 0.05 * noise * (seed > 1), *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "noisy", wrapper)


def test_a_wrapper_that_changes_what_the_model_is_given_in_later_steps() -> None:
    holds(compare(tiny.build("sd15"), pag, _on(_noisy), steps=3))


def _twice(when: Callable[[dict[str, Any]], bool], order: int) -> Node:
    """The mean of two forwards, of which one sees the picture moved."""

    def wrapper(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        to = kwargs.get("transformer_options") or next(a for a in args[::-1] if isinstance(a, dict))
        if not when(to):
            return executor(x, *args, **kwargs)
        inputs = [x, torch.roll(x, 3, -1)]
        outs = [executor(one, *args, **kwargs) for one in (inputs[::-1] if order else inputs)]
        return outs[order] * 0.7 + outs[1 - order] * 0.3

    return _on(lambda p: p.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "twice", wrapper))


TIMES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "always": lambda to: True,
    "beside uncond": lambda to: 1 in to["cond_or_uncond"],
    "alone": lambda to: 1 not in to["cond_or_uncond"],
}


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_wrapper_that_runs_the_model_twice(name: str, times: str, order: int) -> None:
    patch = pag if name == "sd15" else (lambda m, **k: dit(m, single_blocks="0", **k))
    holds(compare(tiny.build(name), patch, _twice(TIMES[times], order), steps=2))


def test_options_that_change_between_the_passes() -> None:
    def change(patcher: Any) -> None:
        def begin(executor: Any, x: Any, t: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
            options["transformer_options"]["louder"] = 1.0
            return executor(x, t, options, *args, **kwargs)

        def end(args: dict[str, Any]) -> Any:
            args["model_options"]["transformer_options"]["louder"] = 3.0
            return args["denoised"]

        patcher.set_model_attn1_patch(lambda q, k, v, extra: (q * extra.get("louder", 1.0), k, v))
        patcher.set_model_sampler_post_cfg_function(end)
        patcher.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "louder", begin)

    model = tiny.build("sd15")
    inner = tiny.Tiny("sd15", _on(change)(model.model), model.shape, model.tokens)
    holds(compare(inner, pag, steps=2))


def test_a_patch_that_gives_the_perturbed_pass_fewer_tokens() -> None:
    """As a cache of keys does, which drops the tokens that it has seen."""

    def change(patcher: Any) -> None:
        calls = itertools.count()

        def fewer(inputs: dict[str, Any]) -> dict[str, Any]:
            if next(calls) % 2:
                inputs["txt"], inputs["txt_ids"] = inputs["txt"][:, 4:], inputs["txt_ids"][:, 4:]
            return inputs

        patcher.set_model_patch(fewer, "post_input")

    patch = lambda m, **k: dit(m, single_blocks="1", **k)  # noqa: E731
    holds(compare(tiny.build("flux"), patch, _on(change), steps=2))


def test_patches_behind_the_fork_cost_nothing() -> None:
    def change(patcher: Any) -> None:
        patcher.set_model_output_block_patch(lambda h, skip, to: (h * 1.02, skip))

    compared = compare(tiny.build("sd15"), pag, _on(change), steps=1)
    holds(compared)
    costs(compared, 1.345)
