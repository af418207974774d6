"""What a skipped block or attention returns: which of its arguments, in which order."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from modular import SLG_ALWAYS, STEPS, Case, denoise, differences, new_case, slow, snapshot

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

from diffusers.hooks import LayerSkipConfig  # noqa: E402

SLG = guiders.SkipLayerGuidance
ATTENTION = {"skip_attention": True, "skip_ff": False}


def _image_then_text(hidden_states, encoder_hidden_states=None, *_, **__):
    return hidden_states, encoder_hidden_states


def _text_then_image(hidden_states, encoder_hidden_states=None, *_, **__):
    return encoder_hidden_states, hidden_states


def _named_norm(norm_hidden_states, hidden_states_masks, norm_encoder_hidden_states, **_):
    return norm_hidden_states, norm_encoder_hidden_states


def _case(model, batch, text, fixed, sample):
    packed = ("first", [text], 16) if sample.ndim == 3 else None
    texts = torch.randn(batch, text, 12), torch.randn(batch, text, 12)
    rows = {"timestep": torch.full((batch,), 0.5)}
    return Case(model, {"encoder_hidden_states": texts}, {**rows, **fixed}, {}, sample, text=packed)


def _cogview4(batch, text):
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        out_channels=4, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
        pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    sizes = {"original_size": 16.0, "target_size": 16.0, "crop_coords": 0.0}
    fixed = {name: torch.full((batch, 2), value) for name, value in sizes.items()}
    return _case(tiny.randomise(model), batch, text, fixed, torch.randn(batch, 4, 8, 8))


def _auraflow(batch, text):
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=3, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return _case(tiny.randomise(model), batch, text, {}, torch.randn(batch, 4, 8, 8))


def _bria(batch, text):
    model = diffusers.BriaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=[2, 2, 4],
    )  # fmt: skip
    fixed = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(text, 3)}
    return _case(tiny.randomise(model), batch, text, fixed, torch.randn(batch, 16, 4))


def _chroma(batch, text):
    model = tiny_hosts.build("ChromaPipeline").transformer
    fixed = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(text, 3)}
    sample = torch.randn(batch, 16, model.config.in_channels)
    return _case(tiny.randomise(model), batch, text, fixed, sample)


def _hidream(batch, text):
    pipe = tiny_hosts.build("HiDreamImagePipeline")
    arguments = tiny_hosts.call_kwargs("HiDreamImagePipeline", pipe, batch=batch)
    model, layers = pipe.transformer, len(pipe.transformer.llama_layers)
    size, pooled = model.config.caption_channels, arguments["pooled_prompt_embeds"].shape[-1]

    def pair(*shape):
        return torch.randn(*shape), torch.randn(*shape)

    pairs = {
        "encoder_hidden_states_t5": pair(batch, text, size[0]),
        "encoder_hidden_states_llama3": pair(layers, batch, text, size[1]),
        "pooled_embeds": pair(batch, pooled),
    }
    fixed = {"timesteps": torch.full((batch,), 0.5)}
    sample = torch.randn(batch, model.config.in_channels, 8, 8)
    return Case(tiny.randomise(model), pairs, fixed, {}, sample)


MODELS = {
    "auraflow": _auraflow,
    "bria": _bria,
    "chroma": _chroma,
    "cogview4": _cogview4,
    "hidream": _hidream,
}


def _made(name, batch=2, text=5):
    torch.manual_seed(0)
    return MODELS[name](batch, text) if name in MODELS else new_case(name, batch=batch)


@contextmanager
def _returning(module, returns):
    module.forward = returns
    yield
    del module.forward


def _check(setup, config, module, returns):
    guider = SLG(skip_layer_config=config, **SLG_ALWAYS)
    before = snapshot(setup.model)
    result = denoise(setup, guider)
    assert snapshot(setup.model) == before
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    skipping = functools.partial(_returning, module, returns)
    expected = slow(setup, skipping, active=range(STEPS), **scales)
    assert max(differences(result, expected)) < 1e-5
    assert min(differences(result, slow(setup, list, active=(), **scales))) > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("name", "stack", "text", "returns"),
    [
        ("auraflow", "joint_transformer_blocks", 5, _text_then_image),
        ("bria", "transformer_blocks", 5, _text_then_image),
        # as many tokens of text as of the image
        ("chroma", "transformer_blocks", 16, _text_then_image),
        ("cogview4", "transformer_blocks", 16, _image_then_text),
        ("hidream", "double_stream_blocks", 5, _image_then_text),
    ],
)
def test_skipped_blocks_return_what_their_model_expects(name, stack, text, returns, batch):
    """Diffusers knows nothing of two of them, and of Bria's that they return one stream."""
    setup = _made(name, batch, text)
    _check(setup, LayerSkipConfig([1], fqn=stack), getattr(setup.model, stack)[1], returns)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("name", "stack"),
    [
        ("cogview4", "transformer_blocks"),
        ("cogvideox", "transformer_blocks"),
        ("hunyuan_video", "single_transformer_blocks"),
        ("hunyuan_video", "transformer_blocks"),
        ("auraflow", "joint_transformer_blocks"),
        ("hidream", "double_stream_blocks"),
        ("chroma", "transformer_blocks"),
    ],
)
def test_skipped_attentions_return_what_their_block_expects(name, stack, batch):
    setup = _made(name, batch)
    block = getattr(setup.model, stack)[1]
    returns = _image_then_text
    if name == "hidream":
        block, returns = block.block, _named_norm
    attention = getattr(block, "attn1", None) or block.attn
    _check(setup, LayerSkipConfig([1], fqn=stack, **ATTENTION), attention, returns)


