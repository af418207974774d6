"""Every perturbation, on pipelines, against a naive implementation that shares nothing."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext

import pytest
import torch
from naive import gaussian_blur as naive_blur
from naive import naive
from numerics import observing, relative
from tiny import PIPELINES, build, call_kwargs, latents
from tiny import unet as tiny_unet
from torch._dynamo.testing import CompileCounterWithBackend

import pag_fast
from pag_fast import ops
from pag_fast.analysis.flops import patched_flops
from pag_fast.models.layer_names import resolve
from pag_fast.perturbations import (
    BlockPerturbation,
    BlurredMap,
    BlurredQueries,
    Branch,
    Identity,
    Layer,
    NoisyScores,
    Rows,
    ShuffledTokens,
    SkippedBlock,
    SoftIdentity,
)
from pag_fast.perturbations.base import token_grid
from pag_fast.perturbations.blur import gaussian_blur
from pag_fast.sharing.block_hooks import PerturbedBlock
from pag_fast.sharing.rows import BranchState

SD, XL = "StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline"
SD3, PIXART = "StableDiffusion3PAGPipeline", "PixArtSigmaPAGPipeline"
HUNYUAN, SANA = "HunyuanDiTPAGPipeline", "SanaPAGPipeline"
SIZE = {"height": 16, "width": 24}  # pixels; latents are 8 × 12
# tokens of 8 × 12 latents: UNets at every resolution, transformers with patches of 2. HunyuanDiT's
# are 8 × 8, Sana's 16 × 32
GRIDS = {96: (8, 12), 24: (4, 6), 6: (2, 3), 16: (4, 4), 512: (16, 32)}
EVERYWHERE = [
    Identity(),
    SoftIdentity(0.3),
    SoftIdentity([0.0, 0.9]),
    BlurredQueries(),
    BlurredQueries(0.6),
    BlurredMap(0.6),
    NoisyScores(2.0, seed=2**40 + 5),
    ShuffledTokens(seed=3),
    SkippedBlock(),
]
CASES = [(name, how) for name in (SD, XL, SD3, PIXART) for how in EVERYWHERE]
CASES += [(SANA, how) for how in EVERYWHERE if not isinstance(how, NoisyScores)]
CASES += [(HUNYUAN, how) for how in (SoftIdentity(0.3), BlurredQueries(0.6), *EVERYWHERE[-2:])]


@functools.cache
def _pipe(name):
    return build(name)


def _size(name):
    return {"height": 32, "width": 64} if name == SANA else SIZE


def _kwargs(name, pipe, **change):
    return call_kwargs(name, pipe, **{**_size(name), **change})


def _names(pipe, layers, how):
    """Module names by the rules of the documentation: all attentions, or their blocks."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    names = list(resolve(model, layers))
    if isinstance(how, BlockPerturbation):
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    return names


def _both(name, branches, *, cfg=True, layers=None, **options):
    """Final latents: patched, and naively; and what the patch counted."""
    pipe = _pipe(name)
    try:
        if layers is not None:
            pag_fast.patch(pipe, layers, perturbation=branches[0].perturbation, **options)
        else:
            pag_fast.patch(pipe, branches=branches, **options)
        patched = latents(pipe, _kwargs(name, pipe, cfg=cfg))
        steps = dict(pipe._pag_fast.steps)
    finally:
        pag_fast.unpatch(pipe)
    scales = [3.0 if branch.scale is None else branch.scale for branch in branches]
    written = [
        (branch.perturbation, _names(pipe, branch.layers, branch.perturbation), scale)
        for branch, scale in zip(branches, scales, strict=True)
    ]
    with naive(pipe, name, written, GRIDS, cfg):
        expected = latents(pipe, _kwargs(name, pipe, cfg=cfg, pag_scale=sum(scales)))
    return patched, expected, steps


def _layers(name):
    return PIPELINES[name].layers["middle"]


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda case: str(case)[:40])
def test_equals_the_naive_one(name, how):
    branch = Branch(_layers(name), how)
    patched, expected, steps = _both(name, [branch], layers=_layers(name))
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared": 2}
    pipe = _pipe(name)
    assert relative(patched, latents(pipe, _kwargs(name, pipe, pag_scale=0.0))) > 1e-3


