"""Ranks that do not agree raise on all, and what cannot run on ranks is a ``ValueError``."""

from __future__ import annotations

import time
from typing import Any

import processes
import pytest
import tiny
import tiny_hosts
import torch
from rank_cases import FLUX, SD3, SDXL, Case, build, check, draw, module_of

import pag_fast
from pag_fast import Branch, PatchConfig, Schedule
from pag_fast.parallel.agreement import code, settings_of
from pag_fast.perturbations import Identity, NoisyScores, SoftIdentity


def raised(mesh: Any, case: Case, **more: Any) -> str:
    try:
        draw(mesh, case, **more)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def disagree(mesh: Any) -> dict[str, str]:
    rank = mesh.get_rank()
    seed = torch.Generator().manual_seed(rank)
    wide = {"height": 32, "width": 16 if rank else 32}
    return {
        "latents or timesteps": raised(mesh, Case(SDXL), generator=seed),
        "prompts or other conditioning": raised(mesh, Case(SDXL, {"seed": rank})),
        "latents' size or dtype": raised(mesh, Case(SD3), **wide),
        "number of steps": raised(mesh, Case(SD3, {"steps": 2 + rank})),
        "perturbed layers": raised(mesh, Case(SD3, options={"layers": f"blocks.{1 + rank}"})),
    }


def test_ranks_that_differ_raise_on_all() -> None:
    for found in processes.run(2, disagree):
        for what, message in found.items():
            assert "do not draw the same picture" in message and what in message, message


# what one rank has of its own in a call of one step: only the last combination shows it
APART: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pag_scale": ({"pag_scale": 0.0}, {}),
    "guidance scales": ({"guidance_rescale": 0.7}, {}),
    "perturbation": ({}, {"perturbation": NoisyScores(seed=1)}),
    "rescale, rescale_mode": ({}, {"rescale_mode": "full", "rescale": 0.7}),
    "schedule": ({}, {"schedule": Schedule(per_step=[2.0])}),
}


def disagree_at_last(mesh: Any) -> dict[str, str]:
    found = {}
    for what, (call, options) in APART.items():
        mine = (call, options) if mesh.get_rank() else ({}, {})
        found[what] = raised(mesh, Case(SDXL, {"steps": 1}, mine[1]), **mine[0])
    weak = {"true_cfg_scale": 4.0 - mesh.get_rank()}
    found["guidance scales "] = raised(mesh, Case(FLUX, {"steps": 1}), **weak)
    weak = {"pag_scale": float(mesh.get_rank())}
    found["pag_scale "] = raised(mesh, Case(FLUX, {"steps": 1}), **weak)
    return found


def test_what_only_the_last_combination_shows() -> None:
    for found in processes.run(2, disagree_at_last):
        assert len(found) == len(APART) + 2
        for what, message in found.items():
            assert f"they differ in {what.strip()}" in message, message


def test_settings_that_are_the_same_picture_are_the_same_number() -> None:
    def one(step: Any) -> float:
        return 1.0

    alike = [
        PatchConfig(branches=[Branch("mid", "identity")], schedule=Schedule(per_step=one)),
        PatchConfig(branches=[Branch(["mid"], Identity())], schedule=Schedule(per_step=one)),
    ]
    (first, second) = [
        {name: code(value) for name, value in settings_of(config).items()} for config in alike
    ]
    assert first == second
    assert code(3) == code(3.0) != code(True)
    other = settings_of(PatchConfig(branches=[Branch("mid", SoftIdentity(0.5))]))
    assert code(other["branches"]) != first["branches"]


