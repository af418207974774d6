"""A pipeline that needs no download, and the demonstration that runs on it."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("a red apple", "a lighthouse in a storm", "two dogs on a sofa")


@dataclass(frozen=True)
class Shot:
    """One prompt, stock and patched: seconds per step, and how far the pictures are apart.

    ``largest_difference`` is between final latents, relative to the largest stock latent;
    ``largest_pixel_difference`` is in steps of an 8-bit channel.
    """

    prompt: str
    stock: float
    patched: float
    largest_difference: float
    largest_pixel_difference: int

    @property
    def speedup(self) -> float:
        return self.stock / self.patched


def small_sdxl(seed: int = 0) -> Any:
    """A real ``StableDiffusionXLPAGPipeline`` of a small configuration with seeded random weights.

    The architecture is SDXL's (two text encoders, pooled text and size conditioning, attention in
    the lower two resolutions, a deep middle); the weights are untrained, so pictures show textures.
    """
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPAGPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=48,
        block_out_channels=(64, 128, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 6),
        attention_head_dim=(2, 4, 8),
        use_linear_projection=True,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    pipe = StableDiffusionXLPAGPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
        pag_applied_layers="mid",
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def byte_tokenizer() -> Any:
    """A ``CLIPTokenizer`` with one token per byte, made on the spot."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [256 + i for i in range(256 - len(printable))]
    letters = [chr(code) for code in [*printable, *shifted]]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {word: index for index, word in enumerate(words)}
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def run_demo(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int = 6,
    guidance_scale: float = 6.0,
    pag_scale: float = 3.0,
    seed: int = 0,
    out: Path | None = None,
    config: Any = None,
    stretch: bool = False,
    progress: bool = True,
) -> list[Shot]:
    """Run every prompt stock and patched with the same seed; write pictures and numbers to ``out``.

    Writes ``demo.png`` (a row per prompt: stock, patched, their difference amplified) and
    ``demo.json``. ``stretch`` spreads each picture's contrast, for untrained weights. The pipeline
    is left unpatched.
    """
    from tqdm.auto import tqdm

    from . import PatchConfig, explain, patched

    config = config or PatchConfig()
    shots, pictures = [], []
    bar = tqdm(total=2 * steps * (len(prompts) + 1), disable=not progress, unit="step")

    def tick(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    def run(prompt: str, label: str) -> tuple[torch.Tensor, float]:
        bar.set_description(label)
        start = time.perf_counter()
        latents = pipe(
            prompt,
            guidance_scale=guidance_scale,
            pag_scale=pag_scale,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=tick,
        ).images
        if latents.device.type == "cuda":
            torch.cuda.synchronize()
        return latents, (time.perf_counter() - start) / steps

    # the first run of each pays for memory and caches
    run(prompts[0], "warm-up, stock")
    with patched(pipe, config=config):
        run(prompts[0], "warm-up, patched")
    for prompt in prompts:
        stock, stock_seconds = run(prompt, "stock  ")
        with patched(pipe, config=config):
            ours, our_seconds = run(prompt, "patched")
        difference = (stock.float() - ours.float()).abs().max() / stock.float().abs().max()
        images = [decode(pipe, latents, stretch=stretch) for latents in (stock, ours)]
        pixels = (images[0].short() - images[1].short()).abs()
        shots.append(Shot(prompt, stock_seconds, our_seconds, difference.item(), int(pixels.max())))
        pictures.append((*images, pixels))
    bar.close()
    if out is not None:
        with patched(pipe, config=config):
            explanation = explain(pipe)
        out.mkdir(parents=True, exist_ok=True)
        _grid(prompts, pictures).save(out / "demo.png")
        report = {
            "shots": [asdict(shot) for shot in shots],
            "speedup": median_speedup(shots),
            "explanation": explanation.as_dict(),
        }
        (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return shots


def median_speedup(shots: Sequence[Shot]) -> float:
    """Median over the prompts of stock seconds per step over patched."""
    return statistics.median(shot.speedup for shot in shots)


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor, *, stretch: bool = False) -> torch.Tensor:
    """The picture of one latent ``[1, C, h, w]`` as ``[H, W, 3]`` bytes."""
    image = pipe.vae.decode(
        latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False
    )[0][0].float()
    low, high = image.aminmax() if stretch else (-1.0, 1.0)
    image = (image - low) / (high - low)
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()


def _grid(prompts: Sequence[str], pictures: Sequence[tuple[torch.Tensor, ...]]) -> Any:
    from PIL import Image, ImageDraw

    height, width = pictures[0][0].shape[:2]
    head, gap = 22, 6
    sheet = Image.new(
        "RGB", (3 * width + 4 * gap, (height + 20 + gap) * len(pictures) + head), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("stock diffusers", "pag_fast", "difference x 50")):
        draw.text((gap + column * (width + gap), 5), title, fill="black")
    for row, (prompt, (stock, ours, difference)) in enumerate(zip(prompts, pictures, strict=True)):
        top = head + row * (height + 20 + gap)
        amplified = (difference.int() * 50).clamp(max=255).byte()
        for column, pixels in enumerate((stock, ours, amplified)):
            tile = Image.fromarray(pixels.numpy())
            sheet.paste(tile, (gap + column * (width + gap), top))
        draw.text((gap, top + height + 3), prompt, fill="black")
    return sheet
