"""Runs the engine's main.py in this process: ``serve.py ROOT ARGUMENTS…``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import absent


def main() -> None:
    """Do what ``python main.py ARGUMENTS…`` in ROOT does, with stand-ins for what is missing."""
    script = Path(sys.argv[1], "main.py")
    absent.stand_in()
    sys.path[0] = str(script.parent)
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
