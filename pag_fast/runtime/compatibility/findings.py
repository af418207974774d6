"""What others have put on a model, as one answer for one forward."""

from __future__ import annotations

from collections.abc import Iterable

from . import HOLDS_ROWS, STOCK_PAG, Answer, Finding, combined, refuse
from .hooks import PARALLEL


class Findings:
    """The findings of one look at a model, or at several that run as one.

    Attributes:
        items: each thing that was found.
        answer: all their answers together.
        unshared, keep_rows, weights_apart, nothing_kept, may_skip, recheck, sees_rows, refuses:
            what they ask for, each by itself: a forward reads these, as asking a flag is a call.
        stock_pag: a PAG pipeline of diffusers has put its processors there.
        holds_rows: a module has a tensor of its own with the rows of the batch.
        parallel: ranks share its tokens or heads.
    """

    def __init__(self, items: Iterable[Finding] = ()) -> None:
        self.items = items if isinstance(items, tuple) else tuple(items)
        self.answer = answer = combined(self.items)
        self.unshared = Answer.UNSHARED in answer
        self.keep_rows = Answer.KEEP_ROWS in answer
        self.weights_apart = Answer.WEIGHTS_APART in answer
        self.nothing_kept = Answer.NOTHING_KEPT in answer
        self.may_skip = Answer.MAY_SKIP in answer
        self.recheck = Answer.RECHECK in answer
        self.sees_rows = Answer.SEES_ROWS in answer
        self.refuses = Answer.REFUSE in answer
        self.stock_pag = any(item.what == STOCK_PAG for item in self.items)
        self.holds_rows = any(item.what == HOLDS_ROWS for item in self.items)
        self.parallel = any(item.what in PARALLEL for item in self.items)

    @staticmethod
    def together(several: Iterable[Findings]) -> Findings:
        """The findings on several models as one."""
        return Findings(item for found in several for item in found.items)

    def refuse(self) -> None:
        """Raises ValueError where the call cannot be right."""
        if self.refuses:
            refuse(self.items)

    def who(self, answer: Answer) -> str:
        """What asks for ``answer`` first."""
        return next(item.what for item in self.items if answer in item.answer)

    def refuse_rows(self, error: Exception) -> None:
        """Raises ValueError where a forward with added rows may fail because of what is not known.

        Code of others often expects the rows that the pipeline itself makes.
        """
        asks = Answer.UNSHARED if self.unshared else Answer.SEES_ROWS
        if asks in self.answer and type(error) in (RuntimeError, IndexError):
            raise ValueError(
                f"The model fails with PAG's rows behind those of the pipeline ({error}). There is "
                f"{self.who(asks)} on it, which may expect the pipeline's own rows alone: have it "
                "take any number of rows, or take it off."
            ) from error

    def why(self, answer: Answer) -> str:
        """The sentence of the first finding that asks for ``answer``."""
        return next(item.sentence for item in self.items if answer in item.answer)
