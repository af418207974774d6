"""What the loop of a pipeline that nobody has described does with its denoiser, seen as it runs.

Which rows of a batch, or which of several forwards in a step, are cond's shows in whose text they
get. Where that cannot be seen diffusers' order is taken (uncond in front in a batch, cond first
where each has a forward), and checked by what the loop makes of the predictions
(``observed_guidance.py``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from ...models.registry import COND, UNCOND
from ..access.forwards import Call
from .observed_guidance import LATENTS, ObservedGuidance

# the other passes of a step besides uncond: SD3's skip-layer guidance, and what is like it
SKIP = "skip"
# comparisons of prompts that are remembered
_MOST_KNOWN = 256
_FLAGS = ("do_true_cfg", "do_classifier_free_guidance", "do_cfg")


class ObservedLoop:
    """For one denoiser and one call.

    Args:
        pipe: the running pipeline.
        tell: is told of what is not as it should be.
        what: why it is looked at: what its class does, or has not.
        would: what would help, where it cannot be followed.

    Attributes:
        guidance: what the loop makes of the predictions.
        assumed: the order of the latest forward's branches was not seen.
        seen: what there was to see, for whoever describes the pipeline.
    """

    def __init__(self, pipe: Any, tell: Callable[[str], None], what: str, would: str) -> None:
        self.pipe = pipe
        self._tell = tell
        self._name, self._would = f"{type(pipe).__name__} {what}", would
        self.guidance = ObservedGuidance(
            type(pipe).__name__, self._name, tell, self._refusal, self._rescales
        )
        self.cond_first = False
        self.assumed = False
        self._equal: dict[tuple[int, int, int], tuple[Any, Any, bool]] = {}
        self._first: Any = None
        self._halves_seen = False
        self.seen: dict[str, str] = {}

    def _rescales(self) -> bool:
        names = "guidance_rescale", "_guidance_rescale"
        return any(float(getattr(self.pipe, name, None) or 0.0) > 0.0 for name in names)

    # ---- rows and passes ----

    def uses_cfg(self, local: dict[str, Any]) -> bool:
        """Whether the call uses CFG, by its own names for that, or by its guider."""
        guider = local.get("guider", getattr(self.pipe, "guider", None))
        conditions = getattr(guider, "num_conditions", None)
        if isinstance(conditions, int):
            return conditions > 1
        for name in _FLAGS:
            if isinstance(local.get(name), bool):
                return bool(local[name])
        return any(bool(getattr(self.pipe, name, False)) for name in _FLAGS)

    def branches(self, rows: int, local: dict[str, Any]) -> int:
        """How many branches a batch of ``rows`` rows holds.

        Raises:
            ValueError: more than two, or no telling.
        """
        pictures = 0
        for name in LATENTS:
            latents = local.get(name)
            if isinstance(latents, list) and latents and isinstance(latents[0], torch.Tensor):
                have = len(latents)
            elif isinstance(latents, torch.Tensor) and latents.ndim > 1:
                have = latents.shape[0]
            else:
                continue
            pictures = pictures or have
            if have and not rows % have and rows // have <= 2:
                return rows // have
            if have and not rows % have:
                raise self._refusal(
                    f"and runs {rows // have} branches in one batch: which of them is cond cannot "
                    "be told"
                )
        if pictures > 1 and rows != pictures:
            raise self._refusal(
                f"and runs {rows} rows at a time for its {pictures} pictures: whether they are "
                "uncond and cond of one of them, or cond of several, cannot be told"
            )
        if not self.uses_cfg(local):
            return 1
        raise self._refusal(
            "and its loop does not show whether the denoiser's batch holds uncond and cond, or one "
            "of them"
        )

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"{self._name}, {why}. {self._would}")

    def layout(self, call: Call, rows: int, local: dict[str, Any]) -> tuple[str, ...]:
        """The branches of a batch, in our order; :attr:`cond_first` says whether it is turned."""
        if self.branches(rows, local) == 1:
            return (COND,)
        first = self._whose(call, rows, local, 2)
        if not first:
            first, self.assumed = UNCOND, True
        self.cond_first = first == COND
        order = "cond, uncond" if self.cond_first else "uncond, cond"
        self.seen["branches"] = f"together in one forward, {order}"
        return UNCOND, COND

    def pass_of(self, call: Call, rows: int, local: dict[str, Any], seen: list[str]) -> str:
        """Which pass of its step a forward is.

        A second one of cond, with other settings on as many tokens, is another term of the loop's
        guidance: what it subtracts is cond's.
        """
        self.assumed = False
        before = self.seen.get("branches")
        found = self._pass_of(call, rows, local, seen)
        if found != COND:
            return found
        settings = _settings(call)
        if COND not in seen:
            self._first = settings
        elif settings != self._first and settings[0] == self._first[0]:
            if before is not None:  # it has no rows of uncond, wherever those are
                self.seen["branches"] = before
            return SKIP
        return COND

    def _pass_of(self, call: Call, rows: int, local: dict[str, Any], seen: list[str]) -> str:
        if self.branches(rows, local) == 2:
            return COND
        found = self._whose(call, rows, local, 1)
        if not found:
            self._refuse_halves(call, rows, local)
        if found != UNCOND and not self.uses_cfg(local):
            self.seen.setdefault("branches", "cond alone")
            return COND
        self.seen["branches"] = "a forward for each"
        if not found:
            found, self.assumed = (UNCOND if COND in seen else COND), True
        return found

    def _refuse_halves(self, call: Call, rows: int, local: dict[str, Any]) -> None:
        """See, once in a call, whether a batch is uncond and cond of some of the pictures.

        Raises:
            ValueError: as many rows as there are pictures have the prompts of fewer.
        """
        if self._halves_seen or rows % 2:
            return
        self._halves_seen, unit = True, rows // 2
        own = _parts(local, rows, unit)
        for given in [
            x for x in call.values() if isinstance(x, torch.Tensor) and _is_text(x, rows)
        ]:
            found = [
                {branch for branch, x in own if _equals(half, x)} for half in given.split(unit)
            ]
            if sorted(map(sorted, found)) == sorted(([UNCOND], [COND])):
                raise self._refusal(
                    f"and runs uncond and cond of {unit} of its {rows} pictures at a time: a batch "
                    "should have all of them"
                )

    def _whose(self, call: Call, rows: int, local: dict[str, Any], slabs: int) -> str:
        """Whose text is in front of a batch; empty where that cannot be seen."""
        unit = rows // slabs
        names = [name for name in list(local) if "embed" in name and "mask" not in name]
        own = [(_branch(name), local[name]) for name in names]
        own = [(branch, x) for branch, x in own if _is_text(x, unit)]
        told: set[str] = set()
        for given in [x for x in call.values() if _is_text(x, rows)]:
            found: list[set[str]] = []
            for start in range(0, rows, unit):
                part = given[start : start + unit]
                found.append({b for b, x in own if self._same(part, x, given, start)})
            # what both have in common, as masks, tells nothing
            for place, branches in enumerate(found):
                if len(branches) == 1 and found.count(branches) == 1:
                    branch = branches.pop()
                    told.add(branch if place == 0 else (COND if branch == UNCOND else UNCOND))
                    break
        # what each pass has, as a picture's embedding, looks like cond's alone
        return UNCOND if UNCOND in told else "".join(told)

    def _same(self, x: Any, own: Any, whole: Any, start: int) -> bool:
        """Whether two prompts are equal; lists have a tensor for each row.

        Args:
            whole, start: ``x`` is the part of it that begins there.
        """
        if isinstance(x, list) or isinstance(own, list):
            both = isinstance(x, list) and isinstance(own, list)
            if not both or len(x) != len(own):
                return False
            return all(self._same(x[i], own[i], x[i], 0) for i in range(len(x)))
        if x.shape != own.shape or x.dtype != own.dtype:
            return False
        if x.data_ptr() == own.data_ptr() and x.stride() == own.stride():
            return True
        # comparing waits for the device, and most prompts last for the call; the address of one
        # that does not is another's soon
        key, versions = (id(whole), start, id(own)), (_version(whole), _version(own))
        known = self._equal.get(key)
        if known is not None and None not in versions and known[1] == versions:
            refs, _, equal = known
            if refs[0]() is whole and refs[1]() is own:
                return equal
        equal = _equals(x, own)
        if len(self._equal) >= _MOST_KNOWN:
            self._equal.clear()
        self._equal[key] = (weakref.ref(whole), weakref.ref(own)), versions, equal
        return equal


def _parts(local: dict[str, Any], rows: int, unit: int) -> list[tuple[str, torch.Tensor]]:
    """The loop's prompts for ``rows`` pictures, ``unit`` of them at a time, and whose they are."""
    names = [name for name in list(local) if "embed" in name and "mask" not in name]
    own = [(_branch(name), local[name]) for name in names if isinstance(local[name], torch.Tensor)]
    return [(branch, x) for branch, text in own if _is_text(text, rows) for x in text.split(unit)]


