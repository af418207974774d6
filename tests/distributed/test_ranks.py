"""Branches on ranks: the picture of one process, the same bits on all, and what runs where."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import tiny
import tiny_hosts
import torch
from PIL import Image
from rank_cases import FLUX, SD3, SDXL, Case, build, check, draw, module_of

import pag_fast
from examples.ranks.draw import main as draw_example
from pag_fast import Branch, Reuse, Schedule
from pag_fast.analysis.counter import FlopCounter
from pag_fast.analysis.ranks import rank_costs
from pag_fast.perturbations.branch import NAMES
from pag_fast.runtime.compatibility.origins import row_wise
from pag_fast.tools.load import emoji

PAG = [
    Case(SDXL),
    Case("StableDiffusionXLControlNetPAGPipeline", {"batch": 2}),
    Case("StableDiffusionControlNetPAGPipeline", {"guess_mode": True}),
    Case("KolorsPAGPipeline", {"cfg": False}),
    Case("AnimateDiffPAGPipeline"),
    Case(SD3, {"batch": 2}),
    Case("HunyuanDiTPAGPipeline"),
    Case("PixArtSigmaPAGPipeline", {"num_images_per_prompt": 2}),
    Case("SanaPAGPipeline"),
]
OTHERS = [
    Case("StableDiffusion3ControlNetPipeline"),
    Case("AnimateDiffControlNetPipeline"),
    Case("StableDiffusionXLAdapterPipeline", {"batch": 2}),
    Case("StableDiffusionInstructPix2PixPipeline"),  # three branches of its own
    Case("ZImagePipeline"),  # lists of rows, cond in front
    Case("CogVideoXPipeline"),
    # uncond in a call of its own
    Case(FLUX, {"steps": 3}),
    Case("WanPipeline", {"steps": 3, "cfg": False}),
    Case("QwenImageControlNetPipeline", {"steps": 3}),
    Case("HunyuanVideoPipeline", {"steps": 3}),
    Case("Lumina2Pipeline", {"steps": 3}),
    Case("LTXPipeline"),
    Case("ChromaPipeline", {"steps": 3}),
    Case("CogView4Pipeline", {"steps": 3}),
    Case("Krea2Pipeline", {"steps": 3}),
    Case("HiDreamImagePipeline"),
    Case("Flux2KleinPipeline", {"steps": 3}),
]
TWO = (Branch("mid"), Branch("up_blocks.1", "noise", scale=1.0))
OPTIONS = [
    Case(SDXL, options={"layers": "mid", "perturbation": "noise"}),
    Case(SD3, options={"layers": "blocks.3", "perturbation": "skip"}),
    Case(SDXL, options={"layers": "mid", "perturbation": "shuffle"}),
    Case(SDXL, options={"branches": TWO}),
    Case(SDXL, {"cfg": False}, {"branches": TWO}),
    Case(SDXL, {"steps": 4}, {"schedule": Schedule(start=1, stop=3)}),
    Case(SDXL, {"steps": 4}, {"reuse": Reuse(every=2)}),
    Case(SDXL, options={"share_branches": False}),
    Case(FLUX, {"steps": 4}, {"schedule": Schedule(stop=2)}),
]


def draw_all(mesh: Any, cases: list[Case]) -> list[torch.Tensor]:
    return [draw(mesh, case) for case in cases]


def compare(size: int, cases: list[Case]) -> None:
    whole = draw_all(None, cases)
    ranks = processes.run(size, draw_all, cases)
    for case, wanted, *found in zip(cases, whole, *ranks, strict=True):
        check(case.pipeline, wanted, found)


@pytest.mark.parametrize("size", [2, 3])
def test_pictures_of_pag_pipelines(size: int) -> None:
    compare(size, PAG if size == 2 else PAG[::2])


@pytest.mark.parametrize("size", [2, 3])
def test_pictures_of_other_pipelines(size: int) -> None:
    compare(size, OTHERS if size == 2 else OTHERS[3:8])


@pytest.mark.parametrize("size", [2, 3])
def test_options(size: int) -> None:
    compare(size, OPTIONS if size == 3 else [*OPTIONS[:5], Case("Flux2Pipeline")])


@pytest.mark.parametrize(("size", "name"), [(2, SD3), (3, SDXL)])
def test_every_perturbation(size: int, name: str) -> None:
    # each alone on a rank, where no row attends
    call = {"cfg": size == 3, "steps": 1}
    compare(size, [Case(name, call, {"perturbation": perturbation}) for perturbation in NAMES])


def test_compiled() -> None:
    shallow, layers = {"num_layers": 2}, {"layers": "blocks.1"}
    whole = draw(None, Case(SD3, {}, layers, shallow))
    eager = {**layers, "compile": pag_fast.CompileConfig(backend="eager")}
    check("compiled", whole, processes.run(2, draw, Case(SD3, {}, eager, shallow)))


# ---- what runs where ----


def rows_and_flops(mesh: Any, case: Case) -> tuple[list[int], int]:
    """The rows of every forward of the denoiser, and the FLOPs of the last."""
    pipe = build(mesh, case)
    rows, flops, counter = [], [], FlopCounter()

    def before(model: Any, args: Any, kwargs: Any) -> None:
        flops.append(counter.total)

    def after(model: Any, args: Any, output: Any) -> None:
        rows.append(len(output[0]))
        flops[-1] = counter.total - flops[-1]

    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    model.register_forward_pre_hook(row_wise(before), with_kwargs=True)
    model.register_forward_hook(row_wise(after))
    module = module_of(case.pipeline)
    with counter:
        module.latents(pipe, module.call_kwargs(case.pipeline, pipe, **case.call))
    return rows, flops[-1]


PLAIN = {"cache_conditioning": False, "fewer_launches": False}


@pytest.mark.parametrize(
    ("name", "cfg"), [(SDXL, True), (SD3, True), ("PixArtSigmaPAGPipeline", False)]
)
def test_flops_of_every_rank_are_as_predicted(name: str, cfg: bool) -> None:
    case = Case(name, {"cfg": cfg}, PLAIN)
    seen: list[Any] = []
    pipe = tiny.build(name)
    model = getattr(pipe, tiny.PIPELINES[name].denoiser)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(({**kwargs}, args)), with_kwargs=True
    )
    stock = tiny.call_kwargs(name, pipe, cfg=cfg, pag_scale=0.0, batch=3)
    pipe(**stock)
    hook.remove()
    named, args = seen[0]
    names = ("sample" if hasattr(model, "down_blocks") else "hidden_states", "timestep")
    given = {**dict(zip(names, args, strict=False)), **named}

    def inputs(rows: int) -> dict[str, Any]:
        def cut(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: cut(value) for name, value in x.items()}
            return x[:rows] if isinstance(x, torch.Tensor) and x.ndim else x

        return {name: cut(x) for name, x in given.items() if name != "return_dict"}

    for size in (2, 3):
        config = pag_fast.PatchConfig(**PLAIN)
        layers = tiny.PIPELINES[name].layers["middle"]
        costs = rank_costs(model, layers, inputs, size=size, cfg=cfg, config=config)
        ran = processes.run(size, rows_and_flops, case)
        for cost, (rows, flops) in zip(costs, ran, strict=True):
            if cost.branches:
                assert rows[-1] == len(cost.branches)
                assert flops == cost.flops


def test_uncond_runs_ahead_from_the_second_step_on() -> None:
    case = Case(FLUX, {"steps": 3})
    (first, _), (second, _) = processes.run(2, rows_and_flops, case)
    # cond and perturbed apart, then uncond everywhere; then one forward in a step
    assert first == [1, 1, 1, 1] and second == [1, 1, 2, 2]


def another_negative(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step != 1:
        return {}
    return {"negative_prompt_embeds": -kwargs["negative_prompt_embeds"]}


def draw_with_another_negative(mesh: Any) -> tuple[torch.Tensor, list[str]]:
    case = Case("WanPipeline", {"steps": 4})
    pipe = build(mesh, case)
    kwargs = tiny_hosts.call_kwargs(case.pipeline, pipe, **case.call)
    names = ["negative_prompt_embeds"]
    kwargs |= {
        "callback_on_step_end": another_negative,
        "callback_on_step_end_tensor_inputs": names,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tiny_hosts.latents(pipe, kwargs), list(pipe._pag_fast.fallbacks)


def test_a_negative_prompt_that_changes_runs_again() -> None:
    whole, _ = draw_with_another_negative(None)
    found = processes.run(2, draw_with_another_negative)
    check("another negative prompt", whole, [latents for latents, _ in found])
    for _, fallbacks in found:
        assert any("encoder_hidden_states was another one" in reason for reason in fallbacks)


def explained(mesh: Any) -> tuple[str, Any] | None:
    if mesh.get_rank():
        return None
    pipe = build(mesh, Case(SDXL))
    found = pag_fast.explain(pipe, height=64, width=64)
    return str(found), found.as_dict()["ranks"]


def test_explain_says_what_runs_where() -> None:
    found, _ = processes.run(2, explained)
    assert found is not None
    text, ranks = found
    chosen = [(rank["cfg"], rank["rank"], rank["branches"]) for rank in ranks]
    assert chosen == [
        (True, 0, ["uncond"]),
        (True, 1, ["cond", "perturbed"]),
        (False, 0, ["cond"]),
        (False, 1, ["perturbed"]),
    ]
    assert all(rank["flops"] > 0 for rank in ranks)
    assert "branches on ranks" in text and "on the slowest rank, one process over it 1." in text


# ---- the example ----


def run_example(mesh: Any, out: str) -> None:
    os.environ |= {"RANK": str(mesh.get_rank()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    draw_example(["red apple", "--steps", "2", "--seed", "3", "--out", out])


def test_the_example_draws_what_one_process_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pag_fast, "explain", lambda _: "")
    processes.run(2, run_example, str(tmp_path / "apple.png"))
    pipe = pag_fast.patch(emoji())
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(3)
    wanted = pipe("red apple", num_inference_steps=2, generator=seed).images[0]
    found = Image.open(tmp_path / "apple.png")
    difference = np.asarray(found).astype(int) - np.asarray(wanted).astype(int)
    assert found.size == wanted.size and np.abs(difference).max() <= 1
