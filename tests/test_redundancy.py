"""Nothing is computed twice: an oracle that looks at the values, not at the plan.

Every matrix product and convolution of a patched denoiser call is watched. Where two branches' rows
of its input are equal, the work on one of them was redundant.
"""

from __future__ import annotations

import pytest
import tiny_hosts
import torch
from tiny import PIPELINES, build, call_kwargs, every, latents
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import pag_fast
from pag_fast.models.layer_names import self_attentions
from pag_fast.pipelines.registry import HOSTS
from pag_fast.runtime.compatibility import row_wise

_SKIP = {torch.ops.pag_fast.combine_guidance}


@row_wise
class Redundancy(TorchDispatchMode):
    """FLOPs in total, and FLOPs spent on rows that equal those of another branch."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches, self.total, self.redundant = branches, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry and packet not in _SKIP:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.total += flops
            # addmm(bias, x, weight): the rows are the second argument's
            x = args[1] if packet is torch.ops.aten.addmm else args[0]
            self.redundant += flops * self._equal_share(x)
        return out

    def _equal_share(self, x: torch.Tensor) -> float:
        for slabs in (self.branches, self.branches - 1):
            if slabs > 1 and x.shape[0] % slabs == 0:
                *_, cond, other = x.chunk(slabs)
                # some BLAS round a row in another way where it lies elsewhere in the batch
                if (cond - other).norm() <= 1e-6 * cond.norm():
                    return 1 / slabs
        return 0.0


@pytest.mark.parametrize(
    ("name", "cfg", "layers"),
    every(
        [(True, "middle"), (False, "default")],
        [(True, "default"), (True, "last"), (False, "middle"), (False, "last")],
    ),
)
def test_no_row_is_computed_for_two_branches(name, cfg, layers):
    pipe = build(name, pag_applied_layers=PIPELINES[name].layers[layers])

    def redundant_share():
        # noise that differs from row to row: equal rows are then equal branches
        with Redundancy(3 if cfg else 2) as seen:
            latents(pipe, call_kwargs(name, pipe, batch=2, cfg=cfg, steps=1))
        return seen.redundant / seen.total

    stock = redundant_share()
    with pag_fast.patched(pipe):
        patched = redundant_share()
    # what is left, large only at this size: embeddings, and the keys of CLIP's few text tokens
    assert patched < 0.06
    assert stock > 2 * patched or patched < 0.002


@pytest.mark.parametrize("layers", ["middle", "last"])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", [n for n, spec in tiny_hosts.HOSTS.items() if spec.brings_a_model])
def test_no_row_is_computed_for_two_branches_of_a_host(name, cfg, layers):
    pipe = tiny_hosts.build(name)
    chosen = tiny_hosts.HOSTS[name].layers["middle"]
    if layers == "last":
        chosen = list(self_attentions(pipe.transformer))[-1:]
    together = cfg and not HOSTS[name].sequential

    def redundant_share(**options):
        # enough image tokens to outweigh what is projected from the timestep
        pixels = 128 if name == "ZImagePipeline" else 96
        size = {"height": pixels, "width": pixels}
        batch = tiny_hosts.HOSTS[name].batches[-1]
        kwargs = tiny_hosts.call_kwargs(name, pipe, batch=batch, cfg=cfg, steps=1, **size)
        seen = Redundancy(3 if together else 2)
        with pag_fast.patched(pipe, chosen, **options), seen:
            tiny_hosts.latents(pipe, kwargs)
        return seen.redundant / seen.total

    apart, patched = redundant_share(share_branches=False), redundant_share()
    assert patched < 0.06
    assert apart > 2 * patched
