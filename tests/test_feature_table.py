"""The README's table is what descriptions say and tests exercise; here is what no other test has.

``feature_table.EVIDENCE`` names the tests that fill a column. Those of this file run one pipeline
of each denoiser that the tests of a feature leave out.
"""

from __future__ import annotations

import feature_table
import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from random_adapters import add_lora, denoiser_of
from recorded import RecordingCapture
from shallow import build as shallow
from shallow import least
from tiny_hosts import HOSTS, call_kwargs, latents
from torch._dynamo.utils import counters

import pag_fast
from pag_fast.models.layer_names import resolve
from pag_fast.settings.compile_config import CompileConfig

EAGER = CompileConfig(backend="eager")
KOLORS = "KolorsPAGPipeline"
# with a denoiser of their own, without PAG
OWN = [name for name, spec in HOSTS.items() if spec.brings_a_model]
# not HiDream, HunyuanVideo 1.5 and Lumina 2: their forwards ask on the host, stock as well
COMPILED = ["CogView4Pipeline", "Krea2Pipeline"]
# nor HiDream and HunyuanVideo 1.5 for that reason; test_graphs.py has Flux, Wan and Qwen-Image
_OTHERS = ("HiDreamImagePipeline", "HunyuanVideo15Pipeline", "WanVACEPipeline")
_DONE = ("FluxPipeline", "WanPipeline", "QwenImagePipeline")
GRAPHS = [name for name in OWN if name not in (*_OTHERS, *_DONE)]


def _present(*names):
    return [name for name in names if name in HOSTS or name in tiny.PIPELINES]


def _calls(name, pipe, **more):
    return (tiny if name in tiny.PIPELINES else tiny_hosts).call_kwargs(name, pipe, **more)


def _least(name):
    """A pipeline with little to compile, and the layers to patch it with."""
    if name == KOLORS:
        parts = {"down_block_types": ("DownBlock2D",), "mid_block_type": None}
        return shallow(name, **parts, pag_applied_layers=["up_blocks.0.attentions.1"]), None
    pipe, layers = least(name)
    return pipe, layers if name in HOSTS else None


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


newest = pytest.mark.skipif(not feature_table.known(), reason="the table is of a newer diffusers")


@newest
def test_the_table_is_up_to_date():
    readme = feature_table.README.read_text("utf-8")
    assert readme == feature_table.written(readme), "run make table"


@newest
def test_a_cell_without_a_test_is_empty(monkeypatch):
    """The table follows the tests' parameters: Lumina 2's LoRA is here alone."""
    before = feature_table.cells()["Lumina-Image 2.0"]
    monkeypatch.setitem(feature_table.EVIDENCE, "LoRA", (("test_features_adapters", "test_lora"),))
    after = feature_table.cells()["Lumina-Image 2.0"]
    assert before["LoRA"] == "✓" and after == {**before, "LoRA": ""}
    monkeypatch.setitem(feature_table.EVIDENCE, "LoRA", (("test_features_adapters", "test_gone"),))
    with pytest.raises(AttributeError):
        feature_table.cells()


@pytest.mark.parametrize("name", _present(*OWN, KOLORS))
def test_lora(name):
    """An adapter of random weights in every attention: separate forwards, or stock PAG, with it."""
    own = name in HOSTS
    pipe = (tiny_hosts if own else tiny).build(name)
    layers = HOSTS[name].layers["middle"] if own else None
    plain = latents(pipe, _calls(name, pipe))
    add_lora(denoiser_of(pipe))
    stock = latents(pipe, _calls(name, pipe))
    assert relative(stock, plain) > 1e-3, "the adapter makes no difference"
    truth = _slow(pipe, name, layers) if own else stock
    with pag_fast.patched(pipe, layers):
        patched = latents(pipe, _calls(name, pipe))
        assert dict(pipe._pag_fast.steps) == {"shared": 2}
    assert relative(patched, truth) < 1e-5


def _slow(pipe, name, layers):
    kwargs = call_kwargs(name, pipe)
    attentions = list(resolve(denoiser_of(pipe), layers).values())
    with tiny_hosts.slow_pag(pipe, name, attentions, 3.0, HOSTS[name].cfg_scale(kwargs)):
        return latents(pipe, kwargs)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", _present(*COMPILED, KOLORS))
def test_compiled(name):
    """The same picture, and no graph more for other scales and numbers of steps."""
    pipe, layers = _least(name)
    with pag_fast.patched(pipe, layers):
        eager = latents(pipe, _calls(name, pipe))
    with pag_fast.patched(pipe, layers, compile=EAGER):
        before = counters["stats"]["unique_graphs"]
        assert relative(latents(pipe, _calls(name, pipe)), eager) < 1e-5
        made = counters["stats"]["unique_graphs"] - before
        latents(pipe, _calls(name, pipe, steps=3, pag_scale=1.0))
        assert counters["stats"]["unique_graphs"] - before == made > 0


@pytest.mark.parametrize("name", _present(*GRAPHS, "SanaPAGPipeline"))
def test_graphs(name):
    """The same picture from forwards that are recorded, and played back in later steps."""
    pipe, layers = _least(name)
    with pag_fast.patched(pipe, layers):
        eager = latents(pipe, _calls(name, pipe, steps=4))
    with pag_fast.patched(pipe, layers, graphs=True):
        pipe._pag_fast.make_capture = RecordingCapture
        assert relative(latents(pipe, _calls(name, pipe, steps=4)), eager) < 1e-6
        assert pipe._pag_fast.steps["replayed"] >= 3


def test_the_readme_is_short():
    """One page, with code near its top: everything else is in docs/."""
    lines = feature_table.README.read_text("utf-8").splitlines()
    assert len(lines) <= 130
    first = lines.index("```python")
    assert first + lines[first:].index("```") < 30
    commands = [line.split("#")[0].strip() for line in lines if line.startswith("    make ")]
    assert commands == ["make demo", "make test"]
