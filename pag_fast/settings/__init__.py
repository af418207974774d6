"""Options as plain data, and the checks that they share."""

from __future__ import annotations
