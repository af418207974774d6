"""What reuse of the guidance costs and saves: ``python -m examples.emoji.lossy``.

The model that ships, without CFG and with faint prompts, where PAG makes the largest difference:
each setting of :class:`pag_fast.Reuse` against the exact pipeline, same seeds. Writes
``docs/lossy.png``, the table in ``docs/lossy.md`` and ``examples/emoji/lossy.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import pag_fast
from pag_fast import Reuse
from pag_fast.tools import load as models
from pag_fast.tools.bench.timing import interleave
from pag_fast.tools.metrics import NearestPicture, generate, prompt_accuracy, psnr, ssim

from .gallery import DOCS, replace_table, spread

RESULT = Path(__file__).parent / "lossy.json"
STEPS = 12
CALL: dict[str, Any] = {
    "prompt_weight": 0.45,
    "guidance_scale": 1.0,
    "num_inference_steps": STEPS,
}
PAG_SCALE = 1.5
SETTINGS: dict[str, Reuse | None] = {
    "exact": None,
    **{f"every={k}": Reuse(every=k) for k in (2, 3, 4, 6)},
    **{f"drift={b:g}": Reuse(drift=b) for b in (0.05, 0.1, 0.2, 0.4)},
}
WITHOUT = "without PAG"


def pipelines() -> dict[str, Any]:
    """A patched pipeline for every setting; the exact one is also the one that runs without PAG."""
    pipes = {name: pag_fast.patch(models.emoji(), reuse=reuse) for name, reuse in SETTINGS.items()}
    for pipe in pipes.values():
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.set_progress_bar_config(disable=True)
    return {**pipes, WITHOUT: pipes["exact"]}


def arguments_of(name: str) -> dict[str, Any]:
    """Arguments of a setting's calls."""
    return {**CALL, "pag_scale": 0.0 if name == WITHOUT else PAG_SCALE}


def fidelity(pipes: dict[str, Any], prompts: int) -> list[dict[str, Any]]:
    """A row for every setting: how near its pictures are to the exact ones, and to the prompt."""
    pictures = models.emoji_pictures()
    known = NearestPicture(pictures.captions, pictures.images)
    captions = spread(pictures.captions, prompts)
    jobs = [(caption, i) for i, caption in enumerate(captions[:16])]
    exact, rows = torch.empty(0), []
    for name, pipe in tqdm(pipes.items(), unit="setting"):
        pipe._pag_fast.steps.clear()
        images = generate(pipe, jobs, **arguments_of(name))
        ran = 0 if name == WITHOUT else pipe._pag_fast.steps["shared"]
        exact = images if name == "exact" else exact
        accuracy = prompt_accuracy(pipe, known, captions, seeds=(0,), **arguments_of(name))
        rows.append(
            {
                "setting": name,
                "perturbed_steps": ran,
                "psnr": None if name == "exact" else psnr(images, exact),
                "ssim": ssim(images, exact),
                "top1": accuracy.top1,
                "images": accuracy.images,
            }
        )
    return rows


def speeds(pipes: dict[str, Any], rounds: int) -> dict[str, float]:
    """How many times as fast as the exact pipeline each setting is: medians within rounds."""
    captions = spread(models.emoji_pictures().captions, 8)
    jobs = [(caption, i) for i, caption in enumerate(captions)]
    samples = interleave(
        {
            name: lambda name=name, pipe=pipe: generate(pipe, jobs, **arguments_of(name))
            for name, pipe in pipes.items()
        },
        rounds,
    )
    base = samples["exact"]
    return {
        name: statistics.median(b / a for a, b in zip(own, base, strict=True))
        for name, own in samples.items()
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a Markdown table."""
    lines = [
        "| `reuse` | perturbed branch in | speed, × exact | PSNR | SSIM | prompt accuracy |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = row["setting"]
        label = name if name in ("exact", WITHOUT) else f"`Reuse({name})`"
        close = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        ran = f"{row['perturbed_steps']} of {STEPS} steps"
        lines.append(
            f"| {label} | {ran} | {row['speedup']:.2f} | {close} | {row['ssim']:.3f} "
            f"| {100 * row['top1']:.0f} % |"
        )
    return lines


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """PSNR and prompt accuracy over speed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for kind, colour in (("every", "tab:blue"), ("drift", "tab:orange")):
        own = [row for row in rows if row["setting"].startswith(kind)]
        own.sort(key=lambda row: row["speedup"])
        speeds = [row["speedup"] for row in own]
        left.plot(
            speeds, [row["psnr"] for row in own], "o-", color=colour, label=f"Reuse({kind}=…)"
        )
        right.plot(speeds, [100 * row["top1"] for row in own], "o-", color=colour)
        for row in own:
            at = row["speedup"], row["psnr"]
            left.annotate(
                row["setting"].split("=")[1], at, xytext=(4, 4), textcoords="offset points"
            )
    named = {row["setting"]: row for row in rows}
    for name, colour in (("exact", "black"), (WITHOUT, "grey")):
        row = named[name]
        right.plot(row["speedup"], 100 * row["top1"], "s", color=colour, label=name)
        if row["psnr"] is not None:
            left.plot(row["speedup"], row["psnr"], "s", color=colour)
    left.set(xlabel="speed, × exact PAG", ylabel="PSNR to exact, dB")
    right.set(xlabel="speed, × exact PAG", ylabel="prompt accuracy, %")
    left.legend(loc="upper right")
    right.legend(loc="lower left")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=64, help="for the accuracy of each setting")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is timed")
    parser.add_argument("--times-only", action="store_true", help="keep the fidelity measured last")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipes = pipelines()
    if arguments.times_only:
        rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    else:
        rows = fidelity(pipes, arguments.prompts)
    times = speeds(pipes, arguments.rounds)
    rows = [{**row, "speedup": times[row["setting"]]} for row in rows]
    RESULT.write_text(json.dumps({"steps": STEPS, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    replace_table(DOCS / "lossy.md", "reuse", table(rows))
    plot(rows, DOCS / "lossy.png")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
