"""What a pipeline that nobody has described is tried with."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import PIL.Image
import tiny
import torch
from editing import small_pictures

TOKENS = 5  # of a prompt
DIM = 12  # of its embeddings
POOLED = 10
SIZE = {"height": 64, "width": 64}
VIDEO = {**SIZE, "num_frames": 5}
DENOISERS = ("unet", "transformer", "transformer_2")
COPIES = (
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "num_waveforms_per_prompt",
)


@dataclass(frozen=True)
class Spec:
    """A pipeline, and how PAG in it is known to be right.

    Attributes:
        name: of the class.
        parts: makes the components; those that the constructor asks for besides are ``None``.
        layers: that are perturbed, with the fork in a block in the middle.
        call: arguments of the call beside those that every pipeline gets; what can be called gets
            the number of prompts.
        text: where text is in the sequence of a perturbed attention: ``""``, ``"first"``,
            ``"last"``; or a function of the number of rows, queries and keys that says
            ``[rows, keys]`` which are the image's.
        image: how many tokens of the image there are where text is.
        cfg: the argument with the scale of CFG; empty where there is no CFG.
        scales: its values with and without CFG.
        rows: branches in a batch, in their order; where each is a forward of its own, in theirs.
        apart: each branch is a forward of its own.
        weight: cond's weight in the result, by the scale of CFG.
        everywhere: add PAG's difference to all branches, not to cond alone by its weight: for
            guidance that is not linear.
        others: forwards in each step behind these, whose predictions are part of the guidance.
        batches: numbers of prompts with and without CFG.
        unknown: what the call must not be given, though its signature has it.
        setup: is called with the pipeline.
        refused: what the refusal says, as a regular expression; empty: PAG works.
        refuses: whether that is so with or without CFG, for a number of prompts.
        warned: what PAG warns of, as a regular expression; empty: of nothing.
        warned_without: the same, of calls without CFG alone.
        shared: whether branches are shared.
        denoiser: the attribute that holds it.
        prompts: makes the arguments for prompts of a prefix (``"negative_"`` or none), of a batch.
        dim: of the embeddings of prompts.
        masks: the dtype of masks over the tokens of prompts.
        before: is called with the pipeline before each call, and whether CFG is on.
        louder: what the weights of perturbed layers are multiplied by.
    """

    name: str
    parts: Callable[[], dict[str, Any]]
    layers: list[str]
    call: dict[str, Any] = field(default_factory=dict)
    text: Any = ""
    image: int = 0
    cfg: str = "guidance_scale"
    scales: tuple[float, float] = (5.0, 1.0)
    rows: tuple[str, ...] = ("uncond", "cond")
    apart: bool = False
    weight: Callable[[float], float] = lambda scale: scale
    everywhere: bool = False
    others: int = 0
    batches: tuple[int, int] = (2, 1)
    copies: int = 2
    unknown: tuple[str, ...] = ()
    setup: Callable[[Any], None] | None = None
    refused: str = ""
    refuses: Callable[[bool, int], bool] = lambda cfg, batch: True
    warned: str = ""
    warned_without: str = ""
    shared: bool = True
    denoiser: str = ""
    prompts: Callable[[str, int], dict[str, Any]] | None = None
    masks: torch.dtype = torch.long
    before: Callable[[Any, bool], None] | None = None
    louder: float = 1.0
    dim: int = DIM

    @property
    def exists(self) -> bool:
        """Whether this version of diffusers has the class, and what it imports."""
        found = getattr(diffusers, self.name, None)
        return isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)

    @property
    def cases(self) -> list[tuple[bool, int, int]]:
        """With CFG or not, prompts, and pictures of each."""
        several = any(name in self.parameters for name in COPIES) and self.copies > 1
        without = (False, self.batches[1], self.copies if several else 1)
        if not self.cfg:
            return [(False, self.batches[0], 1), without] if self.batches[0] > 1 else [without]
        return [(True, self.batches[0], 1), without]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Of the pipeline's call."""
        found = inspect.signature(getattr(diffusers, self.name).__call__).parameters
        return {k: p for k, p in found.items() if k not in self.unknown}


def variants(base: Spec, **others: dict[str, Any]) -> list[Spec]:
    """Pipelines with the parts of ``base``, and what is different in each; calls are added up."""
    made = []
    for name, changes in others.items():
        call = {**base.call, **changes.pop("call", {})}
        made.append(replace(base, name=name, call=call, **changes))
    return made


def build(spec: Spec) -> Any:
    """The tiny pipeline."""
    cls = getattr(diffusers, spec.name)
    torch.manual_seed(0)
    made = spec.parts()
    for part in made.values():
        for module in part if isinstance(part, list) else [part]:
            if isinstance(module, torch.nn.Module):
                tiny.randomise(module)
    parameters = inspect.signature(cls.__init__).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty][1:]
    if "requires_safety_checker" in parameters:
        made.setdefault("requires_safety_checker", False)
    if "add_watermarker" in parameters:
        made.setdefault("add_watermarker", False)
    pipe = cls(**{**dict.fromkeys(required), **made})
    pipe.set_progress_bar_config(disable=True)
    if spec.setup is not None:
        spec.setup(pipe)
    for model in models_of(spec, pipe):
        for name, parameter in model.named_parameters():
            if any(re.search(layer, name) for layer in spec.layers):
                parameter.data.mul_(spec.louder)
    return pipe


