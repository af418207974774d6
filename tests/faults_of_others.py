"""Faults of what others put on a model, its classes and the modules that their code is from."""

from __future__ import annotations

from planting import Fault, tests_of

_ORIGINS, _COMPATIBILITY = (
    "pag_fast/runtime/compatibility_origins.py",
    "pag_fast/runtime/compatibility.py",
)
_PLACES = tests_of("functions_of_others", "no_forward")

OTHERS = [
    Fault(
        "what is equal to something row-wise is row-wise",
        "pag_fast/runtime/compatibility_origins.py",
        "_ROW_WISE.get(id(thing)) is thing or",
        "any(thing == marked for marked in _ROW_WISE.values()) or",
        tests_of("compatibility_hooks", "row_wise_goes_by"),
    ),
    Fault(
        "a report that an encoding lacks characters for ends the command",
        "pag_fast/cli.py",
        'stream.reconfigure(errors="replace")',
        "pass",
        tests_of("verify_command", "encoding"),
    ),
    Fault(
        "ops are opaque to gradients",
        "pag_fast/ops/backend.py",
        "return torch.is_grad_enabled() and any(",
        "return False and any(",
        tests_of("gradients", "derivative"),
    ),
    Fault(
        "outputs with a graph are kept",
        "pag_fast/sharing/conditioning_cache.py",
        "if any(x.requires_grad for x in _tensors(value)):",
        "if False:",
        tests_of("gradients", "in_every_step"),
    ),
    Fault(
        "checkpointing is looked for in training mode alone",
        "pag_fast/runtime/compatibility_surroundings.py",
        "checkpointed = (model, *self._checkpointed)",
        "checkpointed = [m for m in (model, *self._checkpointed) if m.training]",
        tests_of("gradients", "checkpointing"),
    ),
    Fault(
        "a call past the patched pipeline's own has no PAG, and nobody says so",
        "pag_fast/runtime/basic_state.py",
        'if getattr(pipe, "_pag_fast", None) is self:',
        "if False:",
        tests_of("gradients", "past_ours"),
    ),
    Fault(
        "norms of doubles are floats",
        "pag_fast/sharing/spot_checks.py",
        "wide = torch.promote_types(now.dtype, torch.float32)",
        "wide = torch.float32",
        tests_of("spot_checks", "double_precision"),
    ),
    Fault(
        "the guidance of a step is normalised as the call began",
        "pag_fast/pipelines/description.py",
        'return bool(getattr(pipe, f"_{self.normalised_by}", arguments.get(self.normalised_by)))',
        "return bool(arguments.get(self.normalised_by))",
        tests_of("normalised_later", "turns_rescale"),
    ),
    Fault(
        "steps without uncond are normalised",
        "pag_fast/runtime/injected.py",
        "if alone or not self._cfg():",
        "if not self._cfg():",
        tests_of("normalised_later", "nothing_to_normalise"),
    ),
    Fault(
        "the number of steps is that of an earlier call",
        "pag_fast/runtime/guidance.py",
        "if type(before) is int:",
        "if False:",
        tests_of("own_loops_steps", "earlier_call_tells_nothing"),
    ),
    Fault(
        "writes into conditioning are looked for in what is computed of kept outputs",
        "pag_fast/sharing/conditioning_cache.py",
        "if self._firsts % 2 and self._first:",
        "if False:",
        tests_of("changed_in_mid_call", "leaves_no_trace"),
    ),
    Fault(
        "a forward put on a class, or taken off it, is not followed",
        "pag_fast/runtime/instance_patch.py",
        "if forwards != self._forwards or self._rebound != Replacement.rebound:",
        "if False:",
        tests_of("functions_of_others", "comes_onto_a_class"),
    ),
    Fault(
        "a forward is followed by one of two patches",
        "pag_fast/runtime/instance_patch.py",
        "if forwards != self._forwards or self._rebound != Replacement.rebound:",
        "if forwards != self._forwards:",
        tests_of("functions_of_others", "comes_onto_a_class"),
    ),
    Fault(
        "methods on instances are nobody's concern",
        _COMPATIBILITY,
        "for method, who in foreign_methods(module):",
        "for method, who in ():",
        _PLACES,
    ),
    Fault(
        "methods of classes other than forwards are nobody's concern",
        _ORIGINS,
        "if not isinstance(function, FunctionType) or _runs_in_no_forward(name):",
        'if not isinstance(function, FunctionType) or name != "forward":',
        _PLACES,
    ),
    Fault(
        "functions of torch and diffusers are looked at once",
        _COMPATIBILITY,
        "if watch.rewritten():",
        "if False:",
        _PLACES,
    ),
    Fault(
        "a processor keeps the signature of an earlier function",
        "pag_fast/fusion/signatures.py",
        "if function is not self.function:",
        "if self.function is None:",
        tests_of("fusion_signatures", "followed"),
    ),
    Fault(
        "joined weights are not looked at again for a processor's function",
        "pag_fast/fusion/__init__.py",
        "list(map(_call, self._kinds)),",
        "",
        tests_of("fusion_signatures", "followed"),
    ),
    Fault(
        "each model has a signature of its own for a processor",
        "pag_fast/fusion/signatures.py",
        "_signed.get(processor) or _signed.setdefault(processor, Signed(processor))",
        "Signed(processor)",
        tests_of("fusion_signatures", "share_a_processor"),
    ),
    Fault(
        "chunks of rows are not looked at again",
        "pag_fast/runtime/compatibility_watch.py",
        'list(map(dict.get, self._chunked, repeat("_chunk_size"))),',
        "",
        tests_of("feed_forward_chunks", "AnimateDiff"),
    ),
    Fault(
        "functions for settings make branches run apart",
        _ORIGINS,
        "return name in _PASSIVE or name.startswith(_SETTERS)",
        "return name in _PASSIVE",
        tests_of("functions_of_others", "settings"),
    ),
    Fault(
        "copies of conditioning last, whoever writes",
        "pag_fast/runtime/injected.py",
        "if not self._copies_last:",
        "if False:",
        tests_of("changed_in_mid_call", "leaves_no_trace"),
    ),
]