def _equals(x: torch.Tensor, other: torch.Tensor) -> bool:
    alike = x.shape == other.shape and x.dtype == other.dtype
    return alike and torch.equal(x.to(other.device), other)


def _version(x: torch.Tensor) -> int | None:
    """Another number after every write; ``None`` where nobody counts them."""
    return None if x.is_inference() else x._version


def _settings(call: Call) -> tuple[Any, dict[str, Any]]:
    """The size of a row of latents, and the arguments that are neither tensors nor numbers.

    A number may be the timestep: at another one cond is evaluated again.
    """
    first = next(iter(call.values()))
    size = first.shape[1:] if isinstance(first, torch.Tensor) else None
    plain, listed = (bool, str, type(None)), (bool, int, float, str, type(None))
    return size, {
        name: x
        for name, x in call.items()
        if isinstance(x, plain) or (isinstance(x, list) and all(isinstance(i, listed) for i in x))
    }


def _branch(name: str) -> str:
    return UNCOND if "negative" in name or "uncond" in name else COND


def _is_text(x: Any, rows: int) -> bool:
    if isinstance(x, list):
        return len(x) == rows and all(isinstance(row, torch.Tensor) for row in x)
    return isinstance(x, torch.Tensor) and x.ndim in (2, 3) and x.shape[0] == rows