@pytest.mark.parametrize(("share", "cfg"), [(True, False), (False, True)])
@pytest.mark.parametrize("how", EVERYWHERE[3:], ids=str)
def test_without_cfg_and_unshared(how, share, cfg):
    branch = Branch(["mid"], how)
    patched, expected, steps = _both(SD, [branch], layers=["mid"], cfg=cfg, share_branches=share)
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared" if share else "not shared": 2}


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
    patched, expected, steps = _both(name, branches)
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
    patched, expected, _ = _both(name, branches, cfg=cfg, share_branches=share)
    assert relative(patched, expected) < 1e-5


def test_branches_in_other_orders_are_the_same_picture():
    branches = [Branch("mid", "identity", 1.0), Branch("up_blocks.1", SoftIdentity(0.5), 2.0)]
    first, _, _ = _both(SD, branches)
    second, _, _ = _both(SD, branches[::-1])
    assert relative(first, second) < 1e-5


def test_a_branch_has_the_calls_scale_unless_it_has_its_own():
    patched, expected, _ = _both(SD, [Branch("mid", "identity"), Branch("mid", "blur", 3.0)])
    assert relative(patched, expected) < 1e-5
    other, _, _ = _both(SD, [Branch("mid", "identity", 1.0), Branch("mid", "blur", 3.0)])
    assert relative(patched, other) > 1e-3


def test_an_adaptive_scale_lowers_every_branch(monkeypatch):
    """At 1000 − t = 250 and 500: scales 1 and 3 have 0.5 and 2.5, then 0 and 2."""
    pipe = _pipe(SD)
    branches = [Branch("mid", "identity", 1.0), Branch("up_blocks.1", "identity", 3.0)]
    seen = []
    with pag_fast.patched(pipe, branches=branches):
        kwargs = _kwargs(SD, pipe, steps=4, pag_adaptive_scale=0.002)
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
    pipe, rows = _pipe(name), {}
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
            latents(pipe, _kwargs(name, pipe))
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
    from test_features import _with_ip_adapter

    pipe = _with_ip_adapter(build(SD))
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


# ---- what each costs ----


def _inputs(rows):
    return {
        "sample": torch.empty(rows, 4, 16, 16, device="meta"),
        "timestep": torch.empty(rows, device="meta"),
        "encoder_hidden_states": torch.empty(rows, 5, 12, device="meta"),
    }


@functools.cache
def _flops(how, layers):
    with torch.device("meta"):
        model = tiny_unet()
    config = pag_fast.PatchConfig(layers, how)
    return patched_flops(model, layers, _inputs, cfg=True, config=config)


@pytest.mark.parametrize("how", ["soft", "blur", "noise"])
def test_flops_of_a_layer_next_to_the_identity(how):
    """By hand: 64 tokens of 16 channels where the branch begins, and in the layer behind."""
    fork, later = "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"
    tokens, channels = 64, 16
    project = 2 * tokens * channels**2
    scores = 4 * tokens**2 * channels
    one_query = 4 * tokens * channels
    at_fork = {"soft": 0, "blur": one_query, "noise": scores}[how]
    behind = {
        "soft": 2 * project + scores,
        "blur": project + project // tokens + one_query,
        "noise": 2 * project + scores,
    }[how]
    assert _flops(how, fork) - _flops("identity", fork) == at_fork
    both = (fork, later)
    assert _flops(how, both) - _flops("identity", both) == at_fork + behind


def test_explain_predicts_every_perturbation():
    """Without a lower bound, which is the identity's."""
    pipe = _pipe(SD3)
    with pag_fast.patched(pipe, "blocks.2", perturbation="skip"):
        found = pag_fast.explain(pipe, **SIZE)
    assert [predicted.bound for predicted in found.flops] == [0, 0]
    assert 0 < found.flops[0].patched < found.flops[0].stock
    assert "–" in str(found)


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


# ---- settings ----


