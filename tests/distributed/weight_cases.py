"""Cases of tensor parallelism and FSDP2, run on every rank: one process, then all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers.hooks.tensor_parallel as tensor_parallel
import modular
import tiny
import tiny_hosts
import torch
from context_cases import MANY, cases
from diffusers import TensorParallelConfig
from numerics import relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pag_fast
from pag_fast import PatchConfig
from pag_fast.guiders import PerturbedAttentionGuidance


def _halved(model: Any) -> None:
    """Tensor parallelism over two ranks; diffusers knows the CPU for none that can."""
    tensor_parallel._SUPPORTED_TP_DEVICES += ("cpu",)
    model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))


def tensor(_: Any, name: str) -> dict[str, list[float]]:
    """Every perturbation, and patched before, after, and before and after heads were shared out."""
    found = {}

    def picture(pipe: Any) -> torch.Tensor:
        return tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(name, pipe, pag_scale=2.0))

    for case, options in cases(name).items():
        if name == "QwenImagePipeline" and case not in MANY:
            continue  # the same processors
        alone = tiny_hosts.build(name)
        stock = tiny_hosts.latents(alone, tiny_hosts.call_kwargs(name, alone))
        pag_fast.patch(alone, **options)
        expected = picture(alone)
        for order in ("after", "before", "both") if case == "several" else ("after",):
            pipe = tiny_hosts.build(name)
            if order != "after":
                pag_fast.patch(pipe, **options)
                picture(pipe)
            if order == "both":
                pag_fast.unpatch(pipe)
            _halved(pipe.transformer)
            if order != "before":
                pag_fast.patch(pipe, **options)
            found[f"{case}, {order}"] = [
                relative(picture(pipe), expected),
                relative(expected, stock),
            ]
    return found


def tensor_guider(_: Any, name: str) -> list[float]:
    """A guider's perturbed attention with some of the heads on each rank."""

    def guider(**more: Any) -> PerturbedAttentionGuidance:
        return PerturbedAttentionGuidance(**modular.ALWAYS, **more)

    alone = modular.denoise(modular.new_case(name), guider())
    plain = modular.denoise(modular.new_case(name), guider(perturbed_guidance_scale=0.0))
    case = modular.new_case(name)
    _halved(case.model)
    result = modular.denoise(case, guider())
    pairs = (result, alone), (alone, plain)
    return [max(modular.differences(*pair)) for pair in pairs]


# ---- FSDP2 ----


def _blocks(model: Any) -> list[Any]:
    names = ("transformer_blocks", "single_transformer_blocks", "blocks")
    names += ("down_blocks", "mid_block", "up_blocks")
    found = [getattr(model, name) for name in names if hasattr(model, name)]
    return [x for part in found for x in (part if hasattr(part, "__len__") else [part])]


def _transformers(model: Any) -> list[Any]:
    """What is inside of the blocks of a UNet."""
    kinds = ("Transformer2DModel", "BasicTransformerBlock", "ResnetBlock2D")
    return [x for x in model.modules() if type(x).__name__ in kinds]


SHARDED: dict[str, Callable[[Any], list[Any]]] = {
    "root": lambda model: [],
    "blocks": _blocks,
    "inside": lambda model: _transformers(model)[::-1],
}
METHODS = ("identity", "skip", "shuffle")


def _build(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and what it is called with: without PAG, as far as it has any."""
    if name in tiny_hosts.HOSTS:
        pipe = tiny_hosts.build(name)
        return pipe, tiny_hosts.call_kwargs(name, pipe)
    pipe = tiny.build(name)
    return pipe, {**tiny.call_kwargs(name, pipe), "pag_scale": 0.0}


def _picture(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    out = pipe(**{**call, "output_type": "latent"})
    return out.frames if hasattr(out, "frames") else out.images


def fsdp(_: Any, name: str) -> dict[str, Any]:
    """Of every case the difference between one process and two, PAG's own, and shared steps."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    specs: dict[str, Any] = {**tiny.PIPELINES, **tiny_hosts.HOSTS}
    layers, on = specs[name].layers["middle"], {"pag_scale": 3.0}
    # half of the channels of PixArt are a variance
    more = {"rescale": 0.7, "rescale_mode": "full"} if name.startswith("PixArt") else {}
    for method in METHODS:
        config = PatchConfig(layers=layers, perturbation=method, **more)
        stock = _picture(*_build(name))
        pipe, call = _build(name)
        pag_fast.patch(pipe, config=config)
        expected = _picture(pipe, {**call, **on})
        for where, parts in SHARDED.items():
            pipe, call = _build(name)
            model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            for part in [*parts(model), model]:
                fully_shard(part, mesh=mesh)
            pag_fast.patch(pipe, config=config)
            out = _picture(pipe, {**call, **on})
            numbers = relative(out, expected), relative(expected, stock)
            found[f"{method}, {where}"] = [*numbers, dict(pipe._pag_fast.steps)]
    return found
