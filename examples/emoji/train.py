"""Train the emoji model from nothing: ``python -m examples.emoji.train --out FOLDER``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from . import autoencoder, data, denoiser
from .export import save
from .pictures import save_pictures
from .tokens import train_tokenizer


def train(out: Path, *, autoencoder_steps: int, first_stage: int, checkpoint: int = 500) -> None:
    """Render the data, train both stages, save a ``StableDiffusionPAGPipeline`` to ``out``."""
    torch.manual_seed(0)
    emoji = data.load()
    save_pictures(emoji, out)
    print(f"{len(emoji.captions)} emoji at {data.SIZE} × {data.SIZE}")

    cache = out.parent / f"{out.name}-autoencoder.pt"
    vae = autoencoder.make_autoencoder().to(memory_format=torch.channels_last)
    if cache.exists():
        vae.load_state_dict(torch.load(cache, weights_only=True))
    else:
        with tqdm(total=autoencoder_steps, desc="autoencoder") as bar:
            autoencoder.train_autoencoder(
                vae, emoji.images, steps=autoencoder_steps, progress=_reporter(bar)
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vae.state_dict(), cache)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(emoji.images).latents
        error = (vae.decode(latents).sample - emoji.images).square().mean().item()
    print(f"latents {latents.mean():.3f} ± {latents.std():.3f}, reconstruction MSE {error:.5f}")

    tokenizer = train_tokenizer(emoji.captions, out / "tokenizer")
    model = denoiser.Denoiser(denoiser.make_text_encoder(tokenizer), denoiser.make_unet())
    scheduler = denoiser.make_scheduler()
    for name, part in (("vae", vae), ("text", model.text_encoder), ("unet", model.unet)):
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.2f} M parameters")
    ids = denoiser.token_ids(tokenizer, emoji.captions)
    empty = denoiser.token_ids(tokenizer, [""])
    for number, stage in enumerate(denoiser.STAGES, 1):
        if number < first_stage:
            continue
        if number == first_stage and number > 1:
            model = _load(out, model)
        with tqdm(
            total=stage.samples // stage.batch, desc=f"stage {number}", mininterval=10
        ) as bar:
            report = _reporter(bar)

            def progress(step: int, loss: float, average: Any, report: Any = report) -> None:
                report(step, loss)
                if (step + 1) % checkpoint == 0:
                    save(out, vae, tokenizer, average.text_encoder, average.unet, scheduler)

            model = denoiser.train_denoiser(
                model, scheduler, latents, ids, empty, **asdict(stage), progress=progress
            ).requires_grad_(True)
        save(out, vae, tokenizer, model.text_encoder, model.unet, scheduler)


def _load(folder: Path, model: Any) -> Any:
    """``model`` with the weights that were saved to ``folder``."""
    for part in ("text_encoder", "unet"):
        old = getattr(model, part)
        new = type(old).from_pretrained(folder / part, torch_dtype=torch.float32)
        old.load_state_dict(new.state_dict())
    return model


def _reporter(bar: Any) -> Any:
    average = [0.0]

    def report(step: int, loss: float) -> None:
        average[0] = loss if step == 0 else 0.98 * average[0] + 0.02 * loss
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{average[0]:.4f}", refresh=False)
        bar.update()

    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("emoji-model"))
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--first-stage", type=int, default=1, help="2: go on from what OUT holds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, autoencoder_steps=args.autoencoder_steps, first_stage=args.first_stage)


if __name__ == "__main__":
    main()
