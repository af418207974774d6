"""Descriptions of models that nobody has described: seen in one forward.

``structure.py`` finds what may be attention, ``trace.py`` runs the model once with NaN as its image
and attention that mixes no tokens, and so sees which tokens are the image's, what runs in which
order, and which attention can hand on more rows. ``plan.py`` makes a branch plan of that.
"""

from __future__ import annotations
