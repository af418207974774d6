"""``pag-fast generate``: pictures of many prompts, on one device or on many.

Processes share nothing but a folder: each takes the rows of its shard and writes a picture to its
place in one step, so that a run which was killed goes on where it was.
"""

from __future__ import annotations
