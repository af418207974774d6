"""What a file in this package says about a class of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..processors.rows import PerturbedProcessor
from ..sharing.layout import IMAGE_ALONE, Layout, Stream
from ..sharing.plan import BranchPlan
from ..sharing.tokens import Run
from .tensors import Latent, NewTensors

Inputs = Callable[[Any, NewTensors, int, Latent], dict[str, Any]]
"""Makes a model's forward arguments for a number of rows and a size of latents."""

Sequence = Callable[[Any, dict[str, Any]], tuple[tuple[int, ...], int]]
"""``(text tokens of each sample, image tokens)`` from a model and its arguments."""

Runs = Callable[[Any, dict[str, Any]], tuple[Run, ...]]
"""Where the image's tokens are, in all rows or in each, from a model and its arguments."""


@dataclass(frozen=True)
class Checkpoint:
    """Published weights of a denoiser (and ControlNet), by their configuration.

    ``config`` may leave out what is the class's default, ``height``, ``width`` (pixels) and
    ``frames`` are the model's native size, and ``variant`` tells checkpoints of one pipeline apart.
    """

    pipeline: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    height: int = 1024
    width: int = 1024
    frames: int = 1
    frame_factor: int = 1
    vae_scale_factor: int = 8
    controlnet: dict[str, Any] | None = None
    variant: str = ""


@dataclass(frozen=True)
class ControlNetDescription:
    """A class of ControlNets.

    Attributes:
        name: of the class.
        inputs: makes arguments of its forward, as the pipelines of diffusers do.
        blocks: class names of its repeated blocks.
        fusable_processors: class names of diffusers' attention processors that project queries,
            keys and values of one tensor, and take projections that are views of one product.
    """

    name: str
    inputs: Inputs
    blocks: tuple[str, ...]
    fusable_processors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ModelDescription:
    """A class of denoisers.

    Attributes:
        name: of the class.
        processor: the attention processor of its perturbed layers.
        plan: builds the branch plan from the model and the names of its perturbed layers.
        inputs: makes arguments of its forward, as the pipelines of diffusers do.
        blocks: class names of its repeated blocks, and the streams that each returns, in order.
            These are the blocks that can be perturbed as a whole.
        layout: of a transformer; UNets have none.
        text: forward arguments in which uncond and cond differ because their prompts do.
        stock_processors: class names of diffusers' ``(CFG, no CFG)`` pair of PAG processors, if it
            has one.
        replaces: class names of diffusers' processors whose arithmetic ours repeats. Others are
            refused in perturbed layers, but for PAG pipelines of diffusers, which displace any.
            Where ours runs the one that it displaces (:attr:`runs_stock`), none means any.
        fusable_processors: class names of diffusers' attention processors that project queries,
            keys and values of one tensor, and take projections that are views of one product; the
            ``stock_processors`` do, too.
        sequence: where blocks get text and image as one sequence, how long each is.
        cut: how many tokens of text and image diffusers' context parallelism cuts into a part for
            each rank, if that is exact; without it context parallelism is refused.
        shares_heads: diffusers' tensor parallelism gives each rank some of the heads of a layer,
            and what its processor does there is right for these alone.
        heads: the attribute of its attentions that says how many heads they have.
        tokens: of a model whose layers' own processors run around our product
            (:class:`~pag_fast.processors.stock.PerturbedStockAttention`), where the image's tokens
            are in the sequences that its layers attend to.
        rows_second: forward arguments whose tensors have their rows in the second dimension.
        countable: of a model whose own code asks tensors for their values: changes it, on the meta
            device, so that it runs there at the same FLOPs. It is neither compiled nor captured.
        learned_sigma: with twice as many channels as go in, the second half of what comes out is
            a variance.
        checkpoints: published weights of this class.
        attentions: of a model that was derived (:mod:`pag_fast.models.traced`), the names of its
            attentions: at first those that may be perturbed, then those that a trace has shown to
            mix image tokens, in execution order.
        is_traced: which tokens are the image's, and where rows can change, is seen in a trace of
            every model of this class, see :func:`pag_fast.models.traced.written.traced_model`.
        traced: what the forwards of a model that is traced have shown so far.
    """

    name: str
    processor: type[PerturbedProcessor]
    plan: Callable[..., BranchPlan]
    inputs: Inputs
    blocks: Mapping[str, tuple[Stream, ...]]
    layout: Layout | None = None
    text: frozenset[str] = frozenset()
    stock_processors: tuple[str, str] | None = None
    replaces: frozenset[str] = frozenset()
    fusable_processors: frozenset[str] = frozenset()
    sequence: Sequence | None = None
    cut: Sequence | None = None
    shares_heads: bool = False
    heads: str = "heads"
    tokens: Runs | None = None
    rows_second: tuple[str, ...] = ()
    countable: Callable[[Any], None] | None = None
    learned_sigma: bool = False
    checkpoints: tuple[Checkpoint, ...] = field(default=(), repr=False)
    attentions: tuple[str, ...] = ()
    is_traced: bool = False
    traced: Any = field(default=None, repr=False)

    @property
    def is_derived(self) -> bool:
        """Whether a trace completes this description, be it of an unknown class or not."""
        return bool(self.attentions)

    @property
    def known_processors(self) -> frozenset[str]:
        """Class names of the processors whose place ours may take, those of diffusers' PAG too."""
        return self.replaces | set(self.stock_processors or ())

    @property
    def runs_stock(self) -> bool:
        """Whether the processors of perturbed layers go on running, around our product."""
        return self.is_derived or self.tokens is not None

    @property
    def skippable_blocks(self) -> frozenset[str]:
        """Class names of the blocks that can be skipped, or get their tokens in another order."""
        return frozenset(self.blocks)

    def streams(self, block: Any) -> tuple[Stream, ...]:
        """What a block of such a model returns, in order."""
        kinds = [cls.__name__ for cls in type(block).__mro__]
        return next((self.blocks[kind] for kind in kinds if kind in self.blocks), IMAGE_ALONE)

    def predicts_variance(self, model: Any) -> bool:
        """Whether the second half of a model's output channels is a variance."""
        return self.learned_sigma and model.config.out_channels == 2 * model.config.in_channels
