"""PAG added to pipelines that have none: other guidance, layers and perturbations, and refusals."""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import pytest
import tiny
import torch
from built_hosts import FLUX, SD, SD3, built_host, denoiser_of, slow
from numerics import observing, relative
from sweep.spec import photo
from tiny_hosts import HOSTS, build, call_kwargs, latents

import pag_fast
from pag_fast.models.layer_names import resolve
from pag_fast.ops import reference


def test_cogvideox_decides_on_its_scale_behind_the_model():
    """So the difference goes into uncond and cond: for a constant scale that is the same."""
    name = "CogVideoXPipeline"
    pipe, layers = built_host(name), HOSTS[name].layers["middle"]
    with pag_fast.patched(pipe, layers):
        constant = latents(pipe, call_kwargs(name, pipe))
        dynamic = latents(pipe, call_kwargs(name, pipe, use_dynamic_cfg=True))
        host = pipe._pag_fast.host
        pipe._pag_fast.host = dataclasses.replace(host, scale=lambda *_: None)
        assert relative(latents(pipe, call_kwargs(name, pipe)), constant) < 1e-5
    assert relative(dynamic, constant) > 1e-3


def test_skip_layer_guidance_of_sd3_goes_on_beside_pag():
    pipe, layers = built_host(SD3), HOSTS[SD3].layers["middle"]
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    skip["skip_layer_guidance_start"] = 0.0
    skip["skip_layer_guidance_scale"] = 20.0
    with pag_fast.patched(pipe, layers):
        plain = latents(pipe, call_kwargs(SD3, pipe))
        both = latents(pipe, call_kwargs(SD3, pipe, **skip))
        assert dict(pipe._pag_fast.steps) == {"shared": 4, "stock guidance resumed": 1}
    assert relative(both, plain) > 1e-4


@pytest.mark.parametrize("window", [None, pag_fast.Schedule(stop=1)], ids=["", "without PAG"])
@pytest.mark.parametrize("mode", [None, "cfg", "full", "partial", "snf"])
def test_skip_layer_guidance_of_sd3_beside_every_way_to_rescale(mode, window):
    """Its own term, ``k·(cond − skipped)``, is added to what PAG's guidance makes of the others."""
    pipe, layers = built_host(SD3), HOSTS[SD3].layers["middle"]
    rescale = {"rescale_mode": mode} if mode else {}
    if mode not in (None, "snf"):
        rescale["rescale"] = 0.7
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    skip |= {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_scale": 20.0}
    predicted, combined, step = [], [], pipe.scheduler.step

    def recorded(prediction, *args, **kwargs):
        combined.append(prediction)
        return step(prediction, *args, **kwargs)

    with pag_fast.patched(pipe, layers, schedule=window, **rescale):
        handle = denoiser_of(pipe).register_forward_hook(
            observing(lambda *a: predicted.append(a[2][0]))
        )
        pipe.scheduler.step = recorded
        try:
            latents(pipe, call_kwargs(SD3, pipe, steps=2, **skip))
        finally:
            handle.remove()
            del pipe.scheduler.step
    # diffusers skips no layers in the first step
    _, rows, skipped = predicted
    uncond, cond, *perturbed = rows.chunk(2 if window else 3)
    truth = reference.combine_guidance(uncond, cond, *(perturbed or [None]), 5.0, 3.0, **rescale)
    assert relative(combined[1], truth) > 1e-3
    assert relative(combined[1], truth + 20.0 * (cond - skipped)) < 1e-5


def test_an_adapter_in_a_perturbed_layer_is_refused(snapshot):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    pipe = build(FLUX)
    block = pipe.transformer.transformer_blocks[1].attn
    block.set_processor(FluxIPAdapterAttnProcessor(16, 16))
    pag_fast.patch(pipe, "^transformer_blocks.1")
    before = snapshot(pipe)
    with pytest.raises(ValueError, match="runs FluxIPAdapterAttnProcessor, whose arithmetic"):
        latents(pipe, call_kwargs(FLUX, pipe))
    assert snapshot(pipe) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pag_scale": -1.0}, "pag_scale must be a number of at least 0, and finite; got -1.0"),
        ({"pag_adaptive_scale": True}, "pag_adaptive_scale must be a number"),
        ({"layers": "blocks.77"}, "matches none of the 6 self-attention layers of FluxT"),
    ],
)
def test_bad_options(options, message, snapshot):
    pipe = built_host(FLUX)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe, **options)
    assert snapshot(pipe) == before


def test_a_pag_pipeline_takes_its_scale_in_the_call():
    pipe = tiny.build("StableDiffusionPAGPipeline")
    with pytest.raises(ValueError, match="takes it in every call"):
        pag_fast.patch(pipe, pag_scale=2.0)


