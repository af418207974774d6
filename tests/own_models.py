"""A denoiser and pipelines that diffusers does not have, as somebody might bring them along.

``Denoiser`` can perturb its own attention by a dense mask (``perturb``), which shares no code with
the package: that is the truth of the tests.
"""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

TEXT, WIDTH, HEADS, SIZE = 5, 16, 2, 4


class Plain:
    """A processor that calls PyTorch."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in attn.qkv(x))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn.masked(mask, q), enable_gqa=attn.grouped
        )
        return attn.out(out.transpose(1, 2).flatten(2))


class Dispatched:
    """A processor that calls diffusers' dispatcher."""

    _attention_backend = None

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)) for part in attn.qkv(x))
        out = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=attn.masked(mask, q.transpose(1, 2)),
            enable_gqa=attn.grouped,
            backend=self._attention_backend,
        )
        return attn.out(out.flatten(2))


class Twice(Plain):
    """Attends to the image and, again, to everything."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return super().__call__(attn, x, mask) + super().__call__(attn, x.flip(1), mask)


class ByHand(Plain):
    """Multiplies out its scores."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        q, k, v = attn.qkv(x)
        return attn.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v)


class Valued(Plain):
    """Has further use for its values behind the attention."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in attn.qkv(x))
        q, k, v = (part.contiguous() for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn.masked(mask, q))
        out = out + (v if len(v) == len(out) else torch.cat([v, v[len(v) - (len(out) - len(v)) :]]))
        return attn.out(out.transpose(1, 2).flatten(2))


class Drawing(Plain):
    """Draws a random number, which changes nothing."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return super().__call__(attn, x, mask) + 0.0 * torch.rand(())


