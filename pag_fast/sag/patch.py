"""The lasting part of a patched ``StableDiffusionSAGPipeline``, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import PatchConfig
from ..fusion import Fusion
from ..models.registry import fusable_processors
from ..runtime.basic_state import BasicState
from ..runtime.own_code import check_sag
from ..runtime.undoing import undo_after_error, undo_all
from ..sharing.rows import BranchState
from .attention import RememberingSelfAttention
from .session import SagSession


def is_sag(pipe: Any) -> bool:
    """Whether ``pipe`` is a pipeline of Self-Attention Guidance."""
    return any(cls.__name__ == "StableDiffusionSAGPipeline" for cls in type(pipe).__mro__)


class SagPatch(BasicState):
    """As :class:`pag_fast.runtime.patch_state.PatchState`: settings, steps, what can be reused.

    Raises:
        ValueError: a pipeline that is not as diffusers wrote it.
    """

    def __init__(self, pipe: Any, config: PatchConfig) -> None:
        before = getattr(pipe, "_pag_fast", None)
        self.original_class: type = type(pipe) if before is None else before.original_class
        _check(pipe, self.original_class)
        super().__init__(config)
        # lasting: compiled blocks guard on it
        self.processor = RememberingSelfAttention()
        self.step = BranchState()
        self._fusion: tuple[Any, Fusion] | None = None

    def enter_models(self, pipe: Any) -> None:
        """Stand in front of the UNet that the pipeline has now."""
        self.enter(pipe, "unet")

    def call(
        self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``call``, the pipeline's own ``__call__``, inside a session."""
        with self.one_call():
            _refuse_call_layers(kwargs)
            check_sag(pipe, self.original_class)
            self.enter_models(pipe)
            with self.alone("unet", f"{type(pipe).__name__} (patched)"):
                session = SagSession(pipe, self)
                session.start()
            self.session = self.running["unet"] = session
            try:
                result = call(*args, **kwargs)
            except BaseException:
                self.session, self.running = None, {}
                undo_after_error(session.end)
                raise
            self.session, self.running = None, {}
            session.end()
            session.check(self._entries["unet"][0][0])
            return result

    def fusion(self, model: Any) -> Fusion:
        """What can be joined in the UNet, found anew when something changed."""
        key = [id(module) for module in model.modules()]
        if self._fusion is None or self._fusion[0] != key:
            self._release_fusion()
            known = fusable_processors(model)
            self._fusion = key, Fusion(model, traced=False, state=self.step, fusable=known)
        return self._fusion[1]

    def release(self) -> None:
        """Leave the UNet as it was found."""
        undo_all(super().release, self._release_fusion)

    def _release_fusion(self) -> None:
        if self._fusion is not None:
            self._fusion[1].release()
            self._fusion = None


def _refuse_call_layers(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("pag_applied_layers", None) is not None:
        raise ValueError(
            "Self-Attention Guidance perturbs no layers: leave pag_applied_layers out of the call."
        )


def _check(pipe: Any, cls: type) -> None:
    check_sag(pipe, cls)
    middle = getattr(getattr(pipe.unet, "mid_block", None), "attentions", None)
    if not middle or not hasattr(middle[0], "transformer_blocks"):
        raise ValueError(
            f"{type(pipe.unet).__name__} has no transformer in its middle block, whose attention "
            "Self-Attention Guidance looks at."
        )