def _of_a_step(name, pipe):
    """What the model predicts in the one step of a call, and what reaches the scheduler."""
    predicted, combined, step = [], [], pipe.scheduler.step

    def recorded(prediction, *args, **kwargs):
        combined.append(prediction)
        return step(prediction, *args, **kwargs)

    # in front of the session's own hook, which combines
    handle = denoiser_of(pipe).register_forward_hook(
        observing(lambda *a: predicted.append(a[2][0]))
    )
    pipe.scheduler.step = recorded
    try:
        latents(pipe, call_kwargs(name, pipe, steps=1))
    finally:
        handle.remove()
        del pipe.scheduler.step
    return predicted, combined[0]


@pytest.mark.parametrize(("name", "mode"), [(SD, "full"), (SD, "snf"), (FLUX, "partial")])
def test_rescale_modes(name, mode):
    """What reaches the scheduler, against the op on what the model has predicted."""
    pipe, layers = built_host(name), HOSTS[name].layers["middle"]
    rescale = {} if mode == "snf" else {"rescale": 0.7}
    with pag_fast.patched(pipe, layers, rescale_mode=mode, **rescale):
        predicted, combined = _of_a_step(name, pipe)
    if name == SD:
        uncond, cond, perturbed = predicted[0].chunk(3)
    else:
        (cond, perturbed), uncond = predicted[0].chunk(2), predicted[1]
    plain, truth = (
        reference.combine_guidance(uncond, cond, perturbed, 5.0, 3.0, **options)
        for options in ({}, {"rescale_mode": mode, **rescale})
    )
    assert relative(truth, plain) > 1e-4
    assert relative(combined, truth) < 1e-5


@pytest.mark.skipif("ZImagePipeline" not in HOSTS, reason="this diffusers has no Z-Image")
def test_cfg_is_rescaled_in_a_step_without_pag():
    """Of a list of rows, which the loop gets with cond in front."""
    name, never = "ZImagePipeline", pag_fast.Schedule(per_step=lambda step: 0.0)
    pipe, layers = built_host(name), HOSTS[name].layers["middle"]
    with pag_fast.patched(pipe, layers, rescale_mode="cfg", rescale=0.7, schedule=never):
        predicted, combined = _of_a_step(name, pipe)
    uncond, cond = torch.stack(predicted[0]).chunk(2)
    g = 1.0 + HOSTS[name].cfg_scale(call_kwargs(name, pipe))  # cond + g·(cond − uncond)
    plain, truth = (
        reference.combine_guidance(uncond, cond, None, g, 0.0, **options)
        for options in ({}, {"rescale_mode": "cfg", "rescale": 0.7})
    )
    assert relative(truth, plain) > 1e-4
    assert relative(-combined.reshape(truth.shape), truth) < 1e-5


def test_guidance_is_rescaled_once():
    pipe, name = built_host(SD), SD
    twice = pytest.raises(ValueError, match=r"guidance_rescale=0\.5 and the patch rescale_mode")
    with pag_fast.patched(pipe, rescale_mode="full", rescale=0.7), twice:
        latents(pipe, call_kwargs(name, pipe, guidance_rescale=0.5))
    name = "CogVideoXPipeline"
    pipe = built_host(name)
    with pag_fast.patched(pipe, HOSTS[name].layers["middle"], rescale_mode="partial", rescale=0.7):
        latents(pipe, call_kwargs(name, pipe))
        with pytest.raises(ValueError, match="scale of CFG has to be known"):
            latents(pipe, call_kwargs(name, pipe, use_dynamic_cfg=True))


def test_layers_can_be_changed_between_calls():
    pipe = built_host(SD)
    with pag_fast.patched(pipe, "mid"):
        mid = latents(pipe, call_kwargs(SD, pipe))
        pipe.set_pag_applied_layers("up_blocks.2")
        up = latents(pipe, call_kwargs(SD, pipe))
        with pytest.raises(ValueError, match="matches none"):
            pipe.set_pag_applied_layers("sideways")
    with pag_fast.patched(pipe, "up_blocks.2"):
        assert torch.equal(latents(pipe, call_kwargs(SD, pipe)), up)
    assert relative(up, mid) > 1e-4


@pytest.mark.skipif("Flux2KleinKVPipeline" not in HOSTS, reason="this diffusers has no FLUX.2")
def test_keys_that_are_kept_from_step_to_step_are_refused(snapshot):
    """FLUX.2 Klein keeps those of its reference pictures, without the perturbed rows."""
    name = "Flux2KleinKVPipeline"
    pipe = build(name)
    pag_fast.patch(pipe, HOSTS[name].layers["middle"])
    before = snapshot(pipe)
    picture = photo()
    with pytest.raises(ValueError, match="keeps keys and values of its reference pictures"):
        latents(pipe, call_kwargs(name, pipe, image=picture))
    assert snapshot(pipe) == before


