"""Rows of a model's arguments: declared by name, completed where a pipeline has fewer."""

from __future__ import annotations

import pytest
import tiny_hosts
import torch
from numerics import relative

import pag_fast
from pag_fast.sharing.arguments import batched, complete_rows, with_rows

BROADCASTING = ["FluxPipeline", "HunyuanVideoPipeline", "WanPipeline", "QwenImagePipeline"]


def _run(pipe, name, *, repeated, cfg, several):
    kwargs = tiny_hosts.call_kwargs(name, pipe, cfg=cfg, **({} if repeated else {several: 2}))
    if repeated:
        for key, value in kwargs.items():
            if "prompt" in key and isinstance(value, torch.Tensor):
                kwargs[key] = value.repeat(2, *[1] * (value.ndim - 1))
    return tiny_hosts.latents(pipe, kwargs)


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("name", BROADCASTING)
def test_one_prompt_for_two_pictures(name, cfg):
    several = "num_videos_per_prompt" if "Video" in name or "Wan" in name else None
    several = several or "num_images_per_prompt"
    pipe = pag_fast.patch(tiny_hosts.build(name), tiny_hosts.HOSTS[name].layers["middle"])
    expected = _run(pipe, name, repeated=True, cfg=cfg, several=several)
    found = _run(pipe, name, repeated=False, cfg=cfg, several=several)
    assert relative(found, expected) < 1e-5


def test_declared_names_alone_are_completed():
    text, ids, table = torch.randn(1, 4, 3), torch.randn(1, 3), torch.randn(1, 8)
    whole = torch.randn(4, 5)
    call = {
        "hidden_states": torch.randn(4, 2, 2),
        "encoder_hidden_states": text,
        "txt_ids": ids,
        "image_rotary_emb": (table, table),
        "pooled_projections": whole,
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 3), "mine": ids},
    }
    done = complete_rows(call, 4, 1)
    assert torch.equal(done["encoder_hidden_states"], text.repeat(4, 1, 1))
    assert done["txt_ids"] is ids and done["image_rotary_emb"][0] is table
    assert done["pooled_projections"] is whole
    embeds = call["added_cond_kwargs"]["text_embeds"]
    assert torch.equal(done["added_cond_kwargs"]["text_embeds"], embeds.repeat_interleave(2, 0))
    assert done["added_cond_kwargs"]["mine"] is ids
    assert call["encoder_hidden_states"] is text  # the caller's own is left alone


def test_rows_of_a_video_and_what_does_not_divide():
    call = {"sample": torch.randn(2, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(6, 5, 12)}
    done = complete_rows(call, 2, 3)
    assert done["encoder_hidden_states"] is call["encoder_hidden_states"]
    odd = {"hidden_states": torch.randn(4, 2, 2), "encoder_hidden_states": torch.randn(3, 5, 12)}
    assert complete_rows(odd, 4, 1)["encoder_hidden_states"].shape[0] == 3


def test_token_counts_are_not_rows():
    x = torch.randn(4, 3)
    assert with_rows("encoder_hidden_states", x, 4, 1)
    assert not with_rows("txt_ids", x, 4, 1)
    assert not with_rows("image_rotary_emb", x, 4, 1)
    assert not with_rows("encoder_hidden_states", x, 3, 1)
    assert not with_rows("timestep", torch.tensor(3), 1, 1)
    call = {"encoder_hidden_states": x, "txt_ids": x, "joint_attention_kwargs": {"img_ids": x}}
    assert list(batched(call, 4, 1)) == ["encoder_hidden_states"]
