"""A text-to-image model that ships with the pack: PAG on and off without any download.

It draws 320 emoji at 64 × 64 from their Unicode names. ``tools/convert_emoji.py`` wrote its weights
from the project's diffusers pipeline. ComfyUI's own loader cannot take them: it derives widths from
whole multiples of 64 and knows one vocabulary and one width of a tiny autoencoder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.taesd.taesd
import comfy.utils
import torch
from comfy_api.latest import io
from torch import nn

FOLDER = Path(__file__).parent / "assets" / "emoji"
WEIGHTS = FOLDER / "emoji.safetensors"
SIZE = 16  # height and width of a latent: pictures of 64 × 64
TOKENS = 16
TEXT = {
    "vocab_size": 1540,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "eos_token_id": 1539,
}
SPECIAL = {"start": 1538, "end": 1539, "pad": 1539}


class _Ratio(float):
    """A ratio whose products with widths are whole: ComfyUI multiplies widths with ratios."""

    def __mul__(self, width: float) -> int:  # type: ignore[override]
        return round(float(self) * width)

    __rmul__ = __mul__


UNET: dict[str, Any] = {
    "image_size": SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, _Ratio(1.5)],
    "num_res_blocks": [2, 2],
    "transformer_depth": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "context_dim": 128,
    "num_heads": -1,
    "num_head_channels": 32,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_checkpoint": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
}
GROUPS = 16  # of its group norms; ComfyUI makes them with 32


class _Latents(comfy.latent_formats.LatentFormat):
    scale_factor = 1.0
    spacial_downscale_ratio = 4


class _Config(comfy.supported_models.SD15):
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 (SD 1.5 has eight heads everywhere)
    latent_format = _Latents
    sampling_settings = {"zsnr": True}  # noqa: RUF012 (as the engine's classes have it)

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION


class _TextModel(comfy.clip_model.CLIPTextModel):
    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(config, dtype, device, operations)
        # ComfyUI makes CLIP's own vocabulary
        size = config["vocab_size"], config["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=TOKENS,
            textmodel_json_config=dict(TEXT),
            special_tokens=SPECIAL,
            model_class=_TextModel,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class _Tokenizer(comfy.sd1_clip.SDTokenizer):
    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            tokenizer_path=str(FOLDER),
            max_length=TOKENS,
            embedding_directory=embedding_directory,
            embedding_size=TEXT["hidden_size"],
            tokenizer_data=tokenizer_data or {},
        )


def _conv(in_channels: int, out_channels: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(32, 32), nn.ReLU(), _conv(32, 32), nn.ReLU(), _conv(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


class _Autoencoder(nn.Module):
    """TAESD's kind, half as wide, with two scales; pixels are in −1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(_conv(3, 32), _Block()),
            *(_conv(32, 32, stride=2, bias=False), _Block()),
            *(_conv(32, 32, stride=2, bias=False), _Block(), _Block()),
            _conv(32, 4),
        )
        self.decoder = nn.Sequential(
            *(_conv(4, 32), nn.ReLU(), _Block(), _Block(), _Block()),
            *(nn.Upsample(scale_factor=2), _conv(32, 32, bias=False), _Block(), _Block()),
            *(nn.Upsample(scale_factor=2), _conv(32, 32, bias=False), _Block()),
            _conv(32, 3),
        )

    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.encoder(pixels / 2 + 0.5)

    def decode(self, latents: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.decoder(torch.tanh(latents / 3) * 3) * 2 - 1


def load_model(weights: dict[str, torch.Tensor]) -> Any:
    """The UNet as a ``ModelPatcher``; v-prediction with zero terminal SNR."""
    config = _Config(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    for module in model.diffusion_model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = GROUPS
    model.diffusion_model.load_state_dict(_part(weights, "model.diffusion_model."))
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_clip(weights: dict[str, torch.Tensor]) -> Any:
    """Tokenizer and text encoder, for CLIPTextEncode."""
    target = comfy.supported_models_base.ClipTarget(
        functools.partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=_Tokenizer),
        functools.partial(comfy.sd1_clip.SD1ClipModel, clip_model=_TextEncoder),
    )
    options = {"dtype": torch.float32, "initial_device": torch.device("cpu")}
    clip = comfy.sd.CLIP(target, model_options=options)
    transformer = clip.cond_stage_model.clip_l.transformer
    width = TEXT["hidden_size"]
    # the model has no projection of its own
    projection = {"text_projection.weight": torch.eye(width)}
    transformer.load_state_dict(_part(weights, "cond_stage_model.transformer.") | projection)
    return clip


def load_vae(weights: dict[str, torch.Tensor]) -> Any:
    """The autoencoder, for VAEDecode and VAEEncode; a latent's pixel is one of 4 × 4 pixels."""
    # everything but the network is what ComfyUI sets up for a tiny autoencoder
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD().state_dict(), dtype=torch.float32)
    network = _Autoencoder()
    network.load_state_dict(_part(weights, "first_stage_model."))
    vae.first_stage_model = network.eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    vae.downscale_ratio = vae.upscale_ratio = 4
    return vae


def _part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


class PagFastEmoji(io.ComfyNode):
    """Loads the model in the box."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PagFastEmoji",
            display_name="Load Emoji Model (tiny, comes with PAG Fast)",
            category="loaders",
            description=(
                "A tiny text-to-image model that comes with this pack and draws emoji from their "
                "names, at 64 × 64, in a second on a CPU. For seeing what PAG does without any "
                "download."
            ),
            search_aliases=["emoji", "tiny model", "pag example", "no download"],
            inputs=[
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64, tooltip="Pictures in the empty latent."
                )
            ],
            outputs=[
                io.Model.Output(tooltip="For KSampler; with euler and the scheduler simple."),
                io.Clip.Output(tooltip='For CLIPTextEncode: "red apple", "dog face".'),
                io.Vae.Output(),
                io.Latent.Output(tooltip="An empty latent of the size that the model draws."),
            ],
        )

    @classmethod
    def execute(cls, batch_size: int = 1) -> io.NodeOutput:
        weights = comfy.utils.load_torch_file(str(WEIGHTS), safe_load=True)
        weights = {name: tensor.float() for name, tensor in weights.items()}
        device = comfy.model_management.intermediate_device()
        latent = torch.zeros(batch_size, 4, SIZE, SIZE, device=device)
        parts = load_model(weights), load_clip(weights), load_vae(weights)
        return io.NodeOutput(*parts, {"samples": latent})
