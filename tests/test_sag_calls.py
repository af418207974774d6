"""A call of a patched SAG pipeline survives errors and callbacks, and checks itself."""

from __future__ import annotations

import copy
import warnings

import diffusers
import pytest
import torch
from numerics import relative
from tiny_sag import ATTENTION, Injected, build_sag, sag_latents, sag_snapshot

import pag_fast

# ---- defects of the host ----


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["guided", "degraded", "callback", "decode"])
def test_exceptions_leave_the_pipeline_as_it_was(where, error):
    pipe = build_sag()
    stock = sag_latents(pipe)
    processor = pipe.unet.get_submodule(ATTENTION).processor
    pag_fast.patch(pipe)
    before = sag_snapshot(pipe)
    passes = []

    def fail(*_, **__):
        passes.append(0)
        if where in ("callback", "decode") or len(passes) == {"guided": 3, "degraded": 4}[where]:
            raise error

    kwargs = {"callback": fail} if where == "callback" else {}
    if where == "decode":
        kwargs["output_type"] = "pt"
        pipe.vae.decode = fail
    in_unet = where in ("guided", "degraded")
    handle = pipe.unet.up_blocks[0].register_forward_pre_hook(fail) if in_unet else None
    inside = sag_snapshot(pipe)
    with pytest.raises(error):
        sag_latents(pipe, **kwargs)
    assert sag_snapshot(pipe) == inside
    if handle is not None:
        handle.remove()
    assert sag_snapshot(pipe) == before
    assert pipe.unet.get_submodule(ATTENTION).processor is processor
    assert relative(sag_latents(pipe), stock) < 1e-5
    pag_fast.unpatch(pipe)
    assert torch.equal(sag_latents(pipe), stock)


def test_stock_leaks_its_processor():
    """What the test above guards against."""
    pipe = build_sag()
    pipe.unet.up_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sag_latents(pipe)
    assert type(pipe.unet.get_submodule(ATTENTION).processor).__name__ == "CrossAttnStoreProcessor"


def test_heads_are_counted_not_read_from_the_configuration():
    """Stock reshapes the map by ``attention_head_dim``, which UNets may have as a tuple."""
    pipe = build_sag(attention_head_dim=(2, 4))
    with pytest.raises(TypeError):
        sag_latents(pipe)
    pipe = build_sag(attention_head_dim=(2, 4))
    pipe.unet.register_to_config(attention_head_dim=4)
    stock = sag_latents(pipe)
    pipe.unet.register_to_config(attention_head_dim=(2, 4))
    assert relative(sag_latents(pag_fast.patch(pipe)), stock) < 1e-5


