"""What a traced model does with the rest of a patch: options, compiling, other calls, copies."""

from __future__ import annotations

import older
import own_models
import pytest
import torch
from numerics import relative
from own_models import build, prompts, truth
from torch._dynamo.utils import counters

import pag_fast
from pag_fast import perturbations as P
from pag_fast.models import registry
from pag_fast.runtime import traced as traced_session
from pag_fast.runtime.separately import Separately
from pag_fast.settings.compile_config import CompileConfig

LAYERS = ["layers.1", "layers.2"]
NAMES = ["layers.1.mixer", "layers.2.mixer"]


def test_a_trace_for_each_size_and_a_comparison(monkeypatch):
    traces, compared = [], []
    trace, separately = traced_session.trace, Separately.run

    def counted(model, call):
        traces.append(call["words"].shape)
        return trace(model, call)

    def noted(*args):
        compared.append(args[-1])
        return separately(*args)

    monkeypatch.setattr(traced_session, "trace", counted)
    monkeypatch.setattr(Separately, "run", noted)
    pipe = build(text="middle", mask="keys")
    pag_fast.patch(pipe, LAYERS)
    for tokens in (5, 5, 7, 5, 7):
        call = prompts(tokens=tokens)
        fast = pipe(**call)
        assert relative(fast, truth_of(pipe, call)) < 1e-5
    # later steps are compared with what is known of rounding
    assert len(traces) == compared.count(None) == 2
    # a mask says where text is: another one is looked at, too
    call = prompts()
    call["prompt_embeds"][0, -3:] = 0
    pipe(**call)
    assert len(traces) == 3


