"""The ops on the Triton backend, in the interpreter: as ops, compiled, and which calls it takes."""

from __future__ import annotations

import json

import pytest
import torch
from launches import launches  # noqa: F401
from pag_fast_kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode

from pag_fast import PatchConfig, ops
from pag_fast.ops import backend as backends
from pag_fast.ops import reference
from pag_fast.ops.perturbed_attention import attention_backend

QKV = (2, 21, 2, 16)


def _attention(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    return lambda: ops.perturbed_attention(q[:1], k[:1], v, num_attend=1, backend=backend)


def _attention_(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    return lambda: ops.perturbed_attention_(
        q, k, v.clone(), num_attend=1, num_context=5, backend=backend
    )


def _fork(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    return lambda: ops.perturbed_attention(
        q, k, v, num_attend=2, num_context=5, num_forked=1, backend=backend
    )


def _soft(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    strength = torch.rand(2)
    return lambda: ops.perturbed_attention(
        q, k, v, num_attend=1, perturbation="soft", strength=strength, backend=backend
    )


def _blur(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    return lambda: ops.perturbed_attention(
        q, k, v, num_attend=1, perturbation="blur", backend=backend
    )


def _noisy(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    clock = torch.zeros(1, dtype=torch.int64)
    return lambda: ops.noisy_attention(q, k, v, clock=clock, seed=3, backend=backend)


def _masked(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    mask = torch.randn(1, 1, 1, QKV[1])
    return lambda: ops.perturbed_attention(
        q[:1], k[:1], v, num_attend=1, attn_mask=mask, backend=backend
    )


def _linear(backend):
    q, k, v = torch.randn(3, *QKV).unbind()
    return lambda: ops.linear_attention(q[:1], k[:1], v, num_attend=1, backend=backend)


def _norm(backend):
    q, k = torch.randn(2, *QKV).unbind()
    affine = (torch.randn(QKV[3]), torch.randn(QKV[3]))
    rotary = (torch.randn(QKV[1], QKV[3]), torch.randn(QKV[1], QKV[3]))

    def run():
        a, b = q.clone(), k.clone()
        ops.qk_norm_rope_(a, b, q_affine=affine, k_affine=affine, rotary=rotary, backend=backend)
        return torch.cat([a, b])

    return run


def _combine(backend):
    u, c, p = torch.randn(6, 4, 8, 8).chunk(3)
    return lambda: ops.combine_guidance(
        u, c, p, guidance_scale=7.0, pag_scale=3.0, rescale=0.5, backend=backend
    )


def _received(backend):
    q, k, _ = torch.randn(3, *QKV).unbind()
    return lambda: ops.received_attention(q, k, backend=backend)


def _degrade(backend):
    sample, output = torch.randn(2, 1, 2, 5, 6).unbind()
    received, blur = 2 * torch.rand(1, 6), reference.gaussian_kernel(2, 3)
    return lambda: ops.degrade_latents(
        sample,
        output,
        received,
        blur,
        map_size=(2, 3),
        clean=(1.2, -0.5),
        noise=(0.1, 0.7),
        backend=backend,
    )


CALLS = [_attention, _attention_, _fork, _soft, _blur, _noisy, _masked, _linear, _norm, _combine]
CALLS += [_received, _degrade]
by_name = pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__.strip("_"))


@by_name
def test_backends_agree(make, launches, poisoned):  # noqa: F811
    outputs = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        before = len(launches)
        outputs.append(make(backend)())
        assert (len(launches) > before) == (backend == "triton")
    assert torch.isfinite(outputs[0]).all()
    assert torch.allclose(*outputs, atol=1e-5)


@by_name
def test_compiles_whole(make, launches):  # noqa: F811
    run = make("triton")
    expected = run()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(), expected, atol=1e-5)


def test_opcheck(launches):  # noqa: F811
    q, k, v = torch.randn(3, *QKV).unbind()
    op = torch.ops.pag_fast
    cases = [
        (op.perturbed_attention, (q[:1], k[:1], v, 1, 0, None, None, 0, "identity", None)),
        (op.perturbed_attention, (q, k, v, 2, 5, None, None, 1, "identity", None)),
        (op.perturbed_attention, (q, k, v, 1, 0, None, 0.3, 0, "soft", torch.rand(2))),
        (op.perturbed_attention, (q, k, v, 1, 0, None, 0.3, 0, "blur", None)),
        (op.noisy_attention, (q, k, v, torch.zeros(1).long(), 2, 3, 0.5, None, 0.3, 0)),
        (op.linear_attention, (q[:1], k[:1], v, 1, 0)),
        (op.combine_guidance, (q, k, v, 7.0, 3.0, 0.7)),
        (op.received_attention, (q, k, 0.3)),
        (op.qk_norm_rope_, (q.clone(), k.clone(), *(None,) * 6, True, 1e-6)),
    ]
    for name, arguments in cases:
        torch.library.opcheck(name.default, (*arguments, "triton"))
    for mode in ("full", "partial"):
        arguments = (q, k, v, 7.0, 3.0, 0.7, "triton", mode)
        torch.library.opcheck(op.combine_guidance.default, arguments)


def test_scales_do_not_recompile(launches):  # noqa: F811
    """The scales reach the kernel as fp32 numbers, whatever step they are from."""
    u, c, p = torch.randn(3, 2, 4, 8, 8).unbind()
    for g, s in ((1.0, 0.0), (7.5, 3.0), (2, 1)):
        out = ops.combine_guidance(u, c, p, guidance_scale=g, pag_scale=s, backend="triton")
        assert torch.allclose(out, reference.combine_guidance(u, c, p, g, s), atol=1e-5)


# ---- which backend ----


@by_name
def test_auto_compiles_whole_too(make):
    """On the CPU that means PyTorch; the choice itself is traced."""
    run = make("auto")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(), run(), atol=1e-5)


def test_the_table_is_asked_while_compiling(monkeypatch, launches):  # noqa: F811
    """Constants of the graph: neither a break nor a guard."""
    asked = []
    monkeypatch.setattr(backends, "_LEFT_ALONE", ())
    monkeypatch.setattr(launch, "supports", lambda device_type, index: True)
    faster = launch.Measured("triton", launch.Config(16, 16, 4, 1))
    table = {launch.call_key(torch.float32, QKV[3], QKV[1], 2, 1, 0): faster}
    monkeypatch.setattr(launch, "measured_on", lambda *device: asked.append(device) or table)
    run = _attention("auto")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(), run(), atol=1e-5)
    assert asked


def _on_gpu(dtype=torch.float16, tokens=1024, head_dim=64, rows=3):
    return torch.empty(rows, tokens, 10, head_dim, dtype=dtype, device="cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that the kernels run on, as far as the choice of a backend can tell."""
    table = {}
    monkeypatch.setattr(launch, "supports", lambda device_type, index: device_type == "cuda")
    monkeypatch.setattr(launch, "measured_on", lambda device_type, index: table)
    with FakeTensorMode():
        yield table


def test_auto_on_a_chip_without_a_table(gpu):
    for arguments in ({}, {"num_context": 77}, {"perturbation": "blur"}):
        assert attention_backend("auto", _on_gpu(), num_attend=2, **arguments) == "torch"
    assert attention_backend("triton", _on_gpu(), num_attend=2) == "triton"
    assert ops.resolve_backend("auto", _on_gpu(), default="triton") == "torch"


def test_auto_where_the_table_is_silent(gpu):
    gpu["something else"] = None
    v = _on_gpu()
    assert ops.resolve_backend("auto", v, default="triton") == "triton"
    assert attention_backend("auto", v, num_attend=2) == "torch"
    assert attention_backend("auto", v, num_attend=2, num_context=77) == "triton"
    assert attention_backend("auto", v, num_attend=2, perturbation="blur") == "triton"
    # three passes of the tensor cores and small tiles: no match for PyTorch
    wide = _on_gpu(torch.float32)
    assert attention_backend("auto", wide, num_attend=2, num_context=77) == "torch"
    assert attention_backend("auto", _on_gpu(torch.float64), num_attend=2) == "torch"
    assert attention_backend("auto", _on_gpu(head_dim=512), num_attend=2) == "torch"
    mask = torch.empty(2, 1, 1024, 1024, device="cuda")
    assert attention_backend("auto", v, num_attend=2, attn_mask=mask) == "torch"
    assert attention_backend("auto", torch.empty(3, 9, 2, 64), num_attend=2) == "torch"


def test_auto_asks_the_table(gpu):
    tile = launch.Config(64, 64, 4, 3)
    gpu[launch.call_key(torch.float16, 64, 1024, 3, 2, 0)] = launch.Measured("triton", tile)
    assert attention_backend("auto", _on_gpu(), num_attend=2) == "triton"
    assert attention_backend("auto", _on_gpu(tokens=700), num_attend=2) == "triton"
    assert attention_backend("auto", _on_gpu(tokens=1025), num_attend=2) == "torch"
    assert attention_backend("auto", _on_gpu(rows=2), num_attend=1) == "torch"
    assert attention_backend("auto", _on_gpu(rows=2), num_attend=2) == "torch"
    assert attention_backend("torch", _on_gpu(), num_attend=2) == "torch"


def test_read_table(tmp_path):
    entry = {
        "dtype": "float16",
        "head_dim": 64,
        "tokens": 1024,
        "attend_per_perturbed": 2,
        "joint": False,
        "backend": "triton",
        "config": [128, 64, 4, 3],
    }
    path = tmp_path / "chip.json"
    assert launch.read_table(path) == {}
    path.write_text(json.dumps({"attention": [entry]}))
    key = launch.call_key(torch.float16, 64, 600, 6, 4, 0)
    assert launch.read_table(path) == {key: launch.Measured("triton", launch.Config(128, 64, 4, 3))}


def test_shipped_tables_are_readable():
    for path in launch.CONFIGS.glob("*.json"):
        assert launch.read_table(path), path.name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb")],
)
def test_chip_name(name, expected):
    assert launch.chip_name(name) == expected


def test_launches_go_to_the_tensors_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        near, far = (torch.empty(1, device=f"cuda:{index}") for index in (0, 1))
    assert not isinstance(launch.on_device(torch.empty(1)), torch.cuda.device)
    assert not isinstance(launch.on_device(near), torch.cuda.device)
    assert launch.on_device(far).idx == 1


def test_explicit_triton_where_it_cannot_run():
    q, k, v = torch.randn(3, *QKV, dtype=torch.float64).unbind()
    with pytest.raises(ValueError, match=r"cannot run this call on .* in torch\.float64"):
        ops.perturbed_attention(q[:1], k[:1], v, num_attend=1, backend="triton")
    q, k, v = q.float(), k.float(), v.float()
    mask = torch.zeros(1, 1, QKV[1], QKV[1])
    with pytest.raises(ValueError, match="no mask but a bias per key"):
        ops.perturbed_attention(q[:1], k[:1], v, num_attend=1, attn_mask=mask, backend="triton")


def test_explicit_triton_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "_installed", lambda: False)
    with pytest.raises(ValueError, match=r"needs triton 3\.6 or newer"):
        PatchConfig(backend="triton")
    PatchConfig(backend="auto")
