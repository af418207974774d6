"""The folder that all processes of a run share: pictures, a manifest, errors."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..output import to_json
from .rows import Row
from .shards import Shard

_KEY = "pag_fast"  # of the text in a picture that tells which row it is of


class Folder:
    """Pictures under the names of their rows, each written in one step.

    Args:
        path: made where it does not exist.
        shard: of this process.
    """

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path, self.shard = path, shard
        path.mkdir(parents=True, exist_ok=True)

    def claim(self, settings: dict[str, Any], about: dict[str, Any]) -> None:
        """Write what the pictures of this folder are made with, or compare with what is written.

        Args:
            settings: what a picture depends on beside its row.
            about: what is worth knowing, and may differ between runs.

        Raises:
            ValueError: the folder holds pictures of other settings.
        """
        manifest = self.path / "manifest.json"
        text = to_json({"settings": settings, **about})
        part = self._part("manifest.json")
        part.write_text(text, encoding="utf-8")
        try:
            os.link(part, manifest)  # of several processes, the first one writes
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not manifest.exists():
                os.replace(part, manifest)
        finally:
            part.unlink(missing_ok=True)
        written = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
        same = json.loads(json.dumps(settings))
        differing = [key for key in {**written, **same} if written.get(key) != same.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{self.path} holds pictures made with {key} {written.get(key)!r}, not "
                f"{same.get(key)!r}: give another folder to --out, or the settings in {manifest}."
            )

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that have no picture yet.

        Raises:
            ValueError: a picture under a row's name was made of another row.
        """
        out: list[Row] = []
        for row in rows:
            file = self.file(row)
            if not file.exists():
                out.append(row)
                continue
            with Image.open(file) as picture:
                made_of = picture.info.get(_KEY)
            if made_of != row.digest:
                raise ValueError(
                    f"{file} is a picture of another row than {row.name!r} is now: give rows ids "
                    "of their own, or another folder to --out."
                )
        return out

    def file(self, row: Row) -> Path:
        """Where a row's picture is."""
        return self.path / f"{row.name}.png"

    def save(self, row: Row, picture: Image.Image) -> None:
        """Write a picture to its place: whole, or not at all."""
        part, text = self._part(row.digest), PngInfo()  # a name may be as long as a file's can be
        text.add_text(_KEY, row.digest)
        try:
            with part.open("wb") as file:
                picture.save(file, format="PNG", pnginfo=text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.file(row))
        finally:
            part.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove parts that killed processes of this machine have left."""
        for part in self.path.glob(f".*.{_host()}-*.part"):
            process = part.name.rsplit("-", 1)[1].removesuffix(".part")
            if process.isdigit() and not _runs(int(process)):
                part.unlink(missing_ok=True)

    def report(self, failed: list[dict[str, str]], summary: dict[str, Any]) -> None:
        """Write this process's failures and its summary; an empty file says there were none."""
        lines = [to_json(one, None) for one in failed]
        self._write(f"errors.{self.shard}.jsonl", "".join(lines))
        self._write(f"report.{self.shard}.json", to_json(summary))

    def _write(self, name: str, text: str) -> None:
        part = self._part(name)
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path / name)

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.{_host()}-{os.getpid()}.part"


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum() or c == "_") or "host"


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
