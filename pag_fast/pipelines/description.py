"""What a file in this package says about a class of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from ..config import PatchConfig

Arguments = Mapping[str, Any]
"""The arguments of the pipeline's call, defaults included."""

Kind = Literal["pag", "injected", "sag", "stock"]

_EVERY_OPTION = frozenset(field.name for field in fields(PatchConfig))
_OPTIONS: dict[Kind, frozenset[str]] = {
    "injected": _EVERY_OPTION,
    "pag": _EVERY_OPTION - {"pag_scale", "pag_adaptive_scale"},
    "sag": frozenset({"backend", "cache_conditioning", "fewer_launches", "strict"}),
    "stock": frozenset({"strict"}),
}

_RESCALE = frozenset({"rescale_mode", "rescale"})


# ---- whether a call uses CFG, and its scale ----


def property_cfg(pipe: Any, arguments: Arguments) -> bool:
    """As the pipeline's own property says."""
    return bool(pipe.do_classifier_free_guidance)


def property_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    """The pipeline's own property, which a callback may have changed."""
    return float(pipe.guidance_scale)


def argument_cfg(pipe: Any, arguments: Arguments) -> bool:
    """As the call's ``guidance_scale`` says."""
    return float(arguments["guidance_scale"]) > 1.0


def argument_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    """The call's ``guidance_scale``."""
    return float(arguments["guidance_scale"])


def true_cfg(pipe: Any, arguments: Arguments) -> bool:
    """Models that are distilled for guidance use CFG where a negative prompt is given."""
    if float(arguments["true_cfg_scale"]) <= 1.0:
        return False
    # Flux and HunyuanVideo need both parts of a negative prompt, Qwen-Image has one
    names = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = [arguments[name] is not None for name in names if name in arguments]
    return arguments["negative_prompt"] is not None or all(embeds)


def true_scale(pipe: Any, arguments: Arguments, step: int, denoiser: str) -> float | None:
    """The call's ``true_cfg_scale``."""
    return float(arguments["true_cfg_scale"])


# ---- the description ----


UNTESTED = "untested: two thirds of the way through, where shared blocks make PAG cheap"
"""The source of layers that nobody has published, and that their cost has chosen."""


