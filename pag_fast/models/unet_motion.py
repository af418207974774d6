"""``UNetMotionModel``: Stable Diffusion 1.5 with motion modules, AnimateDiff."""

from __future__ import annotations

from ..processors import PerturbedSelfAttention
from ..sharing.layout import IMAGE_ALONE
from ..sharing.unet_plan import plan_unet
from .description import Checkpoint, ModelDescription
from .unets import IDENTITY, PLAIN, TEXT, unet_inputs

_V15_2 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "num_attention_heads": 8,
    "motion_num_attention_heads": 8,
    "motion_max_seq_length": 32,
    "use_motion_mid_block": True,
}

DESCRIPTION = ModelDescription(
    "UNetMotionModel",
    PerturbedSelfAttention,
    plan_unet,
    unet_inputs,
    # the second stands in for the first while FreeNoise is on
    blocks={"BasicTransformerBlock": IMAGE_ALONE, "FreeNoiseTransformerBlock": IMAGE_ALONE},
    text=TEXT,
    stock_processors=IDENTITY,
    replaces=PLAIN,
    fusable_processors=frozenset({"AttnProcessor", "AttnProcessor2_0"}),
    checkpoints=(
        Checkpoint(
            "AnimateDiffPAGPipeline",
            "Stable Diffusion 1.5 + motion adapter v1.5-2",
            _V15_2,
            height=512,
            width=512,
            frames=16,
        ),
    ),
)
