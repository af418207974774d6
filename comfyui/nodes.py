"""The four nodes: what they take, and how a model is patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_api.latest import io

from .blocks import (
    Block,
    dit_lists,
    parse_dit_blocks,
    parse_unet_blocks,
    replaced_keys,
    single_unet_block,
)
from .defaults import default_blocks
from .emoji import PagFastEmoji
from .guidance import RESCALE_MODES, Guidance
from .passes import DiTPass, UNetPass
from .perturbations import BlurredQueries, Identity
from .sharing.dit import DiTPlan
from .sharing.others import ours
from .sharing.step import Sharing, denoiser
from .sharing.unet import UNetPlan

CATEGORY = "model/patch/unet"
ALIASES = ["PAG", "perturbed attention", "guidance", "pag_fast", "fast PAG"]


def guide(
    patcher: Any, guidance: Guidance, perturbed: Callable[[Any], Any], sharing: Sharing | None
) -> io.NodeOutput:
    """A clone of ``patcher`` whose predictions are guided; the model itself is not touched.

    Args:
        patcher: a ``ModelPatcher``.
        guidance: when, and how strongly.
        perturbed: the perturbed prediction, from what ComfyUI hands to a post-CFG function.
        sharing: what lets it resume from the main pass; None: it is computed whole.
    """
    patcher = patcher.clone()

    @ours
    def post_cfg(args: dict[str, Any]) -> Any:
        if not guidance.active(args["sigma"]):
            return args["denoised"]
        scale = guidance.scale_at(args["model"].model_sampling, args["sigma"])
        if scale == 0:
            return args["denoised"]
        return guidance.combine(args, perturbed(args), scale)

    patcher.set_model_sampler_post_cfg_function(
        post_cfg, disable_cfg1_optimization=guidance.rescale_mode == "snf"
    )
    if sharing is not None:
        sharing.attach(patcher)
    return io.NodeOutput(patcher)


def _guide_unet(
    patcher: Any, guidance: Guidance, blocks: frozenset[Block], attention: Any, share: bool
) -> io.NodeOutput:
    sharing = Sharing(UNetPlan(blocks), guidance.active) if share else None
    keys = replaced_keys(denoiser(patcher.model), blocks)
    return guide(patcher, guidance, UNetPass(keys, attention, sharing), sharing)


def _unet_of(patcher: Any, node: str) -> Any:
    net = denoiser(patcher.model)
    if isinstance(net, UNetModel):
        return net
    if dit_lists(net):
        raise ValueError(
            f"{node}: this model is a {type(patcher.model).__name__} "
            f"({type(net).__name__}), which has no UNet blocks: use PAG Fast (DiT)."
        )
    raise ValueError(
        f"{node}: {type(net).__name__} is of no family that pag_fast knows how to perturb; it "
        "takes UNets (SD 1.5, SD 2, SDXL and their kin) and transformers with lists of blocks."
    )


def _scale(default: float = 3.0) -> io.Float.Input:
    return io.Float.Input(
        "scale",
        default=default,
        min=0.0,
        max=100.0,
        step=0.1,
        round=0.01,
        tooltip="How strongly the prediction moves away from the perturbed one. 0 turns it off.",
    )


def _rescale() -> io.Float.Input:
    return io.Float.Input(
        "rescale",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="How much of the contrast that guidance adds is taken back.",
    )


def _share() -> io.Boolean.Input:
    return io.Boolean.Input(
        "share",
        default=True,
        optional=True,
        tooltip="Resume the perturbed pass where it leaves the main one: the same picture, sooner.",
    )


def _unet_inputs(*behind_scale: Any) -> list[Any]:
    """The inputs of the advanced node of sd-perturbed-attention, in its order."""
    sigma = {"default": -1.0, "min": -1.0, "max": 10000.0, "step": 0.01, "round": False}
    return [
        io.Model.Input("model"),
        _scale(),
        *behind_scale,
        io.Combo.Input(
            "unet_block",
            options=["input", "middle", "output"],
            default="middle",
            tooltip="Which part of the UNet is perturbed, unless unet_block_list names blocks.",
        ),
        io.Int.Input("unet_block_id", default=0, min=0, tooltip="Which block of that part."),
        io.Float.Input(
            "sigma_start", **sigma, tooltip="Guide at noise levels up to this one; -1: from first."
        ),
        io.Float.Input(
            "sigma_end", **sigma, tooltip="Guide at noise levels above this one; -1: to the last."
        ),
        _rescale(),
        io.Combo.Input(
            "rescale_mode",
            options=list(RESCALE_MODES),
            default="full",
            tooltip="Measured on the whole result, on cond alone, or the stronger guidance of "
            "each place (snf).",
        ),
        io.String.Input(
            "unet_block_list",
            default="",
            optional=True,
            tooltip="Several blocks: m0, u0.4, d2.2-9. Numbers count blocks with self-attention.",
        ),
        _share(),
    ]


def _guide_by_widgets(
    node: str,
    attention: Any,
    model: Any,
    *,
    unet_block: str,
    unet_block_id: int,
    unet_block_list: str = "",
    share: bool = True,
    **guidance: Any,
) -> io.NodeOutput:
    """Patch a clone of ``model`` as :func:`_unet_inputs` say; the others are of ``Guidance``."""
    net = _unet_of(model, node)
    if unet_block_list.strip():
        blocks = parse_unet_blocks(net, unet_block_list)
    else:
        blocks = single_unet_block(net, unet_block, unet_block_id)
    return _guide_unet(model, Guidance(**guidance), blocks, attention, share)


class PagFastPAG(io.ComfyNode):
    """Perturbed-Attention Guidance in the middle block, as ComfyUI's own node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The inputs of ComfyUI's own node."""
        return io.Schema(
            node_id="PagFastPAG",
            display_name="PAG Fast",
            category=CATEGORY,
            description="Perturbed-Attention Guidance for UNets, computing nothing twice. "
            "The same picture as PerturbedAttentionGuidance.",
            search_aliases=ALIASES,
            inputs=[io.Model.Input("model"), _scale()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, scale: float) -> io.NodeOutput:
        """Patch a clone of ``model``."""
        net = _unet_of(model, "PAG Fast")
        blocks = single_unet_block(net, "middle", 0)
        return _guide_unet(model, Guidance(scale), blocks, Identity(), share=True)


class PagFastPAGAdvanced(io.ComfyNode):
    """Perturbed-Attention Guidance with blocks, a window and rescaling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The inputs of sd-perturbed-attention's advanced node, and ``share``."""
        adaptive = io.Float.Input(
            "adaptive_scale",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            round=0.0001,
            tooltip="Weakens guidance as noise is removed; 1 ends it after the first step.",
        )
        return io.Schema(
            node_id="PagFastPAGAdvanced",
            display_name="PAG Fast (Advanced)",
            category=CATEGORY,
            description="Perturbed-Attention Guidance for UNets in chosen blocks, at chosen noise "
            "levels, computing nothing twice.",
            search_aliases=ALIASES,
            inputs=_unet_inputs(adaptive),
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, **widgets: Any) -> io.NodeOutput:
        """Patch a clone of ``model``."""
        return _guide_by_widgets("PAG Fast (Advanced)", Identity(), model, **widgets)


