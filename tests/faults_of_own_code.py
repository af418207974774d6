"""Faults of code of a user's own, where a patch stands in for diffusers'."""

from __future__ import annotations

from planting import Fault, tests_of

_OWN_CODE, _GUIDED = "pag_fast/runtime/own_code.py", "pag_fast/runtime/guided.py"
_MIXINS, _INJECTED = "pag_fast/mixins.py", "pag_fast/runtime/injected.py"

OWN_CODE = [
    Fault(
        "functions on the instance are passed over",
        _OWN_CODE,
        "[*on_class, *on_pipe]",
        "on_class",
        tests_of("own_code", "on_the_instance"),
    ),
    Fault(
        "classes are taken for diffusers' own by their names",
        _OWN_CODE,
        "return function.__code__.co_name == name",
        "return True",
        tests_of("own_code_parts", "another_file"),
    ),
    Fault(
        "a wrapper is what it wraps",
        _OWN_CODE,
        'if package(origin(function)) == "diffusers":',
        'if package(function.__module__) == "diffusers":',
        tests_of("own_code", "replaced_for_everybody"),
    ),
    Fault(
        "copies of diffusers' code are a user's own",
        _OWN_CODE,
        "return _text(function.__code__) == _text(copied.__code__)",
        "return False",
        tests_of("own_code_parts", "another_file"),
    ),
    Fault(
        "guidance of a user's own is combined by ours",
        _MIXINS,
        "or session.code.combines:",
        ":",
        tests_of("own_code", "subclass"),
    ),
    Fault(
        "rows are dropped that a user's own combination takes apart",
        _GUIDED,
        "if found.keep_rows or self.code.wraps or self.code.combines:",
        "if found.keep_rows:",
        tests_of("own_code", "adaptive"),
    ),
    Fault(
        "options are passed over by a combination on the instance",
        _GUIDED,
        "if self.code.wraps and self.ran is not None:",
        "if False:",
        tests_of("own_code", "passes_over"),
    ),
    Fault(
        "every loop rescales as diffusers' do",
        _OWN_CODE,
        'if loop is None or package(loop.f_globals.get("__name__", "")) != "diffusers":',
        "if loop is None:",
        tests_of("own_code", "rescale_of_its_own"),
    ),
    Fault(
        "the function that rescales is diffusers', whoever has replaced it",
        _OWN_CODE,
        "return not is_diffusers(loop.f_globals.get(_RESCALES), _RESCALES)",
        "return False",
        tests_of("own_code", "is_replaced"),
    ),
    Fault(
        "a pipeline without PAG rescales as its argument says",
        _INJECTED,
        "return not (patched or own or ",
        "return not (",
        tests_of("own_code", "subclass_without_pag"),
    ),
    Fault(
        "processors are told by their names",
        _OWN_CODE,
        'or not is_diffusers(own, "__call__"):',
        ":",
        tests_of("own_code_parts", "processors"),
    ),
    Fault(
        "layers are set by ours, whatever a subclass does there",
        _MIXINS,
        'if self._is_own("set_pag_applied_layers"):',
        "if False:",
        tests_of("own_code_parts", "chosen_by_a_method"),
    ),
    Fault(
        "a SAG pipeline is looked at when it is patched alone",
        "pag_fast/sag/patch.py",
        "_refuse_call_layers(kwargs)\n            check_sag(pipe, self.original_class)",
        "_refuse_call_layers(kwargs)",
        tests_of("own_code_parts", "sag"),
    ),
]
