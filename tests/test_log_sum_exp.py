"""Attention with its log-sum-exp: which kernel, in which layout, and how far from fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_as_torch, attention_rounding, max_error, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

from pag_fast import ops
from pag_fast.ops import log_sum_exp

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
HIDDEN = float("-inf")


def _heads_first(device="cpu", dtype=torch.float32, queries=50, keys=13, dim=64):
    make = torch.empty if device in ("meta", "cuda") else torch.randn
    shapes = [(2, n, 3, dim) for n in (queries, keys, keys)]
    return [make(shape, device=device, dtype=dtype).transpose(1, 2) for shape in shapes]


# ---- which kernel ----


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (SDPBackend.FLASH_ATTENTION, "flash"),
        (SDPBackend.EFFICIENT_ATTENTION, "efficient"),
        (SDPBackend.CUDNN_ATTENTION, "cudnn"),
        (SDPBackend.MATH, "chunks"),
        (SDPBackend.OVERRIDEABLE, "chunks"),
    ],
)
def test_a_gpu_runs_what_sdpa_would(choice, expected, monkeypatch):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *call: choice.value)
    with FakeTensorMode():
        assert log_sum_exp.kernel_for(*_heads_first("cuda", torch.float16)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("allowed", [True, False])
def test_a_mask_is_for_the_memory_efficient_kernel(dtype, allowed, monkeypatch):
    """The only one that takes masks in every dtype; PyTorch says whether it can, of our call."""
    asked = []

    def can_use(call):
        asked.append(call)
        return allowed

    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", can_use)
    with FakeTensorMode():
        q, k, v = _heads_first("cuda", dtype)
        bias = torch.empty(2, 1, 1, 13, device="cuda", dtype=dtype)
        found = log_sum_exp.kernel_for(q, k, v, bias)
        assert asked[0].query is q
        assert asked[0].attn_mask is bias
    assert found == ("efficient" if allowed else "chunks")


def test_heads_that_sdpa_would_pad_run_in_chunks(monkeypatch):
    """Its kernels refuse 36 halves, which are no multiple of 16 bytes; 36 floats are."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *call: SDPBackend.FLASH_ATTENTION.value)
    with FakeTensorMode():
        assert log_sum_exp.kernel_for(*_heads_first("cuda", torch.float16, dim=36)) == "chunks"
        assert log_sum_exp.kernel_for(*_heads_first("cuda", torch.float32, dim=36)) == "flash"


