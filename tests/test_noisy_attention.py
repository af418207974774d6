"""``noisy_attention``: its random numbers, the op against its reference, FLOPs, fakes, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from numerics import relative
from torch.utils.flop_counter import FlopCounterMode

from pag_fast import ops
from pag_fast.ops import reference

# the package's attribute of that name is the function
op = importlib.import_module("pag_fast.ops.noisy_attention")


def _clock(step=0):
    return torch.full((1,), step)


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_is_random123s(word, key, expected):
    """The known answers that the library of its authors ships (kat_vectors, philox4x32 10)."""
    found = reference.philox([torch.tensor([word])] * 4, key)
    assert tuple(int(x) for x in found) == expected


def test_noise_is_normal_and_independent():
    noise = reference.score_noise((1, 6, 256, 257), _clock(7), 3, 11).double()
    count = noise.numel()
    moments = [noise.pow(n).mean().item() for n in (1, 2, 3, 4)]
    # six standard errors of each moment: variances 1, 2, 15, 96 over the number of draws
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(found - expected) < 6 * (variance / count) ** 0.5
    for dim in range(1, 4):
        a, b = (
            noise.narrow(dim, 0, noise.shape[dim] - 1),
            noise.narrow(dim, 1, noise.shape[dim] - 1),
        )
        assert abs((a * b).mean().item()) < 6 / a.numel() ** 0.5
    values = noise.flatten().sort().values
    quantiles = torch.special.ndtri((torch.arange(count) + 0.5) / count)
    assert (values - quantiles)[count // 1000 : -count // 1000].abs().max() < 0.03


def test_noise_is_a_function_of_its_position():
    whole = reference.score_noise((1, 2, 9, 13), _clock(2), 1, 5)
    assert torch.equal(reference.score_noise((1, 2, 9, 6), _clock(2), 1, 5), whole[..., :6])
    some = reference.score_noise((1, 2, 4, 13), _clock(2), 1, 5, first_query=3)
    assert torch.equal(some, whole[:, :, 3:7])
    batch = reference.score_noise((3, 2, 9, 13), _clock(2), 1, 5)
    assert torch.equal(batch, whole.expand_as(batch))  # a picture does not know its place in it
    for other in ((_clock(3), 1, 5), (_clock(2), 2, 5), (_clock(2), 1, 6), (_clock(2), 1, 2**33)):
        assert (reference.score_noise((1, 2, 9, 13), *other) - whole).abs().mean() > 0.5


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("kind", [None, "bias", "boolean"])
def test_op_equals_its_reference(chunk, kind, monkeypatch):
    """However many queries are computed at a time, with every kind of mask."""
    monkeypatch.setattr(op, "_MAX_SCORES", chunk)
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (11, 7, 7))
    mask = {
        None: None,
        "bias": torch.randn(2, 1, 1, 7, dtype=torch.float64),
        "boolean": torch.rand(2, 3, 11, 7) > 0.3,
    }[kind]
    if kind == "boolean":
        mask[..., 0] = True
    at = {"clock": _clock(4), "layer": 2, "seed": 9, "sigma": 0.8, "scale": 0.3}
    out = ops.noisy_attention(q, k, v, attn_mask=mask, **at)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
    scores += 0.8 * reference.score_noise(scores.shape, _clock(4), 2, 9).double()
    if kind == "bias":
        scores += mask
    if kind == "boolean":
        scores[~mask] = -torch.inf
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    assert relative(out, expected) < 1e-10


def test_some_of_the_heads():
    """Ranks that share a layer's heads have the noise of one that has all of them."""
    q, k, v = (torch.randn(2, n, 4, 8, dtype=torch.float64) for n in (11, 7, 7))
    whole = ops.noisy_attention(q, k, v, clock=_clock(3))
    first = ops.noisy_attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], clock=_clock(3))
    rest = [x[:, :, 2:] for x in (q, k, v)]
    second = ops.noisy_attention(*rest, clock=_clock(3), first_head=2)
    assert relative(torch.cat([first, second], dim=2), whole) < 1e-12
    assert relative(ops.noisy_attention(*rest, clock=_clock(3)), whole[:, :, 2:]) > 1e-2


def test_opcheck_flops_and_graph():
    q, k, v = (torch.randn(2, n, 3, 8) for n in (11, 7, 7))
    arguments = (q, k, v, _clock(), 1, 5, 0.5, None, None, 1, "torch")
    torch.library.opcheck(torch.ops.pag_fast.noisy_attention.default, arguments)
    with FlopCounterMode(display=False) as counter:
        ops.noisy_attention(q, k, v, clock=_clock())
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 11 * 7 * 8)

    def run(clock):
        return ops.noisy_attention(q, k, v, clock=clock)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for step in range(2):
        assert torch.equal(compiled(_clock(step)), run(_clock(step)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 5, 3)}, "takes q as"),
        ({"v": torch.ones(2, 6, 3, 8)}, "takes q as"),
        ({"q": torch.ones(2, 5, 2, 8)}, "must share heads"),
        ({"q": torch.ones(2, 5, 3, 8).half()}, "must share heads, head_dim and dtype"),
        ({"clock": torch.zeros(1)}, "one int64 number"),
        ({"clock": torch.zeros(2).long()}, "one int64 number"),
    ],
)
def test_bad_arguments(change, message):
    given = {"q": torch.ones(2, 5, 3, 8), "k": torch.ones(2, 7, 3, 8), "v": torch.ones(2, 7, 3, 8)}
    given = {**given, "clock": _clock(), **change}
    with pytest.raises(ValueError, match=message):
        ops.noisy_attention(**given)
