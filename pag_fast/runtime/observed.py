"""What the loop of a pipeline that nobody has described does with its denoiser, seen as it runs.

Which rows of a batch, or which of several forwards in a step, are cond's shows in whose text they
get. Where that cannot be seen diffusers' order is taken (uncond in front in a batch, cond first
where each has a forward), and checked: behind the first step lies what the loop has made of the
predictions, a weighted sum of them. Its weights say which was cond's, that nothing but linear
guidance was done, and that they sum to one, so that PAG's difference in each comes out as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..models.registry import COND, UNCOND
from .forwards import Call

# the other passes of a step besides uncond: SD3's skip-layer guidance, and what is like it
SKIP = "skip"
_LATENTS = ("latents", "latent", "intermediate_images", "image_latents", "x")
_COMBINED = ("noise_pred", "model_pred", "model_output", "noise_prediction", "pred", "noise")
_FLAGS = ("do_true_cfg", "do_classifier_free_guidance", "do_cfg")
# of what is left of a combination that is no weighted sum, and of weights that do not sum to one
_MOST = {torch.float16: 3e-2, torch.bfloat16: 6e-2}
# what a rescaled sum may leave, and be told by its weights all the same
_LOOSE = 0.1


class ObservedLoop:
    """For one denoiser and one call.

    Args:
        pipe: the running pipeline.
        tell: is told of what is not as it should be.
        what: why it is looked at: what its class does, or has not.
        would: what would help, where it cannot be followed.

    Attributes:
        seen: what there was to see, for whoever describes the pipeline.
    """

    def __init__(self, pipe: Any, tell: Callable[[str], None], what: str, would: str) -> None:
        self.pipe = pipe
        self._tell = tell
        self._name, self._would = f"{type(pipe).__name__} {what}", would
        self.cond_first = False
        self._assumed = False
        self._equal: dict[tuple[int, int], bool] = {}
        self._given: list[tuple[str, torch.Tensor]] = []
        self._key: Any = None
        self._checked = False
        self._first: Any = None
        self.seen: dict[str, str] = {}

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
        for name in _LATENTS:
            latents = local.get(name)
            if isinstance(latents, list) and latents and isinstance(latents[0], torch.Tensor):
                have = len(latents)
            elif isinstance(latents, torch.Tensor) and latents.ndim > 1:
                have = latents.shape[0]
            else:
                continue
            if have and not rows % have and rows // have <= 2:
                return rows // have
            if have and not rows % have:
                raise self._refusal(
                    f"and runs {rows // have} branches in one batch: which of them is cond cannot "
                    "be told"
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
            first, self._assumed = UNCOND, True
        self.cond_first = first == COND
        order = "cond, uncond" if self.cond_first else "uncond, cond"
        self.seen["branches"] = f"together in one forward, {order}"
        return UNCOND, COND

    def pass_of(self, call: Call, rows: int, local: dict[str, Any], seen: list[str]) -> str:
        """Which pass of its step a forward is.

        A second one of cond, with other settings on as many tokens, is another term of the loop's
        guidance: what it subtracts is cond's.
        """
        found = self._pass_of(call, rows, local, seen)
        if found != COND:
            return found
        settings = _settings(call)
        if COND not in seen:
            self._first = settings
        elif settings != self._first and settings[0] == self._first[0]:
            return SKIP
        return COND

    def _pass_of(self, call: Call, rows: int, local: dict[str, Any], seen: list[str]) -> str:
        if self.branches(rows, local) == 2:
            return COND
        found = self._whose(call, rows, local, 1)
        if found != UNCOND and not self.uses_cfg(local):
            self.seen.setdefault("branches", "cond alone")
            return COND
        self.seen["branches"] = "a forward for each"
        if not found:
            found, self._assumed = (UNCOND if COND in seen else COND), True
        return found

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
                found.append({branch for branch, x in own if self._same(part, x)})
            # what both have in common, as masks, tells nothing
            for place, branches in enumerate(found):
                if len(branches) == 1 and found.count(branches) == 1:
                    branch = branches.pop()
                    told.add(branch if place == 0 else (COND if branch == UNCOND else UNCOND))
                    break
        # what each pass has, as a picture's embedding, looks like cond's alone
        return UNCOND if UNCOND in told else "".join(told)

    def _same(self, x: Any, own: Any) -> bool:
        """Whether two prompts are equal; lists have a tensor for each row."""
        if isinstance(x, list) or isinstance(own, list):
            both = isinstance(x, list) and isinstance(own, list)
            return both and all(map(self._same, x, own))
        if x.shape != own.shape or x.dtype != own.dtype:
            return False
        if x.data_ptr() == own.data_ptr() and x.stride() == own.stride():
            return True
        # comparing waits for the device, and prompts last for the call
        key = x.data_ptr(), own.data_ptr()
        if key not in self._equal:
            self._equal[key] = torch.equal(x.to(own.device), own)
        return self._equal[key]

    # ---- what has become of the predictions ----

    def gave(self, key: Any, branches: tuple[str, ...], predictions: list[torch.Tensor]) -> None:
        """Note what the loop gets in the first step: predictions of each branch."""
        if self._checked:
            return
        if self._key is None:
            self._key = key
        if key == self._key:
            self._given += zip(branches, predictions, strict=True)

    def check(self, key: Any, local: dict[str, Any]) -> None:
        """Behind the first step: see what the loop has made of the predictions.

        Raises:
            ValueError: cond was taken for uncond.
        """
        if self._checked or self._key is None or key == self._key:
            return
        given, self._given, self._checked = self._given, [], True
        combined = _combined(local, [x for _, x in given])
        if combined is None and self._assumed:
            raise self._refusal(
                "and its loop shows neither by its prompts nor by what it makes of the predictions "
                "which of them is cond's"
            )
        if combined is None:
            self._tell(
                f"{self._name}, and what its loop makes of the predictions cannot be seen: it is "
                "taken for linear guidance"
            )
            return
        self._judge(combined, given)

    def _judge(self, combined: torch.Tensor, given: list[tuple[str, torch.Tensor]]) -> None:
        """See by which weights the loop has made ``combined`` of the predictions."""
        name = type(self.pipe).__name__
        weights, left = _weights(combined, [_cropped(x, combined) for _, x in given])
        most, total = _MOST.get(combined.dtype, 1e-3), sum(weights)
        weighed = [(branch, w) for (branch, _), w in zip(given, weights, strict=True)]
        terms = " + ".join(f"{w:.3g} · {branch}" for branch, w in weighed)
        self.seen["guidance"] = terms + ("" if left <= most else f" + {left:.1%} more")
        conds = [w for branch, w in weighed if branch == COND]
        if len(conds) > 1 and (left > most or any(abs(w) > most for w in conds[:-1])):
            raise self._refusal(
                f"runs its denoiser {len(given)} times in a step and makes one prediction of that: "
                "which of them is cond's cannot be told"
            )
        if dict(weighed).get(UNCOND, 0.0) * total > 1.0 + most:
            raise self._refusal(
                "and runs its branches in another order than diffusers' pipelines do: cond was "
                "taken for uncond"
            )
        if left > most:
            self._tell(
                f"{name} does more to the predictions than to weigh them "
                f"({left:.1%} of the result are left unexplained): PAG's difference goes through "
                "that, too, and may come out weaker or stronger"
            )
            return
        if abs(abs(total) - 1.0) > most:
            self._tell(
                f"{name} adds predictions with weights that sum to {total:.3g}:"
                " PAG's difference comes out as many times as strong"
            )


def _settings(call: Call) -> tuple[Any, dict[str, Any]]:
    """The size of a row of latents, and the arguments that are no tensors."""
    first = next(iter(call.values()))
    size = first.shape[1:] if isinstance(first, torch.Tensor) else None
    plain = (bool, int, float, str, type(None))
    return size, {
        name: x
        for name, x in call.items()
        if isinstance(x, plain) or (isinstance(x, list) and all(isinstance(i, plain) for i in x))
    }


def _branch(name: str) -> str:
    return UNCOND if "negative" in name or "uncond" in name else COND


def _is_text(x: Any, rows: int) -> bool:
    if isinstance(x, list):
        return len(x) == rows and all(isinstance(row, torch.Tensor) for row in x)
    return isinstance(x, torch.Tensor) and x.ndim in (2, 3) and x.shape[0] == rows


def _combined(local: dict[str, Any], given: list[torch.Tensor]) -> torch.Tensor | None:
    """What the loop has made of predictions: a sum of all of them, else what it calls so."""
    fitting = [_fitting(local.get(name), given[0]) for name in _COMBINED]
    named = [x for x in fitting if x is not None]
    partly = None
    for found in named:
        whole, used = _is_sum(found, given)
        if whole:
            return found
        partly = found if partly is None and used else partly
    if partly is not None:
        return partly
    alike = [x for x in list(local.values()) if _has_shape(x, given[0].shape)]
    exact = next((x for x in alike if _is_sum(x, given)[0]), None)
    return exact if exact is not None else next((x for x in alike if _is_nearly(x, given)), None)


def _is_nearly(found: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether a tensor is a sum of all predictions but for what rescaling has added to it."""
    weights, left = _weights(found, given)
    whole = all(abs(w) > _LOOSE for w in weights)
    return len(given) > 1 and whole and max(left, abs(abs(sum(weights)) - 1.0)) <= _LOOSE


