"""Guiders for diffusers' modular pipelines whose perturbed pass recomputes nothing.

from pag_fast.guiders import PerturbedAttentionGuidance

pipe.update_components(guider=PerturbedAttentionGuidance(perturbed_guidance_layers="mid"))

Drop-ins for the classes of the same names in diffusers, which they are subclasses of. Importing
this module needs diffusers 0.36 or newer; the rest of pag_fast does not.
"""

from __future__ import annotations

import diffusers

try:
    from diffusers.guiders import BaseGuidance

    _speaks = hasattr(BaseGuidance, "prepare_inputs_from_block_state")
except ImportError:
    _speaks = False
if not _speaks:
    raise ImportError(
        "pag_fast.guiders needs diffusers 0.36 or newer: the guiders of diffusers "
        f"{diffusers.__version__} work in another way. pag_fast.patch works with it."
    )

from .perturbed_attention import PerturbedAttentionGuidance
from .skip_layer import SkipLayerGuidance

__all__ = ["PerturbedAttentionGuidance", "SkipLayerGuidance"]
