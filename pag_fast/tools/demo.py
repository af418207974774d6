"""The demonstration: the same prompts and seeds without PAG, with stock PAG and patched PAG."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..models.layer_names import resolve
from ..models.registry import denoiser_name, uncompiled
from ..settings.layers import as_list
from .metrics import NearestPicture, generate, psnr
from .output import progress as progress_bar
from .output import write_json

PROMPTS = (
    "red apple",
    "dog face",
    "sunflower",
    "rocket",
    "penguin",
    "butterfly",
    "hamburger",
    "crown",
)
WITHOUT, STOCK, PATCHED = "without PAG", "PAG, stock diffusers", "PAG, pag_fast"
METHODS = (WITHOUT, STOCK, PATCHED)


@dataclass
class Method:
    """One way to run the pipeline: its ``pictures`` (n, 3, H, W) in [0, 1], and each step's time.

    ``steps`` holds seconds between the ends of consecutive steps, of all calls. ``shows`` names the
    known picture nearest to each one, where the model has known pictures.
    """

    pictures: torch.Tensor
    steps: list[float]
    shows: list[str] | None = None

    @property
    def seconds_per_step(self) -> float:
        return statistics.median(self.steps)


@dataclass
class Demo:
    """What a demonstration has shown: the methods by name, and PSNR (dB) patched against stock."""

    prompts: list[str]
    settings: dict[str, Any]
    methods: dict[str, Method]
    psnr: list[float] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Stock PAG's seconds per step over patched PAG's."""
        return self.methods[STOCK].seconds_per_step / self.methods[PATCHED].seconds_per_step

    def time_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: seconds per step of each method, and ratios to no PAG and stock PAG."""
        seconds = {name: method.seconds_per_step for name, method in self.methods.items()}
        rows = [
            [
                name,
                f"{value * 1e3:.1f}",
                f"{value / seconds[WITHOUT]:.2f}×",
                "" if name == WITHOUT else f"{seconds[STOCK] / value:.2f}×",
            ]
            for name, value in seconds.items()
        ]
        return ["method", "ms per step", "of no PAG", "speed-up"], rows

    def prompt_table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: what each method's picture shows, and PSNR patched against stock."""
        shown = [(name, method.shows) for name, method in self.methods.items() if method.shows]
        rows = [
            [prompt, *(shows[i] for _, shows in shown), f"{self.psnr[i]:.1f}"]
            for i, prompt in enumerate(self.prompts)
        ]
        return ["prompt", *(name for name, _ in shown), "PSNR, dB"], rows

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; the PSNR of equal pictures is infinite."""
        return {
            "settings": self.settings,
            "speedup": self.speedup,
            "seconds_per_step": {k: m.seconds_per_step for k, m in self.methods.items()},
            "prompts": [
                {
                    "prompt": prompt,
                    "psnr": self.psnr[i],
                    "shows": {k: m.shows[i] for k, m in self.methods.items() if m.shows},
                }
                for i, prompt in enumerate(self.prompts)
            ],
        }


def run_demo(
    pipe: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    steps: int = 20,
    guidance_scale: float = 2.0,
    pag_scale: float = 3.0,
    seed: int = 0,
    batch: int = 8,
    rounds: int = 1,
    config: Any = None,
    known: NearestPicture | None = None,
    progress: bool = True,
    **call: Any,
) -> Demo:
    """Run every prompt without PAG, with stock PAG and with patched PAG, from the same noise.

    Prompt i starts from seed ``seed + i``. ``call`` takes further arguments of the pipeline's call.
    The methods take turns, ``rounds`` times, after a warm-up of each. The pipeline is left
    unpatched, with the PAG layers it had.

    Raises:
        ValueError: fewer than two steps, no prompts, or what the pipeline or a layer does not know.
    """
    from .. import PatchConfig, patched

    _check_run(pipe, prompts, steps, batch, rounds)
    config = config or PatchConfig()
    layers = perturbed_layers(pipe, config)
    jobs = [(prompt, seed + i) for i, prompt in enumerate(prompts)]
    batches = [jobs[start : start + batch] for start in range(0, len(jobs), batch)]
    settings = {
        "guidance_scale": guidance_scale,
        "pag_scale": pag_scale,
        "steps": steps,
        "seed": seed,
        "batch": min(batch, len(jobs)),
        "layers": layers,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        **call,
    }
    calls = len(METHODS) * (1 + rounds * len(batches))

    def run(method: str, part: Sequence[tuple[str, int]]) -> tuple[torch.Tensor, list[float]]:
        bar.set_description(method)
        scale = 0.0 if method == WITHOUT else pag_scale
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **call}
        with (
            patched(pipe, config=config) if method == PATCHED else _stock(pipe, layers),
            timed_steps(pipe, bar.update) as laps,
        ):
            pictures = generate(pipe, part, pag_scale=scale, **options)
        return pictures.cpu(), laps

    results: dict[str, list[Any]] = {method: [] for method in METHODS}
    with progress_bar(calls * steps, "step", name="demo", show=progress) as bar:
        for method in METHODS:
            run(method, batches[0])
        for part in batches * rounds:
            for method in METHODS:
                results[method].append(run(method, part))
    methods = {}
    for method, found in results.items():
        pictures = torch.cat([images for images, _ in found[: len(batches)]])
        laps = [lap for _, times in found for lap in times]
        methods[method] = Method(pictures, laps, known.nearest(pictures) if known else None)
    pairs = zip(methods[PATCHED].pictures, methods[STOCK].pictures, strict=True)
    return Demo(list(prompts), settings, methods, [psnr(ours, stock) for ours, stock in pairs])


def _check_run(pipe: Any, prompts: Sequence[str], steps: int, batch: int, rounds: int) -> None:
    if hasattr(pipe, "_pag_fast"):
        raise ValueError(
            "The demonstration compares with the unpatched pipeline: call unpatch(pipe) first."
        )
    if steps < 2:
        raise ValueError(f"The demonstration needs at least 2 steps to time one; got {steps}.")
    if not prompts or batch < 1 or rounds < 1:
        raise ValueError(
            "The demonstration needs at least one prompt, a batch of at least 1 and one round; got "
            f"{len(prompts)} prompts, batch {batch}, {rounds} rounds."
        )


@contextmanager
def timed_steps(pipe: Any, tick: Callable[[], Any]) -> Iterator[list[float]]:
    """Move our progress bar in place of the pipeline's; collects the seconds between steps.

    Every pipeline has a progress bar, and updates it once a step. Not all have callbacks, and some
    samplers call their scheduler twice.
    """
    laps: list[float] = []
    last: list[float] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, steps: int = 1) -> None:
            if pipe.device.type != "cpu":
                torch.accelerator.synchronize(pipe.device)
            now = time.perf_counter()
            if last:
                laps.append(now - last.pop())
            last.append(now)
            tick()

    pipe.progress_bar = lambda *args, **kwargs: Bar()
    try:
        yield laps
    finally:
        del pipe.progress_bar


def perturbed_layers(pipe: Any, config: Any) -> list[str]:
    """Full names of the perturbed layers: stock diffusers does not know every short form."""
    denoiser = uncompiled(getattr(pipe, denoiser_name(pipe)))
    wanted = pipe.pag_applied_layers if config.layers is None else config.layers
    return list(resolve(denoiser, as_list(wanted), exact=config.exact_layers))


@contextmanager
def _stock(pipe: Any, layers: list[str]) -> Iterator[None]:
    """The pipeline unpatched, with ``layers`` perturbed."""
    before = pipe.pag_applied_layers
    # not set_pag_applied_layers: it also resets the processors, to those of another model family
    pipe.pag_applied_layers = layers
    try:
        yield
    finally:
        pipe.pag_applied_layers = before


def write_demo(demo: Demo, out: Path, explanation: dict[str, Any]) -> None:
    """Write ``demo.png`` and ``demo.json`` to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    grid(demo).save(out / "demo.png")
    report = {**demo.as_dict(), "explanation": explanation}
    write_json(out / "demo.json", report)


