"""Faults of what is seen instead of described: traces, comparisons, the loops of pipelines."""

from __future__ import annotations

from planting import Fault, tests_of

_TRACE, _PLAN = "pag_fast/models/traced/trace.py", "pag_fast/models/traced/plan.py"
_STOCK, _TOKENS = "pag_fast/processors/stock.py", "pag_fast/sharing/tokens.py"
_PRESERVED = "pag_fast/models/traced/preserved.py"
_TRACED, _SEPARATELY = "pag_fast/runtime/traced.py", "pag_fast/runtime/separately.py"
_DERIVED_GUIDER = "pag_fast/guiders/derived.py"
_OBSERVED, _COPIES = "pag_fast/runtime/observed.py", "pag_fast/runtime/row_copies.py"

SEEN = [
    Fault(
        "rows that depend on each other count as rounding",
        _SEPARATELY,
        "if not self.rounding <= _MOST_ROUNDING.get(cond.dtype, 1e-4):",
        "if False:",
        tests_of("derived_models", "rows_that_depend"),
    ),
    Fault(
        "a comparison of other layers counts for these",
        _TRACED,
        "chosen = self._signature, installed.plan.order, installed.branches",
        "chosen = self._signature",
        tests_of("derived_models", "every_choice_of_layers"),
    ),
    Fault(
        "masks are compared by shape alone",
        "pag_fast/models/traced/signatures.py",
        "found.append(value.cpu().numpy().tobytes())",
        "pass",
        tests_of("derived_models_patched", "a_trace_for_each_size"),
    ),
    Fault(
        "a trace draws random numbers",
        _PRESERVED,
        "with torch.random.fork_rng(indices, device_type=kind), eager:",
        "with eager:",
        tests_of("derived_models_patched", "random_numbers"),
    ),
    Fault(
        "what a trace has left in a model stays there",
        _PRESERVED,
        "held.restore()",
        "pass",
        tests_of("derived_memory", "guider_leaves or next_forward_reads"),
    ),
    Fault(
        "memory is written into without a copy of it",
        _PRESERVED,
        "self._copies[at] = self._places[at][1].clone()",
        "pass",
        tests_of("derived_memory", "taken_back"),
    ),
    Fault(
        "what a forward leaves is of no interest",
        _TRACE,
        "if left and not _alike(after, fresh):",
        "if False:",
        tests_of("derived_memory", "next_forward_reads"),
    ),
    Fault(
        "no later step is compared",
        _TRACED,
        "(known and not self._is_turn(call, chosen))",
        "known",
        tests_of("derived_late", "mix_later"),
    ),
    Fault(
        "the last step is compared in every call",
        "pag_fast/models/traced/turns.py",
        "return 1.0 - calls * _GOLDEN % 1.0",
        "return 1.0",
        tests_of("derived_late", "mix_later or turns"),
    ),
    Fault(
        "blocks of a traced model may run in any order",
        "pag_fast/sharing/sequence.py",
        "if not follows:",
        "if False:",
        tests_of("derived_late", "another_order_runs_apart"),
    ),
    Fault(
        "a forward may end with fewer rows than it began",
        "pag_fast/sharing/sequence.py",
        "if not self._whole:",
        "if False:",
        tests_of("derived_late", "sequence_lets_pass"),
    ),
    Fault(
        "a guider replays behind what it has perturbed",
        "pag_fast/runtime/recording.py",
        "if value is None or self.state.entered:",
        "if False:",
        tests_of("derived_late", "guiders_pass"),
    ),
    Fault(
        "tokens that were put in order stay so",
        _STOCK,
        "return (out if back is None else out.index_select(1, back)).transpose(1, 2)",
        "return out.transpose(1, 2)",
        tests_of("derived_models", "equals_separate"),
    ),
    Fault(
        "a query of the context is perturbed, too",
        _TOKENS,
        "(queries[:, :, None] & self.image[:, None, :] & ~itself)",
        "(self.image[:, None, :] & ~itself)",
        tests_of("derived_models", "equals_separate"),
    ),
    Fault(
        "values of the layer's own are written into",
        _STOCK,
        "value.clone(memory_format=torch.contiguous_format) if order is None else value",
        "value",
        tests_of("derived_models", "values_are_the_layers_own"),
    ),
    Fault(
        "blocks behind a list's end get the shared rows",
        _PLAN,
        "None if leads else SPLIT,",
        "None,",
        tests_of("derived", "the_same_picture"),
    ),
    Fault(
        "cond and uncond may change places",
        _OBSERVED,
        "if dict(weighed).get(UNCOND, 0.0) * total > 1.0 + most:",
        "if False:",
        tests_of("derived_models", "diffusers_order"),
    ),
    Fault(
        "an order that nobody has seen is taken",
        _OBSERVED,
        "if combined is None and self._assumed:",
        "if False:",
        tests_of("derived_models", "diffusers_order"),
    ),
    Fault(
        "guidance that is no sum is taken for one",
        _OBSERVED,
        "if left > most:",
        "if False:",
        tests_of("derived_models", "what_the_loop_makes"),
    ),
    Fault(
        "lists of rows are not turned",
        _COPIES,
        "for slab in reversed(range(have))",
        "for slab in range(have)",
        tests_of("derived_models", "lists_of_rows"),
    ),
    Fault(
        "what is put together with a fork's product has fewer rows",
        "pag_fast/sharing/dit_plan.py",
        '_BESIDE_THE_PRODUCT = ("mlp_act_fn", "to_gate")',
        '_BESIDE_THE_PRODUCT = ("mlp_act_fn",)',
        tests_of("hosts", "three_separate and Krea2"),
    ),
    Fault(
        "what a guider has resumed is not compared",
        _DERIVED_GUIDER,
        "why = difference(prediction_of(out), prediction_of(truth))",
        'why = ""',
        tests_of("guiders_derived", "resumed_wrong"),
    ),
    Fault(
        "a trace of other arguments tells a guider which tokens are the image's",
        _DERIVED_GUIDER,
        "if signature not in traced.tokens:",
        "if not traced.tokens:",
        tests_of("guiders_derived", "another_length"),
    ),
    Fault(
        "code between blocks that needs all rows gets the shared ones",
        "pag_fast/models/hidream.py",
        "whole_between=True,",
        "whole_between=False,",
        tests_of("hidream", "between_blocks"),
    ),
    Fault(
        "text that is replaced in mid-call is looked for in the wrong dimension",
        "pag_fast/runtime/forwards.py",
        "if name not in views or views[name][0] is not own:",
        "if name not in views:",
        tests_of("hidream", "another_prompt"),
    ),
]
