"""The perturbed pass of a UNet and of a transformer: cond's prediction with perturbed attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from comfy.model_patcher import set_model_options_patch_replace
from comfy.patcher_extension import WrappersMP

from .blocks import Block, dit_lists
from .sharing.dit import ASKING, COMPARED, HOOKLESS, DiTPlan, Patch, key_of, leave_out, with_patches
from .sharing.inputs import tensors_of
from .sharing.joint import Overrides, Perturbed, Probe, Seen
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
        self._probing = False
        self._seen: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, args: Arguments) -> torch.Tensor:
        """The perturbed prediction [B, C, ...] of ``args["cond"]``.

        Raises:
            ValueError: no block was perturbed, because the transformer does not let them be.
        """
        net = denoiser(args["model"])
        if net not in HOOKLESS:
            out = self._patched(args, net)
            if out is not None:
                return out
            HOOKLESS.add(net)
        if self.skip:
            raise ValueError(
                f"{type(net).__name__} does not let its blocks be left out; "
                "use perturbation 'identity'."
            )
        return self._hooked(args, net)

    def _patched(self, args: Arguments, net: torch.nn.Module) -> torch.Tensor | None:
        """Through patches of the blocks; None where the transformer asks none."""
        known = self.skip or type(net).__name__ in COMPARED
        override = Overrides(_override(args)) if self.skip else Perturbed(_override(args))
        patch = _skipping(override) if self.skip else _around(override)
        options = self._with_blocks(args, patch, override)
        if not known:
            options = self._looking(options, net, override)
        ran: list[int] = []
        with self._watching(net, options, ran):
            out = _resumed(self.sharing, args, options)
        if override.entered:
            ASKING.add(net)
        elif ran:
            return None
        if self.skip:
            return self._compared(out, args, net, options)
        _check(override, net)
        return self._compared(out, args, net, options)

    @contextmanager
    def _watching(
        self, net: torch.nn.Module, options: dict[str, Any], ran: list[int]
    ) -> Iterator[None]:
        """Note forwards of a transformer that was never seen to ask.

        A cache that leaves the forward out does so inside of the transformer's own, by a wrapper:
        beside one, only blocks that run count.
        """
        if net in ASKING:
            yield
            return
        lists = dit_lists(net)
        modules = [lists[kind][number] for kind, number, _ in self.blocks]
        wrappers = options["transformer_options"].get("wrappers", {})
        if not any(wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).values()):
            modules.append(net)
        with ExitStack() as stack:
            for module in modules:
                handle = module.register_forward_pre_hook(
                    lambda *_: None if self._probing else ran.append(1)
                )
                stack.callback(handle.remove)
            yield

    def _compared(
        self,
        out: torch.Tensor,
        args: Arguments,
        net: torch.nn.Module,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """``out``, which a whole pass has to equal once if the transformer is unknown."""
        if self.sharing is None or not self.sharing.resumed or not self.plan.doubted(net):
            return out
        whole = _whole(args, options)
        if not _equal(out, whole, args["cond_denoised"]):
            self.plan.refused[net] = "it does not come out the same when it resumes"
            self.sharing.report.whole(type(net).__name__, self.plan.refused[net])
            return whole
        self.plan.trusted.add(net)
        return out

    def _with_blocks(self, args: Arguments, patch: Any, override: Overrides) -> dict[str, Any]:
        options = _with_override(args, override)
        to = options.get("transformer_options", {})
        to = with_patches(to, {key_of(block): patch for block in self.blocks})
        return {**options, "transformer_options": to}

    # -- transformers whose blocks ask no patches ---------------------------------------------

    def _hooked(self, args: Arguments, net: torch.nn.Module) -> torch.Tensor:
        """Through hooks on the perturbed blocks, which are gone when the pass has ended."""
        override = Perturbed(_override(args))
        options = self._looking(_with_override(args, override), net, override)
        with self._hooks(net, override):
            out = _whole(args, options)
        _check(override, net)
        return out

    @contextmanager
    def _hooks(self, net: torch.nn.Module, override: Overrides) -> Iterator[None]:
        def meant() -> bool:
            """Tokens may be looked for inside of the perturbed pass."""
            return self._probing == isinstance(override, Probe)

        def enter(*_: Any) -> None:
            if meant():
                override.enter(0, 0)

        def leave(*_: Any) -> None:
            if meant():
                override.leave()

        lists = dit_lists(net)
        with ExitStack() as stack:
            for kind, number, _ in self.blocks:
                block = lists[kind][number]
                stack.callback(block.register_forward_pre_hook(enter).remove)
                stack.callback(block.register_forward_hook(leave, always_call=True).remove)
            yield

    def _looking(
        self, options: dict[str, Any], net: torch.nn.Module, override: Overrides
    ) -> dict[str, Any]:
        """``options`` with a wrapper that tells ``override`` the image tokens of each batch."""

        def look(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = self._inputs(x, *args, **kwargs)
            override.seen = self._tokens(executor.class_obj, net, inputs)
            return executor(x, *args, **kwargs)

        to = options["transformer_options"]
        wrappers = dict(to.get("wrappers", {}))
        around = dict(wrappers.get(WrappersMP.APPLY_MODEL, {}))
        # the last wrapper is the innermost one: it sees what the model is given
        wrappers[WrappersMP.APPLY_MODEL] = {**around, "pag_fast_tokens": [look]}
        return {**options, "transformer_options": {**to, "wrappers": wrappers}}

    @staticmethod
    def _inputs(
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        to = transformer_options or {}
        named = {"x": x, "t": t, "c_concat": c_concat, "c_crossattn": c_crossattn, **kwargs}
        return {**named, "transformer_options": to}

    def _tokens(
        self, model: Any, net: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the image and others of one batch, seen in a forward of NaN latents.

        Nobody else's patch, wrapper or ControlNet takes part: it might remember the NaN.
        """
        to = inputs["transformer_options"]
        shapes = tuple((name, tuple(one.shape)) for name, one in tensors_of(inputs))
        of = (tuple(to.get("uuids", ())), shapes)
        if of not in self._seen:
            probe = Probe(None)
            alone = {key: value for key, value in to.items() if key not in _OF_OTHERS}
            alone["optimized_attention_override"] = probe
            nan = {"x": torch.full_like(inputs["x"], float("nan")), "transformer_options": alone}
            self._probing = True
            with self._hooks(net, probe):
                try:
                    model._apply_model(**{**inputs, **nan})
                except Seen as seen:
                    if len(self._seen) >= _BATCHES:
                        self._seen.clear()
                    self._seen[of] = seen.tokens
                else:
                    raise ValueError(_nothing_perturbed(net))
                finally:
                    self._probing = False
        return self._seen[of]


# what transformer options hold of other nodes
_OF_OTHERS = ("patches", "patches_replace", "wrappers", "callbacks")
_BATCHES = 16  # of which the image tokens are remembered


def _override(args: Arguments) -> Any:
    return args["model_options"].get("transformer_options", {}).get("optimized_attention_override")


def _with_override(args: Arguments, override: Overrides) -> dict[str, Any]:
    options = args["model_options"]
    to = {**options.get("transformer_options", {}), "optimized_attention_override": override}
    return {**options, "transformer_options": to}


def _skipping(override: Overrides) -> Any:
    def patch(args: dict[str, Any], extra: dict[str, Any], before: Patch | None) -> Any:
        override.entered += 1
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
    if not isinstance(img, torch.Tensor):
        return 0, 0  # pictures with sound: their tokens have been seen
    if "txt" in args:
        text = args.get("txt")
        return img.shape[1], (0 if text is None else text.shape[1])
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
