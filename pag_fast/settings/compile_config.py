"""How a pipeline is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import Settings, switch

# every PyTorch has them: no need to ask its compiler
_COMMON = ("inductor", "eager")


@dataclass(frozen=True)
class CompileConfig(Settings):
    """How ``patch(pipe, compile=...)`` compiles the denoiser and its ControlNets.

    Attributes:
        regional: compile the blocks that a model repeats instead of the model: the first call waits
            seconds instead of minutes, and steps are a little slower.
        channels_last: convolutional models run with channels last in memory, as GPUs and oneDNN
            like it best.
        cuda_graphs: replay each model as one CUDA graph (``mode="reduce-overhead"``): for small
            models and batches, whose launches take longer than their work.
        backend: of ``torch.compile``.
    """

    regional: bool = False
    channels_last: bool = True
    cuda_graphs: bool = False
    backend: str = "inductor"

    def __post_init__(self) -> None:
        for name in ("regional", "channels_last", "cuda_graphs"):
            switch(name, getattr(self, name))
        if not isinstance(self.backend, str) or self.backend not in _COMMON:
            _check_backend(self.backend)
        if self.cuda_graphs and self.backend != "inductor":
            raise ValueError("cuda_graphs needs backend='inductor', which makes them.")


def _check_backend(backend: object) -> None:
    import torch

    # this imports the compiler, which takes as long as all of PyTorch
    known = torch.compiler.list_backends(exclude_tags=())
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"Unknown backend {backend!r}: choose one of {', '.join(known)}.")
