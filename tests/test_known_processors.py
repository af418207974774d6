"""Which attention processors ours takes the place of, and whose keys are kept from step to step."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import tiny_hosts
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0
from numerics import relative

import pag_fast
from pag_fast.models.layer_names import resolve
from pag_fast.models.registry import DESCRIPTIONS
from pag_fast.runtime.compatibility import row_wise

SD, XL, HOST = (
    "StableDiffusionPAGPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionPipeline",
)
SIMPLE = [
    (SD, "down_blocks.1", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
    (XL, "up_blocks.0", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
    (
        SD,
        "mid",
        {"up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    ),
]


@pytest.mark.parametrize(("name", "layer", "config"), SIMPLE)
@pytest.mark.filterwarnings("ignore:pag_fast. branches are not shared")
def test_keys_of_the_image_are_not_kept(name, layer, config):
    """Attentions with added keys call themselves cross-attention, and project the image, too."""
    pipe = tiny.build(name, **config)
    pipe.set_pag_applied_layers(layer)
    stock = tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=6))
    with pag_fast.patched(pipe):
        fast = tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=6))
        assert not any("written" in reason for reason in pipe._pag_fast.fallbacks)
    assert relative(fast, stock) < 1e-5


@row_wise
class _Widened(AttnProcessor2_0):
    """Keys and values of the text, and a little of the image in them."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if encoder_hidden_states is not None:
            seen = hidden_states.mean((1, 2), keepdim=True)
            encoder_hidden_states = encoder_hidden_states + seen
        return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


@pytest.mark.parametrize("name", [SD, XL])
def test_keys_of_a_processor_of_ones_own_are_not_kept(name):
    """What is row-wise may still compute them of more than the text."""
    pipe = tiny.build(name)
    pipe.set_pag_applied_layers("mid")
    stock = tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=6))
    for module_name, module in pipe.unet.named_modules():
        if module_name.endswith("attn2"):
            module.processor = _Widened()
    own = tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=6))
    assert relative(own, stock) > 1e-3
    with pag_fast.patched(pipe, strict=True):
        fast = tiny.latents(pipe, tiny.call_kwargs(name, pipe, steps=6))
        assert pipe._pag_fast.steps["shared"] == 6
        assert "none are kept" in str(pag_fast.explain(pipe))
    assert relative(fast, own) < 1e-5


def _with_pictures(pipe):
    """An IP-Adapter of SD3, which has every layer attend to pictures, too."""
    model, adapter = pipe.transformer, diffusers.models.embeddings.IPAdapterTimeImageProjection
    head_dim, heads = model.config.attention_head_dim, model.config.num_attention_heads
    width = head_dim * heads
    kind = attention_processor.SD3IPAdapterJointAttnProcessor2_0
    made = {
        name: kind(width, width, head_dim, timesteps_emb_dim=16) for name in model.attn_processors
    }
    model.set_attn_processor(made)
    model.image_proj = adapter(
        embed_dim=6,
        output_dim=width,
        hidden_dim=16,
        depth=1,
        dim_head=8,
        heads=2,
        num_queries=3,
        timestep_in_dim=8,
        timestep_flip_sin_to_cos=True,
    )
    for module in (*made.values(), model.image_proj):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return pipe


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"])
def test_layers_that_attend_to_pictures_are_refused(name):
    """Ours would leave the pictures out for uncond and cond, too."""
    torch.manual_seed(7)
    pipe = _with_pictures(tiny_hosts.build(name))

    def called(**more):
        pictures = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
        kwargs = tiny_hosts.call_kwargs(name, pipe, batch=1)
        return tiny_hosts.latents(pipe, {**kwargs, "ip_adapter_image_embeds": pictures, **more})

    stock = called()
    with pag_fast.patched(pipe, "blocks.1"), pytest.raises(ValueError, match="SD3IPAdapter"):
        called()
    assert torch.equal(called(), stock)


def test_a_processor_of_diffusers_that_counts_is_refused():
    """Attend-and-Excite's counts the attentions that have run, and ours would not."""
    pipe = tiny_hosts.build(HOST)
    for attention in resolve(pipe.unet, ["mid"]).values():
        attention.processor = type("AttendExciteAttnProcessor", (AttnProcessor2_0,), {})()
        type(attention.processor).__module__ = "diffusers.pipelines.elsewhere"
    pag_fast.patch(pipe, "mid", pag_scale=2.0)
    with pytest.raises(ValueError, match=r"AttendExcite.*choose layers with AttnProcessor or"):
        tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe))


@pytest.mark.parametrize("kind", ["AttnProcessor", "SlicedAttnProcessor"])
def test_other_ways_to_compute_attention_are_known(kind):
    pipe = tiny_hosts.build(HOST)
    with pag_fast.patched(pipe, "mid", pag_scale=2.0, strict=True):
        usual = tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe))
        for module in pipe.unet.modules():
            if hasattr(module, "processor"):
                arguments = (1,) if kind.startswith("Sliced") else ()
                module.set_processor(getattr(attention_processor, kind)(*arguments))
        other = tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(HOST, pipe))
    assert relative(other, usual) < 1e-5


@pytest.mark.parametrize("entry", DESCRIPTIONS, ids=lambda entry: entry.name)
def test_every_description_names_processors(entry):
    assert entry.replaces
