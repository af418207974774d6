"""The README's table of families and features: what descriptions say, and what tests exercise.

A cell is filled where a test named in ``EVIDENCE`` runs with a pipeline of that family among its
parameters, so it is empty where nobody has tried. ``make table`` writes the table.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import tiny_hosts

import pag_fast
import pag_fast.pipelines

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- features -->", "<!-- end of features -->"
COLUMNS = (
    *("PAG", "added", "guider", "SAG", "ComfyUI"),
    *("compile", "graphs", "ControlNet", "IP-Adapter", "LoRA", "ranks"),
)
# tests by file; what a column is filled from, beside the descriptions
EVIDENCE: dict[str, tuple[tuple[str, str], ...]] = {
    "guider": (
        ("test_guiders", "test_pag_equals_three_whole_forwards"),
        ("test_guiders", "test_pag_in_models_without_a_pag_pipeline"),
    ),
    "compile": (
        ("test_compile", "test_one_graph_for_all_steps_scales_prompts_and_calls"),
        ("test_hosts", "test_compiled_without_recompiling"),
        ("test_feature_table", "test_compiled"),
    ),
    "graphs": (
        ("test_graphs", "test_the_picture_is_the_same"),
        ("test_graphs", "test_pipelines_without_pag"),
        ("test_feature_table", "test_graphs"),
    ),
    "ControlNet": (
        ("test_parity", "test_patched_equals_stock"),
        ("test_hosts", "test_equals_three_separate_forwards"),
    ),
    "IP-Adapter": (("test_features_adapters", "test_ip_adapter"),),
    "LoRA": (("test_features_adapters", "test_lora"), ("test_feature_table", "test_lora")),
}
# what tests call models by that are no pipelines
_CASES = {
    "sd": "StableDiffusionPAGPipeline",
    "sd15": "StableDiffusionPAGPipeline",
    "xl": "StableDiffusionXLPAGPipeline",
    "sdxl": "StableDiffusionXLPAGPipeline",
    "motion": "AnimateDiffPAGPipeline",
    "sd3": "StableDiffusion3PAGPipeline",
    "sd35": "StableDiffusion3PAGPipeline",
    "hunyuan": "HunyuanDiTPAGPipeline",
    "pixart": "PixArtSigmaPAGPipeline",
    "sana": "SanaPAGPipeline",
    "flux": "FluxPipeline",
    "chroma": "ChromaPipeline",
    "qwen": "QwenImagePipeline",
    "qwen_image": "QwenImagePipeline",
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "cogvideox": "CogVideoXPipeline",
    "hunyuan_video": "HunyuanVideoPipeline",
    "lumina2": "Lumina2Pipeline",
    "z_image": "ZImagePipeline",
}


def families() -> dict[str, tuple[Any, ...]]:
    """The described pipelines of each file, by what the file is about."""
    found = {}
    for entry in pkgutil.iter_modules(pag_fast.pipelines.__path__):
        module = importlib.import_module(f"{pag_fast.pipelines.__name__}.{entry.name}")
        if entry.name != "registry" and hasattr(module, "PIPELINES"):
            title = re.split(r"[:\n]", module.__doc__)[0].rstrip(".")
            found[title] = module.PIPELINES
    return found


def known() -> bool:
    """Whether this diffusers has every described pipeline: with an older one tests run fewer."""
    described = {entry.name for entries in families().values() for entry in entries}
    return described <= set(pag_fast.supported_pipelines())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield _CASES.get(value, value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def exercised(file: str, function: str) -> set[str]:
    """The pipelines among the parameters of a test.

    Raises:
        AttributeError: there is no such test any more.
    """
    test = getattr(importlib.import_module(file), function)
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    values = mark_values(marks)
    return set(_strings(values))


def mark_values(marks: Any) -> list[Any]:
    """The values of parametrize marks, those of ``pytest.param`` included.

    Raises:
        TypeError: values that can be read once, which pytest has done when it collected the test.
    """
    if any(iter(mark.args[1]) is mark.args[1] for mark in marks):
        raise TypeError("the values of a parametrized test are no list: write list(...)")
    rows = [row for mark in marks for row in mark.args[1]]
    return [list(getattr(row, "values", row)) if hasattr(row, "marks") else row for row in rows]


def _ranks() -> set[str]:
    """Of the tests of several processes: parameters, lists of cases, and the model that ships."""
    folder = ROOT / "tests" / "distributed"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    found = set()
    for path in sorted(folder.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        for name, value in vars(module).items():
            if isinstance(value, list | tuple):
                found |= {case.pipeline for case in value if hasattr(case, "pipeline")}
            if name.startswith("test_"):
                found |= exercised(path.stem, name)
                if name == "test_killed_in_the_middle_and_started_again":  # generate, two processes
                    found.add("StableDiffusionPAGPipeline")
    return found


def _comfy() -> dict[str, str]:
    """The models that the tests of the ComfyUI nodes run, and whether whole: read, not imported."""
    folder = ROOT / "comfyui" / "tests"
    table = next(
        node.value
        for node in ast.parse((folder / "tiny.py").read_text("utf-8")).body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "_FAMILIES"
    )
    names = [key.value for key in table.keys]
    source = (folder / "test_dit.py").read_text("utf-8")
    whole = re.search(r'^@pytest.mark.parametrize\("name", (\[.*\])\)\ndef \w+whole', source, re.M)
    apart = ast.literal_eval(whole[1]) if whole else []
    return {_CASES[name]: "whole" if name in apart else "✓" for name in names}


def cells() -> dict[str, dict[str, str]]:
    """The cells of each family, by column."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    tested = {
        column: set().union(*(exercised(*test) for test in tests))
        for column, tests in EVIDENCE.items()
    }
    tested["ControlNet"] = {name for name in tested["ControlNet"] if "ControlNet" in name}
    tested["ranks"] = _ranks()
    comfy = _comfy()
    # test_parity.py, test_hosts.py, test_stock_guidance.py and test_sag.py run every one of these
    run = {*tiny.PIPELINES, *tiny_hosts.HOSTS}
    for title, entries in families().items():
        row, names = found[title], [entry.name for entry in entries]
        count = Counter(e.kind for e in entries if e.name in run or e.kind in ("sag", "stock"))
        row["PAG"] = str(count["pag"] or ("STG" if count["stock"] else ""))
        row["added"] = str(count["injected"] or "")
        row["SAG"] = "✓" if count["sag"] else ""
        row["ComfyUI"] = next((comfy[name] for name in names if name in comfy), "")
        for column, having in tested.items():
            row[column] = "✓" if having & set(names) else ""
    return found


def table() -> str:
    """The table, as Markdown."""
    rows = sorted(cells().items(), key=lambda item: (not item[1]["PAG"].isdigit(), item[0]))
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{':-:|' * len(COLUMNS)}"]
    for title, row in rows:
        lines.append(f"| {title} | {' | '.join(row[column] for column in COLUMNS)} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def written(text: str) -> str:
    """A page with the table in place of the one that it has."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(written(README.read_text("utf-8")), encoding="utf-8")
