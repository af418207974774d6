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
        "self.times <= 1 and self.versions == self._versions()",
        "True",
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
        "if frame is None or pipe is not self.pipe:",
        "if frame is None:",
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
        "return self._result(out, [prediction + difference])",
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
    Fault(
        "what runs behind the loop is the loop's",
        "pag_fast/runtime/session.py",
        "return LoopCode(frame.f_code) if frame is not None and pipe is self.pipe else ANYWHERE",
        "return ANYWHERE",
        tests_of("beside_the_loop", "behind_the_call"),
    ),
    Fault(
        "what runs in front of the loop is the loop's",
        "pag_fast/runtime/frames.py",
        'if loop.begins and "t" not in local:',
        "if False:",
        tests_of("beside_the_loop", "in_front_of_the_loop"),
    ),
    Fault(
        "a loop of the user's own runs the branches in diffusers' order",
        "pag_fast/runtime/observed_session.py",
        'whose = "own"',
        'whose = "described"',
        tests_of("beside_the_loop", "any_order"),
    ),
    Fault(
        "a second loop has the arguments of the first",
        "pag_fast/runtime/injected.py",
        "self._arguments, self._seen, self._pending = None, (None, []), None",
        "self._seen, self._pending = (None, []), None",
        tests_of("several_loops", "own_arguments"),
    ),
    Fault(
        "a second loop uses a difference of the first again",
        "pag_fast/runtime/guided.py",
        "self._difference = None if reuse is None else Difference(reuse)",
        "self._difference = self._difference or (reuse and Difference(reuse))",
        tests_of("several_loops", "used_again"),
    ),
    Fault(
        "a batch keeps the pictures that it began with",
        "pag_fast/runtime/session.py",
        "if pictures and rows in (pictures, 2 * pictures, 3 * pictures):",
        "if False:",
        tests_of("fewer_pictures", "stocks_pictures"),
    ),
    Fault(
        "a difference of other pictures is used again",
        "pag_fast/sharing/guidance_reuse.py",
        "if self._held is not None and self._held.shape[0] != latents.shape[0]:",
        "if False:",
        tests_of("fewer_pictures", "used_again"),
    ),
    Fault(
        "a wrapper of the call stays on the class of the patched pipeline",
        "pag_fast/runtime/subclass.py",
        "setattr(cls, name, own if value is call else value)",
        "type.__setattr__(_, name, value)",
        tests_of("wrapped_calls", "put_on"),
    ),
    Fault(
        "lists of other things are cut by rows",
        f"{_SHARING}arguments.py",
        "if (latents_are or name in BY_ROW) and",
        "if",
        tests_of("row_lists", "nets_as_rows"),
    ),
    Fault(
        "layers inside of kept modules are not compared",
        f"{_SHARING}weight_signature.py",
        "self._holding += [d for d in children if d]",
        "pass",
        tests_of("changed_in_mid_call", "anothers_place"),
    ),
    Fault(
        "writes into inference tensors do not show",
        f"{_SHARING}row_equality.py",
        "if self._quiet():",
        "if True:",
        tests_of("changed_in_mid_call", "written_in_place"),
    ),
    Fault(
        "rows made to differ in inference tensors stay equal",
        f"{_SHARING}row_equality.py",
        "self._seen.clear()",
        "pass",
        tests_of("changed_in_mid_call", "made_to_differ"),
    ),
    Fault(
        "what is kept for steps of the other kind stays good",
        f"{_SHARING}conditioning_cache.py",
        "del self._last[other]",
        "pass",
        tests_of("changed_in_mid_call", "each_kind_of_step"),
    ),
    Fault(
        "a guider's arguments of one shape are equal",
        "pag_fast/guiders/resumption.py",
        "same = self._inputs.equal(now, values=not known)",
        "same = self._inputs.equal(now, values=False)",
        tests_of("guiders_whole_passes", "another_prompt"),
    ),
    Fault(
        "a guider trusts its model from pass to pass",
        "pag_fast/guiders/resumption.py",
        "return self._unchanged.why_not(model, self._looks)",
        'return ""',
        tests_of("guiders_changes", "between_the_passes"),
    ),
    Fault(
        "a guider trusts arguments that are the same objects",
        "pag_fast/guiders/unchanged.py",
        "_is_as_marked(b, mark) if a is b else",
        "True if a is b else",
        tests_of("guiders_changes", "between_the_passes or inference_mode"),
    ),
    Fault(
        "a guider looks at no hook between its passes",
        "pag_fast/guiders/unchanged.py",
        "(self._look(), found) == self._noted",
        "self._look() == self._noted[0]",
        tests_of("guiders_changes", "Hook"),
    ),
    Fault(
        "several rows of images for a picture are left as they are",
        f"{_SHARING}arguments.py",
        "images = _folded(added[",
        "images = (lambda x, _: x)(added[",
        tests_of("image_rows", "row_for_each_picture"),
    ),
]