@dataclass(frozen=True)
class StockGuidance:
    """A forward that a stock pipeline makes to guide by: cond's, with some blocks changed.

    Attributes:
        name: what it is called, in messages.
        argument: of the denoiser, with the indices of the changed blocks; empty in other forwards.
        changed: these indices for the step that runs, from the pipeline and the locals of its loop;
            empty where no such forward follows.
        blocks: attribute of the denoiser that holds the blocks.
        others: arguments that are set in forwards that are neither cond's nor such a one.
        with_it: arguments besides ``argument`` that such a forward may have, and cond's has not.
    """

    name: str
    argument: str
    changed: Callable[[Any, Arguments], Sequence[int]]
    blocks: str = "transformer_blocks"
    others: tuple[str, ...] = ()
    with_it: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineDescription:
    """A class of pipelines.

    Attributes:
        name: of the class.
        kind: ``"pag"`` for those of diffusers that have PAG, ``"injected"`` for those that have
            not and get it here, ``"sag"`` for Self-Attention Guidance, ``"stock"`` for those that
            get no PAG, and whose own guidance is resumed.
        layers: layers that are perturbed unless others are chosen; for PAG pipelines, those that
            the documentation names.
        source: where that choice comes from.
        base: a pipeline with the same denoiser, whose published models stand for this one's.
        denoisers: attributes that hold the denoisers.
        passes: ``"together"``: one call of the denoiser with ``[uncond | cond]``; ``"apart"``: one
            with cond, then one with uncond; ``"alone"``: there is no CFG, and no uncond, as a model
            that was distilled from it gets its scale as an embedding; ``"observed"``: its calls
            show what runs, as nobody has described the class, or a guider decides on that.
        rows: the branches in a batch of ``"together"``, in order; ``"image"`` is what has the
            picture and no text, for guidance with a scale for each.
        guidance: ``"linear"``: what CFG returns is a linear function of both predictions;
            ``"normalised"``: it is scaled by a norm or a deviation of them.
        normalised_by: the argument of the call that turns the latter on; empty: it always is.
        cfg: whether a call uses CFG; not asked where cond is alone.
        scale: its CFG scale in a step, where it uses CFG, from the pipeline, the call's arguments,
            the step's number and the name of the denoiser; ``None`` where it is not known yet.
        rescales_again: the pipeline rescales guidance itself, behind the op that has done it.
        guess_mode_images: in guess mode the control images have to be doubled all the same.
        mask_of_image_latents: with image latents there are no masked image latents to take apart.
        stock_guidance: a forward of the pipeline's own that begins as cond's does.
    """

    name: str
    kind: Kind
    layers: tuple[str, ...] = ()
    source: str = ""
    base: str = ""
    denoisers: tuple[str, ...] = ("transformer",)
    passes: Literal["together", "apart", "alone", "observed"] = "together"
    rows: tuple[str, ...] = ("uncond", "cond")
    guidance: Literal["linear", "normalised"] = "linear"
    normalised_by: str = ""
    cfg: Callable[[Any, Arguments], bool] = property_cfg
    scale: Callable[[Any, Arguments, int, str], float | None] = property_scale
    rescales_again: bool = False
    guess_mode_images: bool = False
    mask_of_image_latents: bool = False
    stock_guidance: StockGuidance | None = None

    @property
    def sequential(self) -> bool:
        """Whether uncond and cond are two calls of the denoiser, as far as is known."""
        return self.passes in ("apart", "observed")

    @property
    def is_observed(self) -> bool:
        """Whether its calls show which of its forwards and rows are whose."""
        return self.passes == "observed"

    @property
    def is_written(self) -> bool:
        """Whether somebody has described the class."""
        return not self.is_observed or bool(self.source)

    @property
    def others(self) -> tuple[str, ...]:
        """The branches of CFG besides cond, in the order in which we run them in front of it."""
        if self.passes == "alone":
            return ()
        return tuple(row for row in ("uncond", "image") if row in self.rows)

    @property
    def cond_is_first(self) -> bool:
        """Whether a batch has cond in front, where ours has it right before the perturbed rows."""
        return self.rows[0] == "cond"

    @property
    def options(self) -> frozenset[str]:
        """The options of :class:`pag_fast.PatchConfig` that mean something for this pipeline."""
        no_scale = len(self.rows) > 2 or self.is_observed
        return _OPTIONS[self.kind] - (_RESCALE if no_scale else frozenset())

    def is_normalised(self, pipe: Any, arguments: Arguments) -> bool:
        """Whether a step scales what CFG returns, so that PAG has to know CFG's scale.

        Loops read the attribute of the pipeline, which a callback may change, where there is one.
        """
        if self.guidance == "linear":
            return False
        if not self.normalised_by or not arguments:
            return not self.normalised_by
        return bool(getattr(pipe, f"_{self.normalised_by}", arguments.get(self.normalised_by)))


def check_options(description: PipelineDescription, config: PatchConfig) -> None:
    """Refuse options that a pipeline has no use for.

    Raises:
        ValueError: such an option is set to another value than its default.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in description.options and value != field.default:
            raise ValueError(_no_option(description, field.name, value))
    mode = config.rescale_mode
    if description.passes != "together" and mode not in (None, "partial"):
        runs = "runs its model once for each" if description.sequential else "has none"
        raise ValueError(
            f"rescale_mode={mode!r} needs the unconditional prediction next to the others, and "
            f"{description.name} {runs}: use rescale_mode='partial', or no rescale."
        )


def _no_option(description: PipelineDescription, name: str, value: Any) -> str:
    if description.is_observed:
        return (
            f"{name}={value!r} needs the scale of CFG, which is not known for {description.name}: "
            "leave it out, or describe the pipeline as CONTRIBUTING.md says."
        )
    if description.kind == "injected":
        return (
            f"{name}={value!r} is made for guidance with one scale, and {description.name} has "
            "two, of the text and of the picture: leave it out."
        )
    if description.kind == "pag":
        return (
            f"{name} is an option for pipelines that have no PAG of their own. This one takes it "
            f"in every call: pipe(prompt, {name}={value!r})."
        )
    if description.kind == "stock":
        return (
            f"{description.name} gets no PAG: pag_fast.patch(pipe) makes its own guidance sooner, "
            f"with the same picture. Leave out {name}={value!r}."
        )
    if name == "layers":
        return (
            "Self-Attention Guidance perturbs no layers: it blurs what the middle self-attention "
            f"looks at. Leave out layers for {description.name}."
        )
    if name == "compile":
        return (
            f"{description.name} puts a new hook onto its UNet in every call, for which a compiled "
            "UNet would be compiled anew: leave out compile."
        )
    return (
        f"{description.name} has no use for {name}={value!r}: Self-Attention Guidance has no "
        f"perturbed branch, and takes {', '.join(sorted(description.options))} alone. Leave out "
        f"{name}."
    )
