"""Films with sound, and films of the kinds that pipelines make in parts."""

from __future__ import annotations

from typing import Any

import diffusers

from sweep.spec import (
    DIM,
    Nothing,
    Spec,
    also,
    model,
    variants,
)

# ---- LTX-2: films with sound ----


def _ltx2_vae() -> Any:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


def _sound_vae() -> Any:
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        mel_bins=8,
    )


class _Connectors(Nothing):
    """Prompts as they are given, for film and sound."""

    def forward(self, embeds: Any, mask: Any, **_: Any) -> Any:
        return embeds, embeds.flip(-1), mask


_LTX2 = Spec(
    "LTX2Pipeline",
    also(
        model(
            "LTX2VideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=3,
            caption_channels=DIM,
            rope_double_precision=False,
            rope_type="split",
        ),
        vae=_ltx2_vae,
        audio_vae=_sound_vae,
        connectors=_Connectors,
    ),
    [r"^transformer_blocks\.1\.attn1"],
    everywhere=True,
    warned="cannot be seen",
    others=2,  # without the text's attention in a block, and without that between film and sound
    copies=1,
    call={
        "height": 32,
        "width": 32,
        "guidance_rescale": 0.0,
        "audio_guidance_scale": 1.0,
        "audio_guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": [2],
    },
)

# its others have spatio-temporal guidance of their own, which pag_fast.patch makes faster
SPECS = variants(_LTX2, LTX2DFRPipeline={"cfg": "", "others": 0, "call": {"generate_slots": False}})
