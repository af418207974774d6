"""``pag_fast.verify``: equal where the patch is right, different where it is not, nothing left."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from importlib.metadata import version

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from tiny import build

import pag_fast
from pag_fast import Branch, PatchConfig, Reuse, Schedule
from pag_fast.analysis.verify import _compare, _tensor
from pag_fast.cli import main

UNET, HOST, FLUX = "StableDiffusionPAGPipeline", "StableDiffusionPipeline", "FluxPipeline"


def _call(name, pipe, **more):
    module = tiny if name in tiny.PIPELINES else tiny_hosts
    call = {**module.call_kwargs(name, pipe), **more}
    return {k: v for k, v in call.items() if k not in ("generator", "num_inference_steps")}


def _sag():
    parts = build(UNET).components
    names = inspect.signature(diffusers.StableDiffusionSAGPipeline.__init__).parameters
    given = {name: part for name, part in parts.items() if name in names}
    given["scheduler"] = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.StableDiffusionSAGPipeline(**given, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "name", [UNET, "StableDiffusion3PAGPipeline", "SanaPAGPipeline", "AnimateDiffPAGPipeline"]
)
@pytest.mark.parametrize("is_patched", [False, True])
def test_pipelines_with_pag_equal_diffusers(name, is_patched):
    pipe = build(name)
    if is_patched:
        pag_fast.patch(pipe, tiny.PIPELINES[name].layers["middle"])
    found = pag_fast.verify(pipe, **_call(name, pipe))
    assert found.ok and 0.0 < found.relative < 1e-5 and found.psnr > 90
    assert found.reference == "diffusers' own pipeline"
    assert found.steps == {"shared": 4} and found.fallbacks == {}
    assert found.explanation.is_patched
    assert found.versions["torch"] == version("torch")
    assert (found.dtype, found.device, found.bound) == ("float32", "cpu", 1e-4)


@pytest.mark.parametrize("name", [HOST, FLUX, "WanPipeline"])
def test_pipelines_without_pag_equal_themselves_unshared(name):
    pipe = tiny_hosts.build(name)
    layers = tiny_hosts.HOSTS[name].layers["middle"]
    found = pag_fast.verify(pipe, layers=layers, **_call(name, pipe))
    assert found.ok and found.relative < 1e-5
    assert "nothing shared, as the pipeline has no PAG itself" in found.reference
    assert found.steps == {"shared": 4}


def test_sag_equals_diffusers():
    pipe = _sag()
    call = _call(UNET, pipe, sag_scale=0.75)
    del call["pag_scale"]
    call.pop("pag_adaptive_scale", None)
    for _ in range(2):
        found = pag_fast.verify(pipe, **call)
        assert found.ok and found.relative < 1e-5
        assert found.reference == "diffusers' own pipeline"
        assert found.steps == {"guided passes": 4, "degraded passes": 4}
        assert "perturbed layers" not in str(found)
        pag_fast.patch(pipe)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"perturbation": "soft"}, "perturbation"),
        ({"branches": [Branch("mid"), Branch("up", "blur", 1.0)]}, "branches"),
        ({"schedule": Schedule(stop=2)}, "schedule"),
        ({"rescale_mode": "full", "rescale": 0.5}, "rescale_mode"),
        ({"reuse": Reuse(every=2)}, "reuse"),
    ],
)
def test_what_diffusers_cannot_do_is_compared_with_itself(options, why):
    pipe = pag_fast.patch(build(UNET), **options)
    found = pag_fast.verify(pipe, **_call(UNET, pipe))
    assert found.ok and found.reference.endswith(f"as the patch has {why}")


def test_layers_and_config_of_one_verification():
    pipe = pag_fast.patch(build(UNET), "mid")
    before = pipe._pag_fast
    found = pag_fast.verify(pipe, layers="up_blocks.1", **_call(UNET, pipe))
    assert found.ok and all(n.startswith("up_blocks.1") for n in found.explanation.layers)
    config = PatchConfig("down", share_branches=False)
    found = pag_fast.verify(pipe, config=config, **_call(UNET, pipe))
    assert found.ok and all(n.startswith("down") for n in found.explanation.layers)
    # layers of the call alone, which stock would not know
    call = _call(UNET, pipe, pag_applied_layers=["up_blocks.1"])
    assert "up_blocks.1" in str(pag_fast.verify(pipe, **call))
    assert pipe._pag_fast is before and pipe.pag_applied_layers == ["mid"]
    with pytest.raises(ValueError, match="config must be a PatchConfig"):
        pag_fast.verify(pipe, config={"layers": "mid"})
    with pytest.raises(ValueError, match="not a pipeline that pag_fast can patch"):
        pag_fast.verify(torch.nn.Linear(2, 2))


# ---- faults are seen ----


def _spoil(monkeypatch, how):
    """Spoil what a patched pipeline computes, and nothing that stock computes."""
    from pag_fast.processors import PerturbedSelfAttention

    real = PerturbedSelfAttention.__call__
    monkeypatch.setattr(PerturbedSelfAttention, "__call__", lambda *a, **k: how(real(*a, **k)))


def test_a_spoiled_processor_differs(monkeypatch):
    pipe = build(UNET)
    _spoil(monkeypatch, lambda out: out * 1.01)
    found = pag_fast.verify(pipe, **_call(UNET, pipe))
    assert not found.ok and found.relative > 1e-4 and found.psnr < 90
    assert "DIFFERS" in str(found) and "> 1e-04" in str(found)
    # the processor is the same where nothing is shared
    assert found.from_unshared < 1e-5 and "sharing is not the reason" in str(found)


def test_a_fault_of_what_is_shared_is_told_apart(monkeypatch):
    """Spoiled only where rows are shared: stock and the unshared patch are right."""
    pipe = build(UNET)
    assert pag_fast.verify(pipe, **_call(UNET, pipe)).from_unshared is None
    _spoil(monkeypatch, lambda out: out * (1.1 if pipe._pag_fast.config.share_branches else 1.0))
    found = pag_fast.verify(pipe, **_call(UNET, pipe))
    assert not found.ok and found.from_unshared > 1e-4
    assert "sharing is the reason" in str(found)


def test_where_diffusers_fails(snapshot):
    """SD3.5 with dual attention is what diffusers' own PAG cannot run."""
    name = "StableDiffusion3PAGPipeline"
    pipe = build(name, sd35=True)
    before = snapshot(pipe)
    found = pag_fast.verify(pipe, **_call(name, pipe))
    assert found.ok and "nothing shared, as diffusers' own fails with" in found.reference
    assert snapshot(pipe) == before


