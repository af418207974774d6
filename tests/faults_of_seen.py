"""Faults of what is seen instead of described: traces, comparisons, the loops of pipelines."""

from __future__ import annotations

from planting import Fault, tests_of

_TRACE, _PLAN = "pag_fast/models/traced/trace.py", "pag_fast/models/traced/plan.py"
_STOCK, _TOKENS = "pag_fast/processors/stock.py", "pag_fast/sharing/tokens.py"
_TRACED, _SEPARATELY = "pag_fast/runtime/traced.py", "pag_fast/runtime/separately.py"
_DERIVED_GUIDER = "pag_fast/guiders/derived.py"
_OBSERVED, _COPIES = "pag_fast/runtime/observed.py", "pag_fast/runtime/row_copies.py"
_GUIDANCE = "pag_fast/runtime/observed_guidance.py"
_WEIGHTS = "pag_fast/runtime/observed_weights.py"
_LOOPS, _EVALUATIONS = "own_loops", "own_loops_evaluations"

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
        _TRACE,
        "found.append(value.cpu().numpy().tobytes())",
        "pass",
        tests_of("derived_models_patched", "a_trace_for_each_size"),
    ),
    Fault(
        "a trace draws random numbers",
        _TRACE,
        "with torch.random.fork_rng(indices, device_type=kind), eager:",
        "with eager:",
        tests_of("derived_models_patched", "random_numbers"),
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
        _WEIGHTS,
        "if uncond > 1.0 + most:",
        "if False:",
        tests_of("derived_models", "diffusers_order"),
    ),
    Fault(
        "an order that nobody has seen is taken",
        _GUIDANCE,
        "if any(found.assumed for found in rounds):",
        "if False:",
        tests_of("derived_models", "diffusers_order"),
    ),
    Fault(
        "an order that no weights have shown is taken",
        _GUIDANCE,
        "if self._judge.unconfirmed:",
        "if False:",
        tests_of(_LOOPS, "never_show"),
    ),
    Fault(
        "guidance that is no sum is taken for one",
        _WEIGHTS,
        "if left > most:",
        "if False:",
        tests_of("derived_models", "what_the_loop_makes"),
    ),
    Fault(
        "predictions of earlier steps are not looked for",
        _GUIDANCE,
        "kept = {name: x for name, x in self._old.items() if old and x.shape == shape}",
        "kept: dict[str, torch.Tensor] = {}",
        tests_of(_LOOPS, "of_an_earlier_step_is_refused"),
    ),
    Fault(
        "a last step that is like none before is not looked at",
        "pag_fast/runtime/observed_session.py",
        "if whole else []",
        "if False else []",
        tests_of(_LOOPS, "of_an_earlier_step_is_refused"),
    ),
    Fault(
        "steps that are like an earlier one are not read",
        _GUIDANCE,
        "self._later.append(columns)\n            return\n        self._judge",
        "return\n        self._judge",
        tests_of(_LOOPS, "in_later_steps_alone"),
    ),
    Fault(
        "every step waits for the device",
        _GUIDANCE,
        "known = self._is_known(kinds)\n        target = self._result",
        "known = False\n        target = self._result",
        tests_of(_LOOPS, "waits_for_the_device"),
    ),
    Fault(
        "uncond may be used beside the guided prediction",
        _GUIDANCE,
        "if one.left > _CERTAIN * two.left and",
        "if False and",
        tests_of(_LOOPS, "beside_the_guided"),
    ),
    Fault(
        "a timestep that is a number is a setting",
        _OBSERVED,
        "plain, listed = (bool, str, type(None)),",
        "plain, listed = (bool, int, float, str, type(None)),",
        tests_of(_EVALUATIONS, "two_evaluations"),
    ),
    Fault(
        "cond begins no new round",
        "pag_fast/runtime/observed_session.py",
        "self._seen = key, []\n        self._seen[1]",
        "pass\n        self._seen[1]",
        tests_of(_EVALUATIONS, "two_evaluations"),
    ),
    Fault(
        "forwards for two prompts are added up",
        _WEIGHTS,
        "if own.left > most or not whole:",
        "if False:",
        tests_of(_EVALUATIONS, "two_prompts"),
    ),
    Fault(
        "rows of some of the pictures are taken for cond's",
        _OBSERVED,
        "if pictures > 1 and rows != pictures:",
        "if False:",
        tests_of(_EVALUATIONS, "one_picture"),
    ),
    Fault(
        "as many rows as pictures are cond's, whatever their prompts",
        _OBSERVED,
        "if self._halves_seen or rows % 2:",
        "if True:",
        tests_of(_EVALUATIONS, "one_picture"),
    ),
    Fault(
        "a prompt is known by its address",
        _OBSERVED,
        "if refs[0]() is whole and refs[1]() is own:",
        "if True:",
        tests_of("own_loops_steps", "made_for_each"),
    ),
    Fault(
        "a prompt that was written into is the same",
        _OBSERVED,
        "and known[1] == versions",
        "",
        tests_of("own_loops_steps", "takes_turns"),
    ),
    Fault(
        "a loop that steps by itself stays in its first step",
        "pag_fast/runtime/loop.py",
        'for at in (found.get("t"), call.get("timestep")):',
        "for at in ():",
        tests_of("own_loops_steps", "makes_its_own_steps"),
    ),
    Fault(
        "timesteps that are handed out anew begin the call again",
        "pag_fast/runtime/guidance.py",
        'if host != cache.get("host"):',
        "if True:",
        tests_of("own_loops_steps", "have_little"),
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
