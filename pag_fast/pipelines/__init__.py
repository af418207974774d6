"""What is known about each pipeline class."""

from __future__ import annotations