def models_of(spec: Spec, pipe: Any) -> list[Any]:
    """The denoisers of a pipeline."""
    names = (spec.denoiser,) if spec.denoiser else DENOISERS
    found = [getattr(pipe, name, None) for name in names]
    return [model for model in found if model is not None]


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def _prompts(spec: Spec, prefix: str, batch: int) -> dict[str, Any]:
    """Embeddings of ``batch`` prompts under the names that a call takes."""
    seed, names = 2 if prefix else 1, spec.parameters
    made: dict[str, Any] = {}
    if f"{prefix}prompt_embeds" in names:
        made[f"{prefix}prompt_embeds"] = normal(seed, batch, TOKENS, spec.dim)
    if f"{prefix}pooled_prompt_embeds" in names:
        made[f"{prefix}pooled_prompt_embeds"] = normal(seed + 10, batch, POOLED)
    if "negative_prompt" in names:
        made["negative_prompt"] = None
    for name in names:
        if re.fullmatch(rf"{prefix}prompt_(embeds_|attention_)*mask", name):
            mask = torch.ones(batch, TOKENS, dtype=spec.masks)
            mask[0, -2:] = 0  # the first prompt is shorter
            made[name] = mask
    return made


def call_kwargs(spec: Spec, cfg: bool, batch: int, copies: int, steps: int = 2) -> dict[str, Any]:
    """Arguments of a call; equal calls give equal pictures."""
    names = spec.parameters
    kwargs: dict[str, Any] = {}
    for prefix in ("", "negative_") if cfg else ("",):
        make = spec.prompts or functools.partial(_prompts, spec)
        kwargs |= make(prefix, batch)
    if spec.cfg:
        kwargs[spec.cfg] = spec.scales[0 if cfg else 1]
    kwargs["num_inference_steps"] = steps
    kwargs |= {name: copies for name in COPIES if copies > 1}
    kwargs["generator"] = torch.Generator().manual_seed(0)
    kwargs["output_type"] = "latent"
    kwargs |= VIDEO
    if "prompt" in names and names["prompt"].default is inspect.Parameter.empty:
        kwargs.setdefault("prompt", None)
    kwargs |= {k: v(batch) if callable(v) else v for k, v in spec.call.items()}
    return {name: value for name, value in kwargs.items() if name in names}


def result(spec: Spec, pipe: Any, case: tuple[bool, int, int]) -> torch.Tensor:
    """What a call makes, as one tensor."""
    torch.manual_seed(0)
    if spec.before is not None:
        spec.before(pipe, case[0])
    with small_pictures(pipe):
        made = pipe(**call_kwargs(spec, *case))
    return _tensor(made[0] if not isinstance(made, dict) else next(iter(made.values())))


def _tensor(made: Any) -> torch.Tensor:
    if isinstance(made, torch.Tensor):
        return made
    if isinstance(made, list | tuple):
        return torch.stack([_tensor(x) for x in made])
    import numpy as np

    return torch.from_numpy(np.asarray(made).astype("float64"))


# ---- components and pictures ----


def vae(channels: int = 4, **config: Any) -> Any:
    """Of factor two."""
    own = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "sample_size": 16,
        "norm_num_groups": 2,
        "shift_factor": 0.1,
    }
    return diffusers.AutoencoderKL(**{**own, **config})


def model(name: str, **config: Any) -> Any:
    """Makes a transformer of that class, and the scheduler of most."""

    def make() -> dict[str, Any]:
        return {"transformer": getattr(diffusers, name)(**config), "scheduler": flow()}

    return make


def also(parts: Any, **more: Any) -> Any:
    """Makes components besides, of which each is made by a function."""
    return lambda: {**parts(), **{name: make() for name, make in more.items()}}


def flow(**config: Any) -> Any:
    """The scheduler of most transformers."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


class Nothing(diffusers.ModelMixin):
    """A component that has a device and a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.ones(1))


def photo(seed: int = 1, size: int = 64) -> Any:
    source = torch.Generator().manual_seed(seed)
    numbers = torch.randint(256, (size, size, 3), generator=source, device="cpu")
    return PIL.Image.fromarray(numbers.to(torch.uint8).numpy())


def photos(batch: int) -> Any:
    return [photo(seed) for seed in range(1, batch + 1)] if batch > 1 else photo()


def film(frames: int = 5, size: int = 64) -> list[Any]:
    return [photo(seed, size) for seed in range(frames)]


def picture(size: int = 64, batch: int = 1) -> torch.Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, size, size, generator=source, device="cpu")
