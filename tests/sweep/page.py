"""docs/pipelines.md: every pipeline class of diffusers, and what pag_fast makes of it.

``PYTHONPATH=tests python -m sweep.page`` writes the page from the specs and what was recorded of
them; with ``--record`` the sweep runs before, and is recorded in ``results.json``.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import tiny
import tiny_hosts

import pag_fast
from pag_fast.models.registry import find
from pag_fast.pipelines.registry import PIPELINES
from sweep import specs
from sweep.check import check
from sweep.not_tried import NO_TIME, NOT_TRIED
from sweep.spec import DENOISERS, build, models_of

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
STATES = ("described", "observed", "derived", "refused", "no denoiser", "not tried")
TAKEN = STATES[:3]
_HEAD = """# Pipelines

What `pag_fast.patch` makes of each of the {total} pipeline classes of diffusers {version}: it takes
{taken} of them.

| state | classes | is |
|---|---|---|
| described | {described} | files in `pag_fast/` describe the pipeline and its denoiser |
| observed | {observed} | its passes are seen as they run; its denoiser is described |
| derived | {derived} | observed, and the denoiser's description is derived from its first forward |
| refused | {refused} | `patch`, or the first call, raises a `ValueError` that says why |
| no denoiser | {no_denoiser} | no `unet`, `transformer` or `transformer_2`: `patch` refuses it |
| not tried | {not_tried} | it may work, and checks itself where it does |

`make page` makes this page. It builds each pipeline in miniature, runs two steps with CFG and two
prompts, and two without CFG with several pictures of a prompt, where the class has these, and
compares with separate forwards within 1e-5 (`tests/sweep/`; for described ones that is done by
`tests/test_hosts.py` and the tests of PAG pipelines). `make sweep` repeats that, and
`tests/test_pipelines_page.py` holds the page to the specs.

| pipeline | denoiser | state | remarks |
|---|---|---|---|
"""


def classes() -> list[str]:
    """All pipeline classes that diffusers exports and that can be imported here."""
    found = []
    for name in dir(diffusers):
        value = getattr(diffusers, name, None)
        if inspect.isclass(value) and issubclass(value, diffusers.DiffusionPipeline):
            found.append(name)
    return sorted(found)


def described() -> dict[str, Any]:
    """The pipelines that are described, with the denoisers of their tiny ones."""
    found: dict[str, Any] = {}
    for entry in PIPELINES:
        if entry.name not in pag_fast.supported_pipelines():
            continue
        found[entry.name] = {"state": "described", "denoiser": _denoiser(entry)}
        if entry.kind == "stock":
            found[entry.name]["remarks"] = (
                "its own guidance is made faster; PAG where layers are named"
            )
        if entry.kind == "sag":
            found[entry.name]["remarks"] = "Self-Attention Guidance is made faster; no PAG"
    return found


def _denoiser(entry: Any) -> str:
    for family in (tiny_hosts.HOSTS, tiny.PIPELINES):
        if entry.name in family:
            pipe = (tiny_hosts if family is tiny_hosts.HOSTS else tiny).build(entry.name)
            return type(pipe.unet if hasattr(pipe, "unet") else pipe.transformer).__name__
    return "LTX2VideoTransformer3DModel" if "LTX2" in entry.name else "UNet2DConditionModel"


def record() -> dict[str, Any]:
    """Run the sweep, and say what has become of each pipeline."""
    found = described()
    for spec in specs():
        found[spec.name] = _tried(spec)
        print(spec.name, found[spec.name], flush=True)
    return {"diffusers": diffusers.__version__, "pipelines": found}


def _tried(spec: Any) -> dict[str, Any]:
    results = [(case, check(spec, case)) for case in spec.cases]
    made = {"denoiser": results[0][1]["denoiser"]}
    reasons = [(case, result["reason"]) for case, result in results if "reason" in result]
    if len(reasons) == len(results):
        return {**made, "state": "refused", "remarks": reasons[0][1]}
    remarks = [x for _, result in results for x in result.get("told", ())]
    remarks += [f"refused with {_case(case)}: {reason}" for case, reason in reasons]
    pipe = build(spec)
    model = models_of(spec, pipe)[0]
    pag_fast.patch(pipe, spec.layers)
    state = "derived" if find(model).is_derived else "observed"
    return {**made, "state": state, "remarks": "; ".join(dict.fromkeys(remarks))}


def _case(case: tuple[bool, int, int]) -> str:
    cfg, prompts, _ = case
    return f"{prompts} prompts {'and' if cfg else 'without'} CFG"


def state_of(name: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """The row of a class."""
    if name in recorded:
        return recorded[name]
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if name in NOT_TRIED:
        return {"state": "not tried", "remarks": NOT_TRIED[name]}
    if not set(parameters) & set(DENOISERS):
        return {"state": "no denoiser", "remarks": ""}
    return {"state": "not tried", "remarks": NO_TIME}


def page(results: dict[str, Any]) -> str:
    """The page, as text."""
    rows = {name: state_of(name, results["pipelines"]) for name in classes()}
    count = Counter(row["state"] for row in rows.values())
    head = _HEAD.format(
        total=len(rows),
        version=results["diffusers"],
        taken=sum(count[state] for state in TAKEN),
        **{state.replace(" ", "_"): count[state] for state in STATES},
    )
    lines = []
    for name, row in rows.items():
        remarks = row.get("remarks", "").replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {row.get('denoiser', '')} | {row['state']} | {remarks} |")
    return head + "\n".join(lines) + "\n"


def main() -> None:
    diffusers.logging.set_verbosity_error()
    if "--record" in sys.argv:
        RESULTS.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
