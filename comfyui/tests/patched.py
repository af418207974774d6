"""Models as this pack's nodes return them, and how two samplings compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import loaded
import tiny
import torch
from flops import Flops

# isort: split
from comfyui import nodes

ADVANCED = {
    "scale": 3.0,
    "adaptive_scale": 0.0,
    "unet_block": "middle",
    "unet_block_id": 0,
    "sigma_start": -1.0,
    "sigma_end": -1.0,
    "rescale": 0.0,
    "rescale_mode": "full",
    "unet_block_list": "",
    "share": True,
}
SEG = {k: v for k, v in ADVANCED.items() if k != "adaptive_scale"} | {"blur_sigma": -1.0}
DIT = {
    "scale": 3.0,
    "double_blocks": "",
    "single_blocks": "",
    "start_percent": 0.0,
    "end_percent": 1.0,
    "perturbation": "identity",
    "rescale": 0.0,
    "share": True,
}


def pag(model: Any, **widgets: Any) -> Any:
    """``model`` (a ``ModelPatcher``) patched by the advanced node."""
    return nodes.PagFastPAGAdvanced.execute(model, **{**ADVANCED, **widgets}).result[0]


def seg(model: Any, **widgets: Any) -> Any:
    """``model`` patched by the SEG node."""
    return nodes.PagFastSEG.execute(model, **{**SEG, **widgets}).result[0]


def dit(model: Any, **widgets: Any) -> Any:
    """``model`` patched by the node for transformers."""
    return nodes.PagFastDiT.execute(model, **{**DIT, **widgets}).result[0]


@dataclasses.dataclass(repr=False)
class Compared:
    """A sampling without PAG, with a whole perturbed pass, and with one that resumes."""

    without: torch.Tensor
    whole: torch.Tensor
    shared: torch.Tensor
    ratios: tuple[float, float]  # FLOPs of the whole and of the resumed, × those without PAG

    def __repr__(self) -> str:
        return f"error {self.error:.2e}, effect {self.effect:.2e}, FLOPs {self.ratios}"

    @property
    def error(self) -> float:
        """How far sharing moves the result, relative to the result."""
        return float((self.shared - self.whole).abs().max() / self.whole.abs().max())

    @property
    def effect(self) -> float:
        """How far PAG moves the result, relative to the result."""
        return float((self.without - self.whole).abs().max() / self.whole.abs().max())


def compare(
    model: tiny.Tiny, patch: Callable[..., Any], around: Callable[[Any], Any] | None = None,
    sample: Callable[..., torch.Tensor] = tiny.sample, **options: Any
) -> Compared:  # fmt: skip
    """Three samplings; ``around`` is another node, whose effect is in all of them."""
    around = around or (lambda patcher: patcher)
    results, counts = [], []
    for patched in (
        around(model.model),
        around(patch(model.model, share=False)),
        around(patch(model.model, share=True)),
    ):
        with Flops() as count:
            results.append(sample(model, patched, **options))
        counts.append(count)
    return Compared(*results, (counts[1] / counts[0], counts[2] / counts[0]))


# engines before it ask the patch for layers of classes that they do not know only
UNETS_SHARE = loaded.at_least("0.20.1")


def costs(compared: Compared, most: float, saved: float = 0.0) -> None:
    """A UNet's FLOPs × those without PAG are at most ``most``, and ``saved`` below a whole pass.

    Engines that cannot share compute whole, which is as much as core's node.
    """
    whole, shared = compared.ratios
    if UNETS_SHARE:
        assert shared <= min(most, whole - saved), compared
    else:
        assert shared <= 1.001 * whole, compared


def holds(compared: Compared, bound: float = 5e-6) -> None:
    """Sharing does not move the picture, PAG does, by far more."""
    assert compared.shared.isfinite().all()
    assert compared.error <= bound, compared
    assert compared.effect > 100 * max(compared.error, 1e-6), compared
