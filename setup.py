"""Packages by hand: discovery would trip over the top-level folders that are none."""

from __future__ import annotations

from setuptools import setup

# import name: folder
PACKAGES = {
    "pag_fast": "pag_fast",
    "pag_fast.analysis": "pag_fast/analysis",
    "pag_fast.fusion": "pag_fast/fusion",
    "pag_fast.guiders": "pag_fast/guiders",
    "pag_fast.models": "pag_fast/models",
    "pag_fast.models.traced": "pag_fast/models/traced",
    "pag_fast.ops": "pag_fast/ops",
    "pag_fast.ops.reference": "pag_fast/ops/reference",
    "pag_fast.parallel": "pag_fast/parallel",
    "pag_fast.perturbations": "pag_fast/perturbations",
    "pag_fast.pipelines": "pag_fast/pipelines",
    "pag_fast.processors": "pag_fast/processors",
    "pag_fast.runtime": "pag_fast/runtime",
    "pag_fast.runtime.access": "pag_fast/runtime/access",
    "pag_fast.runtime.compatibility": "pag_fast/runtime/compatibility",
    "pag_fast.runtime.compiled": "pag_fast/runtime/compiled",
    "pag_fast.runtime.loops": "pag_fast/runtime/loops",
    "pag_fast.runtime.ranks": "pag_fast/runtime/ranks",
    "pag_fast.sag": "pag_fast/sag",
    "pag_fast.settings": "pag_fast/settings",
    "pag_fast.sharing": "pag_fast/sharing",
    "pag_fast.tools": "pag_fast/tools",
    "pag_fast.tools.bench": "pag_fast/tools/bench",
    "pag_fast.tools.generate": "pag_fast/tools/generate",
    # never as "kernels": that is the name of a package that diffusers and transformers look for
    "pag_fast_kernels": "kernels/torch-ext/pag_fast_kernels",
}

setup(packages=list(PACKAGES), package_dir=PACKAGES)
