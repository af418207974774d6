"""Lists among a model's arguments: for each row, or for each net or layer, as many as they are."""

from __future__ import annotations

import pytest
import shallow
import tiny
import tiny_hosts
import torch
from diffusers import FluxMultiControlNetModel, SD3MultiControlNetModel
from numerics import relative
from tiny_hosts.reference import slow_pag

import pag_fast
from pag_fast.models.layer_names import resolve
from pag_fast.sharing.arguments import change_rows, lists_by_row

NETS = [name for name, spec in tiny.PIPELINES.items() if spec.controlnet]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "nocfg"])
@pytest.mark.parametrize("name", NETS)
def test_as_many_nets_as_rows(name, cfg, batch):
    """Their scales are a list, and every one of them runs."""
    nets = batch * (3 if cfg else 2)
    layers = shallow.LAYERS[shallow.family(name)]["middle"]
    pipe = shallow.build(name, controlnets=nets, pag_applied_layers=layers)

    def run():
        return tiny.latents(pipe, tiny.call_kwargs(name, pipe, batch=batch, cfg=cfg))

    stock = run()
    with pag_fast.patched(pipe, strict=True):
        assert relative(run(), stock) < 1e-5


@pytest.mark.parametrize(
    ("name", "multi"),
    [
        ("StableDiffusion3ControlNetPipeline", SD3MultiControlNetModel),
        ("FluxControlNetPipeline", FluxMultiControlNetModel),
    ],
)
@pytest.mark.parametrize("nets", [2, 3])
def test_nets_of_transformers(name, multi, nets):
    """With the rows of a step of CFG, and with those that PAG makes of them."""
    pipe, layers = tiny_hosts.build(name), tiny_hosts.HOSTS[name].layers["middle"]
    pipe.controlnet = multi([pipe.controlnet] * nets)
    attentions = list(resolve(pipe.transformer, layers).values())

    def arguments():
        kwargs = tiny_hosts.call_kwargs(name, pipe, batch=1)
        image = "control_image" if "control_image" in kwargs else "image"
        scales = [0.2 + 0.3 * index for index in range(nets)]
        images = {image: [kwargs[image]] * nets}
        return kwargs | images | {"controlnet_conditioning_scale": scales}

    with slow_pag(pipe, name, attentions, 3.0, tiny_hosts.HOSTS[name].cfg_scale(arguments())):
        truth = tiny_hosts.latents(pipe, arguments())
    with pag_fast.patched(pipe, layers, pag_scale=3.0, strict=True):
        assert relative(tiny_hosts.latents(pipe, arguments()), truth) < 1e-5


def test_only_what_is_known_to_be_of_rows_is_cut():
    rows = torch.arange(3.0)[:, None]
    call = {"sample": rows, "conditioning_scale": [0.1, 0.2, 0.3], "skip_layers": [7, 8, 9]}
    call |= {"txt_seq_lens": [4, 5, 6], "img_shapes": [[(1, 2, 2)]] * 3}
    assert lists_by_row(call, 3) == ("txt_seq_lens", "img_shapes")
    cut = change_rows(call, 3, 1, 3, 2)
    assert cut["conditioning_scale"] == [0.1, 0.2, 0.3] and cut["skip_layers"] == [7, 8, 9]
    assert cut["txt_seq_lens"] == [4, 5] and len(cut["img_shapes"]) == len(cut["sample"]) == 2
    # where latents are a list of rows, prompts are one, too
    lists = {"x": [torch.ones(2)] * 3, "t": rows, "cap_feats": [torch.ones(1)] * 3}
    assert lists_by_row(lists, 3) == ("x", "cap_feats")