def test_what_stock_leaves_where_it_alone_fails(snapshot):
    """CFG turned off by a callback: diffusers' own PAG cannot tell its rows apart."""

    def without_cfg(pipe, index, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if index == 0 else {}

    pipe = build(UNET)
    before, wanted = snapshot(pipe), tiny.latents(pipe, tiny.call_kwargs(UNET, pipe, pag_scale=0.0))
    call = _call(UNET, pipe, callback_on_step_end=without_cfg)
    found = pag_fast.verify(pipe, **call, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert found.ok and "diffusers' own fails with" in found.reference
    assert snapshot(pipe) == before
    again = tiny.latents(pipe, tiny.call_kwargs(UNET, pipe, pag_scale=0.0))
    assert torch.equal(again, wanted)


def test_what_is_not_finite_differs(monkeypatch):
    pipe = build(UNET)
    _spoil(monkeypatch, lambda out: out * float("nan"))
    found = pag_fast.verify(pipe, **_call(UNET, pipe))
    assert not found.ok and math.isnan(found.relative)
    assert "not finite" in str(found)


def test_a_spoiled_instance_differs():
    """A fault in the shared pass alone, of a pipeline that is compared with itself unshared."""
    name = FLUX
    pipe = pag_fast.patch(tiny_hosts.build(name), tiny_hosts.HOSTS[name].layers["middle"])
    assert pag_fast.verify(pipe, **_call(name, pipe)).ok
    own = pipe._pag_fast.call

    def spoiled(pipe, call, args, kwargs):
        out = own(pipe, call, args, kwargs)
        out.images = out.images * 1.001
        return out

    pipe._pag_fast.call = spoiled
    found = pag_fast.verify(pipe, **_call(name, pipe))
    assert not found.ok and 1e-4 < found.relative < 1e-2
    del pipe._pag_fast.call


def test_command_says_that_they_differ(capsys, monkeypatch):
    _spoil(monkeypatch, lambda out: out * 1.1)
    assert main(["verify", "--steps", "1"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


# ---- nothing is left ----


@pytest.mark.parametrize("name", [UNET, HOST])
@pytest.mark.parametrize("is_patched", [False, True])
def test_everything_is_as_it_was(name, is_patched, snapshot):
    module = tiny if name == UNET else tiny_hosts
    pipe = module.build(name)
    if is_patched:
        pag_fast.patch(pipe, "mid")
    call = module.call_kwargs(name, pipe)
    wanted = module.latents(pipe, {**call, "generator": torch.Generator().manual_seed(3)})
    before, attributes, scheduler = snapshot(pipe), dict(vars(pipe)), dict(vars(pipe.scheduler))
    steps = dict(pipe._pag_fast.steps) if is_patched else None
    generator, state = torch.Generator().manual_seed(3), torch.get_rng_state()
    given = {**call, "generator": generator}
    assert pag_fast.verify(pipe, **given).ok

    def fail(pipe, index, timestep, tensors):
        if index == 1:
            raise RuntimeError("from a callback")
        return tensors

    with pytest.raises(RuntimeError, match="from a callback"):
        pag_fast.verify(pipe, **given, callback_on_step_end=fail)
    with pytest.raises(ValueError, match="nowhere"):
        pag_fast.verify(pipe, layers="nowhere", **given)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(pipe) == attributes and list(vars(pipe)) == list(attributes)
    assert pipe.scheduler is attributes["scheduler"]
    assert vars(pipe.scheduler).keys() == scheduler.keys()
    assert all(vars(pipe.scheduler)[k] is v for k, v in scheduler.items())
    assert snapshot(pipe) == before
    if is_patched:
        assert dict(pipe._pag_fast.steps) == steps and not pipe._pag_fast.fallbacks
    again = module.latents(pipe, {**call, "generator": generator})
    assert torch.equal(again, wanted)


def test_generators_and_tensors_are_copied():
    """Either run starts from the same noise, also from a list of generators or given latents."""
    pipe = build(UNET)
    call = _call(UNET, pipe)
    generators = [torch.Generator().manual_seed(5)]
    torch.randn(3, generator=generators[0])
    assert pag_fast.verify(pipe, **call, generator=generators).ok
    given = torch.randn(1, 4, 16, 16)
    kept = given.clone()
    assert pag_fast.verify(pipe, **{**call, "latents": given}).ok
    assert torch.equal(given, kept)


def test_pictures_are_compared_unrounded():
    pipe = build(UNET)
    call = _call(UNET, pipe)
    for kind in ("pt", "np"):
        found = pag_fast.verify(pipe, **{**call, "output_type": kind}, num_inference_steps=2)
        assert found.ok and found.relative > 0.0 and found.shape[0] == 1
        assert found.steps == {"shared": 2}


def test_measures():
    same = torch.arange(1.0, 5.0)
    assert _compare(same, same) == {"largest": 0.0, "relative": 0.0, "psnr": math.inf}
    found = _compare(same + torch.tensor([0.0, 0, 0, 0.04]), same)
    assert found["largest"] == pytest.approx(0.04, rel=1e-5)
    assert found["relative"] == pytest.approx(0.04 / 30**0.5, rel=1e-5)
    # the peak is 4, the mean squared error 0.0004
    assert found["psnr"] == pytest.approx(10 * math.log10(16 / 0.0004), rel=1e-5)
    assert _compare(same, 0 * same)["relative"] == math.inf
    with pytest.raises(ValueError, match="not outputs of the same call"):
        _compare(same, same[:2])
    from PIL import Image

    pictures = [Image.new("RGB", (2, 2), (255, 0, 51))] * 2
    assert _tensor(pictures).shape == (2, 2, 2, 3)
    assert _tensor(pictures)[1, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert _tensor([pictures]).shape == (1, 2, 2, 2, 3)


def test_half_precision_has_a_bound_of_its_own():
    pipe = build(UNET, dtype=torch.bfloat16)
    found = pag_fast.verify(pipe, **_call(UNET, pipe))
    assert (found.dtype, found.bound) == ("bfloat16", 6e-2)
    assert found.ok and found.relative > 1e-4


def test_the_result_is_data():
    pipe = build(UNET)
    found = pag_fast.verify(pipe, **_call(UNET, pipe))
    data = json.loads(json.dumps(found.as_dict()))
    assert data["ok"] is True and data["explanation"]["pipeline"] == UNET
    assert data["relative"] == found.relative
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.relative = 0.0
    assert repr(found) == str(found)


def test_explain_changes_nothing(snapshot):
    for pipe in (pag_fast.patch(build(UNET)), pag_fast.patch(tiny_hosts.build(HOST), "mid")):
        module, name = (tiny, UNET) if hasattr(pipe, "pag_attn_processors") else (tiny_hosts, HOST)
        module.latents(pipe, module.call_kwargs(name, pipe))
        found = pipe._pag_fast
        before, state = snapshot(pipe), dict(vars(found))
        counts = dict(found.steps), dict(found.fallbacks)
        inside = {k: dict(v) for k, v in state.items() if isinstance(v, dict)}
        assert pag_fast.explain(pipe, height=32, width=32).findings == ()
        assert vars(found) == state and (dict(found.steps), dict(found.fallbacks)) == counts
        assert inside == {k: dict(v) for k, v in vars(found).items() if isinstance(v, dict)}
        assert snapshot(pipe) == before


def test_findings_are_printed():
    found = dataclasses.replace(
        pag_fast.explain(build(UNET), flops=False), findings=("a hook on unet: run unshared",)
    )
    assert "others on the model\n  a hook on unet: run unshared" in str(found)
    assert found.as_dict()["findings"] == ["a hook on unet: run unshared"]
