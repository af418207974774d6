"""Self-Attention Guidance (arXiv 2210.00939): diffusers' ``StableDiffusionSAGPipeline``.

A step runs the UNet twice: on uncond and cond as always, and on latents whose salient parts are
blurred, with the conditioning of uncond. What is salient says the attention that each token of the
middle block receives. The two passes have different latents, so no row is computed twice; what goes
is around them: the attention map, the small launches of the degradation, and what both passes
compute from the same conditioning and the same timestep.
"""

from __future__ import annotations

from .patch import SagPatch, is_sag
from .pipeline import PatchedSagPipeline

__all__ = ["PatchedSagPipeline", "SagPatch", "is_sag"]