def grid(demo: Demo, *, tile: int = 128) -> Any:
    """A labelled sheet: a column per prompt, a row per method, and the amplified difference."""
    amplify = 1000 if demo.settings["dtype"] == "float32" else 20
    pictures = [method.pictures for method in demo.methods.values()]
    difference = (pictures[-1] - pictures[-2]).abs() * amplify
    rows = [*zip(demo.methods, pictures, strict=True), (f"difference x {amplify}", difference)]
    return sheet([name for name, _ in rows], demo.prompts, [row for _, row in rows], tile=tile)


def sheet(
    rows: Sequence[str], columns: Sequence[str], pictures: Sequence[torch.Tensor], *, tile: int
) -> Any:
    """Pictures with row and column titles; ``pictures`` holds (columns, 3, H, W) for every row."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=14)
    left, head, gap = 12 + max(int(font.getlength(name)) for name in rows), 28, 4
    width, height = left + len(columns) * (tile + gap), head + len(rows) * (tile + gap)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for i, title in enumerate(columns):
        while font.getlength(title) > tile and len(title) > 4:
            title = title[:-2].rstrip(" …") + "…"
        draw.text((left + i * (tile + gap), 6), title, fill="black", font=font)
    for j, (name, row) in enumerate(zip(rows, pictures, strict=True)):
        top = head + j * (tile + gap)
        draw.text((4, top + tile // 2 - 8), name, fill="black", font=font)
        for i, picture in enumerate(row):
            pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            resized = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.LANCZOS)
            image.paste(resized, (left + i * (tile + gap), top))
    return image