def truth_of(pipe, call):
    """Of a pipeline that is patched: of one with the same weights that is not."""
    other = build(**{k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")})
    other.transformer.load_state_dict(pipe.transformer.state_dict())
    return truth(other, NAMES, call)


def test_random_numbers_are_not_drawn():
    """By the trace and the comparison: what follows is drawn as behind a stock call."""
    pipe, call = build(attends="Drawing"), prompts()
    torch.manual_seed(3)
    pipe(**call)
    after = torch.get_rng_state()
    pag_fast.patch(pipe, LAYERS)
    torch.manual_seed(3)
    pipe(**call)
    assert torch.equal(torch.get_rng_state(), after)
    assert pipe._pag_fast.steps == {"shared": 2}


def test_processors_that_are_exchanged():
    """Between calls: what runs is what the layer has now. In the middle of one: refused."""
    pipe, call = build(), prompts()
    pag_fast.patch(pipe, LAYERS)
    pipe(**call)

    class Doubled(own_models.Plain):
        def __call__(self, attn, x, mask=None):
            return 2 * super().__call__(attn, x, mask)

    pipe.transformer.layers[1].mixer.processor = Doubled()
    with pytest.warns(UserWarning):  # a processor of another package than diffusers
        fast = pipe(**call)
    other = build()
    other.transformer.layers[1].mixer.processor = Doubled()
    assert relative(fast, truth(other, NAMES, call)) < 1e-5


def test_other_perturbations():
    """Against the same model with its text behind, which needs no other order of tokens."""
    for how in (P.SoftIdentity(0.5), P.BlurredQueries()):
        pictures = []
        for text in ("first", "middle", "last"):
            pipe = build(text=text)
            pag_fast.patch(pipe, LAYERS, perturbation=how)
            pictures.append(pipe(**prompts()))
        assert relative(pictures[0], pictures[2]) < 1e-5
        assert relative(pictures[1], pictures[2]) < 1e-5
    pipe = build(mask="pairs")
    pag_fast.patch(pipe, LAYERS, perturbation=P.SoftIdentity(0.5))
    with pytest.raises(ValueError, match="the identity alone can perturb it"):
        pipe(**prompts())
    with pytest.raises(ValueError, match=r"perturbs transformer blocks, and layers\.1 is a OwnB"):
        pag_fast.patch(build(), LAYERS, perturbation=P.SkippedBlock())


@older.TRACES
def test_compiled_without_recompiling():
    torch._dynamo.reset()
    pipe, call = build(attends="Dispatched", mask="keys"), prompts()
    slow = truth(pipe, NAMES, call)
    with pag_fast.patched(pipe, LAYERS, compile=CompileConfig(backend="eager")):
        before = counters["stats"]["unique_graphs"]
        assert relative(pipe(**call), slow) < 1e-5
        made = counters["stats"]["unique_graphs"] - before
        pipe(**call, num_inference_steps=3, guidance_scale=5.0)
        assert counters["stats"]["unique_graphs"] - before == made == 1
    torch._dynamo.reset()


def test_a_description_goes_with_its_model():
    pipe = build()
    pag_fast.patch(pipe, LAYERS)
    pipe(**prompts())
    assert pipe.transformer in registry._TRACED
    count = len(registry._TRACED)
    pag_fast.unpatch(pipe)
    del pipe
    import gc

    gc.collect()
    assert len(registry._TRACED) < count


def test_describe(tmp_path, monkeypatch, capsys):
    """The command prints what a call shows, and writes a file with which the model is described."""
    import importlib.util
    import sys

    from pag_fast import cli
    from pag_fast.models.traced import description
    from pag_fast.tools import load

    def run(*options):
        monkeypatch.setattr(load, "load", lambda *_, **__: build(text="middle"))
        monkeypatch.setattr(own_models.OwnPipeline, "__call__", call)
        return cli.main(["describe", "--pipeline", "own", *options])

    own = own_models.OwnPipeline.__call__

    def call(self, prompt="", **options):
        return own(self, **{**prompts(), **options})

    file = tmp_path / "own.py"
    assert run("--write", str(file)) == 0
    said = capsys.readouterr().out
    assert "branches: together in one forward, uncond, cond" in said
    assert "guidance: -3 · uncond + 4 · cond" in said
    assert "layers.0-3.mixer" in said and "8 image, 5 context, 8 image, in 4 of them" in said
    # as if it were in the package
    source = file.read_text(encoding="utf-8").replace("from .traced", "from pag_fast.models.traced")
    spec = importlib.util.spec_from_loader("own_description", loader=None)
    module = importlib.util.module_from_spec(spec)
    exec(source, vars(module))
    written = module.DESCRIPTION
    assert written.layout.blocks == ("layers",) and written.layout.attentions == ("mixer",)
    monkeypatch.setattr(registry, "DESCRIPTIONS", (*registry.DESCRIPTIONS, written))
    pipe = build(text="middle")
    slow = truth(pipe, NAMES, prompts())
    compared = []
    monkeypatch.setattr(Separately, "run", lambda *_: compared.append(1))
    with pag_fast.patched(pipe, LAYERS):
        assert relative(pipe(**prompts()), slow) < 1e-5
    assert description.derive(pipe.transformer).traced.written and not compared
    assert run("--write", str(file)) == 2
    assert "every denoiser of this pipeline is described" in capsys.readouterr().err
    assert run("--write", str(tmp_path / "no" / "own.py")) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert "own_description" not in sys.modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_reason_not_to_share(dtype):
    pipe, call = build(mask="keys"), prompts()
    slow = truth(pipe, NAMES, call)
    pipe.to(dtype)
    call = {name: x.to(dtype) for name, x in call.items()}
    with pag_fast.patched(pipe, LAYERS):
        fast = pipe(**call)
        assert not pipe._pag_fast.fallbacks
        assert pipe._pag_fast.steps == {"shared": 2}
    assert relative(fast.float(), slow) < (3e-2 if dtype == torch.float16 else 2e-1)


def test_steps_without_a_perturbed_branch():
    """A window that opens late: the first step of it is the one that is compared."""
    pipe, call = build(text="middle"), {**prompts(), "num_inference_steps": 4}
    with pag_fast.patched(pipe, LAYERS, schedule=pag_fast.Schedule(start=2)):
        fast = pipe(**call)
        assert pipe._pag_fast.steps == {"perturbed branch dropped": 2, "shared": 2}
        assert not pipe._pag_fast.fallbacks
    stock = pipe(**call)
    assert 1e-4 < relative(fast, stock) < relative(truth(pipe, NAMES, call), stock)


def test_cfg_that_comes_and_goes():
    pipe = build()
    pag_fast.patch(pipe, LAYERS)
    for cfg, batch in ((True, 2), (False, 2), (True, 1), (False, 1)):
        call = prompts(batch, cfg)
        assert relative(pipe(**call), truth_of(pipe, call)) < 1e-5
    assert not pipe._pag_fast.fallbacks


@older.TRACES
def test_a_model_that_the_user_has_compiled():
    torch._dynamo.reset()
    pipe, call = build(attends="Dispatched"), prompts()
    slow = truth(pipe, NAMES, call)
    pipe.transformer.compile(backend="eager", fullgraph=True)
    pag_fast.patch(pipe, LAYERS)
    assert relative(pipe(**call), slow) < 1e-5
    made = counters["stats"]["unique_graphs"]
    assert relative(pipe(**call), slow) < 1e-5
    assert counters["stats"]["unique_graphs"] == made
    torch._dynamo.reset()


def test_a_patched_pipeline_is_copied_and_saved(tmp_path):
    import copy

    pipe, call = build(), prompts()
    pag_fast.patch(pipe, LAYERS)
    fast = pipe(**call)
    again = copy.deepcopy(pipe)
    assert torch.equal(again(**call), fast)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = own_models.OwnDenoiser.from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in pipe.transformer.state_dict().items())


def test_verify_and_explain():
    """What was seen of the loop is explained, and the model's own classes are nobody else's."""
    pipe = build(text="middle")
    result = pag_fast.verify(pipe, layers=["layers.1"], **prompts())
    assert result.ok and result.steps == {"shared": 4}
    assert not hasattr(pipe, "_pag_fast")
    pag_fast.patch(pipe, LAYERS)
    pipe(**prompts())
    found = pag_fast.explain(pipe)
    assert not found.findings and found.fork == "layers.1.mixer"
    assert "uncond | cond = perturbed   until layers.1.mixer" in str(found)
    pipe.order = "apart"
    pipe(**prompts())
    assert "uncond             a call of its own" in str(pag_fast.explain(pipe))
