"""Tiny random models of the real engine, conditionings, and a KSampler's call of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import loaded  # noqa: F401  (the engine)
import tiny_configs as configs
import torch

# isort: split
import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.supported_models as supported

CPU = torch.device("cpu")
Cond = list[list[Any]]


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model and what it takes.

    ``shape`` is that of a latent, ``tokens`` the length of a conditioning.
    """

    name: str
    model: Any  # ModelPatcher: a node clones it, nobody changes it
    shape: tuple[int, ...]
    tokens: int

    def cond(self, seed: int, tokens: int | None = None, **entries: Any) -> Cond:
        """A conditioning of one entry, as CLIPTextEncode makes it; ``entries`` join its options."""
        if self.name == "ltx":  # its text encoder's nodes always set one
            mask = torch.ones(1, tokens or self.tokens, dtype=torch.long)
            entries.setdefault("attention_mask", mask)
        return cond(seed, tokens or self.tokens, **entries)

    @property
    def positive(self) -> Cond:
        return self.cond(1)

    @property
    def negative(self) -> Cond:
        return self.cond(2)


def cond(seed: int, tokens: int = 77, **entries: Any) -> Cond:
    """A random conditioning of one entry: (1, tokens, CONTEXT) and pooled (1, POOLED)."""
    random = torch.Generator().manual_seed(seed)
    crossattn = torch.randn(1, tokens, configs.CONTEXT, generator=random)
    pooled = torch.randn(1, configs.POOLED, generator=random)
    return [[crossattn, {"pooled_output": pooled, **entries}]]


def _randomize(module: torch.nn.Module, seed: int) -> None:
    """Weights at which every layer matters: those of the engine are empty or zero."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=0.7 / fan_in**0.5, generator=random)
        elif name.endswith(("weight", "scale")):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=random)


def patcher(config_class: Any, config: dict[str, Any], seed: int = 0) -> Any:
    """A ``ModelPatcher`` of random weights, as loading a checkpoint gives one."""
    settings = config_class(copy.deepcopy(config))
    settings.unet_config.update(copy.deepcopy(config))  # its class has set the number of heads
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({}, "", device="cpu")
    _randomize(model, seed)
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=CPU, offload_device=CPU)


# name: class of the engine, configuration, shape of a latent, tokens
_FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
    "sd15": ("SD15", configs.SD15, (1, 4, 16, 16), 77),
    "sdxl": ("SDXL", configs.SDXL, (1, 4, 32, 32), 77),
    "sd3": ("SD3", configs.SD3, (1, 16, 16, 16), 16),
    "flux": ("Flux", configs.FLUX, (1, 16, 32, 32), 32),
    "chroma": ("Chroma", configs.CHROMA, (1, 16, 32, 32), 32),
    "hunyuan_video": ("HunyuanVideo", configs.HUNYUAN_VIDEO, (1, 16, 2, 16, 16), 16),
    "wan": ("WAN21_T2V", configs.WAN, (1, 16, 2, 16, 16), 16),
    "ltx": ("LTXV", configs.LTX, (1, 128, 2, 8, 8), 16),
    "qwen_image": ("QwenImage", configs.QWEN_IMAGE, (1, 16, 1, 32, 32), 32),
    "lumina2": ("Lumina2", configs.LUMINA2, (1, 16, 16, 16), 32),
    "z_image": ("ZImage", configs.Z_IMAGE, (1, 16, 16, 16), 32),
}
NAMES = tuple(_FAMILIES)
UNETS = ("sd15", "sdxl")
DITS = tuple(name for name in NAMES if name not in UNETS)


@functools.cache
def build(name: str, **changes: Any) -> Tiny:
    """The tiny model ``name`` of ``NAMES``, its configuration with ``changes``; always the same."""
    config_class, config, shape, tokens = _FAMILIES[name]
    model = patcher(getattr(supported, config_class), {**config, **changes})
    return Tiny(name, model, shape, tokens)


@functools.cache
def _control(name: str, seed: int) -> Any:
    config = {k: v for k, v in _FAMILIES[name][1].items() if k != "out_channels"}
    config = copy.deepcopy(config) | {"hint_channels": 3}
    model = comfy.cldm.cldm.ControlNet(**config, operations=comfy.ops.disable_weight_init)
    _randomize(model, seed)
    return comfy.controlnet.ControlNet(model.eval(), load_device=CPU)


def controlnet(tiny: Tiny, seed: int = 0, strength: float = 1.0, **hint: Any) -> Any:
    """A real ``comfy.controlnet.ControlNet`` for a UNet, with an image as its hint set.

    ``hint`` are further arguments of ``set_cond_hint``. Controls of one seed share a model.
    """
    size = (1, 3, tiny.shape[-2] * 8, tiny.shape[-1] * 8)
    image = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return _control(tiny.name, seed).copy().set_cond_hint(image, strength, **hint)


def controlled(tiny: Tiny, *controls: Any) -> tuple[Cond, Cond]:
    """Positive and negative with ``controls`` in a row, as ControlNetApplyAdvanced makes them."""
    previous = None
    for control in controls:
        previous = control.copy().set_previous_controlnet(previous)
    entries = {"control": previous, "control_apply_to_uncond": False}
    return tiny.cond(1, **entries), tiny.cond(2, **entries)


def sample(
    tiny: Tiny,
    model: Any = None,
    positive: Cond | None = None,
    negative: Cond | None = None,
    *,
    steps: int = 3,
    cfg: float = 6.0,
    sampler: str = "euler",
    scheduler: str = "normal",
    shape: tuple[int, ...] | None = None,
    seed: int = 1,
    **options: Any,
) -> torch.Tensor:
    """KSampler's latents; ``model`` is ``tiny.model`` or a clone of it that nodes have changed."""
    shape = shape or tiny.shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return comfy.sample.sample(
        tiny.model if model is None else model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        tiny.positive if positive is None else positive,
        tiny.negative if negative is None else negative,
        torch.zeros(shape),
        disable_pbar=True,
        seed=seed,
        **options,
    )


def stock(model: Any, scale: float = 3.0) -> Any:
    """Core's node PerturbedAttentionGuidance."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, scale).result[0]


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """Rows of each forward of a module, such as a ControlNet's ``control_model``."""
    rows: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append((args[0] if args else kwargs["x"]).shape[0])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()
