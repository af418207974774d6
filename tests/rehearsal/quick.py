"""A pytest plugin, by PYTEST_PLUGINS: a rehearsal runs one case of each test, and each once."""

from __future__ import annotations

import pytest

PIPELINES = ("StableDiffusion3PAGPipeline", "HunyuanDiTPAGPipeline")
# the interpreter takes seconds for one case
SLOW = (
    "test_a_long_odd_length",
    "test_large_samples",
    "test_blocks_do_not_change_the_noise",
    "test_other_perturbations_of_joint_attention",
)
# needs storages that know their device
UNABLE = ("test_opcheck",)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "rounds"):
        config.option.rounds = 1
        # the third of a call is the first to come from a graph
        config.option.steps = 4 if config.option.steps else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config.option, "rounds"):
        if config.option.compiled == "yes":  # as much as the first stages, only compiled
            families = ("SDXL", "SD3", "combine")
            items[:] = [item for item in items if any(f in item.name for f in families)]
        items[:] = [item for item in items if "CFG off" not in item.name]
        return
    seen, kept = set(), []
    for item in items:
        name = getattr(item, "originalname", item.name)
        pipeline = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name in SLOW + UNABLE or (pipeline and pipeline not in PIPELINES):
            continue
        key = (item.path, name, pipeline)
        if key not in seen:
            seen.add(key)
            kept.append(item)
    items[:] = kept
