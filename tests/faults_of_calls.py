"""Faults of the life of a call: who has a model, what is kept, what is undone."""

from __future__ import annotations

from planting import Fault, tests_of

_SHARING = "pag_fast/sharing/"
_FUSABLE, _UNDOING = "pag_fast/fusion/processors.py", "pag_fast/runtime/undoing.py"
_ENTRY, _PATCH_STATE = "pag_fast/runtime/entry.py", "pag_fast/runtime/patch_state.py"
_LEASE = "pag_fast/runtime/lease.py"
_INJECTED = "pag_fast/runtime/injected.py"

CALLS = [
    Fault(
        "projections of any processor that diffusers has are joined",
        _FUSABLE,
        "cls.__name__ in known and cls.__module__.startswith",
        "cls.__module__.startswith",
        tests_of("survivors", "processor"),
    ),
    Fault(
        "projections of a processor of an equal name are joined",
        _FUSABLE,
        'stock = cls.__name__ in known and cls.__module__.startswith("diffusers.")',
        "stock = cls.__name__ in known",
        tests_of("fusion_pipelines", "equal_name"),
    ),
    Fault(
        "a degraded pass of other conditioning spoils nothing",
        "pag_fast/sag/shared.py",
        "if not leads:",
        "if False:",
        tests_of("survivors", "degraded"),
    ),
    Fault(
        "a kept output is handed out whatever has been written into it",
        f"{_SHARING}conditioning_cache.py",
        "if version is None or version == ( "
        "_version(value) if isinstance(version, list) else value._version ):",
        "if True:",
        tests_of("invariant", "written_into"),
    ),
    Fault(
        "a recorded output is taken over whatever has been written into it",
        "pag_fast/runtime/recording.py",
        "return self.versions == self._versions()",
        "return True",
        tests_of("guiders_whole_passes", "written_into"),
    ),
    Fault(
        "the scale of a LoRA is no part of the weights",
        f"{_SHARING}weight_signature.py",
        '("scaling", "_active_adapter",',
        '("_active_adapter",',
        tests_of("invariant", "lora_scale"),
    ),
    Fault(
        "nobody waits for the lease",
        _LEASE,
        "if self._holder not in (0, me) or (self._passing and self._others_pass(me)):",
        "if False:",
        tests_of("one_user_waiting", "waiting_in_vain"),
    ),
    Fault(
        "the lease is taken in the middle of stock forwards",
        _LEASE,
        "if self._holder not in (0, me) or (self._passing and self._others_pass(me)):",
        "if self._holder not in (0, me):",
        tests_of("one_user_waiting", "waiting_for and patched"),
    ),
    Fault(
        "every forward is that of the pipeline that runs",
        "pag_fast/runtime/session.py",
        "if pipe is not self.pipe:",
        "if pipe is None:",
        tests_of("one_user", "stock_sibling_in_a_callback"),
    ),
    Fault(
        "what is put on stays after an exception",
        _LEASE,
        "return forward(*args, **kwargs) finally: self._take_off()",
        "out = forward(*args, **kwargs)\n        finally:\n            pass\n"
        "        self._take_off()\n        return out",
        tests_of("guiders_work", "exception_in_a_pass"),
    ),
    Fault(
        "a session stays after an exception",
        _PATCH_STATE,
        "self.session, self.running = None, {} undo_after_error(",
        "undo_after_error(",
        tests_of("lifecycle_errors", "error_anywhere and StableDiffusionPAGPipeline"),
    ),
    Fault(
        "a claim stays when its pipeline has left",
        _ENTRY,
        "self.claims.remove(claim)",
        "pass",
        tests_of("lifecycle_errors", "unpatching_goes_on"),
    ),
    Fault(
        "undoing ends at the first error",
        _UNDOING,
        "first = first or error",
        "raise",
        tests_of("lifecycle_errors", "unpatching_goes_on"),
    ),
    Fault(
        "the last error of undoing wins",
        _UNDOING,
        "first = first or error",
        "first = error",
        tests_of("survivors", "undoing"),
    ),
    Fault(
        "undoing the other way round",
        _UNDOING,
        "for step in steps: try: step() except BaseException as error:",
        "for step in reversed(steps):\n        try:\n            step()\n"
        "        except BaseException as error:",
        tests_of("survivors", "undoing"),
    ),
    Fault(
        "the perturbation counts for the pass of cond alone",
        _INJECTED,
        "return self._result(out, [out[0] + self._pending[1]])",
        "return out",
        tests_of("hosts", "three_separate_forwards and WanPipeline"),
    ),
    Fault(
        "the perturbation counts for the rows of cond alone",
        _INJECTED,
        "[x + difference for x in (*others, cond)]",
        "[*others, cond + difference]",
        tests_of("hosts", "three_separate_forwards and StableDiffusionPipeline"),
    ),
]
