"""What the loop of a pipeline that nobody has described makes of the predictions it gets.

PAG's difference d is in every prediction of its round (a forward of cond, and the passes that
follow for the same latents). So a weighted sum has d as often as its weights in that round sum to:
once where they sum to one. Predictions of earlier steps bring the difference of their own, and what
is taken of uncond beside the sum brings one that PAG does not have there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...models.registry import COND, UNCOND
from .observed_weights import Columns, Judge
from .weighted_sums import combined, fit, fitted, most_of, products, rounding_of

LATENTS = ("latents", "latent", "intermediate_images", "image_latents", "x")
# a loop that runs forwards of cond of which nobody sees what becomes
REPEATS = (
    "the loop runs the denoiser more than once for cond in a step: each forward is taken for one "
    "of cond"
)
# what is left without uncond, in what is left with it, where uncond is surely there
_CERTAIN = 10.0
_COMBINED = ("noise_pred", "model_pred", "model_output", "noise_prediction", "pred", "noise")
Local = dict[str, Any]


@dataclass
class Round:
    """A forward of cond, and the passes that follow for the same latents.

    Attributes:
        active: PAG's difference is in its predictions.
        assumed: which of them is cond's was not seen.
        latents: the loop's name for its latents, and what they were.
        followed: what the loop has made of it alone was seen.
    """

    branches: list[str] = field(default_factory=list)
    predictions: list[torch.Tensor] = field(default_factory=list)
    active: bool = False
    assumed: bool = False
    latents: tuple[str, torch.Tensor] | None = None
    followed: bool = False

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rounds of one kind are treated alike by their loop, until it is seen not to."""
        return (*self.branches, self.active, self.assumed, self.predictions[0].shape)


