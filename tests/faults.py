"""Faults planted on purpose, and the tests that see them: ``python tests/faults.py [NAME …]``.

Each is planted alone in a temporary copy of the tree, its tests are run there, and the copy is
restored. A fault that no test sees has survived, and the exit status is 1. ``--list`` names them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_IGNORED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "demo", "bench-results")


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``path``; ``tests`` are pytest's arguments.

    ``old`` is matched token by token: spaces, line breaks and trailing commas do not count.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    def planted(self, text: str) -> str:
        """``text`` with the fault in it.

        Raises:
            ValueError: ``old`` is not there exactly once.
        """
        tokens = re.findall(r"\w+|[^\w\s]", self.old)
        parts = [(r",?\s*" if token in ")]}" else r"\s*") + re.escape(token) for token in tokens]
        pattern = "".join(parts).removeprefix(r"\s*")
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise ValueError(
                f"Fault {self.name!r}: {self.path} holds {self.old!r} {len(found)} times, not "
                "once: give the fault an anchor that names its place again."
            )
        return text[: found[0].start()] + self.new + text[found[0].end() :]


def _tests(file: str, select: str = "") -> tuple[str, ...]:
    return (f"tests/test_{file}.py", *(("-k", select) if select else ()))


_OPS, _PERTURBED, _PROCESSORS = "pag_fast/ops/", "pag_fast/perturbations/", "pag_fast/processors/"
_SHARING, _SCHEDULES = "pag_fast/sharing/", "pag_fast/settings/schedules.py"
_KERNELS = "kernels/torch-ext/pag_fast_kernels/"
_GUIDANCE = _tests("guidance")
_NAIVE = _tests("perturbations")

FAULTS = [
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
        _tests("degrade_latents"),
    ),
    Fault(
        "noise of the sample for that of the output",
        f"{_OPS}degrade_latents.py",
        "out.add_(output, alpha=noise[1])",
        "out.add_(output, alpha=noise[0])",
        _tests("degrade_latents"),
    ),
    Fault(
        "linear attention's denominator",
        f"{_OPS}linear_attention.py",
        "(sums[:, :, -1:] + 1e-15)",
        "(sums[:, :, -1:] + 1e-2)",
        _tests("linear_attention"),
    ),
    Fault(
        "a sum over heads for their mean",
        f"{_OPS}received_attention.py",
        "return received / heads",
        "return received",
        _tests("received_attention"),
    ),
    Fault(
        "attention given for attention received",
        f"{_OPS}received_attention.py",
        "torch.softmax(query @ key, -1, dtype=wide)",
        "torch.softmax(query @ key, -2, dtype=wide)",
        _tests("received_attention"),
    ),
    Fault(
        "the text's weight for the query's own",
        f"{_OPS}log_sum_exp.py",
        "torch.addcmul(zero, weight, text)",
        "torch.addcmul(zero, 1 - weight, text)",
        _tests("log_sum_exp", "error_of_joint"),
    ),
    Fault(
        "scores rounded before they are scaled",
        f"{_OPS}log_sum_exp.py",
        "q[:, :, some].to(wide) @ keys",
        "(q[:, :, some] @ keys.to(q.dtype)).to(wide)",
        _tests("log_sum_exp", "error_of_joint and chunks"),
    ),
    Fault(
        "padding read as log-sum-exp",
        f"{_OPS}log_sum_exp.py",
        "found[1][..., : q.shape[2]]",
        "found[1][..., -q.shape[2] :]",
        _tests("log_sum_exp", "layouts_are_read_right"),
    ),
    Fault(
        "aligned strides claimed where they are not",
        f"{_KERNELS}bound.py",
        "return unit if starts_aligned and all(stride % unit == 0 for stride in strides) else 1",
        "return unit",
        _tests("bound", "unit_of_strides"),
    ),
    Fault(
        "keys normalised as queries",
        f"{_OPS}qk_norm_rope.py",
        "k.copy_(new_k)",
        "k.copy_(new_q)",
        _tests("kernel_ops", "backends_agree and norm"),
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
        _tests("reuse"),
    ),
    Fault(
        "a kept difference with the wrong sign",
        f"{_SHARING}guidance_reuse.py",
        "return cond - self._held",
        "return cond + self._held",
        _tests("reuse"),
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
        _tests("kernel_pipelines", "all and StableDiffusionPAGPipeline"),
    ),
    Fault(
        "Sana's keys with the queries' norm",
        f"{_PROCESSORS}linear.py",
        "key = attn.norm_k(key)",
        "key = attn.norm_q(key)",
        _tests("survivors"),
    ),
    Fault(
        "28 % of 25 steps is step 8",
        _SCHEDULES,
        "math.ceil(edge * count - 1e-9)",
        "math.ceil(edge * count)",
        _tests("schedules"),
    ),
    Fault(
        "the other end of a range of noise levels",
        _SCHEDULES,
        "above < step.sigma <= below",
        "above <= step.sigma < below",
        _tests("schedules"),
    ),
    Fault(
        "v-prediction's sign",
        "pag_fast/sag/schedule.py",
        "(signal, -noise), (noise, signal)",
        "(signal, noise), (noise, signal)",
        _tests("sag"),
    ),
    Fault(
        "conditioning written in place leads all the same",
        f"{_SHARING}row_equality.py",
        "and len(first) <= len(x) and version == own",
        "and len(first) <= len(x)",
        _tests("survivors"),
    ),
    Fault(
        "a stored map's heads are summed",
        "pag_fast/sag/attention.py",
        "torch.float32)).mean(1)",
        "torch.float32)).sum(1)",
        _tests("received_attention"),
    ),
    Fault(
        "the kernel sees keys behind the last",
        f"{_KERNELS}received_attention.py",
        "tl.where((keys < num_tokens)[None, :], scores",
        "tl.where((keys < num_tokens + 1)[None, :], scores",
        _tests("kernel_received_attention", "lengths or steep"),
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
]


def anchors() -> list[str]:
    """What is wrong with the anchors: a sentence for each that is not found exactly once."""
    wrong = []
    for fault in FAULTS:
        try:
            fault.planted((ROOT / fault.path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    return wrong


def _run(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (tree, tree / "tests", tree / "kernels" / "torch-ext")))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-rf", *tests]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def check(fault: Fault, tree: Path) -> tuple[bool, str]:
    """Whether a test sees ``fault`` in a copy of the tree, and what pytest said."""
    target = tree / fault.path
    before = target.read_text("utf-8")
    target.write_text(fault.planted(before), encoding="utf-8")
    try:
        done = _run(tree, fault.tests)
    finally:
        target.write_text(before, encoding="utf-8")
    lines = done.stdout.splitlines()
    seen = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    # 1: a test failed; anything else (no test, an import error) shows nothing about the fault
    said = seen[0] if seen else (lines or [done.stderr.strip()])[-1]
    return done.returncode == 1 and bool(seen), said


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of a fault's name")
    parser.add_argument("--list", action="store_true", help="name the faults")
    arguments = parser.parse_args(argv)
    wrong = anchors()
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 2
    wanted = arguments.names or [""]
    chosen = [fault for fault in FAULTS if any(part in fault.name for part in wanted)]
    if not chosen:
        print(f"No fault is called {', '.join(wanted)}: --list names them.", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(f"{fault.name}: {fault.path}" for fault in chosen))
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=_IGNORED)
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            done = _run(tree, tests)
            if done.returncode:
                print(f"{' '.join(tests)} fails without a fault:\n{done.stdout}", file=sys.stderr)
                return 2
        for fault in chosen:
            caught, said = check(fault, tree)
            survivors += [] if caught else [fault.name]
            print(f"{'seen' if caught else 'SURVIVED'}: {fault.name}: {said}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults are seen")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
