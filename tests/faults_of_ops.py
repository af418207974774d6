"""Faults of what ops ask of their tensors: layout, dtype, derivatives, sense."""

from __future__ import annotations

from planting import Fault, tests_of

_OPS, _KERNELS = "pag_fast/ops/", "kernels/torch-ext/pag_fast_kernels/"
_LAYOUTS, _GRADIENTS = tests_of("kernel_layouts"), tests_of("op_gradients")
_ARGUMENTS = tests_of("op_arguments")

OPS = [
    Fault(
        "operands are taken to have a unit stride",
        f"{_KERNELS}bound.py",
        "(stride := x.stride())[-1] == 1 and",
        "(stride := x.stride()) and",
        _LAYOUTS,
    ),
    Fault(
        "token strides may be as large as they are",
        f"{_KERNELS}bound.py",
        "and x.shape[1] * stride[1] < MOST_IN_A_ROW",
        "and x.shape[1]",
        tests_of("bound"),
    ),
    Fault(
        "a bias of keys is taken to be contiguous",
        f"{_KERNELS}perturbed_attention.py",
        "if key_bias is not None and key_bias.stride(-1) != 1:",
        "if False:",
        tests_of("kernel_layouts", "key_bias"),
    ),
    Fault(
        "strengths are read one after the other",
        f"{_KERNELS}perturbed_attention.py",
        "strength = strength.contiguous()",
        "pass",
        tests_of("kernel_layouts", "strength"),
    ),
    Fault(
        "a norm has a weight and a bias, or neither",
        f"{_KERNELS}qk_norm_rope.py",
        "norm and any(x is not None for x in affine)",
        "norm and all(x is not None for x in affine)",
        tests_of("kernel_layouts", "affine"),
    ),
    Fault(
        "a binary is that of the first pointer's dtype",
        f"{_KERNELS}bound.py",
        "map(_dtype_of, pointers)",
        "map(_dtype_of, pointers[:1])",
        tests_of("bound"),
    ),
    Fault(
        "gradients of a mask are forgotten",
        f"{_OPS}attention_arguments.py",
        "return mask.requires_grad",
        "return False",
        tests_of("op_gradients", "backward"),
    ),
    Fault(
        "gradients of the perturbed prediction alone are forgotten",
        f"{_OPS}combine_guidance.py",
        "derived = derived or branch.requires_grad",
        "derived = cond.requires_grad",
        tests_of("op_gradients", "backward"),
    ),
    Fault(
        "a norm is written over what its way back needs",
        f"{_OPS}qk_norm_rope.py",
        '"torch", keep=True',
        '"torch"',
        tests_of("op_gradients", "backward"),
    ),
    Fault(
        "only the query says whether a norm is differentiated",
        f"{_OPS}qk_norm_rope.py",
        "is_differentiated(q, k, *vectors, cos, sin)",
        "is_differentiated(q)",
        tests_of("op_gradients", "backward"),
    ),
    Fault(
        "tangents are lost in ops",
        f"{_OPS}backend.py",
        "if forward_ad._current_level >= 0:",
        "if False:",
        tests_of("op_gradients", "forward"),
    ),
    Fault(
        "a blur of each channel is that of the first",
        f"{_OPS}degrade_latents.py",
        "if blur.shape[0] > 1 and blur.stride(0):",
        "if False:",
        tests_of("op_arguments", "blur"),
    ),
    Fault(
        "seeds below zero",
        f"{_OPS}noisy_attention.py",
        "not 0 <= number < stop",
        "not number < stop",
        tests_of("op_arguments", "refused"),
    ),
    Fault(
        "calls inside of torch.func run",
        "pag_fast/runtime/compatibility/surroundings.py",
        "if peek_interpreter_stack() is not None:",
        "if False:",
        tests_of("tangents", "transforms"),
    ),
    Fault(
        "weights are packed where one has a tangent",
        "pag_fast/runtime/compatibility/surroundings.py",
        "if forward_ad._current_level >= 0:",
        "if False:",
        tests_of("tangents", "weight"),
    ),
]