_OF_BLOCKS = [("Flux2Pipeline", "shuffle"), ("ZImagePipeline", "shuffle")]
_OF_BLOCKS += [("ZImagePipeline", "skip"), ("WanVACEPipeline", "skip")]


@pytest.mark.parametrize(("name", "how"), [case for case in _OF_BLOCKS if case[0] in HOSTS])
def test_blocks_with_one_stream_or_code_between_them(name, how):
    """As with branches apart, and beside a prompt of another length as alone."""
    pipe, layers = built_host(name), HOSTS[name].layers["middle"]
    pictures = []
    for share, batch in ((True, 1), (False, 1), (True, HOSTS[name].batches[-1])):
        with pag_fast.patched(pipe, layers, perturbation=how, share_branches=share):
            kwargs = call_kwargs(name, pipe, batch=batch)
            if batch > 1:
                kwargs["generator"] = [torch.Generator().manual_seed(0) for _ in range(batch)]
            else:
                whole = call_kwargs(name, pipe, batch=HOSTS[name].batches[-1])
                kwargs |= {k: x[:1] for k, x in whole.items() if k.endswith("prompt_embeds")}
            pictures.append(latents(pipe, kwargs)[:1])
    assert relative(pictures[0], pictures[1]) < 1e-5
    assert relative(pictures[2], pictures[0]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"share_branches": False}], ids=["shared", "apart"])
@pytest.mark.parametrize("name", [n for n in HOSTS if "ControlNetPipeline" in n])
def test_residuals_when_apart(name, options):
    """Whatever makes branches run apart, a ControlNet's residuals get their rows."""
    pipe, layers = build(name), HOSTS[name].layers["middle"]
    truth = slow(pipe, name, layers, call_kwargs(name, pipe))
    first = next(x for x in denoiser_of(pipe).modules() if isinstance(x, torch.nn.Linear))
    first.register_forward_hook(lambda *_: None)
    pag_fast.patch(pipe, layers, **options)
    assert relative(latents(pipe, call_kwargs(name, pipe)), truth) < 1e-5
    assert set(pipe._pag_fast.steps) == {"not shared"}


class Bare(diffusers.StableDiffusionPipeline):
    """Returns no tuple without ``return_dict``, as StableVideoDiffusionPipeline does."""

    def __call__(self, *args, return_dict=True, **kwargs):
        found = super().__call__(*args, **kwargs)
        return found if return_dict else found.images


def test_a_pipeline_that_returns_no_tuple():
    pipe = build(SD)
    pipe.__class__ = Bare
    kwargs = {"return_dict": False, "output_type": "latent"}
    pag_fast.patch(pipe, HOSTS[SD].layers["middle"])
    expected = pipe(**{**call_kwargs(SD, pipe), "output_type": "latent"}).images
    found = pipe(**{**call_kwargs(SD, pipe), **kwargs})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("called", ["Louder", None])
@pytest.mark.parametrize("name", [SD, SD3, FLUX, "PixArtSigmaPipeline", "HunyuanDiTPipeline"])
def test_a_processor_of_ones_own_in_a_perturbed_layer_is_refused(name, called, marked):
    """Ours would take its place for uncond and cond, too; one of an equal name is none of ours."""
    pipe, layers = build(name), HOSTS[name].layers["middle"]
    attentions = resolve(denoiser_of(pipe), layers)
    kind = type(next(iter(attentions.values())).processor)

    def louder(self, *args, **kwargs):
        out = kind.__call__(self, *args, **kwargs)
        return tuple(x * 1.1 for x in out) if isinstance(out, tuple) else out * 1.1

    louder.__signature__ = inspect.signature(kind.__call__)
    own = type(called or kind.__name__, (kind,), {"__call__": louder, "__module__": __name__})
    if marked:
        pag_fast.runtime.compatibility.row_wise(own)
    pag_fast.patch(pipe, layers)
    before = latents(pipe, call_kwargs(name, pipe))
    stock = {attention: attention.processor for attention in attentions.values()}
    for attention in attentions.values():
        attention.processor = own()
    with pytest.raises(ValueError, match="whose arithmetic pag_fast does not know"):
        latents(pipe, call_kwargs(name, pipe))
    for attention, processor in stock.items():
        attention.processor = processor
    assert relative(latents(pipe, call_kwargs(name, pipe)), before) < 1e-6
