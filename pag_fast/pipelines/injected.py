"""Pipelines that know nothing of PAG.

Their denoiser is called with ``[uncond | cond]`` (or with the one, then with the other), and its
output goes into the pipeline's own CFG. So PAG is added in between: the denoiser runs
``[uncond | cond | perturbed]`` and hands out ``[uncond | cond']`` with

    cond' = cond + (s/g)·(cond − perturbed)

of which CFG with scale g makes ``uncond + g·(cond − uncond) + s·(cond − perturbed)``. Without CFG,
and for guidance-distilled models, ``g`` is 1. Where nobody knows ``g`` before CFG is applied,
``s·(cond − perturbed)`` is added to uncond *and* cond: that comes to the same for every ``g``.

What has to be known of each is in its description, see :mod:`pag_fast.pipelines.registry`.
"""

from __future__ import annotations

from .description import PipelineDescription as Host
from .registry import HOSTS, denoiser_names, host_of

__all__ = ["HOSTS", "Host", "denoiser_names", "host_of"]