class ObservedGuidance:
    """The check of one call.

    Args:
        name: of the pipeline's class.
        subject: the beginning of a sentence about it.
        tell: is told of what may be wrong.
        refusal: makes an error of a reason.
        rescales: says whether the pipeline rescales what it combines.
    """

    def __init__(
        self,
        name: str,
        subject: str,
        tell: Callable[[str], None],
        refusal: Callable[[str], ValueError],
        rescales: Callable[[], bool] = bool,
    ) -> None:
        self._subject, self._refusal = subject, refusal
        self._judge = Judge(name, tell, refusal, rescales)
        self._rounds: list[Round] = []
        self._old: dict[str, torch.Tensor] = {}
        self._was_active = False
        self._result: torch.Tensor | None = None
        # by kinds of rounds: the local that is their combination, if one is
        self._known: dict[Any, str | None] = {}
        # reading waits for the device: what is like an earlier step is read behind the last
        self._later: list[Columns] = []
        self._placed: set[torch.Size] = set()
        self._is_over = False

    @property
    def seen(self) -> dict[str, str]:
        """By which weights the loop adds predictions."""
        return self._judge.seen

    # ---- what the loop gets ----

    def gave(
        self,
        branches: list[str],
        predictions: list[torch.Tensor],
        local: Local,
        *,
        active: bool,
        assumed: bool,
    ) -> None:
        """Note what the loop gets of a forward."""
        if COND in branches or not self._rounds:
            self._rounds.append(Round())
        found = self._rounds[-1]
        found.branches += branches
        found.predictions += predictions
        found.active, found.assumed = found.active or active, found.assumed or assumed
        self._was_active = self._was_active or active
        if COND in branches:
            like = found.predictions[0]
            alike = (name for name in LATENTS if fitted(local.get(name), like) is not None)
            name = next(alike, "")
            # a loop may write into them
            found.latents = (name, local[name].clone()) if name else None

    def round_over(self, local: Local) -> None:
        """Another round of the step begins: see what has become of the one before.

        Raises:
            ValueError: as :meth:`step_over`.
        """
        if not self._rounds or not self._rounds[-1].active:
            return
        found = self._rounds[-1]
        kinds = "part", found.kind
        known = self._is_known(kinds)
        target = self._target([found], local, kinds)
        # a prediction is a sum of itself, and shows nothing of what will become of it
        if target is None or target.data_ptr() in [x.data_ptr() for x in found.predictions]:
            return
        columns = self._columns([found], target, kinds, old=False)
        if known:
            found.followed = True
            self._later.append(columns)
            return
        weights, left = fit(columns.products.cpu(), range(len(found.branches)))
        most = most_of(target.dtype)
        found.followed = left <= most and abs(abs(sum(weights)) - 1.0) <= most
        if found.followed:
            self._judge.order(columns, weights)
        else:
            self._known[kinds] = None

    def step_over(self, local: Local) -> None:
        """A step is over: see what the loop has made of its predictions.

        Raises:
            ValueError: something of which PAG's difference does not come out as it should.
        """
        rounds, self._rounds = self._rounds, []
        if not rounds:
            return
        try:
            self._look(rounds, local)
        finally:
            for found in rounds:
                self._old.update(zip(found.branches, found.predictions, strict=True))

    def finish(self, local: Local) -> None:
        """The call is over: see its last step, and what was left to be read.

        Raises:
            ValueError: as :meth:`step_over`.
        """
        self._is_over = True
        self.step_over(local)
        for columns in self._later:
            self._judge.guidance(columns)
        if self._judge.unconfirmed:
            raise self._judge.no_order()

    def forget(self) -> None:
        """Let go of every tensor."""
        self._rounds, self._old, self._result, self._later = [], {}, None, []

    # ---- what has become of it ----

    def _is_known(self, kinds: Any) -> bool:
        return kinds in self._known and kinds not in self._judge.unconfirmed

    def _look(self, rounds: list[Round], local: Local) -> None:
        active = any(found.active for found in rounds)
        lacks = UNCOND in self._old and all(UNCOND not in found.branches for found in rounds)
        self._result, before = None, self._result
        if not active and not (lacks and self._was_active):
            return
        kinds = tuple([found.kind for found in rounds])
        known = self._is_known(kinds)
        target = self._result = self._target(rounds, local, kinds)
        if target is None:
            if active and not known:
                self._is_unseen(rounds)
            return
        if active and not all(found.followed for found in rounds[:-1]):
            self._judge.tell_once("repeats", REPEATS)
        columns = self._columns(rounds, target, kinds, old=True, result=before)
        if known:
            self._later.append(columns)
            return
        self._judge.guidance(columns)
        # behind the loop latents are decoded, or scaled for that
        if active and len(rounds) == 1 and not self._is_over:
            self._see_latents(rounds[0], target, local, before)

    def _target(self, rounds: list[Round], local: Local, kinds: Any) -> torch.Tensor | None:
        """What the loop has made of the predictions of ``rounds``, if that can be seen."""
        given = [x for found in rounds for x in found.predictions]
        if self._is_known(kinds):
            name = self._known[kinds]
            return None if name is None else fitted(local.get(name), given[0])
        found = combined(local, _COMBINED, rounds[-1].predictions)
        if found is None and len(rounds) > 1:
            found = combined(local, _COMBINED, given)
        self._known[kinds] = None if found is None else found[0]
        return None if found is None else found[1]

    def _columns(
        self,
        rounds: list[Round],
        target: torch.Tensor,
        kinds: Any,
        *,
        old: bool,
        result: torch.Tensor | None = None,
    ) -> Columns:
        given = [x for found in rounds for x in found.predictions]
        shape = given[0].shape
        kept = {name: x for name, x in self._old.items() if old and x.shape == shape}
        more = [result] if result is not None and result.shape == target.shape else []
        of_latents = [] if rounds[-1].latents is None else [rounds[-1].latents[1]]
        of_latents = [x for x in of_latents if x.shape == target.shape]
        return Columns(
            [found.branches for found in rounds],
            kinds,
            any(found.active for found in rounds),
            any(found.assumed for found in rounds),
            bool(of_latents),
            list(kept),
            bool(more),
            target.dtype,
            products([*given, *of_latents, *kept.values(), *more], target, *more),
        )

    def _see_latents(
        self, found: Round, target: torch.Tensor, local: Local, before: torch.Tensor | None
    ) -> None:
        """See whether the loop makes its next latents of the combination, and not of uncond, too.

        Raises:
            ValueError: PAG's difference in uncond goes into them.
        """
        name, was = found.latents or ("", target)
        now = local.get(name)
        passes = zip(found.branches, found.predictions, strict=True)
        apart = [x for branch, x in passes if branch == UNCOND]
        shape = found.predictions[0].shape
        if not apart or shape in self._placed or not isinstance(now, torch.Tensor):
            return
        if not now.shape == was.shape == target.shape:
            return
        self._placed.add(shape)
        given = [was, target, *([] if before is None else [before])]
        against = products([*given, *apart], now).cpu()
        one, two = fit(against, range(len(given))), fit(against, range(len(given + apart)))
        if one.left > _CERTAIN * two.left and one.left > rounding_of(now.dtype):
            raise self._refusal(
                "and makes its next latents of the prediction of uncond, too, beside the guided "
                "one: PAG's difference would go into them twice"
            )

    def _is_unseen(self, rounds: list[Round]) -> None:
        if any(found.assumed for found in rounds):
            raise self._judge.no_order()
        if len(rounds) > 1:
            raise self._judge.repeated([branch for found in rounds for branch in found.branches])
        self._judge.tell_once(
            "unseen",
            f"{self._subject}, and what its loop makes of the predictions cannot be seen: it is "
            "taken for linear guidance",
        )
