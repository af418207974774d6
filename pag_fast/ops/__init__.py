"""The ops of pag_fast as ``torch.library`` custom ops: check, choose a backend, run.

Each op is opaque to ``torch.compile`` (a Python float handed to a traced kernel launch would become
fp64) and carries a fake implementation for shape inference and a FLOP formula, so that
``torch.utils.flop_counter`` sees the work that is done inside. Where nobody watches, attention and
guidance are called without the op's dispatch, 10 to 30 µs of Python. One
file per op: its public function, its PyTorch backend, its registration. The Triton backends are in
``pag_fast_kernels``.
"""

from __future__ import annotations

from .backend import BACKENDS, check_backend, is_differentiated, resolve_backend
from .combine_guidance import check_rescale_mode, combine_guidance
from .degrade_latents import degrade_latents
from .linear_attention import linear_attention
from .noisy_attention import noisy_attention
from .perturbed_attention import perturbed_attention, perturbed_attention_, softmax_attention
from .qk_norm_rope import qk_norm_rope_
from .received_attention import received_attention

__all__ = [
    "BACKENDS",
    "check_backend",
    "check_rescale_mode",
    "combine_guidance",
    "degrade_latents",
    "is_differentiated",
    "linear_attention",
    "noisy_attention",
    "perturbed_attention",
    "perturbed_attention_",
    "qk_norm_rope_",
    "received_attention",
    "resolve_backend",
    "softmax_attention",
]