def test_kernels_nobody_has_looked_at_are_not_trusted(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with FakeTensorMode():
        assert log_sum_exp.kernel_for(*_heads_first("cuda", torch.float16)) == "chunks"
        assert log_sum_exp.kernel_for(*_heads_first("xpu", torch.float16)) == "chunks"


def test_the_users_choice_holds():
    call = _heads_first()
    assert log_sum_exp.kernel_for(*call) == "cpu"
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        assert log_sum_exp.kernel_for(*call) == "chunks"


@pytest.mark.parametrize(
    ("dtype", "dim", "masked", "expected"),
    [
        (torch.float16, 64, False, "flash"),
        (torch.bfloat16, 64, True, "efficient"),
        (torch.float16, 320, False, "efficient"),
        (torch.float32, 64, False, "efficient"),
        (torch.float64, 64, False, "chunks"),
        (torch.float16, 36, False, "chunks"),
    ],
)
def test_what_is_counted_without_a_device(dtype, dim, masked, expected):
    q, k, v = _heads_first("meta", dtype, dim=dim)
    bias = torch.empty(1, 1, 1, 13, device="meta", dtype=dtype) if masked else None
    assert log_sum_exp.kernel_for(q, k, v, bias) == expected
    out, lse = log_sum_exp.attention_with_lse(*(x.transpose(1, 2) for x in (q, k, v)), 0.1, bias)
    assert out.shape == (2, 50, 3, dim)
    assert lse.shape == (2, 50, 3)


# ---- in which layout ----


@pytest.mark.parametrize("queries", [1, 31, 32, 50])
@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_layouts_that_pytorch_declares(name, queries):
    """PyTorch's own shape inference of the ATen op, through our call of it."""
    q, k, v = _heads_first("meta", torch.float16, queries)
    out, lse = log_sum_exp.KERNELS[name](q, k, v, None, 0.125)
    assert (out.shape, out.dtype) == (q.shape, torch.float16)
    assert (lse.shape, lse.dtype) == ((2, 3, queries), torch.float32)


class _Emulated:
    """PyTorch's GPU kernels, in fp64, with the layouts of their log-sum-exp and NaN around it."""

    def __init__(self):
        self.biases = []
        self._safe_softmax = torch.ops.aten._safe_softmax

    def _run(self, q, k, v, bias, scale):
        self.biases.append(bias)
        scores = q.double() @ k.double().mT * scale
        scores = scores if bias is None else scores + bias
        out = torch.ops.aten._safe_softmax(scores, -1) @ v.double()
        return out.to(q.dtype), torch.logsumexp(scores, -1).float()

    def _scaled_dot_product_flash_attention(self, q, k, v, p, causal, debug, *, scale):
        return *self._run(q, k, v, None, scale), None, None, 0, 0, None, None, None

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, log, p, causal, *, scale):
        assert log
        out, lse = self._run(q, k, v, bias, scale)
        padded = F.pad(lse, (0, -lse.shape[-1] % 32), value=float("nan"))
        return out, padded, None, None

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, log, p, causal, debug, *, scale):
        assert log
        out, lse = self._run(q, k, v, bias, scale)
        return out, lse.unsqueeze(-1), None, None, 0, 0, None, None, None


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_layouts_are_read_right(name, monkeypatch):
    monkeypatch.setattr(log_sum_exp, "_aten", _Emulated())
    monkeypatch.setattr(log_sum_exp, "kernel_for", lambda *call: name)
    q, k, v = (x.transpose(1, 2) for x in _heads_first())
    out, lse = log_sum_exp.attention_with_lse(q, k, v, 0.25)
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) * 0.25
    assert relative(lse, torch.logsumexp(scores, -1)) < 1e-6
    assert relative(out, torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v.double())) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
def test_masks_are_laid_out_as_the_kernels_want_them(dtype, heads, monkeypatch):
    emulated = _Emulated()
    monkeypatch.setattr(log_sum_exp, "_aten", emulated)
    monkeypatch.setattr(log_sum_exp, "kernel_for", lambda *call: "efficient")
    q, k, v = (x.transpose(1, 2) for x in _heads_first(dtype=dtype))
    # a slice of a longer mask begins anywhere
    bias = torch.randn(2, heads, 1, 20)[..., 7:]
    out, _ = log_sum_exp.attention_with_lse(q, k, v, 0.25, bias)
    (laid_out,) = emulated.biases
    assert laid_out.shape == (2, 3, 50, 13)
    assert laid_out.dtype == dtype
    assert laid_out.stride(-1) == 1
    assert all(stride % 16 == 0 for stride in laid_out.stride()[:-1])
    assert laid_out.data_ptr() % 16 == 0
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.25 + bias.to(dtype)
    truth = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    assert max_error(out, truth) <= 4 * torch.finfo(dtype).eps * truth.abs().max()


def test_alignment_is_of_address_and_strides():
    x = torch.randn(2, 9, 3, 64)
    assert log_sum_exp.is_aligned(x)
    assert log_sum_exp.is_aligned(x[:, 1:])
    assert not log_sum_exp.is_aligned(x[..., 1:])
    assert not log_sum_exp.is_aligned(torch.randn(2, 9, 3, 66)[..., :64])
    assert log_sum_exp.is_aligned(torch.randn(2, 9, 3, 68)[..., :64])
    assert not log_sum_exp.is_aligned(torch.randn(2, 9, 3, 68).half()[..., :64])


# ---- how far from fp64 ----


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_chunks_do_not_matter(chunk, monkeypatch):
    monkeypatch.setattr(log_sum_exp, "_MAX_SCORES", chunk)
    monkeypatch.setattr(log_sum_exp, "_MAX_PRODUCTS", chunk)
    q, k, v = _heads_first(dtype=torch.float64, dim=16)
    out, lse = log_sum_exp.KERNELS["chunks"](q, k, v, None, 0.25)
    scores = q @ k.mT * 0.25
    assert relative(out, scores.softmax(-1) @ v) < 1e-12
    assert relative(lse, torch.logsumexp(scores, -1)) < 1e-12
    q, k, v = (torch.randn(2, 40, 3, 16, dtype=torch.float64) for _ in range(3))
    out = ops.perturbed_attention(q, k, v, num_attend=0, num_context=9)
    assert relative(out, _dense(q, k, v, 9)) < 1e-12


def _dense(q, k, v, num_context):
    """PyTorch's attention with a dense mask: what diffusers runs."""
    tokens = q.shape[1]
    image = torch.arange(tokens) < tokens - num_context
    hidden = image[:, None] & image & ~torch.eye(tokens, dtype=torch.bool)
    mask = torch.zeros(tokens, tokens, dtype=q.dtype).masked_fill(hidden, HIDDEN)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("sigma", [1, 4, 16, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ["cpu", "chunks"])
def test_error_of_joint_attention(kernel, dtype, sigma, monkeypatch, poisoned):
    """Scores beyond what fp16 holds, weights that bf16 would round before they are used."""
    monkeypatch.setattr(log_sum_exp, "kernel_for", lambda *call: kernel)
    q, k = ((sigma * torch.randn(2, 300, 4, 64)).to(dtype) for _ in range(2))
    v = torch.randn(2, 300, 4, 64).to(dtype)
    truth = _dense(q.double(), k.double(), v.double(), 44)
    out = ops.perturbed_attention(q, k, v, num_attend=0, num_context=44)
    assert_close_as_torch(out, _dense(q, k, v, 44), truth)


@pytest.mark.parametrize("sigma", [1, 48])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_chunks(dtype, sigma):
    """Attention itself, as the text's part of joint attention has it."""
    q, k = ((sigma * x).to(dtype) for x in _heads_first(keys=50)[:2])
    v = _heads_first(keys=50, dtype=dtype)[2]
    out, lse = log_sum_exp.KERNELS["chunks"](q, k, v, None, 0.125)
    same = F.scaled_dot_product_attention(q, k, v, scale=0.125)
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.125)
    flat = (x.transpose(1, 2) for x in (q, k, v))
    rounding = attention_rounding(*flat, 0.125).transpose(1, 2)
    assert_close_as_torch(out, same, truth, rounding)
    scores = q.double() @ k.double().mT * 0.125
    assert relative(lse, torch.logsumexp(scores, -1)) < 1e-6


@pytest.mark.parametrize("kernel", ["cpu", "chunks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt_that_is_all_padding(kernel, dtype, monkeypatch, poisoned):
    """Every text key hidden: an image query sees itself alone."""
    monkeypatch.setattr(log_sum_exp, "kernel_for", lambda *call: kernel)
    q, k, v = (torch.randn(2, 40, 3, 64).to(dtype) for _ in range(3))
    mask = torch.zeros(2, 1, 1, 40, dtype=dtype)
    mask[1, ..., 31:] = HIDDEN
    out = ops.perturbed_attention(q, k, v, num_attend=0, num_context=9, attn_mask=mask)
    assert torch.equal(out[1, :31], v[1, :31])
    assert not torch.equal(out[0, :31], v[0, :31])
    text, lse = log_sum_exp.attention_with_lse(q, k, v, 0.1, torch.full_like(mask, HIDDEN))
    assert torch.equal(text, torch.zeros_like(text))
    assert torch.equal(lse, torch.full_like(lse, HIDDEN))


def test_gradients_of_joint_attention():
    """A fused kernel's log-sum-exp has no derivative: they would be wrong."""
    leaves = [torch.randn(1, 20, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def gradients(run):
        return torch.autograd.grad((run(*leaves, 5) ** 2).sum(), leaves)

    def ours(q, k, v, num_context):
        return ops.perturbed_attention(q, k, v, num_attend=0, num_context=num_context)

    for found, expected in zip(gradients(ours), gradients(_dense), strict=True):
        assert relative(found, expected) < 1e-10