def _with_ip_adapter(pipe, dim=12, tokens=4):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    torch.manual_seed(7)
    unet, state, key = pipe.unet, {}, 1
    for name, processor in unet.attn_processors.items():
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            made = IPAdapterAttnProcessor2_0(hidden, dim, (tokens,), [1.0])
            state |= {f"{key}.to_{n}_ip.weight": torch.randn(hidden, dim) for n in "kv"}
            key += 2
            del made, processor
    projection = {
        "proj.weight": torch.randn(tokens * dim, 6),
        "proj.bias": torch.randn(tokens * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": state}])
    return pipe


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_ip_adapter(cfg, batch):
    """With CFG stock gives the rows of cond to uncond and cond: mended, that is what we do."""
    pipe = _with_ip_adapter(build_sag())
    torch.manual_seed(5)
    embeds = torch.randn(2 * batch if cfg else batch, 1, 6)
    kwargs = {"ip_adapter_image_embeds": [embeds]}

    def mend(_, args, call):
        if args[0].shape[0] == 2 * batch:
            call["added_cond_kwargs"] = {"image_embeds": [embeds]}
        return args, call

    handle = pipe.unet.register_forward_pre_hook(mend, with_kwargs=True) if cfg else None
    expected = sag_latents(pipe, batch, cfg, **kwargs)
    if handle is not None:
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = sag_latents(pipe, batch, cfg, **kwargs)
        assert relative(stock, expected) > 1e-3
    pag_fast.patch(pipe)
    before = sag_snapshot(pipe)
    assert relative(sag_latents(pipe, batch, cfg, **kwargs), expected) < 1e-5
    kwargs["ip_adapter_image_embeds"] = [torch.randn_like(embeds)]
    assert relative(sag_latents(pipe, batch, cfg, **kwargs), expected) > 1e-3
    assert sag_snapshot(pipe) == before


# ---- callbacks ----


def test_a_callback_that_changes_weights_and_latents():
    pipe = build_sag()
    key = pipe.unet.get_submodule(ATTENTION.replace("attn1", "attn2")).to_v.weight
    original = key.detach().clone()

    def run(factor=20.0):
        def callback(step, t, latents):
            if step == 0:
                key.mul_(factor)
                latents.mul_(0.9)

        try:
            return sag_latents(pipe, num_inference_steps=3, callback=callback)
        finally:
            with torch.no_grad():
                key.copy_(original)

    stock = run()
    assert relative(run(factor=1.0), stock) > 1e-3
    pag_fast.patch(pipe)
    assert relative(run(), stock) < 1e-5


def test_a_callback_may_not_call_the_pipeline():
    pipe = pag_fast.patch(build_sag())
    with pytest.raises(ValueError, match="already running"):
        sag_latents(pipe, callback=lambda *_: sag_latents(pipe))
    sag_latents(pipe)


# ---- a call checks itself ----


def _other_unet(pipe):
    pipe.unet = copy.deepcopy(pipe.unet)


def _compiled_in_place(pipe):
    pipe.unet.compile(backend="eager")


def _wrapped(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def _in_callback(change, at=0):
    def callback(step, timestep, x):
        if step == at:
            change()

    return {"callback": callback, "num_inference_steps": 3}


# no attention but that in the middle: it is traced
_BARE = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}


# an eager wrapper would call the model that it has wrapped
@pytest.mark.parametrize(
    ("change", "stance"),
    [(_other_unet, "default"), (_compiled_in_place, "force_eager"), (_wrapped, "default")],
)
def test_a_unet_that_a_callback_takes_away_is_told(change, stance):
    torch._dynamo.reset()
    with torch.compiler.set_stance(stance):
        _take_away(change)


def _take_away(change):
    expected = sag_latents(build_sag(**_BARE), num_inference_steps=3)
    pipe = pag_fast.patch(build_sag(**_BARE))
    with pytest.warns(UserWarning, match="compiled or replaced during the call"):
        found = sag_latents(pipe, **_in_callback(lambda: change(pipe)))
    if change is not _other_unet:  # whose map stock does not see, either
        assert relative(found, expected) < 1e-5
    pipe = pag_fast.patch(build_sag(**_BARE), strict=True)
    with pytest.raises(ValueError, match=r"compiled or replaced during the call.*strict=True"):
        sag_latents(pipe, **_in_callback(lambda: change(pipe)))


def test_passes_that_do_not_come_are_told():
    pipe = pag_fast.patch(build_sag(), strict=True)
    unet = pipe.unet

    def other_for_one_step(step, timestep, x):
        pipe.unet = copy.deepcopy(unet) if step == 0 else unet

    with pytest.raises(ValueError, match=r"2 of 3 guided passes"):
        sag_latents(pipe, callback=other_for_one_step, num_inference_steps=3)
    sag_latents(pipe)


def test_a_call_that_ends_as_it_should_tells_nothing():
    pipe = pag_fast.patch(build_sag(diffusers.PNDMScheduler(skip_prk_steps=True)), strict=True)
    for scale in (0.75, 0.0):
        sag_latents(pipe, sag_scale=scale, num_inference_steps=3)
    assert not pipe._pag_fast.fallbacks