@pytest.mark.parametrize("config", [{}, ATTENTION], ids=["block", "attention"])
def test_cogview4_equals_stock(config):
    """Stock's hooks are right for its blocks, and leave step 0 out."""
    setup = _made("cogview4")
    config = LayerSkipConfig([1], fqn="transformer_blocks", **config)
    window = {"skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 1.0}
    ours, stock = (
        denoise(setup, cls(skip_layer_config=config, **window))
        for cls in (SLG, diffusers.SkipLayerGuidance)
    )
    assert max(differences(ours, stock)) < 1e-5
    plain = slow(setup, list, active=(), guidance_scale=7.5, scale=2.8)
    assert differences(ours, plain)[-1] > 1e-3


def test_an_order_that_nobody_knows_is_refused():
    setup = _made("auraflow", text=8)  # and eight register tokens: as many as the image has
    config = LayerSkipConfig([1], fqn="joint_transformer_blocks")
    before = snapshot(setup.model)
    with pytest.raises(ValueError, match=r"AuraFlowJointTransformerBlock cannot be skipped: sev"):
        denoise(setup, SLG(skip_layer_config=config, **SLG_ALWAYS))
    assert snapshot(setup.model) == before


class _Block(torch.nn.Module):
    def forward(self, x, y=None, z=None):
        return x


_FOUR, _FIVE, _SIX = (torch.zeros(2, n, 8) for n in (4, 5, 6))


@pytest.mark.parametrize(
    ("out", "call", "likely", "wanted"),
    [
        (_FOUR, {"x": _FOUR, "y": _FIVE}, (), ("x",)),
        (_FIVE, {"x": _FOUR, "y": _FIVE}, (), ("y",)),
        ((_FIVE, _FOUR), {"x": _FOUR, "y": _FIVE}, ("x", "y"), ("y", "x")),
        ([_FIVE, _FOUR, _SIX], {"x": _FOUR, "y": _FIVE, "z": _SIX}, (), ("y", "x", "z")),
        ((_FOUR, _FOUR), {"x": _FOUR, "y": _FOUR}, ("y", "x"), ("y", "x")),
        (_FOUR, {"x": _FOUR, "y": _FOUR}, (), ("x",)),
        ((_FOUR, _FIVE), {"x": _FOUR, "y": _FIVE}, ("x",), ("x", "y")),
        ((_FOUR, _FOUR), {"x": _FOUR, "y": _FOUR}, (), "several of its arguments"),
        ((_FOUR, _FOUR), {"x": _FOUR, "y": _FIVE}, (), "several of its arguments"),
        ((_FOUR, _FIVE), {"x": _FOUR, "y": _FOUR, "z": _FIVE}, (), "several of its arguments"),
        (_FIVE, {"x": _FOUR, "y": _FIVE, "z": _FIVE}, (), "several of its arguments"),
        (_SIX, {"x": _FOUR, "y": _FIVE}, (), "none of its arguments"),
        ((_FOUR, None), {"x": _FOUR}, (), "none of its arguments"),
        ({"x": _FOUR}, {"x": _FOUR}, (), "none of its arguments"),
        ((), {"x": _FOUR}, (), "none of its arguments"),
    ],
)
def test_what_stands_for_outputs(out, call, likely, wanted):
    from pag_fast.guiders.outputs import seen

    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=f"A _Block cannot be skipped: .*{wanted}"):
            seen(_Block(), out, call, likely)
        return
    found = seen(_Block(), out, call, likely)
    assert found.arguments == wanted
    assert type(found.of([call[name] for name in found.arguments])) is type(out)


def test_a_compiled_model_of_unknown_blocks_is_refused():
    setup = _made("auraflow")
    config = LayerSkipConfig([1], fqn="joint_transformer_blocks")
    compiled = torch.compile(setup.model, backend="eager")
    with pytest.raises(ValueError, match="is compiled, and has no description"):
        denoise(setup, SLG(skip_layer_config=config, **SLG_ALWAYS), model=compiled)