class Helped(Plain):
    """Has its attention in another method: its call's own code shows none."""

    def __call__(self, attn: Any, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return self.attend(attn, x, mask)

    def attend(self, attn: Any, x: torch.Tensor, mask: Any) -> torch.Tensor:
        return Plain.__call__(self, attn, x, mask)


class OwnAttention(nn.Module):
    def __init__(self, processor: Any, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped
        few = WIDTH // 2 if grouped else WIDTH
        self.q, self.k, self.v = (nn.Linear(WIDTH, n) for n in (WIDTH, few, few))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.processor = processor
        self.image: Any = None  # a mask of the tokens, while the perturbation is on

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def masked(self, mask: Any, q: torch.Tensor) -> Any:
        if self.image is None:
            return mask
        n = q.shape[2]
        image = self.image
        own = ~(image[:, None] & image[None, :] & ~torch.eye(n, dtype=torch.bool))
        return own if mask is None else own & mask

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return self.processor(self, x, mask)


class OwnBlock(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = OwnAttention(**options)
        self.shift = nn.Linear(WIDTH, WIDTH)
        self.net = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, tokens: torch.Tensor, temb: torch.Tensor, mask: Any = None) -> torch.Tensor:
        tokens = tokens + self.mixer(self.norm(tokens) + self.shift(temb)[:, None], mask)
        return tokens + self.net(tokens)


class OwnDenoiser(ModelMixin, ConfigMixin):
    """Text tokens first, last or in the middle of the picture's; options make it difficult.

    ``mask``: none, of the keys, or of all pairs. ``mixes_rows``: a layer that looks at all rows of
    the batch, as experts with a limited capacity do.
    """

    @register_to_config
    def __init__(
        self,
        text: str = "first",
        mask: str = "",
        grouped: bool = False,
        attends: str = "Plain",
        mixes_rows: bool = False,
        num_layers: int = 4,
        channels: int = 4,
    ) -> None:
        super().__init__()
        kind = globals()[attends]
        self.entry, self.caption = nn.Linear(channels, WIDTH), nn.Linear(12, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(
            OwnBlock(processor=kind(), grouped=grouped) for _ in range(num_layers)
        )
        self.exit = nn.Linear(WIDTH, channels)

    def places(self, image: int, text: int) -> torch.Tensor:
        """Which tokens are the image's."""
        start = {"first": 0, "last": image, "middle": image // 2}[self.config.text]
        mask = torch.ones(image + text, dtype=torch.bool)
        mask[start : start + text] = False
        return mask

    def mask_of(self, valid: Any, image: torch.Tensor) -> Any:
        if not self.config.mask:
            return None
        keys = torch.ones(valid.shape[0], len(image), dtype=torch.bool)
        keys[:, ~image] = valid.bool()
        keys = keys[:, None, None, :]
        if self.config.mask == "keys":
            return keys
        near = torch.arange(len(image))
        return keys & ((near[:, None] - near).abs() < 12)

    def forward(
        self,
        pixels: torch.Tensor,
        when: torch.Tensor,
        words: torch.Tensor,
        valid: Any = None,
        cache: Any = None,
        return_dict: bool = True,
    ) -> Any:
        rows, channels, height, width = pixels.shape
        x, text = self.entry(pixels.flatten(2).transpose(1, 2)), self.caption(words)
        temb = self.time(when.to(x.dtype)[:, None] / 1000)
        image = self.places(x.shape[1], text.shape[1])
        tokens = x.new_zeros(rows, len(image), WIDTH)
        tokens[:, image], tokens[:, ~image] = x, text
        mask = self.mask_of(valid, image)
        tokens = self.through(tokens, temb, mask, when)
        out = self.exit(tokens[:, image]).transpose(1, 2).unflatten(2, (height, width))
        return (out,) if not return_dict else {"sample": out}

    def through(
        self, tokens: torch.Tensor, temb: torch.Tensor, mask: Any, when: torch.Tensor
    ) -> torch.Tensor:
        """The tokens behind all blocks."""
        for block in self.layers:
            tokens = block(tokens, temb, mask)
            if self.config.mixes_rows:
                tokens = tokens + tokens.mean(0, keepdim=True)
        return tokens

    @contextlib.contextmanager
    def perturb(self, names: Any, image: int, text: int) -> Any:
        for name in names:
            self.get_submodule(name).image = self.places(image, text)
        yield
        for name in names:
            self.get_submodule(name).image = None


class OwnPipeline(diffusers.DiffusionPipeline):
    """``order`` says how its loop runs the branches, ``hides`` what of it cannot be seen."""

    order = "uncond, cond"
    hides = ()
    normalises = False
    weight = 1.0

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def predict(self, latents: torch.Tensor, t: Any, words: Any, valid: Any) -> torch.Tensor:
        when = t.expand(latents.shape[0])
        extra = {"cache": self.cache} if hasattr(self, "cache") else {}
        given = latents.to(self.transformer.dtype)
        return self.transformer(given, when, words, valid=valid, return_dict=False, **extra)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None = None,
        num_inference_steps: int = 2,
        guidance_scale: float = 4.0,
        seed: int = 0,
    ) -> torch.Tensor:
        rows = prompt_embeds.shape[0]
        do_classifier_free_guidance = negative_prompt_embeds is not None
        valid = (prompt_embeds[..., 0] != 0).long()
        words, masks = prompt_embeds, valid
        if do_classifier_free_guidance:
            unwanted = (negative_prompt_embeds[..., 0] != 0).long()
            if self.order == "uncond, cond":
                words = torch.cat([negative_prompt_embeds, prompt_embeds])
                masks = torch.cat([unwanted, valid])
            elif self.order == "cond, uncond":
                words = torch.cat([prompt_embeds, negative_prompt_embeds])
                masks = torch.cat([valid, unwanted])
            other = negative_prompt_embeds
        if "prompts" in self.hides:
            del prompt_embeds, negative_prompt_embeds
        source = torch.Generator().manual_seed(seed)
        latents = torch.randn(rows, 4, SIZE, SIZE, generator=source)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            if not do_classifier_free_guidance:
                guided = self.predict(latents, t, words, masks)
            else:
                if self.order == "apart":
                    cond = self.predict(latents, t, words, valid)
                    uncond = self.predict(latents, t, other, unwanted)
                elif self.order == "apart, uncond first":
                    uncond = self.predict(latents, t, other, unwanted)
                    cond = self.predict(latents, t, words, valid)
                else:
                    uncond, cond = self.predict(torch.cat([latents] * 2), t, words, masks).chunk(2)
                    if self.order == "cond, uncond":
                        uncond, cond = cond, uncond
                guided = self.weight * (uncond + guidance_scale * (cond - uncond))
                if self.normalises:
                    norms = [x.flatten(1).norm(dim=1) for x in (cond, guided)]
                    guided = guided * (norms[0] / norms[1])[:, None, None, None]
            noise_pred = guided.float()
            latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
            if "result" in self.hides:
                noise_pred = guided = None
        return latents


def build(kind: type = OwnDenoiser, **options: Any) -> OwnPipeline:
    """A pipeline with a denoiser of these options."""
    torch.manual_seed(0)
    model = kind(**options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return OwnPipeline(model, diffusers.FlowMatchEulerDiscreteScheduler())


def prompts(batch: int = 2, cfg: bool = True, tokens: int = TEXT) -> dict[str, torch.Tensor]:
    """Prompts for a call; the first of a batch is shorter."""
    found = {}
    for seed, name in enumerate(["prompt_embeds", "negative_prompt_embeds"][: 1 + cfg]):
        source = torch.Generator().manual_seed(seed)
        found[name] = torch.randn(batch, tokens, 12, generator=source)
        found[name][0, -2:] = 0
    return found


@contextlib.contextmanager
def slow_pag(pipe: OwnPipeline, names: Any, scale: float, guidance_scale: float = 4.0) -> Any:
    """PAG in the obvious way: cond once more, with a mask in the perturbed layers."""
    own = pipe.predict

    def predict(latents: torch.Tensor, t: Any, words: Any, valid: Any) -> torch.Tensor:
        out = own(latents, t, words, valid)
        parts = list(out.chunk(2)) if pipe.slow_batched else [out]
        at = pipe.slow_cond
        if pipe.slow_batched or torch.equal(words, pipe.slow_words):
            slab = slice(None) if len(parts) == 1 else slice(at * len(parts[0]), None)
            slab = slab if len(parts) == 1 else slice(slab.start, slab.start + len(parts[0]))
            image, text = SIZE * SIZE, words.shape[1]
            with pipe.transformer.perturb(names, image, text):
                lost = own(latents[slab], t, words[slab], valid[slab])
            parts[at] = parts[at] + scale / pipe.slow_g * (parts[at] - lost)
        return torch.cat(parts)

    pipe.predict = predict
    pipe.slow_g = guidance_scale
    try:
        yield
    finally:
        del pipe.predict


def truth(pipe: OwnPipeline, names: Any, call: dict[str, Any], scale: float = 3.0) -> Any:
    """The picture of a call with slow PAG."""
    cfg = "negative_prompt_embeds" in call
    pipe.slow_batched = cfg and "apart" not in pipe.order
    pipe.slow_cond = 1 if pipe.order == "uncond, cond" and cfg else 0
    pipe.slow_words = call["prompt_embeds"]
    with slow_pag(pipe, names, scale, 4.0 if cfg else 1.0):
        return pipe(**call)
