"""``StableDiffusionSAGPipeline`` patched: stock's picture without the map, in fewer launches."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
from copies import made_once
from numerics import observing, relative
from shallow import TWO_BLOCKS
from test_received_attention import Shapes

import pag_fast
from pag_fast.analysis.kernel_counts import Launches, counted

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1"
DDIM = diffusers.DDIMScheduler


class Injected(Exception):
    pass


@made_once
def _build(scheduler=None, *, whole=False, **overrides):
    """With two blocks, or all three of ``tiny.py``."""
    torch.manual_seed(0)
    overrides = overrides if whole else {**TWO_BLOCKS, **overrides}
    parts = {"vae": tiny.vae(), "unet": tiny.unet(**overrides)}
    for module in parts.values():
        tiny.randomise(module)
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = diffusers.StableDiffusionSAGPipeline(
        **parts,
        **dict.fromkeys(names),
        scheduler=scheduler or DDIM(clip_sample=False),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _kwargs(batch=1, cfg=True, **extra):
    source = torch.Generator().manual_seed(0)
    prompt, negative = torch.randn(2, batch, 5, 12, generator=source)
    return {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "guidance_scale": 5.0 if cfg else 1.0,
        "sag_scale": 0.75,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(1),
        **extra,
    }


def _latents(pipe, *args, **kwargs):
    return pipe(**_kwargs(*args, **kwargs)).images


def _snapshot(pipe):
    """Everything about a pipeline that a patch could leave behind."""
    seen = {"class": type(pipe), "attributes": {k for k in vars(pipe) if "pag_fast" in k}}
    for name, module in pipe.unet.named_modules():
        seen[name] = (
            set(vars(module)),
            vars(module).get("forward"),
            getattr(module, "processor", None),
            tuple(module._forward_pre_hooks.values()),
            tuple(module._forward_hooks.values()),
        )
    return seen


# ---- parity ----


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_parity(kind, cfg, batch):
    pipe = _build(DDIM(clip_sample=False, prediction_type=kind))
    stock = _latents(pipe, batch, cfg)
    plain = _latents(pipe, batch, cfg, sag_scale=0.0)
    assert relative(plain, stock) > 1e-2
    pag_fast.patch(pipe)
    first = _latents(pipe, batch, cfg)
    assert relative(first, stock) < 1e-5
    assert torch.equal(_latents(pipe, batch, cfg), first)
    assert relative(_latents(pipe, batch, cfg, sag_scale=0.0), plain) < 1e-5
    assert dict(pipe._pag_fast.steps) == {"guided passes": 6, "degraded passes": 4}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.PNDMScheduler(skip_prk_steps=True),
        diffusers.UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers(scheduler):
    pipe = _build(scheduler)
    stock = _latents(pipe)
    assert relative(_latents(pag_fast.patch(pipe)), stock) < 1e-5


@pytest.mark.parametrize("size", [(40, 72), (64, 32)])
def test_sizes(size):
    """Maps that latents are no multiple of."""
    pipe = _build(whole=True)
    kwargs = {"height": size[0], "width": size[1]}
    stock = _latents(pipe, **kwargs)
    assert relative(_latents(pag_fast.patch(pipe), **kwargs), stock) < 1e-5


@pytest.mark.parametrize("options", [{"cache_conditioning": False}, {"fewer_launches": False}])
def test_options(options):
    pipe = _build()
    stock = _latents(pipe)
    assert relative(_latents(pag_fast.patch(pipe, **options)), stock) < 1e-5


def test_triton_backend(monkeypatch):
    pytest.importorskip("triton")
    pipe = _build()
    kwargs = {"num_inference_steps": 1}
    stock = _latents(pipe, **kwargs)
    assert relative(_latents(pag_fast.patch(pipe, backend="triton"), **kwargs), stock) < 1e-5


def _add_lora(pipe):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    pipe.unet.add_adapter(config)


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_lora_scale_reaches_the_guided_pass_alone(cfg):
    """As in stock: then the two passes cannot have text keys in common."""
    pipe = _build()
    _add_lora(pipe)
    kwargs = {"cfg": cfg, "cross_attention_kwargs": {"scale": 0.3}}
    stock = _latents(pipe, **kwargs)
    assert relative(_latents(pipe, cfg=cfg), stock) > 1e-3
    pag_fast.patch(pipe)
    assert relative(_latents(pipe, **kwargs), stock) < 1e-5


# ---- what is no longer done ----


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_no_attention_map(backend):
    def maps(pipe):
        with Shapes() as shapes:
            _latents(pipe, num_inference_steps=1, height=64, width=80)
        # 8 × 10 of 32 × 40 latents
        return shapes.has_map(80)

    pipe = _build(whole=True)
    assert maps(pipe)
    assert not maps(pag_fast.patch(pipe, backend=backend))


def _launches_of(pipe, steps, **kwargs):
    with counted() as found:
        _latents(pipe, num_inference_steps=steps, **kwargs)
    return found.total


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
def test_fewer_launches_a_step(cfg):
    pipe = _build()

    def step(**kwargs):
        # a step in the middle of a call
        more, fewer = (_launches_of(pipe, steps, cfg=cfg, **kwargs) for steps in (3, 2))
        return more - fewer

    stock, without = step(), step(sag_scale=0.0)
    pag_fast.patch(pipe)
    _latents(pipe, cfg=cfg)  # weights are packed in the first forward
    patched, patched_without = step(), step(sag_scale=0.0)
    print(f"a step: {stock} stock, {patched} patched; without: {without}, {patched_without}")
    assert patched < 0.8 * stock
    assert patched_without < 0.85 * without


def test_launches_of_the_degradation():
    """Between the two passes of a step."""
    pipe = _build()

    def between():
        counter, passes = Launches(), []

        def before(*_):
            passes.append(0)
            if len(passes) == 4:  # the degraded pass of the second step
                counter.__exit__(None, None, None)

        def after(*_):
            if len(passes) == 3:
                counter.__enter__()

        unet = pipe.unet
        handles = [
            unet.register_forward_pre_hook(observing(before)),
            unet.register_forward_hook(observing(after)),
        ]
        _latents(pipe)
        for handle in handles:
            handle.remove()
        return counter.total

    stock = between()
    pag_fast.patch(pipe)
    patched = between()
    print(f"stock {stock}, patched {patched}")
    # the combination of CFG (3), reading the timestep, which on the CPU is an op, and our ops (13)
    assert stock > 35 and patched == 17


def test_text_keys_once_a_call_for_both_passes():
    pipe, calls = _build(), []
    key = pipe.unet.get_submodule(ATTENTION.replace("attn1", "attn2")).to_k
    run = key.forward

    def counted(x):
        calls.append(x.shape[0])
        return run(x)

    key.forward = observing(counted)
    _latents(pipe, num_inference_steps=3)
    assert calls == [2, 1] * 3
    pag_fast.patch(pipe)
    for _ in range(2):
        calls.clear()
        _latents(pipe, num_inference_steps=3)
        assert calls == [2]


def test_the_timestep_is_embedded_once_a_step():
    pipe, calls = _build(), []
    embedding = pipe.unet.time_embedding
    handle = embedding.linear_1.register_forward_hook(observing(lambda *_: calls.append(0)))
    _latents(pipe, num_inference_steps=3)
    assert len(calls) == 6
    pag_fast.patch(pipe)
    calls.clear()
    _latents(pipe, num_inference_steps=3)
    assert len(calls) == 3
    handle.remove()


def test_nothing_is_kept_after_the_last_pass():
    pipe = pag_fast.patch(_build())
    held = []

    def decode(*args, **kwargs):
        session = pipe._pag_fast.session
        shared = session._shared
        everything = [*shared.kept.invariants, *shared.timed.invariants]
        held.extend(x.kept for x in everything)
        raise Injected

    pipe.vae.decode = decode
    for scale in (0.75, 0.0):
        with pytest.raises(Injected):
            _latents(pipe, output_type="pt", sag_scale=scale)
    assert held and not any(held)


# ---- defects of the host ----


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["guided", "degraded", "callback", "decode"])
def test_exceptions_leave_the_pipeline_as_it_was(where, error):
    pipe = _build()
    stock = _latents(pipe)
    processor = pipe.unet.get_submodule(ATTENTION).processor
    pag_fast.patch(pipe)
    before = _snapshot(pipe)
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
    inside = _snapshot(pipe)
    with pytest.raises(error):
        _latents(pipe, **kwargs)
    assert _snapshot(pipe) == inside
    if handle is not None:
        handle.remove()
    assert _snapshot(pipe) == before
    assert pipe.unet.get_submodule(ATTENTION).processor is processor
    assert relative(_latents(pipe), stock) < 1e-5
    pag_fast.unpatch(pipe)
    assert torch.equal(_latents(pipe), stock)


def test_stock_leaks_its_processor():
    """What the test above guards against."""
    pipe = _build()
    pipe.unet.up_blocks[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _latents(pipe)
    assert type(pipe.unet.get_submodule(ATTENTION).processor).__name__ == "CrossAttnStoreProcessor"


def test_heads_are_counted_not_read_from_the_configuration():
    """Stock reshapes the map by ``attention_head_dim``, which UNets may have as a tuple."""
    pipe = _build(attention_head_dim=(2, 4))
    with pytest.raises(TypeError):
        _latents(pipe)
    pipe = _build(attention_head_dim=(2, 4))
    pipe.unet.register_to_config(attention_head_dim=4)
    stock = _latents(pipe)
    pipe.unet.register_to_config(attention_head_dim=(2, 4))
    assert relative(_latents(pag_fast.patch(pipe)), stock) < 1e-5


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
    pipe = _with_ip_adapter(_build())
    torch.manual_seed(5)
    embeds = torch.randn(2 * batch if cfg else batch, 1, 6)
    kwargs = {"ip_adapter_image_embeds": [embeds]}

    def mend(_, args, call):
        if args[0].shape[0] == 2 * batch:
            call["added_cond_kwargs"] = {"image_embeds": [embeds]}
        return args, call

    handle = pipe.unet.register_forward_pre_hook(mend, with_kwargs=True) if cfg else None
    expected = _latents(pipe, batch, cfg, **kwargs)
    if handle is not None:
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = _latents(pipe, batch, cfg, **kwargs)
        assert relative(stock, expected) > 1e-3
    pag_fast.patch(pipe)
    before = _snapshot(pipe)
    assert relative(_latents(pipe, batch, cfg, **kwargs), expected) < 1e-5
    kwargs["ip_adapter_image_embeds"] = [torch.randn_like(embeds)]
    assert relative(_latents(pipe, batch, cfg, **kwargs), expected) > 1e-3
    assert _snapshot(pipe) == before


# ---- callbacks ----


def test_a_callback_that_changes_weights_and_latents():
    pipe = _build()
    key = pipe.unet.get_submodule(ATTENTION.replace("attn1", "attn2")).to_v.weight
    original = key.detach().clone()

    def run(factor=20.0):
        def callback(step, t, latents):
            if step == 0:
                key.mul_(factor)
                latents.mul_(0.9)

        try:
            return _latents(pipe, num_inference_steps=3, callback=callback)
        finally:
            with torch.no_grad():
                key.copy_(original)

    stock = run()
    assert relative(run(factor=1.0), stock) > 1e-3
    pag_fast.patch(pipe)
    assert relative(run(), stock) < 1e-5


def test_a_callback_may_not_call_the_pipeline():
    pipe = pag_fast.patch(_build())
    with pytest.raises(ValueError, match="already running"):
        _latents(pipe, callback=lambda *_: _latents(pipe))
    _latents(pipe)


# ---- patch and unpatch ----


def test_unpatch_leaves_what_was_there():
    pipe = _build()
    before, weights = _snapshot(pipe), copy.deepcopy(pipe.unet.state_dict())
    stock = _latents(pipe)
    assert pag_fast.patch(pipe) is pipe
    assert isinstance(pipe, diffusers.StableDiffusionSAGPipeline)
    pag_fast.patch(pipe, cache_conditioning=False)
    assert not pipe._pag_fast.config.cache_conditioning
    _latents(pipe)
    between = _snapshot(pipe)
    # the entry stands in front of the UNet as a whole, from patch to unpatch
    patched = "class", "attributes", ""
    assert {**between, **{k: before[k] for k in patched}} == before
    assert pag_fast.unpatch(pipe) is pipe
    assert _snapshot(pipe) == before
    assert all(torch.equal(weights[k], v) for k, v in pipe.unet.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    assert len(storages) == len(list(pipe.unet.parameters()))
    assert torch.equal(_latents(pipe), stock)


def test_adapters_loaded_between_calls():
    """Weights that were joined before part again."""
    pipe = pag_fast.patch(_build())
    _latents(pipe)
    _add_lora(pipe)
    patched = _latents(pipe)
    pag_fast.unpatch(pipe)
    storages = {p.untyped_storage().data_ptr() for p in pipe.unet.parameters()}
    assert len(storages) == len(list(pipe.unet.parameters()))
    assert relative(patched, _latents(pipe)) < 1e-5


def test_patched_and_deep_copies():
    pipe = _build()
    with pag_fast.patched(pipe) as inner:
        assert inner is pipe
        outer = pipe._pag_fast
        with pag_fast.patched(pipe, fewer_launches=False):
            assert pipe._pag_fast is not outer
        assert pipe._pag_fast is outer
        expected = _latents(pipe)
        twin = copy.deepcopy(pipe)
        assert torch.equal(_latents(twin), expected)
    assert type(pipe) is diffusers.StableDiffusionSAGPipeline
    assert not hasattr(pipe, "pag_applied_layers")


def test_methods_called_by_hand_are_stocks():
    pipe = pag_fast.patch(_build())
    pipe.scheduler.set_timesteps(2)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    t = pipe.scheduler.timesteps[0]
    original = pipe.pred_x0(sample, output, t)
    noise = pipe.pred_epsilon(sample, output, t)
    attention_map = torch.rand(2, 4, 4)
    out = pipe.sag_masking(original, attention_map, (2, 2), t, noise)
    pag_fast.unpatch(pipe)
    assert torch.equal(original, pipe.pred_x0(sample, output, t))
    assert torch.equal(out, pipe.sag_masking(original, attention_map, (2, 2), t, noise))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["mid"]}, "perturbs no layers"),
        ({"compile": True}, "leave out compile"),
        ({"speed": 11}, "Unknown option 'speed'"),
    ],
)
def test_refusals(options, message):
    pipe = pag_fast.patch(_build())
    state = pipe._pag_fast
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe, **options)
    assert pipe._pag_fast is state


def test_a_pipeline_with_methods_of_its_own_is_refused():
    class Mine(diffusers.StableDiffusionSAGPipeline):
        def pred_x0(self, sample, model_output, timestep):
            return sample

    pipe = _build()
    pipe.__class__ = Mine
    with pytest.raises(ValueError, match="Mine has its own pred_x0"):
        pag_fast.patch(pipe)
    assert type(pipe) is Mine


def test_a_unet_without_attention_in_the_middle_is_refused():
    pipe = _build(mid_block_type="UNetMidBlock2D")
    with pytest.raises(ValueError, match="no transformer in its middle block"):
        pag_fast.patch(pipe)


def test_a_compiled_unet_runs_as_it_is():
    pipe = _build()
    stock = _latents(pipe)
    pag_fast.patch(pipe)
    # looks compiled, costs nothing
    pipe.unet._compiled_call_impl = pipe.unet._call_impl
    with pytest.warns(UserWarning, match="the UNet is compiled"):
        patched = _latents(pipe)
    assert relative(patched, stock) < 1e-5
    embeds = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    with pytest.raises(ValueError, match="not compiled, or without"):
        _latents(pipe, **embeds)
    pag_fast.patch(pipe, strict=True)
    with pytest.raises(ValueError, match="strict=True"):
        _latents(pipe)


def test_explain():
    pipe = _build()
    before = pag_fast.explain(pipe)
    assert not before.is_patched and before.layers == () and before.steps == {}
    pag_fast.patch(pipe)
    _latents(pipe)
    after = pag_fast.explain(pipe)
    assert after.is_patched
    assert after.steps == {"guided passes": 2, "degraded passes": 2}
    text = str(after)
    assert "2, then 1" in text and ATTENTION in text and "once per call" in text
    for wrong in ("perturbed layers", "branch tree", "perturbation", "PAG scale"):
        assert wrong not in text and wrong not in str(before)
    assert "passes of a step" in text and "sag_scale" in text
    assert after.as_dict()["pipeline"] == "StableDiffusionSAGPipeline"


def test_is_listed():
    assert "StableDiffusionSAGPipeline" in pag_fast.supported_pipelines()
    with pytest.raises(ValueError, match="supported_pipelines"):
        pag_fast.patch(SimpleNamespace())


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
    expected = _latents(_build(**_BARE), num_inference_steps=3)
    pipe = pag_fast.patch(_build(**_BARE))
    with pytest.warns(UserWarning, match="compiled or replaced during the call"):
        found = _latents(pipe, **_in_callback(lambda: change(pipe)))
    if change is not _other_unet:  # whose map stock does not see, either
        assert relative(found, expected) < 1e-5
    pipe = pag_fast.patch(_build(**_BARE), strict=True)
    with pytest.raises(ValueError, match=r"compiled or replaced during the call.*strict=True"):
        _latents(pipe, **_in_callback(lambda: change(pipe)))


def test_passes_that_do_not_come_are_told():
    pipe = pag_fast.patch(_build(), strict=True)
    unet = pipe.unet

    def other_for_one_step(step, timestep, x):
        pipe.unet = copy.deepcopy(unet) if step == 0 else unet

    with pytest.raises(ValueError, match=r"2 of 3 guided passes"):
        _latents(pipe, callback=other_for_one_step, num_inference_steps=3)
    _latents(pipe)


def test_a_call_that_ends_as_it_should_tells_nothing():
    pipe = pag_fast.patch(_build(diffusers.PNDMScheduler(skip_prk_steps=True)), strict=True)
    for scale in (0.75, 0.0):
        _latents(pipe, sag_scale=scale, num_inference_steps=3)
    assert not pipe._pag_fast.fallbacks
