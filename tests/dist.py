"""``make dist``: wheel and sdist into dist/, and the wheel tried as a user has it.

The sdist is built from a copy of the checkout and the wheel from the sdist, so that neither holds
or lacks what lies about here. The wheel is installed without dependencies into an environment of
its own, which finds those in the environment that runs this; the checkout is on no path of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_NOT_COPIED = (".git", ".venv*", "dist", "build", "*.egg-info", "__pycache__", ".*_cache")
_BUILD = "from setuptools import build_meta as b; print(b.build_{kind}({out!r}))"
_DEMO = ("demo", "--steps", "2", "--rounds", "1", "--prompt", "red apple", "--out", "pictures")


def build(out: Path, scratch: Path) -> tuple[Path, Path]:
    """An sdist of the checkout, and a wheel of the sdist, in ``out``."""
    copy = scratch / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
    sdist = _built("sdist", copy, out)
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch / "source", filter="data")
    (source,) = (scratch / "source").iterdir()
    return sdist, _built("wheel", source, out)


def _built(kind: str, source: Path, out: Path) -> Path:
    code = _BUILD.format(kind=kind, out=str(out))
    done = _run([sys.executable, "-c", code], cwd=source)
    return out / done.splitlines()[-1]


def check_metadata(wheel: Path) -> None:
    """Raises where an index would refuse the wheel's metadata."""
    from packaging.metadata import Metadata

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
        folder = name.removesuffix("METADATA")
        missing = {f"{folder}licenses/{x}" for x in metadata.license_files or []}
        missing -= set(archive.namelist())
    assert metadata.license_files and not missing, f"licences that are not in the wheel: {missing}"
    assert metadata.description_content_type == "text/markdown" and metadata.description


def try_out(wheel: Path, scratch: Path) -> None:
    """Install the wheel and run its commands, from a folder that is no checkout."""
    home = scratch / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-qq",
            "--no-index",
            "--no-compile",
        ]
        + ["--no-deps", "--disable-pip-version-check", str(wheel)]
    )
    site = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    # a path in a .pth file is searched, and its own .pth files are not: no editable checkout
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir()
    where = "import pag_fast, pag_fast_kernels as k; print(pag_fast.__file__); print(k.__file__)"
    for file in _run([str(python), "-c", where], cwd=elsewhere).splitlines():
        assert Path(file).is_relative_to(home), f"{file} is not what was installed"
    command = str(home / "bin" / "pag-fast")
    print(_run([command, "--version"], cwd=elsewhere).strip())
    shown = _run([command, *_DEMO], cwd=elsewhere)
    assert shown.splitlines()[-1] == "pictures side by side: pictures/demo.png", shown
    made = sorted(path.name for path in (elsewhere / "pictures").iterdir())
    assert made == ["demo.json", "demo.png"], made


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Output of a command, in an environment without paths of ours."""
    ours = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Build, check and try."""
    out = ROOT / "dist"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sdist, wheel = build(out, scratch)
        check_metadata(wheel)
        try_out(wheel, scratch)
    for file in (sdist, wheel):
        print(f"dist/{file.name}, {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