class PagFastSEG(io.ComfyNode):
    """Smoothed Energy Guidance: queries are blurred instead of replaced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The inputs of sd-perturbed-attention's SEG node, and ``share``."""
        blur = io.Float.Input(
            "blur_sigma",
            default=-1.0,
            min=-1.0,
            max=9999.0,
            step=0.01,
            round=0.001,
            tooltip="How far queries are blurred, in tokens; -1: every query is their mean.",
        )
        return io.Schema(
            node_id="PagFastSEG",
            display_name="SEG Fast",
            category=CATEGORY,
            description="Smoothed Energy Guidance for UNets, computing nothing twice.",
            search_aliases=[*ALIASES, "SEG", "smoothed energy guidance"],
            inputs=_unet_inputs(blur),
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, blur_sigma: float, **widgets: Any) -> io.NodeOutput:
        """Patch a clone of ``model``."""
        return _guide_by_widgets("SEG Fast", BlurredQueries(blur_sigma), model, **widgets)


class PagFastDiT(io.ComfyNode):
    """Perturbed-Attention Guidance, or skipped layers, in transformers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Blocks by kind, a window in percent of the sampling."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return io.Schema(
            node_id="PagFastDiT",
            display_name="PAG Fast (DiT)",
            category=CATEGORY,
            description="Perturbed-Attention Guidance for transformers (Flux, SD3, Wan, "
            "Qwen-Image, HunyuanVideo, LTX, Chroma, ...), computing nothing twice.",
            search_aliases=[*ALIASES, "SLG", "STG", "skip layer guidance"],
            inputs=[
                io.Model.Input("model"),
                _scale(),
                io.String.Input(
                    "double_blocks",
                    default="",
                    tooltip="Perturbed blocks: 3, 7-9. Both lists empty: the model's default.",
                ),
                io.String.Input(
                    "single_blocks", default="", tooltip="Perturbed single-stream blocks."
                ),
                io.Float.Input(
                    "start_percent", default=0.0, **percent, tooltip="Where guidance begins."
                ),
                io.Float.Input("end_percent", default=1.0, **percent, tooltip="Where it ends."),
                io.Combo.Input(
                    "perturbation",
                    options=["identity", "skip"],
                    default="identity",
                    tooltip="Image tokens attend to themselves and the text, or the blocks are "
                    "left out (SLG, STG).",
                ),
                _rescale(),
                _share(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scale: float,
        double_blocks: str,
        single_blocks: str,
        start_percent: float,
        end_percent: float,
        perturbation: str,
        rescale: float,
        share: bool = True,
    ) -> io.NodeOutput:
        """Patch a clone of ``model``."""
        net = denoiser(model.model)
        if not dit_lists(net):
            known = "use PAG Fast" if isinstance(net, UNetModel) else "pag_fast does not know it"
            raise ValueError(
                f"PAG Fast (DiT): {type(net).__name__} has no list of transformer blocks: {known}."
            )
        blocks = parse_dit_blocks(net, double_blocks, single_blocks) or default_blocks(net)
        guidance = Guidance(scale, 0.0, *_window(model, start_percent, end_percent), rescale)
        plan = DiTPlan(blocks)
        sharing = Sharing(plan, guidance.active) if share else None
        perturbed = DiTPass(blocks, plan, perturbation == "skip", sharing)
        return guide(model, guidance, perturbed, sharing)


def _window(model: Any, start: float, end: float) -> tuple[float, float]:
    """Noise levels of a window in percent of the sampling; -1 where it is open."""
    if start >= end:
        raise ValueError(f"start_percent {start} lies behind end_percent {end}: guide from 0 to 1.")
    sampling = model.get_model_object("model_sampling")
    return (
        -1.0 if start <= 0 else float(sampling.percent_to_sigma(start)),
        -1.0 if end >= 1 else float(sampling.percent_to_sigma(end)),
    )


GUIDANCE: list[type[io.ComfyNode]] = [PagFastPAG, PagFastPAGAdvanced, PagFastSEG, PagFastDiT]
NODES = [*GUIDANCE, PagFastEmoji]
