"""``pag-fast bench``: steps and images per second of the user's own pipeline and settings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ...config import PatchConfig
from ..demo import PROMPTS, timed_steps
from ..metrics import generate
from ..output import progress as progress_bar
from .record import Row
from .timing import interleave, make_rows, peak_bytes
from .variants import compare_outputs, variants


def bench_pipeline(
    pipe: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    name: str,
    steps: int = 10,
    batch: int = 8,
    guidance_scale: float = 2.0,
    pag_scale: float = 3.0,
    rounds: int = 5,
    seed: int = 0,
    config: PatchConfig | None = None,
    compiled: bool = False,
    backend: Any = "inductor",
    progress: bool = True,
) -> list[Row]:
    """Time no PAG, stock PAG and patched PAG in turns on the same prompts and noise.

    Args:
        pipe: a text-to-image PAG pipeline, not patched; it is left as it is.
        prompts: repeated, or cut, to ``batch`` of them in one call.
        name: the pipeline's in the rows.
        steps: of one call; a step's time is from the end of one to the end of the next.
        config: layers and other options of the patch.
        compiled: time all of them under ``torch.compile`` too.

    Returns:
        A row per variant for a step of the whole batch, then a row per variant for an image of it.

    Raises:
        ValueError: fewer than two steps, no prompts, or what the pipeline or a layer does not know.
    """
    if steps < 2 or batch < 1 or rounds < 1 or not prompts:
        raise ValueError(
            "The benchmark needs at least 2 steps, a batch of at least 1, one round and one "
            f"prompt; got {steps} steps, batch {batch}, {rounds} rounds, {len(prompts)} prompts."
        )
    device = pipe.device.type
    ways = variants(pipe, config, compiled=compiled, backend=backend)
    jobs = [(prompts[i % len(prompts)], seed + i) for i in range(batch)]
    call = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "pag_scale": pag_scale,
    }
    settings = {
        **call,
        "batch": batch,
        "seed": seed,
        "layers": list(ways["stock"].pipe.pag_applied_layers),
    }
    laps: dict[str, list[float]] = {variant: [] for variant in ways}
    pictures: dict[str, torch.Tensor] = {}
    extra = device == "cuda"
    total = len(ways) * (1 + rounds + extra) * steps
    with progress_bar(total, "step", name=name, show=progress) as bar:

        def run(variant: str) -> None:
            bar.set_description(variant)
            with timed_steps(ways[variant].pipe, bar.update) as times:
                pictures[variant] = generate(ways[variant], jobs, **call)
            laps[variant].append(statistics.median(times))

        calls = {variant: lambda variant=variant: run(variant) for variant in ways}
        samples = interleave(calls, rounds, device)
        peaks = {v: peak_bytes(call, device) for v, call in calls.items()} if extra else {}
    shared: dict[str, Any] = {
        "suite": "user",
        "settings": settings,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "peaks": peaks,
        "psnrs": compare_outputs(pictures),
    }
    step_samples = {variant: times[1 : 1 + rounds] for variant, times in laps.items()}
    image_samples = {v: [took / batch for took in times] for v, times in samples.items()}
    return [
        *make_rows(step_samples, case=f"{name}, batch {batch}: a step", **shared),
        *make_rows(image_samples, case=f"{name}, batch {batch}: an image", **shared),
    ]
