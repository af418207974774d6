"""Draws the rows of one shard."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...analysis.verify import versions
from ..load import default_dtype, name_of
from ..output import progress
from .folder import Folder
from .rows import Row, batches, read_rows
from .shards import Shard


@dataclass(frozen=True)
class Job:
    """What is drawn, and how.

    Args:
        prompts: a file of rows (:func:`read_rows`).
        out: the folder of the pictures.
        pipeline: "emoji", the folder of a saved pipeline or a hub id.
        layers: perturbed layers; None: the pipeline's own.
        call: arguments of the pipeline's call for every row; a row's own win.
        seed: of the first row.
        batch: rows in one call; it is halved where memory does not suffice.
        dtype: of the weights; None: fp16 on an accelerator, fp32 on the CPU.
    """

    prompts: Path
    out: Path
    pipeline: str = "emoji"
    layers: tuple[str, ...] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch: int = 4
    dtype: str | None = None

    def settings(self, device: str | None) -> dict[str, Any]:
        """What a picture on ``device`` depends on beside its row."""
        return {
            "pipeline": name_of(self.pipeline),
            "layers": None if self.layers is None else list(self.layers),
            "call": self.call,
            "dtype": self.dtype or str(default_dtype(self.pipeline, device)).removeprefix("torch."),
        }


def generate(job: Job, shard: Shard, device: str | None = None) -> int:
    """Draw the rows of ``shard`` that have no picture yet.

    Args:
        device: of the pipeline; None: the accelerator, if there is one.

    Returns:
        how many rows failed; ``errors.I-of-N.jsonl`` names them.

    Raises:
        ValueError: rows, a pipeline or a folder that cannot be used.
    """
    rows = read_rows(job.prompts, job.seed)[shard.index :: shard.count]
    folder = Folder(job.out, shard)
    folder.sweep()
    folder.claim(job.settings(device), {"versions": versions()})
    missing = folder.missing(rows)
    failed: list[dict[str, str]] = []
    fallbacks: dict[str, Any] = {}
    if missing:
        draw = _Drawing(_pipeline(job, device), job)
        failed = _draw_all(draw, missing, folder, job.batch, shard)
        fallbacks = draw.fallbacks()
    summary = {
        "rows": len(rows),
        "there": len(rows) - len(missing),
        "drawn": len(missing) - len(failed),
        "failed": len(failed),
        "fallbacks": fallbacks,
    }
    folder.report(failed, summary)
    print(
        f"shard {shard}: {summary['drawn']} drawn, {summary['there']} were there, "
        f"{summary['failed']} failed"
    )
    return len(failed)


def _pipeline(job: Job, device: str | None) -> Any:
    from ... import patch
    from .. import load as models

    pipe = models.load(job.pipeline, models.dtype_of(job.dtype), device, as_saved=True)
    pipe.set_progress_bar_config(disable=True)
    return patch(pipe, None if job.layers is None else list(job.layers), strict=False)


class _Drawing:
    """A patched pipeline and the arguments that all rows share."""

    def __init__(self, pipe: Any, job: Job) -> None:
        self.pipe, self.call = pipe, job.call
        self.known = set(inspect.signature(type(pipe).__call__).parameters)
        # arguments that pag_fast takes from a call of any pipeline
        self.known |= {"pag_scale", "pag_applied_layers"}

    def __call__(self, rows: list[Row]) -> list[Any]:
        """The pictures of ``rows``, whose arguments are equal, in their order."""
        call = {**self.call, **rows[0].call}
        unknown = sorted(call.keys() - self.known)
        if unknown:
            raise ValueError(f"{type(self.pipe).__name__} takes no argument {unknown[0]!r}.")
        if rows[0].negative_prompt is not None:
            call["negative_prompt"] = [row.negative_prompt for row in rows]
        # one generator for each row, on the CPU: a picture depends on no other and no device
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        prompts = [row.prompt for row in rows]
        out = self.pipe(prompts, generator=generators, **call)
        pictures = getattr(out, "images", None)
        if pictures is None or len(pictures) != len(rows):
            raise ValueError(
                f"{type(self.pipe).__name__} returned no picture for each prompt: `generate` is "
                "for pipelines that turn prompts into pictures."
            )
        return list(pictures)

    def fallbacks(self) -> dict[str, Any]:
        """Where pag_fast left something to the pipeline as it is."""
        from ... import explain

        return dict(explain(self.pipe).as_dict().get("fallbacks", {}))


def _draw_all(
    draw: _Drawing, rows: list[Row], folder: Folder, size: int, shard: Shard
) -> list[dict[str, str]]:
    failed: list[dict[str, str]] = []
    with progress(len(rows), "row", name=f"shard {shard}") as bar:
        for batch in batches(rows, size):
            for row, error in _draw(draw, batch, folder):
                if error is not None:
                    message = f"{type(error).__name__}: {error}"
                    failed.append({"id": row.name, "error": message})
                bar.update()
    return failed


def _draw(
    draw: _Drawing, rows: list[Row], folder: Folder
) -> Iterator[tuple[Row, Exception | None]]:
    """Draw a batch; one that fails is drawn row by row, so that a bad row takes no other along."""
    try:
        pictures = draw(rows)
    except Exception as error:  # a pipeline raises whatever it raises
        if len(rows) == 1:
            yield rows[0], error
            return
        size = (len(rows) + 1) // 2 if _out_of_memory(error) else 1
        del error
    else:
        for row, picture in zip(rows, pictures, strict=True):
            folder.save(row, picture)
            yield row, None
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for part in batches(rows, size):
        yield from _draw(draw, part, folder)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )
