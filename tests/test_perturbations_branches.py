"""Several perturbed branches: against the naive ones, and where each of them begins."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from numerics import observing, relative
from perturbed_pictures import (
    EVERYWHERE,
    PIXART,
    SD,
    SD3,
    XL,
    both_pictures,
    perturbed_pipe,
    picture_kwargs,
)
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast import ops
from pag_fast.perturbations import (
    BlurredQueries,
    Branch,
    Layer,
    NoisyScores,
    Rows,
    ShuffledTokens,
    SoftIdentity,
)
from pag_fast.sharing.block_hooks import PerturbedBlock
from pag_fast.sharing.rows import BranchState

SEVERAL = {
    "two attentions": [Branch("blocks.2", SoftIdentity(0.4), 1.5), Branch("blocks.4", "blur", 2.0)],
    "one layer for all": [
        Branch("blocks.2", "identity", 1.0),
        Branch(["blocks.2", "blocks.3"], SoftIdentity(0.7), 2.0),
        Branch("blocks.2", NoisyScores(1.0), 0.5),
    ],
    "a later fork": [Branch("blocks.4", "identity"), Branch("blocks.1$|blocks.1.attn", "blur")],
    "skipped, and attending": [
        Branch("blocks.2", "skip", 2.0),
        Branch("blocks.4", "identity", 1.0),
    ],
    "skipped, and perturbed inside": [Branch("blocks.2", "skip"), Branch("blocks.2", "identity")],
    "all skipped": [Branch("blocks.2", "skip", 1.0), Branch(["blocks.2", "blocks.3"], "skip", 2.0)],
    "shuffled, and not": [Branch("blocks.2", "shuffle", 1.0), Branch("blocks.3", "identity", 1.0)],
}


@pytest.mark.parametrize("name", [SD3, PIXART])
@pytest.mark.parametrize("branches", SEVERAL.values(), ids=SEVERAL)
def test_several_branches(branches, name):
    """``u + g·(c − u) + Σ sᵢ·(c − pᵢ)``; all share the way to the first fork."""
    patched, expected, steps = both_pictures(name, branches)
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared": 2}


@pytest.mark.parametrize(("share", "cfg"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", [SD, XL, "StableDiffusionControlNetPAGPipeline"])
def test_several_branches_of_a_unet(name, share, cfg):
    branches = [
        Branch("mid", "skip", 1.0),
        Branch("down_blocks.1", SoftIdentity(0.5), 2.0),
        Branch(["mid", "up_blocks.1"], BlurredQueries(0.6), 0.5),
    ]
    patched, expected, _ = both_pictures(name, branches, cfg=cfg, share_branches=share)
    assert relative(patched, expected) < 1e-5


def test_branches_in_other_orders_are_the_same_picture():
    branches = [Branch("mid", "identity", 1.0), Branch("up_blocks.1", SoftIdentity(0.5), 2.0)]
    first, _, _ = both_pictures(SD, branches)
    second, _, _ = both_pictures(SD, branches[::-1])
    assert relative(first, second) < 1e-5


def test_a_branch_has_the_calls_scale_unless_it_has_its_own():
    patched, expected, _ = both_pictures(
        SD, [Branch("mid", "identity"), Branch("mid", "blur", 3.0)]
    )
    assert relative(patched, expected) < 1e-5
    other, _, _ = both_pictures(SD, [Branch("mid", "identity", 1.0), Branch("mid", "blur", 3.0)])
    assert relative(patched, other) > 1e-3


def test_an_adaptive_scale_lowers_every_branch(monkeypatch):
    """At 1000 − t = 250 and 500: scales 1 and 3 have 0.5 and 2.5, then 0 and 2."""
    pipe = perturbed_pipe(SD)
    branches = [Branch("mid", "identity", 1.0), Branch("up_blocks.1", "identity", 3.0)]
    seen = []
    with pag_fast.patched(pipe, branches=branches):
        kwargs = picture_kwargs(SD, pipe, steps=4, pag_adaptive_scale=0.002)
        combine = pipe._apply_perturbed_attention_guidance

        def look(noise_pred, cfg, guidance_scale, t, *rest):
            seen.append((float(t), pipe._pag_fast.session.ran[1]))
            return combine(noise_pred, cfg, guidance_scale, t, *rest)

        monkeypatch.setattr(pipe, "_apply_perturbed_attention_guidance", look, raising=False)
        latents(pipe, kwargs)
    assert len(seen) == 4
    for t, scales in seen:
        assert scales == pytest.approx([max(0, s - 0.002 * (1000 - t)) for s in (1.0, 3.0)])
    assert seen[-1][1][0] == 0.0 < seen[-1][1][1]


# ---- where branches begin ----


def _rows_of_blocks(name, branches):
    """Rows that each transformer block runs on, with CFG and one image."""
    pipe, rows = perturbed_pipe(name), {}
    model = getattr(pipe, PIPELINES[name].denoiser)
    handles = [
        module.ff.register_forward_hook(
            observing(lambda _, args, out, name=n: rows.__setitem__(name, out.shape[0]))
        )
        for n, module in model.named_modules()
        if type(module).__name__ in ("BasicTransformerBlock", "JointTransformerBlock")
    ]
    try:
        with pag_fast.patched(pipe, branches=branches):
            latents(pipe, picture_kwargs(name, pipe))
            found = pag_fast.explain(pipe, flops=False)
    finally:
        for handle in handles:
            handle.remove()
    return rows, found


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("identity", [2, 2, 3, 3, 3, 3]),
        ("skip", [2, 2, 2, 2, 3, 3]),
        ("shuffle", [2, 2, 2, 2, 2, 2]),
    ],
)
def test_forks_of_a_transformer(how, expected):
    rows, found = _rows_of_blocks(SD3, [Branch([r"blocks\.2\.", r"blocks\.3\."], how)])
    assert [rows[f"transformer_blocks.{i}"] for i in range(6)] == expected
    assert found.fork == ("transformer_blocks.2" + (".attn" if how == "identity" else ""))
    behind = {"identity": "2.attn", "skip": "3", "shuffle": "5"}[how]
    assert f"transformer_blocks.{behind}" in found.tree[0]


def test_skipped_blocks_behind_the_fork_run_without_the_branches():
    rows, _ = _rows_of_blocks(PIXART, [Branch([r"blocks\.1\.", r"blocks\.4\."], "skip")] * 2)
    assert [rows[f"transformer_blocks.{i}"] for i in range(6)] == [2, 2, 4, 4, 2, 4]


def test_fork_of_a_shuffled_unet():
    """Nothing in the first perturbed transformer, everything in the next."""
    first, last = "down_blocks.2.attentions.0", "up_blocks.1.attentions.1"
    rows, found = _rows_of_blocks(XL, [Branch([f"{first}.transformer_blocks.0", last], "shuffle")])
    assert {n: r for n, r in rows.items() if n.startswith(first)} == {
        f"{first}.transformer_blocks.0": 2,
        f"{first}.transformer_blocks.1": 2,
    }
    assert {r for n, r in rows.items() if n.startswith(("mid", "up"))} == {3}
    assert f"the end of {first}.transformer_blocks.1" in found.tree[0]


def test_several_branches_share_the_way_to_the_first_fork():
    rows, found = _rows_of_blocks(SD3, SEVERAL["one layer for all"])
    assert [rows[f"transformer_blocks.{i}"] for i in range(6)] == [2, 2, 5, 5, 5, 5]
    assert [call.patched for call in found.calls] == ["2 → 5", "1 → 4"]
    assert len(found.perturbations) == 3
    text = str(found)
    assert "SoftIdentity(strength=0.7): O' = (1 − λ)·O + λ·V" in text
    assert "uncond | cond | perturbed | perturbed | perturbed" in text
    assert "scale 0.5" in text


@pytest.mark.parametrize("masks", [False, True])
def test_ip_adapter_masks_know_places(masks):
    """A token's order is not free to choose then: shuffled branches run apart."""
    from diffusers.image_processor import IPAdapterMaskProcessor
    from random_adapters import with_ip_adapter

    pipe = with_ip_adapter(build(SD))
    mask = IPAdapterMaskProcessor().preprocess(torch.rand(1, 1, 16, 16), 16, 16)
    embeds = torch.randn(2, 1, 6)
    extra = {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}} if masks else {}
    made = []
    for share in (True, False):
        pag_fast.patch(pipe, "mid", perturbation="shuffle", share_branches=share)
        kwargs = call_kwargs(SD, pipe, ip_adapter_image_embeds=[embeds], **extra)
        with pytest.warns(match="tell tokens apart") if masks and share else nullcontext():
            made.append(latents(pipe, kwargs))
        if share:
            assert dict(pipe._pag_fast.steps) == {"not shared" if masks else "shared": 2}
    assert relative(made[0], made[1]) < 1e-5


