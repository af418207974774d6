"""Models whose weights lie together, their outputs, and what of them lies where."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from launches import fusion_of
from shallow import build

from pag_fast.fusion.packed_linears import _WHOLES
from pag_fast.sharing.replacement import MISSING, Replacement
from pag_fast.sharing.rows import BranchState
from pag_fast.sharing.threads import HERE

UNET = "StableDiffusionPAGPipeline"


class Joined:
    """A pipeline whose UNet has joined weights, and a stock one with the same values."""

    def __init__(self) -> None:
        self.pipe, self.stock = build(UNET), build(UNET)
        self.state = BranchState()
        self.fusion = fusion_of(self.pipe.unet, state=self.state)
        self.run()
        assert self.members() and wholes(self.pipe.unet)

    def members(self) -> int:
        return sum(key == "forward" for _, key, _ in self.fusion.entries)

    @contextmanager
    def forward(self):
        """What the runtime does around one forward."""
        fusion = self.fusion
        with torch.no_grad():
            fusion.refresh()
        self.state.step += 1
        self.state.thread = HERE.me
        before = [(own, key, own.get(key, MISSING)) for own, key, _ in fusion.entries]
        for (own, key, value), (_, _, was) in zip(fusion.entries, before, strict=True):
            if isinstance(value, Replacement):
                value.displace(was)
            own[key] = value
        try:
            yield
        finally:
            self.state.thread = None
            for own, key, was in before:
                own.pop(key) if was is MISSING else own.update({key: was})
            fusion.forget()

    def run(self, unet=None):
        with self.forward():
            return output(self.pipe.unet if unet is None else unet)


def output(unet):
    source = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=source) for s in ((2, 4, 8, 8), (2, 5, 12)))
    x, text = x.to(unet.dtype), text.to(unet.dtype)
    with torch.no_grad():
        return unet(x, 7, encoder_hidden_states=text).sample.double()


def wholes(model):
    parameters = list(model.parameters())
    return {w for w in list(_WHOLES.values()) if any(map(w.contains, parameters))}


def equal(have, want):
    assert list(have) == list(want)
    assert all(torch.equal(have[key], want[key]) for key in want)


@pytest.fixture
def joined():
    return Joined()


def owns_storages(parameters):
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters}
    sizes = [p.numel() * p.element_size() for p in parameters]
    return list(storages.values()) == sizes
