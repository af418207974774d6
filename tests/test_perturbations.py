"""Every perturbation, on pipelines, against a naive implementation that shares nothing."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from naive import gaussian_blur as naive_blur
from numerics import observing, relative
from perturbed_pictures import (
    EVERYWHERE,
    HUNYUAN,
    PIXART,
    SANA,
    SD,
    SD3,
    SIZE,
    XL,
    both_pictures,
    perturbed_pipe,
    picture_kwargs,
)
from tiny import PIPELINES, build, call_kwargs, latents
from tiny import unet as tiny_unet
from torch._dynamo.testing import CompileCounterWithBackend

import pag_fast
from pag_fast.analysis.flops import patched_flops
from pag_fast.perturbations import (
    BlurredMap,
    BlurredQueries,
    Branch,
    Layer,
    NoisyScores,
    ShuffledTokens,
    SoftIdentity,
)
from pag_fast.perturbations.base import Rows, token_grid
from pag_fast.perturbations.blur import gaussian_blur
from pag_fast.sharing.rows import BranchState

CASES = [(name, how) for name in (SD, XL, SD3, PIXART) for how in EVERYWHERE]
CASES += [(SANA, how) for how in EVERYWHERE if not isinstance(how, NoisyScores)]
CASES += [(HUNYUAN, how) for how in (SoftIdentity(0.3), BlurredQueries(0.6), *EVERYWHERE[-2:])]


def _layers(name):
    return PIPELINES[name].layers["middle"]


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda case: str(case)[:40])
def test_equals_the_naive_one(name, how):
    branch = Branch(_layers(name), how)
    patched, expected, steps = both_pictures(name, [branch], layers=_layers(name))
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared": 2}
    pipe = perturbed_pipe(name)
    assert relative(patched, latents(pipe, picture_kwargs(name, pipe, pag_scale=0.0))) > 1e-3


@pytest.mark.parametrize(("share", "cfg"), [(True, False), (False, True)])
@pytest.mark.parametrize("how", EVERYWHERE[3:], ids=str)
def test_without_cfg_and_unshared(how, share, cfg):
    branch = Branch(["mid"], how)
    patched, expected, steps = both_pictures(
        SD, [branch], layers=["mid"], cfg=cfg, share_branches=share
    )
    assert relative(patched, expected) < 1e-5
    assert steps == {"shared" if share else "not shared": 2}


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
    pipe = perturbed_pipe(SD3)
    with pag_fast.patched(pipe, "blocks.2", perturbation="skip"):
        found = pag_fast.explain(pipe, **SIZE)
    assert [predicted.bound for predicted in found.flops] == [0, 0]
    assert 0 < found.flops[0].patched < found.flops[0].stock
    assert "–" in str(found)


# ---- settings ----


def test_soft_identity_between_attention_and_the_identity():
    pipe = perturbed_pipe(SD3)
    made = {}
    for how in (SoftIdentity(0.0), SoftIdentity(1.0), SoftIdentity(0.5)):
        with pag_fast.patched(pipe, "blocks.2", perturbation=how):
            made[how.strength] = latents(pipe, picture_kwargs(SD3, pipe))
    # of no strength, the perturbed prediction is cond's, and nothing is added
    assert relative(made[0.0], latents(pipe, picture_kwargs(SD3, pipe, pag_scale=0.0))) < 1e-5
    assert relative(made[0.5], made[0.0]) > 1e-3
    unet = perturbed_pipe(SD)
    with pag_fast.patched(unet, "mid", perturbation=SoftIdentity(1.0)):
        whole = latents(unet, picture_kwargs(SD, unet))
    assert relative(whole, latents(unet, picture_kwargs(SD, unet))) < 1e-5


def test_strengths_by_layer():
    strength = {r"blocks\.2\.": 0.2, "blocks": [0.9, 0.0]}
    branch = Branch([r"blocks\.2\.", r"blocks\.3\."], SoftIdentity(strength))
    patched, expected, _ = both_pictures(SD3, [branch])
    assert relative(patched, expected) < 1e-5


@pytest.mark.parametrize("how", [NoisyScores(2.0), ShuffledTokens()], ids=str)
def test_random_ones_repeat(how):
    """The same seed gives the same picture, another one does not, and every step its own draw."""
    pipe = perturbed_pipe(SD)
    draw = dataclasses.replace(how, seed=1)
    with pag_fast.patched(pipe, "mid", perturbation=how):
        first = latents(pipe, picture_kwargs(SD, pipe))
        assert torch.equal(latents(pipe, picture_kwargs(SD, pipe)), first)
    with pag_fast.patched(pipe, "mid", perturbation=draw):
        assert relative(latents(pipe, picture_kwargs(SD, pipe)), first) > 1e-3


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


def test_some_rows_keep_everything_else():
    """Every field is handed on, as ``dataclasses.replace`` would do it."""
    tensors = {name: torch.randn(3, 4, 2, 5) for name in ("query", "key", "value")}
    numbers = {"num_attend": 2, "num_forked": 1, "num_context": 1, "scale": 0.5}
    others = {"backend": "torch", "constant": torch.ones(1), "mean_query": torch.ones(1)}
    mask = torch.zeros(3, 1, 1, 4)
    layer = Layer(heads=7)
    rows = Rows(**tensors, **numbers, **others, attn_mask=mask, layer=layer, is_whole=True)
    given = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    defaults = Rows(*tensors.values(), num_attend=0)
    assert all(x is not getattr(defaults, n) for n, x in given.items() if n not in tensors)
    some = rows.some(slice(1, 3))
    for name, value in given.items():
        wanted = value[1:3] if name in (*tensors, "attn_mask") else value
        found = getattr(some, name)
        assert torch.equal(found, wanted) if name in (*tensors, "attn_mask") else found is value
