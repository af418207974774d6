"""Counting and explaining, without running a picture."""

from __future__ import annotations
