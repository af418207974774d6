"""What a forward of the perturbed branch alone can take from a forward of cond before it.

The modules in front of the fork see what they saw in cond's forward. Outputs that modules behind
the fork read are kept; of the others the shapes are enough, as nobody looks at their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .plan import BranchPlan, Site, SkipSite
from .rows import SHARED, SPLIT


@dataclass(frozen=True)
class Known:
    """A module in front of the fork.

    Attributes:
        kept: which tensors of its output are read behind the fork, by their position in it;
            ``None``: all of them.
    """

    name: str
    module: nn.Module
    kept: frozenset[int] | None


def known_modules(model: Any, plan: BranchPlan) -> list[Known]:
    """The modules of ``model`` that need not run again once cond has run, by its branch plan.

    Args:
        plan: made without merging uncond and cond. One that shares nothing knows nothing.
    """
    shared = {site.name: site for site in plan.sites if _is_before_fork(site, plan)}
    outer = _outermost(shared)
    skips = {site.name: site for site in plan.skip_sites}
    # HunyuanDiT hands the output of every early block to a late one
    long_skips = any("skip" in site.streams for site in plan.sites)
    read = {name for site in plan.skip_sites if site.name not in shared for name in _makers(site)}
    # of refiners that run one after the other, the last one's output is all that is read
    last = {_list_of(site.name): site.name for site in outer}

    def kept(site: Site) -> frozenset[int] | None:
        is_last = site.leaves == SPLIT and last[_list_of(site.name)] == site.name
        if is_last or long_skips or site.name in read:
            return None
        # a block returns its stream and its skips; the skip made last is the stream
        stored = skips[site.name].stored if site.name in skips else ()
        return frozenset(i for i, to in enumerate(stored, 1) if to == SPLIT)

    return [Known(site.name, site.module, kept(site)) for site in outer]


def _outermost(sites: dict[str, Site]) -> list[Site]:
    """Sites that are inside no other: a UNet's blocks in front of the fork have some inside."""
    return [s for s in sites.values() if not any(s.name.startswith(f"{o}.") for o in sites)]


def _is_before_fork(site: Site, plan: BranchPlan) -> bool:
    # text keys behind the fork are equal as well: there are many, and they are small work
    is_key = site.name.endswith((".to_k", ".to_v"))
    return site.runs == SHARED and site.name != plan.fork and not is_key


def _list_of(name: str) -> str:
    parent, _, own = name.rpartition(".")
    return parent if own.isdigit() else name


def _makers(site: SkipSite) -> list[str]:
    """The units of the fork's own block whose outputs are skips that are read behind the fork."""
    makers = []
    for step, (made, stored) in enumerate(zip(site.made, site.stored, strict=True)):
        if made == SHARED and stored == SPLIT:
            for kind in ("motion_modules", "attentions", "resnets"):
                units = getattr(site.module, kind, None)
                if units is not None and step < len(units) and units[step] is not None:
                    makers.append(f"{site.name}.{kind}.{step}")
                    break
    return makers
