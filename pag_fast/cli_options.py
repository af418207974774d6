"""Options of the command line: all are checked before anything is loaded."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .settings.checks import number, whole_number

SEEDS = 2**63 - 1
PICTURES = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    """Raises ValueError with a sentence where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        # a sentence of this module names its option itself
        message = re.sub(r"^argument (--\S+): (?=\1 )", "", message).rstrip(".")
        raise ValueError(f"{message}. See `{self.prog} --help`.")


def scale(option: str) -> Callable[[str], float]:
    """Reads a guidance scale: finite, at least 0."""

    def read(text: str) -> float:
        return _sentence(lambda: number(option, _parsed(float, text), least=0.0))

    return read


def whole(option: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        value = _parsed(int, text)
        return _sentence(lambda: whole_number(option, value, least=least, most=most))

    return read


def new_file(option: str) -> Callable[[str], Path]:
    """Reads the path of a file that can be written, and leaves what is there as it is."""

    def read(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(
                f"{option} names a file to write, and {path} is a folder."
            )
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(
                f"{option} {path} cannot be written: its folder does not exist. Make it first."
            )
        try:
            if not path.exists():
                path.open("xb").close()
                path.unlink()
            elif path.is_file():  # neither a pipe nor a terminal, which would hear of it
                path.open("ab").close()
        except OSError as error:
            raise argparse.ArgumentTypeError(_not_written(option, path, error)) from error
        return path

    return read


def new_picture(option: str) -> Callable[[str], Path]:
    """Reads the path of a picture that can be drawn and written."""

    def read(text: str) -> Path:
        from .tools.output import without_matplotlib

        path = new_file(option)(text)
        if path.suffix not in PICTURES:
            known = ", ".join(PICTURES)
            raise argparse.ArgumentTypeError(f"{option} {path} has to end with one of {known}.")
        if lacking := without_matplotlib():
            raise argparse.ArgumentTypeError(f"{option} {path} cannot be drawn. {lacking}")
        return path

    return read


def out_folder(option: str) -> Callable[[str], Path]:
    """Reads the path of a folder that can be written to, or made; it is not made yet."""

    def read(text: str) -> Path:
        path, made = Path(text), []
        try:
            for folder in reversed([path, *path.absolute().parents]):
                if not folder.exists():
                    folder.mkdir()
                    made.append(folder)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise argparse.ArgumentTypeError(_not_written(option, path, error)) from error
        finally:
            for folder in reversed(made):
                folder.rmdir()
        return path

    return read


def existing_file(option: str) -> Callable[[str], Path]:
    """Reads the path of a file that can be read."""

    def read(text: str) -> Path:
        path = Path(text)
        try:
            path.open("rb").close()
        except OSError as error:
            raise argparse.ArgumentTypeError(
                f"{option} {path} cannot be read ({error.strerror})."
            ) from error
        return path

    return read


def _not_written(option: str, path: Path, error: OSError) -> str:
    return f"{option} {path} cannot be written ({error.strerror}): choose another place."


def _parsed(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def _sentence(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# ---- options that several commands have ----


def add_pipeline(command: argparse.ArgumentParser, what: str = "a pipeline of your own") -> None:
    """``--pipeline`` and ``--layers``."""
    command.add_argument(
        "--pipeline",
        default="emoji",
        metavar="PATH_OR_HUB_ID",
        help=f"{what}; omitted, the small one that ships with pag_fast",
    )
    command.add_argument("--layers", nargs="+", help="omitted, the pipeline's own")


def add_scales(command: argparse.ArgumentParser, guidance: str) -> None:
    """``--guidance-scale`` and ``--pag-scale``."""
    command.add_argument("--guidance-scale", type=scale("--guidance-scale"), help=guidance)
    command.add_argument("--pag-scale", type=scale("--pag-scale"), default=3.0)


def add_size(command: argparse.ArgumentParser, *names: str) -> None:
    """``--height``, ``--width``, or the ``names`` that are given."""
    helps = {"height": "pixels; omitted, the pipeline's own", "frames": "of a video"}
    for name in names or ("height", "width"):
        command.add_argument(f"--{name}", type=whole(f"--{name}", 1), help=helps.get(name))


def add_json(command: argparse.ArgumentParser, what: str) -> None:
    """``--json``."""
    command.add_argument("--json", type=new_file("--json"), help=f"write {what} to this file too")


def add_plot(command: argparse.ArgumentParser, what: str) -> None:
    """``--plot``."""
    command.add_argument(
        "--plot", type=new_picture("--plot"), metavar="FILE", help=f"{what}: a PNG, SVG or PDF"
    )


def add_dtype(command: argparse.ArgumentParser, text: str | None = None) -> None:
    """``--dtype``."""
    command.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help=text)


def given(arguments: argparse.Namespace, **names: str) -> dict[str, Any]:
    """Arguments of a call: for each ``option="argument"`` the value, where there is one."""
    values = {argument: getattr(arguments, option) for option, argument in names.items()}
    return {argument: value for argument, value in values.items() if value is not None}
