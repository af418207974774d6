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
