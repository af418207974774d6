"""Faults of what later steps take over: spot checks of kept outputs, graphs of forwards."""

from __future__ import annotations

from planting import Fault, tests_of

_CHECKS, _CACHE = "pag_fast/sharing/spot_checks.py", "pag_fast/sharing/conditioning_cache.py"
_GRAPHS = "pag_fast/runtime/compiled/graphs.py"
_WEIGHTS = "pag_fast/sharing/weight_signature.py"

KEPT = [
    Fault(
        "what may be a view is not recorded",
        "tests/recorded.py",
        "_is_view(out, (args, kwargs)):",
        "any(x.alias_info is not None for x in func._schema.returns):",
        tests_of("graphs", "recorded_is_what_runs"),
    ),
    Fault(
        "keys of the image are kept where an attention has added ones",
        _CACHE,
        "over_text = not added and ",
        "over_text = ",
        tests_of("known_processors", "keys_of_the_image"),
    ),
    Fault(
        "keys of a processor that is marked row-wise are kept",
        "pag_fast/runtime/compatibility/__init__.py",
        "yield _OWN_PROCESSOR",
        "pass",
        tests_of("known_processors", "of_a_processor_of_ones_own"),
    ),
    Fault(
        "every processor of diffusers is known",
        "pag_fast/processors/displaced.py",
        "if cls.__name__ in known and (",
        "if (",
        tests_of("known_processors", "attend_to_pictures"),
    ),
    Fault(
        "a kept output that has become another one is not told",
        _CHECKS,
        "if math.isfinite(size) and not distance <= tolerance * size:",
        "if False:",
        tests_of("spot_checks", "a_write_is_told"),
    ),
    Fault(
        "rounding counts as another output",
        _CHECKS,
        "not distance <= tolerance * size",
        "distance >= 0.0",
        tests_of("spot_checks", "no_false_alarm"),
    ),
    Fault(
        "one module is checked in every step",
        _CACHE,
        "state.checked = turn + 1",
        "pass",
        tests_of("spot_checks", "every_module_has_its_turn"),
    ),
    Fault(
        "what a check has computed is not kept",
        _CACHE,
        "kept.value, kept.version = _telling(value) return kept.value",
        "return value",
        tests_of("spot_checks", "launches_of_a_check"),
    ),
    Fault(
        "what is kept in inference mode does not tell of writes",
        _CACHE,
        "if value.is_inference():",
        "if False:",
        tests_of("changed_in_mid_call", "a_hook_writes_into_what_is_kept"),
    ),
    Fault(
        "of tensors that are attributes of modules the objects are compared alone",
        _WEIGHTS,
        "(*weights, *others)",
        "weights",
        tests_of("kept_attributes", "in_a_callback"),
    ),
    Fault(
        "memory of tensors that are attributes is not compared",
        _WEIGHTS,
        "self._placed = [*weights, *plain]",
        "self._placed = weights",
        tests_of("kept_attributes", "another and memory"),
    ),
    Fault(
        "what is in lists of modules is not compared",
        _WEIGHTS,
        "self._collections = collections",
        "self._collections = collections = []",
        tests_of("kept_attributes", "in_a_collection"),
    ),
    Fault(
        "attributes of inference mode are trusted",
        _WEIGHTS,
        "if weights or any(map(_is_inference, others)):",
        "if weights:",
        tests_of("kept_attributes", "inference_mode"),
    ),
    Fault(
        "a guider compares a model's own tensors as objects alone",
        "pag_fast/guiders/unchanged.py",
        "versions += [x._version for x in others if not x.is_inference()]",
        "",
        tests_of("guiders_changes", "OnTheModel"),
    ),
    Fault(
        "a graph reads the arguments that it was recorded with",
        _GRAPHS,
        "copy.copy_(x) graph.filled[index] = x, version",
        "graph.filled[index] = x, version",
        tests_of("graphs", "the_picture_is_the_same"),
    ),
    Fault(
        "an argument written into in place is not copied again",
        _GRAPHS,
        "if before is None or before[0] is not x or before[1] != version or version < 0:",
        "if before is None or before[0] is not x:",
        tests_of("graphs", "written_into_by_the_scheduler"),
    ),
    Fault(
        "a graph outlives the weights that it was recorded with",
        _GRAPHS,
        "if number != self._number:",
        "if False:",
        tests_of("graphs", "changes_in_the_middle or lora_scale"),
    ),
    Fault(
        "a graph outlives what was kept of the conditioning",
        _GRAPHS,
        "any(version_of(x) != version for x, version in graph.kept)",
        "False",
        tests_of("graphs", "changes_in_the_middle"),
    ),
    Fault(
        "a graph counts for other rows",
        _GRAPHS,
        "(state.context, state.slabs, state.epoch, state.num_contexts, state.num_image),",
        "(),",
        tests_of("graphs"),
    ),
    Fault(
        "a graph has the random numbers of the step that it was recorded in",
        _GRAPHS,
        "graph.clock.copy_(self.state.clock)",
        "pass",
        tests_of("graphs", "other_options"),
    ),
    Fault(
        "two steps have one output",
        _GRAPHS,
        "tree_map_only(torch.Tensor, torch.clone, graph.out)",
        "graph.out",
        tests_of("graphs", "callers_own"),
    ),
    Fault(
        "hooks are left out in a replay",
        _GRAPHS,
        "if any(map(any, map(_HOOKS, self._owns))) or any(",
        "if any(",
        tests_of("graphs", "hooks_run"),
    ),
]