def moved(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": kwargs["latents"] + torch.distributed.get_rank()}


def late(mesh: Any) -> dict[str, str]:
    one, first = Case(SDXL, {"steps": 1}), mesh.get_rank() == 0
    return {
        "differ in latents behind the last step.": raised(mesh, one, callback_on_step_end=moved),
        # what a loop leaves has then been scaled for the VAE
        "step, output_type.": raised(mesh, one, output_type="pt" if first else "latent"),
    }


def test_what_comes_behind_the_last_step() -> None:
    for found in processes.run(2, late):
        for what, message in found.items():
            assert what in message


def stopped(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = torch.distributed.get_rank() == 1
    return {}


def ends_early(mesh: Any) -> str:
    return raised(mesh, Case(SDXL, {"steps": 3}), callback_on_step_end=stopped)


def test_a_call_that_ends_early_on_one_rank() -> None:
    goes_on, ended = processes.run(2, ends_early)
    assert "they differ in branches of a step" in goes_on
    assert "they differ in where the call ends" in ended


def gone(mesh: Any) -> str:
    pipe = build(mesh, Case(SDXL))
    torch.distributed.destroy_process_group()
    try:
        pipe(**tiny.call_kwargs(SDXL, pipe))
    except ValueError as error:
        return str(error)
    finally:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return "nothing was raised"


def test_a_call_without_its_process_group() -> None:
    for found in processes.run(2, gone):
        assert "mesh needs the process group that it was made in" in found


def shifted(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    return {"latents": kwargs["latents"] + rank} if step == 1 else {}


def test_latents_that_a_callback_sets_apart() -> None:
    case = Case(SDXL, {"steps": 4})
    for message in processes.run(2, raise_later, case):
        assert "they differ in latents or timesteps" in message


def raise_later(mesh: Any, case: Case) -> str:
    return raised(mesh, case, callback_on_step_end=shifted)


def wait(mesh: Any) -> tuple[str, float]:
    def fail(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if mesh.get_rank() == 1:
            raise KeyError("of a callback")
        return {}

    start = time.monotonic()
    try:
        draw(mesh, Case(SD3, {"steps": 3}), callback_on_step_end=fail)
    except (KeyError, RuntimeError) as error:
        kind = type(error).__name__
        time.sleep(0 if kind == "RuntimeError" else 4)
        return kind, time.monotonic() - start
    return "nothing", 0.0


def test_a_rank_that_has_raised_is_waited_for_until_the_timeout() -> None:
    (first, waited), (second, _) = processes.run(2, wait, timeout=2, barrier=False)
    assert (first, second) == ("RuntimeError", "KeyError")
    assert waited < 30


def refusals(mesh: Any) -> dict[str, str]:
    """What is raised by patch, by what is wrong, on a mesh of 2 × 1."""
    branch, found = mesh["branch"], {}
    lone = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1])
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "2 dimensions": (SDXL, {"mesh": mesh}),
        "has 1": (SDXL, {"mesh": mesh["other"]}),
        "one without a name": (SDXL, {"mesh": lone}),
        "DeviceMesh": (SDXL, {"mesh": 2}),
        "leave out graphs": (SDXL, {"mesh": branch, "graphs": True}),
        "nobody has described": ("HunyuanVideo15Pipeline", {"mesh": branch}),
    }
    for wrong, (name, more) in options.items():
        try:
            pag_fast.patch(module_of(name).build(name), **more)
        except ValueError as error:
            found[wrong] = str(error)
    pipe = build(mesh, Case(SDXL))
    pipe.unet.mid_block.register_forward_hook(lambda *_: None)  # of somebody else's
    try:
        pipe(**tiny.call_kwargs(SDXL, pipe))
    except ValueError as error:
        found["would see some of the rows"] = str(error)
    try:
        own_loop(tiny_hosts.build("StableDiffusionPipeline"), branch)
    except ValueError as error:
        found["runs a loop of its own"] = str(error)
    return found


def own_loop(pipe: Any, branch: Any) -> None:
    class Own(type(pipe)):  # type: ignore[misc]
        def __call__(self, text: torch.Tensor) -> None:
            self.unet(torch.zeros(2, 4, 8, 8), 1, encoder_hidden_states=text)

    pipe.__class__ = Own
    pag_fast.patch(pipe, "mid", mesh=branch)(torch.randn(2, 5, 12))


def test_refusals_are_sentences() -> None:
    for found in processes.run(2, refusals, shape={"branch": 2, "other": 1}):
        assert len(found) == 8
        for what, message in found.items():
            assert what in message and message.endswith("."), message


def test_a_mesh_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match=r'one dimension of a torch DeviceMesh.*\["branch"\]'):
        build({"branch": "nothing"}, Case(SDXL))


def too_many(mesh: Any) -> str:
    return raised(mesh, Case("Flux2Pipeline"))


def test_a_rank_too_many() -> None:
    for message in processes.run(3, too_many):
        assert "cond and perturbed for 3 ranks: use a mesh of 2." in message


def draw_two(mesh: Any) -> torch.Tensor:
    return draw(mesh, Case(SD3, {"seed": mesh["data"].get_local_rank()}))


def test_two_groups_draw_a_picture_each() -> None:
    found = processes.run(4, draw_two, shape={"data": 2, "branch": 2})
    for seed in (0, 1):
        check(f"seed {seed}", draw(None, Case(SD3, {"seed": seed})), found[2 * seed :][:2])
