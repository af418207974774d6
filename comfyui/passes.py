"""The perturbed pass of a UNet and of a transformer: cond's prediction with perturbed attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from comfy.model_patcher import set_model_options_patch_replace

from .blocks import Block, dit_lists
from .sharing.dit import COMPARED, HOOKLESS, DiTPlan, Patch, key_of, leave_out, with_patches
from .sharing.joint import Overrides, Perturbed, Probe, Seen, Tokens
from .sharing.step import Sharing, denoiser, predicted

Arguments = dict[str, Any]  # what ComfyUI hands to a post-CFG function


def _whole(args: Arguments, options: dict[str, Any]) -> torch.Tensor:
    return predicted(args, args["cond"], options)


def _resumed(sharing: Sharing | None, args: Arguments, options: dict[str, Any]) -> torch.Tensor:
    return _whole(args, options) if sharing is None else sharing.perturbed(args, options)


class UNetPass:
    """The perturbed pass of a UNet.

    Args:
        keys: of the perturbed blocks (:func:`.blocks.replaced_keys`).
        attention: replaces ``attn1`` in them.
        sharing: resumes the pass; None: it is computed whole, as by ComfyUI's own node.
    """

    def __init__(
        self, keys: list[tuple[Any, ...]], attention: Callable[..., Any], sharing: Sharing | None
    ) -> None:
        self.keys, self.attention, self.sharing = keys, attention, sharing

    def __call__(self, args: Arguments) -> torch.Tensor:
        """The perturbed prediction [B, C, ...] of ``args["cond"]``."""
        options = args["model_options"].copy()
        for key in self.keys:
            options = set_model_options_patch_replace(options, self.attention, "attn1", *key)
        return _resumed(self.sharing, args, options)


class DiTPass:
    """The perturbed pass of a transformer.

    Args:
        blocks: the perturbed blocks.
        plan: remembers what was seen of the transformer.
        skip: leave the blocks out instead of perturbing their attention.
        sharing: resumes the pass; None: it is computed whole.
    """

    def __init__(
        self, blocks: frozenset[Block], plan: DiTPlan, skip: bool, sharing: Sharing | None
    ) -> None:
        self.blocks, self.plan, self.skip, self.sharing = blocks, plan, skip, sharing
        self._seen: tuple[Any, tuple[Tokens, Tokens]] | None = None

    def __call__(self, args: Arguments) -> torch.Tensor:
        """The perturbed prediction [B, C, ...] of ``args["cond"]``.

        Raises:
            ValueError: no block was perturbed, because the transformer does not let them be.
        """
        net = denoiser(args["model"])
        if type(net) not in HOOKLESS:
            out = self._patched(args, net)
            if out is not None:
                return out
            HOOKLESS.add(type(net))
        if self.skip:
            raise ValueError(
                f"{type(net).__name__} does not let its blocks be left out; "
                "use perturbation 'identity'."
            )
        return self._hooked(args, net)

    def _patched(self, args: Arguments, net: torch.nn.Module) -> torch.Tensor | None:
        """Through patches of the blocks; None where the transformer asks none."""
        if self.skip:
            asked: list[int] = []
            out = _resumed(self.sharing, args, self._with_blocks(args, _skipping(asked)))
            return self._compared(out, args, net, _skipping([])) if asked else None
        known = type(net).__name__ in COMPARED
        override = Perturbed(_override(args), None if known else self._tokens(args, net))
        options = self._with_blocks(args, _around(override), override)
        out = _resumed(self.sharing, args, options)
        if override.entered == 0:
            return None
        _check(override, net)
        return self._compared(out, args, net, _around(override), override)

    def _compared(
        self,
        out: torch.Tensor,
        args: Arguments,
        net: torch.nn.Module,
        patch: Any,
        override: Overrides | None = None,
    ) -> torch.Tensor:
        """``out``, which a whole pass has to equal once if the transformer is unknown."""
        if self.sharing is None or not self.plan.doubted(net) or self.plan.supports(net):
            return out
        whole = _whole(args, self._with_blocks(args, patch, override))
        if not _equal(out, whole, args["cond_denoised"]):
            self.plan.refused[net] = "it does not come out the same when it resumes"
            self.sharing.report.whole(type(net).__name__, self.plan.refused[net])
            return whole
        self.plan.trusted.add(net)
        return out

    def _with_blocks(
        self, args: Arguments, patch: Any, override: Overrides | None = None
    ) -> dict[str, Any]:
        options = args["model_options"] if override is None else _with_override(args, override)
        to = options.get("transformer_options", {})
        to = with_patches(to, {key_of(block): patch for block in self.blocks})
        return {**options, "transformer_options": to}

    # -- transformers whose blocks ask no patches ---------------------------------------------

    def _hooked(self, args: Arguments, net: torch.nn.Module) -> torch.Tensor:
        """Through hooks on the perturbed blocks, which are gone when the pass has ended."""
        override = Perturbed(_override(args), self._tokens(args, net))
        with self._hooks(net, override):
            out = _whole(args, _with_override(args, override))
        _check(override, net)
        return out

    @contextmanager
    def _hooks(self, net: torch.nn.Module, override: Overrides) -> Iterator[None]:
        lists = dit_lists(net)
        with ExitStack() as stack:
            for kind, number, _ in self.blocks:
                block = lists[kind][number]
                enter = block.register_forward_pre_hook(lambda *_: override.enter(0, 0))
                stack.callback(enter.remove)
                leave = block.register_forward_hook(lambda *_: override.leave(), always_call=True)
                stack.callback(leave.remove)
            yield

    def _tokens(self, args: Arguments, net: torch.nn.Module) -> tuple[Tokens, Tokens]:
        """Tokens of the image and others, seen once a sampling in a forward of NaN latents."""
        of = (args["input"].shape, args["cond"][0]["uuid"])
        if self._seen is not None and self._seen[0] == of:
            return self._seen[1]
        probe = Probe(None)
        cond = [{key: one[key] for key in one if key != "control"} for one in args["cond"][:1]]
        nan = {**args, "cond": cond, "input": torch.full_like(args["input"], float("nan"))}
        with self._hooks(net, probe):
            try:
                _whole(nan, _with_override(args, probe))
            except Seen as seen:
                self._seen = of, seen.tokens
                return seen.tokens
        raise ValueError(_nothing_perturbed(net))


def _override(args: Arguments) -> Any:
    return args["model_options"].get("transformer_options", {}).get("optimized_attention_override")


def _with_override(args: Arguments, override: Overrides) -> dict[str, Any]:
    options = args["model_options"]
    to = {**options.get("transformer_options", {}), "optimized_attention_override": override}
    return {**options, "transformer_options": to}


def _skipping(asked: list[int]) -> Any:
    def patch(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
        asked.append(1)
        return leave_out(args, extra, before)

    return patch


def _around(override: Overrides) -> Any:
    """A patch that tells ``override`` when a perturbed block begins and ends."""

    def patch(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
        override.enter(*_tokens(args))
        try:
            return before(args, extra) if before else extra["original_block"](args)
        finally:
            override.leave()

    return patch


def _tokens(args: dict[str, Any]) -> tuple[int, int]:
    """Image tokens of a block, and the text tokens that may stand in front of them."""
    img = args.get("img", args.get("x"))
    if "txt" in args or img is None:
        text = args.get("txt")
        return (0 if img is None else img.shape[1]), (0 if text is None else text.shape[1])
    # a single stream: ComfyUI says where its image begins
    span = args.get("transformer_options", {}).get("img_slice")
    text = span[0] if span else 0
    return img.shape[1] - text, text


def _check(override: Overrides, net: torch.nn.Module) -> None:
    if override.replaced < override.entered:
        raise ValueError(_nothing_perturbed(net))


def _nothing_perturbed(net: torch.nn.Module) -> str:
    return (
        f"the chosen blocks of {type(net).__name__} have no attention that can be perturbed from "
        "outside, so PAG would do nothing; choose other blocks, or perturbation 'skip'."
    )


def _equal(resumed: torch.Tensor, whole: torch.Tensor, cond: torch.Tensor) -> bool:
    """Whether two predictions differ by rounding, measured by the guidance they give."""
    allowed = 1e-3 if whole.dtype == torch.float32 else 2e-2
    difference = (resumed - whole).float().norm()
    return bool(difference <= allowed * (cond - whole).float().norm())
