"""What is known about each pipeline class, and the few methods that a patch overrides."""

from __future__ import annotations