def _is_sum(found: torch.Tensor, given: list[torch.Tensor]) -> tuple[bool, bool]:
    """Whether a tensor is a weighted sum of all predictions, and whether of any at all."""
    weights, left = _weights(found, [_cropped(x, found) for x in given])
    most, used = _MOST.get(found.dtype, 1e-3), [abs(w) > 1e-3 for w in weights]
    whole = all(used) and left <= most and abs(abs(sum(weights)) - 1.0) <= most
    return whole, any(used)


def _has_shape(x: Any, shape: torch.Size) -> bool:
    return isinstance(x, torch.Tensor) and x.shape == shape and x.is_floating_point()


def _fitting(found: Any, like: torch.Tensor) -> torch.Tensor | None:
    """A tensor of the loop as one of predictions like ``like``, if it can be."""
    if not isinstance(found, torch.Tensor) or not found.numel():
        return None
    if [n for n in found.shape if n > 1] == [n for n in like.shape if n > 1]:
        return found.reshape(like.shape)  # frames of a single picture are squeezed out
    # tokens of reference pictures, and channels of a variance, are left out by the loop
    fits = found.ndim == like.ndim
    fits = fits and all(have <= whole for have, whole in zip(found.shape, like.shape, strict=True))
    return found if fits else None


def _cropped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x[tuple([slice(size) for size in like.shape])]


def _weights(combined: torch.Tensor, parts: list[torch.Tensor]) -> tuple[list[float], float]:
    """The weights with which ``parts`` make ``combined``, and what share of it they leave."""
    columns = torch.stack([x.double().flatten() for x in parts], dim=1)
    target = combined.double().flatten()
    # normal equations: few columns, and as many rows as there are numbers in a latent
    gram = columns.mT @ columns
    weights = torch.linalg.lstsq(gram.cpu(), (columns.mT @ target).cpu()[:, None]).solution[:, 0]
    left = target - columns @ weights.to(target.device)
    return [float(w) for w in weights], float(left.norm() / target.norm())
