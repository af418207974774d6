"""Every kind of pipeline takes or refuses each option, as it is described."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from torch.distributed.device_mesh import DeviceMesh

import pag_fast
from pag_fast import PatchConfig
from pag_fast.analysis.published import CARDS
from pag_fast.pipelines.description import PipelineDescription, check_options
from pag_fast.pipelines.registry import PAG_PIPELINES, PIPELINES
from pag_fast.settings.compile_config import CompileConfig

BY_NAME = {entry.name: entry for entry in PIPELINES}


class Mesh(DeviceMesh):
    """A mesh without a process group, which patch would refuse."""

    def __init__(self) -> None:
        pass

    def __repr__(self) -> str:
        return "Mesh()"

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


_SET = {
    "layers": ["mid"],
    "perturbation": "blur",
    "branches": [pag_fast.Branch(["mid"], "identity", 1.0)],
    "pag_scale": 2.0,
    "pag_adaptive_scale": 0.1,
    "schedule": pag_fast.Schedule(start=0.5),
    "rescale_mode": "partial",
    "rescale": 0.5,
    "backend": "torch",
    "share_branches": False,
    "cache_conditioning": False,
    "fewer_launches": False,
    "compile": True,
    "graphs": True,
    "reuse": pag_fast.Reuse(every=2),
    "mesh": Mesh(),
    "exact_layers": True,
    "strict": True,
}


def _refused(entry: PipelineDescription) -> set[str]:
    refused = set()
    for option, value in _SET.items():
        more = {"rescale_mode": {"rescale": 0.5}, "rescale": {"rescale_mode": "partial"}}
        config = replace(PatchConfig(), **{option: value}, **more.get(option, {}))
        try:
            check_options(entry, config)
        except ValueError as error:
            refused.add(option)
            assert option in str(error) or option == "rescale"
    return refused


def test_every_option_is_taken_or_refused():
    assert set(_SET) == {field.name for field in fields(PatchConfig)}
    for entry in PIPELINES:
        check_options(entry, PatchConfig())
        expected = {
            "injected": set(),
            "pag": {"pag_scale", "pag_adaptive_scale"},
            "sag": set(_SET) - {"backend", "cache_conditioning", "fewer_launches", "strict"},
            "stock": set(_SET) - {"strict"},
        }[entry.kind]
        if len(entry.rows) > 2 or entry.is_observed:
            expected = {"rescale_mode", "rescale"}
        assert _refused(entry) == expected == set(_SET) - entry.options, entry.name


def test_refusals_are_sentences():
    sag, pag = BY_NAME["StableDiffusionSAGPipeline"], BY_NAME["StableDiffusionPAGPipeline"]
    with pytest.raises(ValueError, match=r"has no use for reuse=.*takes backend, cache_cond"):
        check_options(sag, PatchConfig(reuse=pag_fast.Reuse(every=2)))
    with pytest.raises(ValueError, match="perturbs no layers"):
        check_options(sag, PatchConfig(layers=["mid"]))
    with pytest.raises(ValueError, match="compiled anew: leave out compile"):
        check_options(sag, PatchConfig(compile=CompileConfig()))
    with pytest.raises(ValueError, match=r"takes it in every call: pipe\(prompt, pag_scale=2\.0\)"):
        check_options(pag, PatchConfig(pag_scale=2.0))


@pytest.mark.parametrize("mode", ["cfg", "full", "snf"])
def test_rescale_modes_that_need_uncond_next_to_cond(mode):
    strength = None if mode == "snf" else 0.5
    config = PatchConfig(rescale_mode=mode, rescale=strength)
    for entry in PIPELINES:
        if entry.kind in ("sag", "stock"):
            continue
        if len(entry.rows) > 2 or entry.is_observed:
            known = r"guidance with one scale, and .* has two|scale of CFG, which is not known"
            with pytest.raises(ValueError, match=known):
                check_options(entry, config)
            continue
        if entry.passes == "together":
            check_options(entry, config)
            continue
        with pytest.raises(ValueError, match=f"rescale_mode='{mode}' needs the unconditional"):
            check_options(entry, config)
        check_options(entry, PatchConfig(rescale_mode="partial", rescale=0.5))


def test_cards_are_those_of_described_pipelines():
    assert {card.pipeline for card in CARDS.values()} <= set(BY_NAME)
    assert [c.pipeline in PAG_PIPELINES for c in CARDS.values()] == [True] * 17 + [False] * 20
