"""Guidance as it is written down: every branch in a forward of its own, every map in full.

Nothing here shares code with pag_fast but the random numbers. A stock PAG pipeline keeps its loop;
its denoiser runs the rows of each branch apart, and the perturbed ones with the processors and
blocks below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from tiny import PIPELINES

from pag_fast import perturbations as P
from pag_fast.ops import reference


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """``[..., h, w]`` blurred as SEG's code does: a convolution in two dimensions, reflected."""
    width = image.shape[-1]
    taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    taps = min(taps, width - (width % 2 - 1))
    at = torch.linspace(-(taps - 1) / 2, (taps - 1) / 2, taps, dtype=image.dtype)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = F.pad(image.reshape(-1, 1, *image.shape[-2:]), [taps // 2] * 4, mode="reflect")
    return F.conv2d(flat, (kernel[:, None] * kernel)[None, None]).view(image.shape)


class Naive:
    """An attention processor that builds the whole map ``[rows, H, N, N]``."""

    def __init__(self, how: Any, grids: dict[int, tuple[int, int]], index: int, strength: Any):
        self.how, self.grids, self.index, self.strength = how, grids, index, strength
        self.step = 0

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: Any = None,
        temb: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        text, n = encoder_hidden_states, hidden_states.shape[1]

        def project(which: str) -> torch.Tensor:
            found = getattr(attn, f"to_{which}")(hidden_states)
            if text is not None:
                found = torch.cat([found, getattr(attn, f"add_{which}_proj")(text)], dim=1)
            found = found.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            norm = getattr(attn, f"norm_{which}", None)
            found = found if norm is None else norm(found)
            turns = image_rotary_emb is not None and which != "v"
            return apply_rotary_emb(found, image_rotary_emb) if turns else found

        q, k, v = map(project, "qkv")
        out = self.weights(q, k, n, "Linear" in type(attn.processor_before).__name__) @ v
        out = out.transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](out[:, :n]))
        if text is None:
            return image
        text = out[:, n:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def weights(self, q: torch.Tensor, k: torch.Tensor, n: int, linear: bool) -> torch.Tensor:
        """The perturbed map of attention; of n image tokens and the text behind them."""
        how, image = self.how, slice(0, n)
        if isinstance(how, P.BlurredQueries):
            blurred = q[:, :, image].mean(2, keepdim=True).expand(-1, -1, n, -1)
            if how.sigma < 9999:
                grid = q[:, :, image].transpose(2, 3).unflatten(3, self.grids[n])
                blurred = gaussian_blur(grid, how.sigma).flatten(3).transpose(2, 3)
            q = torch.cat([blurred, q[:, :, n:]], dim=2)
        if linear:
            scores = torch.relu(q) @ torch.relu(k).transpose(2, 3)
            weights = scores / (scores.sum(-1, keepdim=True) + 1e-15)
        else:
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            if isinstance(how, P.NoisyScores):
                clock = torch.tensor([self.step])
                noise = reference.score_noise(scores.shape, clock, self.index, how.seed)
                noise = noise * (torch.arange(noise.shape[2]) < n)[:, None]
                scores = scores + how.sigma * noise
            if isinstance(how, P.Identity):
                scores[:, :, image, image] += torch.full((n, n), -math.inf).fill_diagonal_(0)
            weights = torch.softmax(scores, -1)
        eye = torch.eye(q.shape[2])
        if isinstance(how, P.Identity) and linear:
            return eye.expand_as(weights)
        if isinstance(how, P.SoftIdentity):
            s = torch.tensor(self.strength).view(-1, 1, 1) * (torch.arange(len(eye)) < n)[:, None]
            return (1 - s) * weights + s * eye
        if isinstance(how, P.BlurredMap):
            maps = weights[:, :, image, image].unflatten(3, self.grids[n])
            weights[:, :, image, image] = gaussian_blur(maps, how.sigma).flatten(3)
        return weights


def _blocks(model: Any) -> list[str]:
    """All transformer blocks; a block's place in this list is what its random order comes from."""
    names = [n for n, m in model.named_modules() if type(m).__name__.endswith("Block")]
    return [n for n in names if re.search(r"blocks\.\d+$", n) and "resnets" not in n]


def _perturb_block(how: Any, module: Any, index: int, step: int) -> None:
    forward = type(module).forward.__get__(module)

    def skipped(hidden_states: Any, *_: Any, encoder_hidden_states: Any = None, **__: Any) -> Any:
        if type(module).__name__ != "JointTransformerBlock":
            return hidden_states
        return None if module.context_pre_only else encoder_hidden_states, hidden_states

    def shuffled(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        order = how.permutation(hidden_states.shape[1], index, torch.tensor([step]))
        return forward(hidden_states[:, order], *args, **kwargs)

    module.forward = skipped if isinstance(how, P.SkippedBlock) else shuffled


@contextmanager
def perturbed(
    model: Any, how: Any, names: list[str], grids: dict[int, tuple[int, int]], step: int
) -> Iterator[None]:
    """``model`` with all rows perturbed."""
    modules, before = dict(model.named_modules()), dict(model.attn_processors)
    attentions = [n for n in modules if re.search(r"\.attn\d?$", n)]
    attentions = [n for n in attentions if not modules[n].is_cross_attention]
    touched = []
    try:
        for name in names:
            module = modules[name]
            if isinstance(how, P.BlockPerturbation):
                _perturb_block(how, module, _blocks(model).index(name), step)
                touched.append(module)
                continue
            strength = getattr(how, "strength", None)
            if isinstance(strength, dict):
                strength = next(v for pattern, v in strength.items() if re.search(pattern, name))
            processor = Naive(how, grids, attentions.index(name), strength)
            processor.step = step
            module.processor_before = before[f"{name}.processor"]
            module.set_processor(processor)
        yield
    finally:
        for module in touched:
            del module.forward
        model.set_attn_processor(before)


@contextmanager
def naive(
    pipe: Any,
    name: str,
    branches: list[tuple[Any, list[str], float]],
    grids: dict[int, tuple[int, int]],
    cfg: bool = True,
) -> Iterator[None]:
    """A stock PAG pipeline whose denoiser runs naively; branches are (perturbation, names, scale).

    With several branches the perturbed rows are those of one that stands for all.
    """
    model = getattr(pipe, PIPELINES[name].denoiser)
    stock = dict(model.attn_processors)
    forward, steps = model.forward, iter(range(1000))

    def run(*args: Any, **kwargs: Any) -> Any:
        slabs = 3 if cfg else 2
        names = dict(zip(("hidden_states", "sample"), args, strict=False))
        rows = (args or [kwargs.get("sample", kwargs.get("hidden_states"))])[0].shape[0]
        assert len(names) == len(args)
        step, unit = next(steps), rows // slabs

        def rows_of(value: Any, slab: int) -> Any:
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows:
                return value[slab * unit : (slab + 1) * unit]
            if isinstance(value, dict):
                return {k: rows_of(v, slab) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [rows_of(v, slab) for v in value]
            return value

        def forward_of(slab: int) -> torch.Tensor:
            some = [rows_of(x, slab) for x in args]
            return forward(*some, **{k: rows_of(v, slab) for k, v in kwargs.items()})[0]

        pag = dict(model.attn_processors)
        model.set_attn_processor(dict(stock))
        outs = [forward_of(slab) for slab in range(slabs - 1)]
        cond, stands = outs[-1], outs[-1]
        total = sum(scale for _, _, scale in branches)
        for how, layers, scale in branches:
            with perturbed(model, how, layers, grids, step):
                stands = stands - scale / total * (cond - forward_of(slabs - 1))
        model.set_attn_processor(pag)
        return (torch.cat([*outs, stands]),)

    model.forward = run
    try:
        yield
    finally:
        del model.forward
