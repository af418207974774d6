"""What a callback changes between two steps counts from the next one on, wherever it is kept."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from observed_steps import SCALE, SD, WAN, layers_of, run_call, slow_steps
from tiny_hosts.reference import slow_pag
from torch import nn

import pag_fast
from pag_fast import Reuse
from pag_fast.models.layer_names import resolve
from pag_fast.runtime.compatibility import row_wise
from pag_fast.sharing.row_equality import RowEquality

XL, SD3 = "StableDiffusionXLPAGPipeline", "StableDiffusion3PAGPipeline"
SANA, PIXART = "SanaPAGPipeline", "PixArtSigmaPAGPipeline"


def _model(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def _both(name, change, prepare=lambda pipe: None):
    """Latents of stock and patched calls in which ``change`` comes behind the second step."""
    found = []
    for patched in (False, True):
        pipe = tiny.build(name)
        prepare(pipe)
        if patched:
            pag_fast.patch(pipe, strict=True)

        def callback(pipe, step, timestep, tensors):
            if step == 1:
                change(pipe)
            return {}

        kwargs = tiny.call_kwargs(name, pipe, steps=4, callback_on_step_end=callback)
        found.append(tiny.latents(pipe, kwargs))
    return found


# ---- layers ----


def _other(path):
    def change(pipe):
        parent, _, name = path.rpartition(".")
        owner = _model(pipe).get_submodule(parent)
        old = getattr(owner, name)
        torch.manual_seed(5)
        new = nn.Linear(old.in_features, old.out_features)
        new.weight.data.mul_(30)
        setattr(owner, name, new)

    return change


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (SD3, "time_text_embed.text_embedder.linear_1"),
        (XL, "add_embedding.linear_2"),
        (SANA, "caption_projection.linear_1"),
        # kept by itself
        (XL, "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"),
    ],
)
def test_a_layer_in_anothers_place(name, path):
    stock, patched = _both(name, _other(path))
    assert relative(patched, stock) < 1e-5
    assert relative(_both(name, lambda pipe: None)[0], stock) > 1e-4


@pytest.mark.parametrize("name", [SD3, XL])
def test_an_adapter_that_is_unloaded(name):
    """peft puts the layers that it had wrapped back in their places."""
    peft = pytest.importorskip("peft")

    def prepare(pipe):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["linear_1"], init_lora_weights=False)
        _model(pipe).add_adapter(config, "one")
        _model(pipe).eval().requires_grad_(False)

    stock, patched = _both(name, lambda pipe: _model(pipe).unload_lora(), prepare)
    assert relative(patched, stock) < 1e-5
    assert relative(_both(name, lambda pipe: None, prepare)[0], stock) > 1e-4


# ---- tensors that do not tell ----


def _write(key, rows=slice(None)):
    def callback(pipe, step, timestep, tensors):
        if step == 1:
            tensors[key][rows].mul_(-5)
        return {}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [key]}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("name", "key"), [(XL, "add_text_embeds"), (XL, "prompt_embeds"), (SD3, "prompt_embeds")]
)
def test_conditioning_written_in_place(name, key, mode):
    """Inference tensors have no version that a write would change."""
    pipe = tiny.build(name)

    def run(**extra):
        with mode():
            return tiny.latents(pipe, {**tiny.call_kwargs(name, pipe, steps=4), **extra})

    plain, stock = run(), run(**_write(key))
    with pag_fast.patched(pipe, strict=True):
        assert relative(run(), plain) < 1e-5
        assert relative(run(**_write(key)), stock) < 1e-5
    assert relative(stock, plain) > 1e-5


def test_cond_and_perturbed_made_to_differ():
    with torch.inference_mode():
        pipe = tiny.build(XL)
        kwargs = {**tiny.call_kwargs(XL, pipe, steps=4), **_write("prompt_embeds", slice(-1, None))}
        stock = tiny.latents(pipe, kwargs)
        pag_fast.patch(pipe)
        kwargs = {**tiny.call_kwargs(XL, pipe, steps=4), **_write("prompt_embeds", slice(-1, None))}
        with pytest.warns(UserWarning, match="rows differ in encoder_hidden_states"):
            assert relative(tiny.latents(pipe, kwargs), stock) < 1e-5


@pytest.mark.parametrize(
    "name", ["WanPipeline", "FluxPipeline", "StableDiffusionControlNetPipeline"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_conditioning_of_pipelines_without_pag(name, mode):
    spec = tiny_hosts.HOSTS[name]

    def run(pipe):
        with mode():
            kwargs = tiny_hosts.call_kwargs(name, pipe, steps=4)
            return tiny_hosts.latents(pipe, {**kwargs, **_write("prompt_embeds")})

    pipe = tiny_hosts.build(name)
    attentions = list(resolve(_model(pipe), spec.layers["middle"]).values())
    scale = spec.cfg_scale(tiny_hosts.call_kwargs(name, pipe))
    with slow_pag(pipe, name, attentions, 3.0, scale):
        truth = run(pipe)
    pag_fast.patch(pipe, spec.layers["middle"], pag_scale=3.0, strict=True)
    assert relative(run(pipe), truth) < 1e-5


def test_without_a_callback_nothing_is_compared(monkeypatch):
    """A comparison waits for the device."""
    asked = []
    own = RowEquality._are_written
    monkeypatch.setattr(
        RowEquality, "_are_written", lambda *args: asked.append(own(*args)) or asked[-1]
    )
    with torch.inference_mode():
        pipe = pag_fast.patch(tiny.build(SD3))
        tiny.latents(pipe, tiny.call_kwargs(SD3, pipe, steps=3))
    assert asked == [False] * 3


@row_wise
def _in_place(module, args, out):
    out.mul_(1.5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("name", "written"), [(XL, "attn2.to_k"), (XL, "add_embedding"), (PIXART, "caption_projection")]
)
def test_a_hook_writes_into_what_is_kept(name, written, mode):
    """What is handed out again in the next step has to be what the module computes."""
    pipe = tiny.build(name)

    def run():
        with mode():
            return tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=3))

    plain = run()
    for module, layer in _model(pipe).named_modules():
        if module.endswith(written):
            layer.register_forward_hook(_in_place)
    stock = run()
    with pag_fast.patched(pipe, strict=True):
        assert relative(run(), stock) < 1e-5
    assert relative(plain, stock) > 1e-4


# ---- steps with and without the perturbed rows ----


def _doubled(pipe, step, timestep, tensors):
    return {"prompt_embeds": 2.0 * tensors["prompt_embeds"]} if step == 1 else {}


@pytest.mark.parametrize("reuse", [Reuse(every=3), Reuse(drift=0.5)], ids=["every", "drift"])
@pytest.mark.parametrize("change", [_doubled, _write("prompt_embeds")], ids=["new", "in place"])
@pytest.mark.parametrize("name", ["StableDiffusionPAGPipeline", SD3, "FluxPipeline", "WanPipeline"])
def test_what_is_kept_for_each_kind_of_step(name, change, reuse):
    """A change behind a step of the one kind counts for the next one of the other, too."""
    module = tiny if name in tiny.PIPELINES else tiny_hosts
    more = change if isinstance(change, dict) else {
        "callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]
    }  # fmt: skip
    layers = None if module is tiny else tiny_hosts.HOSTS[name].layers["middle"]
    scale = {} if module is tiny else {"pag_scale": 3.0}
    found = []
    for keeps in (True, False):
        options = {"reuse": reuse, "cache_conditioning": keeps, "strict": True, **scale}
        pipe = pag_fast.patch(module.build(name), layers, **options)
        kwargs = module.call_kwargs(name, pipe, steps=6)
        found.append(module.latents(pipe, {**kwargs, **more}))
    assert relative(*found) < 1e-5


# ---- writes that leave no trace ----


def _traceless(write):
    def callback(pipe, step, timestep, tensors):
        if step == 1:
            write(tensors["prompt_embeds"])
        return {}

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "steps": 4,
    }


def _by_numpy(x):
    x.numpy()[:] *= 1.5


@pytest.mark.parametrize("write", [lambda x: x.data.mul_(1.5), _by_numpy], ids=["data", "numpy"])
@pytest.mark.parametrize("name", [SD, WAN])
def test_what_leaves_no_trace(name, write):
    """Conditioning has copies for the perturbed rows; kept outputs are told of, or not kept."""
    pipe = tiny_hosts.build(name)
    with slow_steps(pipe, name):
        slow = run_call(pipe, name, **_traceless(write))
        assert relative(run_call(pipe, name, **_traceless(lambda x: x)), slow) > 1e-3
    with pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE, cache_conditioning=False):
        assert relative(run_call(pipe, name, **_traceless(write)), slow) < 1e-5
    with (
        pag_fast.patched(pipe, layers_of(name), pag_scale=SCALE),
        pytest.warns(UserWarning, match="leaves no trace"),
    ):
        run_call(pipe, name, **_traceless(write))
