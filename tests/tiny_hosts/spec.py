"""What a pipeline without PAG is tested with: layers, arguments, and pictures for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import PIL.Image
import tiny
import torch
from editing import EDITED

TEXT = 5  # tokens of a prompt


@dataclass(frozen=True)
class HostSpec:
    """A pipeline without PAG.

    ``layers`` names a set with a fork in the middle and one that holds every layer; ``text`` says
    where text tokens are in the sequence an attention sees: ``"first"``, ``"last"`` or ``""``.
    ``base`` is a host with the same class of denoiser, of which this is a variant. ``cfg`` is the
    argument with CFG's scale; empty where there is no CFG. What can be called in ``call`` gets the
    batch. ``swept`` is the spec of the sweep by which it is built and called.
    """

    name: str
    layers: dict[str, list[str]]
    text: str = ""
    like: str = ""  # the PAG pipeline of tiny.py that has the same components
    base: str = ""
    cfg: str = "guidance_scale"
    apart: bool = False  # cond and uncond are forwards of their own
    batches: tuple[int, ...] = (1, 2)  # that the pipeline takes
    rows: tuple[str, ...] = ("uncond", "cond")
    call: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # of the denoiser's configuration
    without: tuple[str, ...] = ()  # arguments that the PAG pipeline takes and this one does not
    swept: Any = None

    @property
    def brings_a_model(self) -> bool:
        """Whether no other pipeline of these tests, PAG pipelines included, has its denoiser."""
        return not self.like and not self.base

    @property
    def family(self) -> str:
        """The host that all variants of its denoiser are named for."""
        return self.base or self.name

    def cfg_scale(self, kwargs: dict[str, Any]) -> float:
        """The scale of CFG in a call."""
        if self.swept is not None:  # it may be a guider's
            cfg = any(name.startswith("negative_prompt_embeds") for name in kwargs)
            return self.swept.scales[0 if cfg else 1]
        return kwargs[self.cfg] if self.cfg else 1.0


def like(name: str, text: str = "", pag: str = "", **more: Any) -> HostSpec:
    pag = pag or name.replace("ControlNetImg2Img", "ControlNetPAGImg2Img")
    pag = pag.replace("ControlNetInpaint", "ControlNetPAGInpaint")
    if "PAG" not in pag:
        for tail in ("Img2ImgPipeline", "InpaintPipeline", "Pipeline"):
            if pag.endswith(tail):
                pag = pag.removesuffix(tail) + "PAG" + tail
                break
    layers = {k: v for k, v in tiny.PIPELINES[pag].layers.items() if k in ("middle", "all")}
    return HostSpec(name, layers, text, pag, **more)


def blocks(middle: list[str], every: str = "attn1") -> dict[str, list[str]]:
    return {"middle": middle, "all": [every]}


def variants(base: HostSpec, **calls: dict[str, Any]) -> list[HostSpec]:
    """Hosts with the denoiser of ``base``, and what is different in each."""
    return [
        replace(base, name=name, base=base.base or base.name, **changes)
        for name, changes in calls.items()
    ]


def mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, tiny.SIZE, tiny.SIZE)
    mask[:, :, : tiny.SIZE // 2] = 1
    return mask


def _from(seed: int) -> dict[str, Any]:
    """Numbers of a generator are made where it is, whatever the default device."""
    return {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}


def picture() -> torch.Tensor:
    return torch.rand(1, 3, tiny.SIZE, tiny.SIZE, **_from(1))


def photo(seed: int = 1) -> Any:
    numbers = torch.randint(256, (EDITED, EDITED, 3), **_from(seed))
    return PIL.Image.fromarray(numbers.to(torch.uint8).numpy())


def pictures(batch: int) -> torch.Tensor:
    return picture().expand(batch, -1, -1, -1)


def photos(batch: int) -> Any:
    """A film of two for each picture of the batch."""
    films = [[photo(10 * index + 1), photo(10 * index + 2)] for index in range(batch)]
    return films if batch > 1 else films[0]


def pooled(batch: int) -> torch.Tensor:
    return torch.randn(batch, 10, **_from(3))


def film(batch: int) -> torch.Tensor:
    """Of five frames."""
    made = torch.rand(1, 5, 3, tiny.SIZE, tiny.SIZE, **_from(2))
    return made.expand(batch, -1, -1, -1, -1)


SIZE = {"height": tiny.SIZE, "width": tiny.SIZE}
FROM_PICTURE = {"height": tiny.SIZE, "width": tiny.SIZE, "image": picture(), "strength": 1.0}
