"""Faults of the arithmetic: ops, perturbations, schedules and the guidance."""

from __future__ import annotations

from planting import Fault, tests_of

_OPS, _PERTURBED, _PROCESSORS = "pag_fast/ops/", "pag_fast/perturbations/", "pag_fast/processors/"
_SHARING, _SCHEDULES = "pag_fast/sharing/", "pag_fast/settings/schedules.py"
_KERNELS = "kernels/torch-ext/pag_fast_kernels/"
_GUIDANCE = tests_of("guidance")
_NAIVE = tests_of("perturbations")

NUMBERS = [
    Fault(
        "CFG the other way round",
        f"{_OPS}combine_guidance.py",
        "torch.lerp(uncond.to(wide), c, guidance_scale)",
        "torch.lerp(c, uncond.to(wide), guidance_scale)",
        _GUIDANCE,
    ),
    Fault(
        "PAG the other way round",
        f"{_OPS}combine_guidance.py",
        "difference = c - perturbed.to(wide)",
        "difference = perturbed.to(wide) - c",
        _GUIDANCE,
    ),
    Fault(
        "full rescales as partial does",
        f"{_OPS}combine_guidance.py",
        'base = out if rescale_mode == "full" else c',
        "base = c",
        _GUIDANCE,
    ),
    Fault(
        "blurs what is not salient",
        f"{_OPS}degrade_latents.py",
        "x.shape[-2:]) > 1.0",
        "x.shape[-2:]) < 1.0",
        tests_of("degrade_latents"),
    ),
    Fault(
        "noise of the sample for that of the output",
        f"{_OPS}degrade_latents.py",
        "out.add_(output, alpha=noise[1])",
        "out.add_(output, alpha=noise[0])",
        tests_of("degrade_latents"),
    ),
    Fault(
        "linear attention's denominator",
        f"{_OPS}linear_attention.py",
        "(sums[:, :, -1:] + 1e-15)",
        "(sums[:, :, -1:] + 1e-2)",
        tests_of("linear_attention"),
    ),
    Fault(
        "a sum over heads for their mean",
        f"{_OPS}received_attention.py",
        "return received / heads",
        "return received",
        tests_of("received_attention"),
    ),
    Fault(
        "attention given for attention received",
        f"{_OPS}received_attention.py",
        "torch.softmax(query @ key, -1, dtype=wide)",
        "torch.softmax(query @ key, -2, dtype=wide)",
        tests_of("received_attention"),
    ),
    Fault(
        "keys normalised as queries",
        f"{_OPS}qk_norm_rope.py",
        "k.copy_(new_k)",
        "k.copy_(new_q)",
        tests_of("kernel_ops", "backends_agree and norm"),
    ),
    Fault(
        "soft identity of 1 − λ",
        f"{_PERTURBED}identity.py",
        "torch.lerp(out[rows.source], rows.value[rows.source], weight)",
        "torch.lerp(rows.value[rows.source], out[rows.source], weight)",
        _NAIVE,
    ),
    Fault(
        "the last pattern that matches",
        f"{_PERTURBED}identity.py",
        "strength = found[0]",
        "strength = found[-1]",
        _NAIVE,
    ),
    Fault(
        "the same noise in every layer",
        f"{_PERTURBED}noise.py",
        "layer=rows.layer.index",
        "layer=0",
        _NAIVE,
    ),
    Fault(
        "a difference kept one step too long",
        f"{_SHARING}guidance_reuse.py",
        "self._age < self.reuse.every",
        "self._age <= self.reuse.every",
        tests_of("reuse"),
    ),
    Fault(
        "a kept difference with the wrong sign",
        f"{_SHARING}guidance_reuse.py",
        "return cond - self._held",
        "return cond + self._held",
        tests_of("reuse"),
    ),
    Fault(
        "several branches as one",
        f"{_PROCESSORS}rows.py",
        "(total - len(self.branches) * unit, 0)",
        "(total - unit, 0)",
        _NAIVE,
    ),
    Fault(
        "spread takes the last rows",
        f"{_PROCESSORS}rows.py",
        "torch.cat([out[:missing], out])",
        "torch.cat([out[-missing:], out])",
        tests_of("kernel_pipelines", "all and StableDiffusionPAGPipeline"),
    ),
    Fault(
        "Sana's keys with the queries' norm",
        f"{_PROCESSORS}linear.py",
        "key = attn.norm_k(key)",
        "key = attn.norm_q(key)",
        tests_of("survivors"),
    ),
    Fault(
        "28 % of 25 steps is step 8",
        _SCHEDULES,
        "math.ceil(edge * count - 1e-9)",
        "math.ceil(edge * count)",
        tests_of("schedules"),
    ),
    Fault(
        "the other end of a range of noise levels",
        _SCHEDULES,
        "above < step.sigma <= below",
        "above <= step.sigma < below",
        tests_of("schedules"),
    ),
    Fault(
        "v-prediction's sign",
        "pag_fast/sag/schedule.py",
        "(signal, -noise), (noise, signal)",
        "(signal, noise), (noise, signal)",
        tests_of("sag"),
    ),
    Fault(
        "conditioning written in place leads all the same",
        f"{_SHARING}row_equality.py",
        "and len(first) <= len(x) and version == own",
        "and len(first) <= len(x)",
        tests_of("survivors"),
    ),
    Fault(
        "a stored map's heads are summed",
        "pag_fast/sag/attention.py",
        "torch.float32)).mean(1)",
        "torch.float32)).sum(1)",
        tests_of("received_attention"),
    ),
    Fault(
        "the kernel sees keys behind the last",
        f"{_KERNELS}received_attention.py",
        "tl.where((keys < num_tokens)[None, :], scores",
        "tl.where((keys < num_tokens + 1)[None, :], scores",
        tests_of("kernel_received_attention", "lengths or steep"),
    ),
    Fault(
        "an injected prediction without 1 / g",
        "pag_fast/runtime/guidance.py",
        "pag_scale=pag_scale / g",
        "pag_scale=pag_scale",
        _GUIDANCE,
    ),
    Fault(
        "CFG from cond without its 1",
        "pag_fast/runtime/guidance.py",
        "g = guidance_scale + 1.0 if from_cond",
        "g = guidance_scale if from_cond",
        _GUIDANCE,
    ),
    Fault(
        "noise that depends on the row",
        f"{_OPS}reference.py",
        "[..., :keys].expand(rows, -1, -1, -1)",
        "[..., :keys] * torch.arange(1.0, rows + 1.0, device=device)[:, None, None, None]",
        tests_of("noisy_attention", "position"),
    ),
    Fault(
        "the kernel counts rows as heads",
        f"{_KERNELS}noisy_attention.py",
        "number = lane % heads",
        "number = lane",
        tests_of("kernel_noisy_attention", "rows_have"),
    ),
]