def test_soft_identity_between_attention_and_the_identity():
    pipe = _pipe(SD3)
    made = {}
    for how in (SoftIdentity(0.0), SoftIdentity(1.0), SoftIdentity(0.5)):
        with pag_fast.patched(pipe, "blocks.2", perturbation=how):
            made[how.strength] = latents(pipe, _kwargs(SD3, pipe))
    # of no strength, the perturbed prediction is cond's, and nothing is added
    assert relative(made[0.0], latents(pipe, _kwargs(SD3, pipe, pag_scale=0.0))) < 1e-5
    assert relative(made[0.5], made[0.0]) > 1e-3
    unet = _pipe(SD)
    with pag_fast.patched(unet, "mid", perturbation=SoftIdentity(1.0)):
        whole = latents(unet, _kwargs(SD, unet))
    assert relative(whole, latents(unet, _kwargs(SD, unet))) < 1e-5


def test_strengths_by_layer():
    strength = {r"blocks\.2\.": 0.2, "blocks": [0.9, 0.0]}
    branch = Branch([r"blocks\.2\.", r"blocks\.3\."], SoftIdentity(strength))
    patched, expected, _ = _both(SD3, [branch])
    assert relative(patched, expected) < 1e-5


@pytest.mark.parametrize("how", [NoisyScores(2.0), ShuffledTokens()], ids=str)
def test_random_ones_repeat(how):
    """The same seed gives the same picture, another one does not, and every step its own draw."""
    pipe = _pipe(SD)
    draw = dataclasses.replace(how, seed=1)
    with pag_fast.patched(pipe, "mid", perturbation=how):
        first = latents(pipe, _kwargs(SD, pipe))
        assert torch.equal(latents(pipe, _kwargs(SD, pipe)), first)
    with pag_fast.patched(pipe, "mid", perturbation=draw):
        assert relative(latents(pipe, _kwargs(SD, pipe)), first) > 1e-3


def test_permutations():
    how = ShuffledTokens(seed=2**62)
    made = [how.permutation(64, i, torch.tensor([s])) for i, s in ((0, 0), (0, 1), (1, 0), (1, 1))]
    made.append(ShuffledTokens().permutation(64, 0, torch.tensor([0])))
    for order in made:
        assert torch.equal(order.sort().values, torch.arange(64))
    for i, a in enumerate(made):
        for b in made[i + 1 :]:
            assert (a == b).sum() < 10  # about one token in place by chance
    # each place sees each token equally often: 16 cells of 2000 / 4 draws
    many = torch.stack([how.permutation(4, 7, torch.tensor([s])) for s in range(2000)])
    counts = torch.stack([(many == token).sum(0) for token in range(4)])
    assert ((counts - 500).abs() < 6 * (2000 * 3 / 16) ** 0.5).all()


@pytest.mark.parametrize(
    ("tokens", "size", "expected"),
    [
        (4096, (128, 128), (64, 64)),
        (1024, (128, 128), (32, 32)),
        (6, (8, 12), (2, 3)),
        (35, (13, 9), (7, 5)),  # UNets round up
        (64 * 48, (128, 96), (64, 48)),
        (32 * 24, (96, 72), (32, 24)),  # patches of 3: by the ratio alone
    ],
)
def test_token_grid(tokens, size, expected):
    assert token_grid(tokens, size) == expected


def test_no_token_grid():
    with pytest.raises(ValueError, match="7 tokens are no grid"):
        token_grid(7, (8, 12))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("grid", [(8, 8), (7, 7), (6, 9), (9, 5)])
def test_blur_equals_segs(grid, sigma):
    """Also where the kernel is as wide as the image; and its adjoint is one."""
    layer = Layer(state=BranchState())
    layer.state.size = grid
    x, y = torch.randn(2, 3, grid[0] * grid[1], 2, 4, dtype=torch.float64)
    out = gaussian_blur(x, sigma, layer)
    image = x.permute(0, 2, 3, 1).unflatten(3, grid)
    assert relative(out, naive_blur(image, sigma).flatten(3).permute(0, 3, 1, 2)) < 1e-10
    adjoint = gaussian_blur(y, sigma, layer, adjoint=True)
    assert relative((out * y).sum(), (x * adjoint).sum()) < 1e-10


def test_a_blur_wider_than_high():
    """SEG's code cannot reflect more rows than there are; the kernel is cut to the height there."""
    layer = Layer(state=BranchState())
    layer.state.size = (2, 16)
    x = torch.ones(1, 32, 1, 1, dtype=torch.float64)
    assert relative(gaussian_blur(x, 10.0, layer), x) < 1e-12