# ---- the parts alone ----


@pytest.mark.parametrize("num_context", [0, 5])
@pytest.mark.parametrize("how", EVERYWHERE[:7], ids=str)
def test_a_fork_is_a_branch_of_its_own(how, num_context):
    """Rows that are appended equal rows that were there, text included; and none need attend."""
    layer = Layer(heads=2, state=BranchState())
    layer.state.size = (4, 6)
    q, k, v = torch.randn(3, 3, 24 + num_context, 2, 8, dtype=torch.float64).unbind()
    constant = how.constant(layer)

    def run(rows, **mix):
        some = [x[rows].clone() for x in (q, k, v)]
        if not (how.needs_scores or num_context):
            some[:2] = [x[: mix["num_attend"]] for x in some[:2]]
        constants = None if constant is None else torch.tensor(constant)
        mix |= {"num_context": num_context, "layer": layer, "constant": constants}
        return how.attend(Rows(*some, **mix))

    apart = run([0, 1, 1], num_attend=2)
    assert relative(run([0, 1], num_attend=2, num_forked=1), apart) < 1e-10
    assert relative(run([1], num_attend=0), apart[2:]) < 1e-10
    attending = ops.softmax_attention(q, k, v)
    assert relative(apart[:2], attending[:2]) < 1e-10
    assert relative(apart[2:, 24:], attending[1:2, 24:]) < 1e-10 or not num_context
    assert relative(apart[2, :24], attending[1, :24]) > 1e-3


def test_text_behind_a_shuffled_run_is_conds():
    state = BranchState()
    state.slabs = (2, 2, 3)
    how = ShuffledTokens()
    streams = ("encoder_hidden_states", "hidden_states")
    block = PerturbedBlock(
        state, [how], index=4, arrives=1, runs=1, shuffled=[(how, 4)], streams=streams
    )
    text, image = torch.randn(4, 3, 2), torch.randn(4, 9, 2)
    out_text, out_image = block.leave(torch.nn.Identity(), (), (text, image))
    assert torch.equal(out_text, torch.cat([text, text[2:]]))
    order = how.permutation(9, 4, torch.tensor([0]))
    assert torch.equal(out_image, torch.cat([image, image[2:, order]]))