# ---- compiled ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (PIXART, {"layers": "blocks.1", "perturbation": SoftIdentity(0.4)}),
        (SD3, {"branches": [Branch("blocks.0", "skip"), Branch("blocks.1", "shuffle")]}),
        (PIXART, {"branches": [Branch("blocks.0", "noise"), Branch("blocks.1", BlurredMap(0.6))]}),
    ],
    ids=["soft", "skip and shuffle", "noise and blur"],
)
def test_one_graph_for_all_steps_and_calls(name, options):
    """As ``test_compile.py`` has it for the identity."""
    torch._dynamo.reset()
    pipe = build(name, num_layers=2)
    with pag_fast.patched(pipe, **options):
        eager = latents(pipe, call_kwargs(name, pipe, steps=3))
        counter = CompileCounterWithBackend("eager")
        pipe.transformer.compile(fullgraph=True, backend=counter)
        for _ in range(2):
            assert relative(latents(pipe, call_kwargs(name, pipe, steps=3)), eager) < 1e-5
        latents(pipe, call_kwargs(name, pipe, seed=1, pag_scale=1.0))
    assert counter.frame_count == 1


# ---- refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftIdentity(1.5), "strength must be a number from 0 to 1; got 1.5"),
        (lambda: SoftIdentity([0.5, -1]), "strength of a head must be a number from 0 to 1"),
        (lambda: SoftIdentity([]), "empty sequence"),
        (lambda: SoftIdentity({}), "empty dictionary"),
        (lambda: SoftIdentity("0.5"), "strength must be a number"),
        (lambda: SoftIdentity({"mid(": 0.5}), "'mid\\(' for a layer, which is not a regular"),
        (lambda: SoftIdentity({3: 0.5}), "3 for a layer, which is not a regular"),
        (lambda: BlurredQueries(0), "sigma must be a number of at least 0.001; got 0"),
        (lambda: BlurredMap(float("inf")), "sigma must be a number from 0.001 to 9999"),
        (lambda: NoisyScores(-1.0), "sigma must be a number from 0 to 10000"),
        (lambda: NoisyScores(seed=-1), "seed must be an integer"),
        (lambda: ShuffledTokens(seed=1.0), "seed must be an integer"),
        (lambda: Branch([]), "layers is empty"),
        (lambda: Branch("mid", "sharper"), "Unknown perturbation 'sharper'"),
        (lambda: Branch("mid", scale=-1), "scale must be a number of at least 0"),
        (lambda: pag_fast.PatchConfig(branches=[]), "branches must be a list of pag_fast.Branch"),
        (lambda: pag_fast.PatchConfig(branches=["mid"]), "branches must be a list"),
        (lambda: pag_fast.PatchConfig("mid", branches=[Branch("mid")]), "layers and perturbations"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (SD, {"perturbation": SoftIdentity([0.5] * 3)}, "holds 3 numbers, and mid_block.* has 2"),
        (SD, {"perturbation": SoftIdentity({"up": 1.0})}, "no entry for the perturbed layer mid"),
        (SANA, {"perturbation": "noise"}, "linear attention, which has no scores"),
        ("AnimateDiffPAGPipeline", {"perturbation": BlurredMap()}, "tokens of .* are frames"),
        (SD, {"branches": [Branch("mid"), Branch("nowhere")]}, "'nowhere' matches none"),
    ],
)
def test_refusals_leave_the_pipeline_alone(name, options, message, snapshot):
    pipe = build(name)
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        pag_fast.patch(pipe, **options)
    assert snapshot(pipe) == before


def test_layers_of_branches_belong_to_the_patch(snapshot):
    pipe = build(SD3)
    before = snapshot(pipe)
    pag_fast.patch(pipe, branches=[Branch("blocks.2", "skip"), Branch("blocks.3", "noise")])
    with pytest.raises(ValueError, match="each of which has layers of its own"):
        pipe.set_pag_applied_layers("blocks.4")

    @observing
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    handle = pipe.transformer.transformer_blocks[2].ff.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        latents(pipe, call_kwargs(SD3, pipe))
    handle.remove()
    ((_, installed),) = pipe._pag_fast._installed.values()
    assert all(not block._kept for _, block in installed.blocks)
    latents(pipe, call_kwargs(SD3, pipe))
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
