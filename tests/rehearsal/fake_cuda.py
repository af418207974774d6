"""A ``cuda`` of CPU tensors: enough of one to rehearse on any machine what will run on a GPU.

Every storage has a device here, the CPU or cuda:0, and :class:`Devices` refuses what a GPU would
refuse: tensors of both in one op, a generator of the CPU for numbers on the GPU, a NumPy view.
Values are the CPU's, Triton's kernels run in its interpreter, and the clock is simulated: a sleep
keeps the GPU busy, and events behind it come later. ``torch.compile`` compiles nothing.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from pag_fast.runtime.compatibility import row_wise

NAME = "NVIDIA Rehearsal"
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
_MOVES = ("to", "cuda", "cpu", "type_as")
# an index, or what is written, may come from the other side
_MIXES = ("__getitem__", "__setitem__", "copy_", "set_", "new_tensor", "as_tensor", "tensor")
_MIXES += ("_has_compatible_shallow_copy_type",)
_PLAIN = ("shape", "dtype", "ndim", "requires_grad", "layout", "is_leaf", "_version", "is_sparse")
_PLAIN += ("is_quantized", "is_meta", "is_nested", "grad_fn", "names")
_FACTORIES = {function.__name__ for function in _device._device_constructors()}

on_gpu: dict[int, StorageWeakRef] = {}  # weakly: an address is taken again only when it is gone


def device_of(tensor: torch.Tensor) -> torch.device:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return tensor.device
    return GPU if tensor.untyped_storage()._cdata in on_gpu else CPU


def _mark(tensor: torch.Tensor, device: torch.device) -> None:
    if device.type != "cuda":
        return
    if tensor.layout == torch.strided and tensor.device.type == "cpu":
        storage = tensor.untyped_storage()
        on_gpu.setdefault(storage._cdata, StorageWeakRef(storage))
    if len(on_gpu) > _forget.limit:
        _forget()


def _forget() -> None:
    for key in [key for key, reference in on_gpu.items() if reference.expired()]:
        del on_gpu[key]
    _forget.limit = 2 * len(on_gpu) + 10_000


_forget.limit = 10_000


def _tensors(values: Any) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


@row_wise
class Devices(TorchFunctionMode):
    """Keeps account of where every tensor would be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name == "__get__" and func.__self__.__name__ in _PLAIN:
            return func(*args)
        kwargs = dict(kwargs or {})
        if active_fake_mode() is not None:  # which knows devices itself
            return func(*args, **kwargs)
        if name in ("__get__", "__set__", "__delete__"):
            return _attribute(func, name, args)
        if name in ("numpy", "__array__") and device_of(args[0]).type == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "get_device":
            return {"cuda": 0}.get(device_of(args[0]).type, -1)
        if name in _MOVES:
            return _move(func, name, args, kwargs)
        tensors = _tensors([*args, *kwargs.values()])
        device = _result_device(name, tensors, kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != device.type:
            raise RuntimeError(
                f"Expected a '{device.type}' device type for generator but found "
                f"'{generator.device.type}'"
            )
        if kwargs.get("device") is not None or name in _FACTORIES:
            kwargs["device"] = CPU if device.type == "cuda" else device
        out = func(*args, **kwargs)
        for tensor in _tensors([out]):
            _mark(tensor, device)
        return out


def _attribute(func: Any, name: str, args: Any) -> Any:
    attribute = func.__self__.__name__
    if name == "__get__" and attribute == "device":
        return device_of(args[0])
    if name == "__get__" and attribute == "is_cuda":
        return device_of(args[0]).type == "cuda"
    out = getattr(func.__self__, name)(*args)
    if name == "__get__" and isinstance(out, torch.Tensor):
        _mark(out, device_of(args[0]))
    return out


def _result_device(name: str, tensors: list[torch.Tensor], kwargs: Any) -> torch.device:
    wish = kwargs.get("device")
    if wish is not None:
        return torch.device(wish)
    if name in _FACTORIES:
        return torch.device(_device.CURRENT_DEVICE or CPU)
    devices = [device_of(tensor) for tensor in tensors]
    kinds = {d.type for d, tensor in zip(devices, tensors, strict=True) if tensor.dim()}
    if {"cpu", "cuda"} <= kinds and name not in _MIXES:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu, in {name}: {[str(d) for d in devices]}"
        )
    if name in _MIXES and devices:
        return devices[0]
    return next((device for device in devices if device.type != "cpu"), CPU)


def _move(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    before = device_of(tensor)
    if name in ("cuda", "cpu"):
        func, rest, kwargs = torch.Tensor.to, ["cuda:0" if name == "cuda" else "cpu"], {}
    device = before
    for index, wish in enumerate(rest):
        if isinstance(wish, torch.Tensor):
            device = device_of(wish)
        elif isinstance(wish, str | torch.device) or type(wish) is int:
            device, rest[index] = _wished(wish)
    if kwargs.get("device") is not None:
        device, kwargs["device"] = _wished(kwargs["device"])
    out = func(tensor, *rest, **kwargs)
    shares = out.layout == torch.strided and out.device.type == "cpu" == tensor.device.type
    shares = shares and out.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    if shares and device.type != before.type:
        out = out.clone()
    _mark(out, device)
    return out


def _wished(wish: Any) -> tuple[torch.device, torch.device]:
    """The device that somebody asks for, and where its tensors are."""
    device = GPU if type(wish) is int else torch.device(wish)
    return device, CPU if device.type == "cuda" else device


_original_set = torch.Tensor.set_


def _set(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    device = device_of(self)
    _original_set(self, *args, **kwargs)
    _mark(self, device)
    return self


# ---- attention: ATen's ops of fused kernels, which the CPU does not have ----


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    out = torch.softmax(scores, -1) @ v.float()
    return out.to(q.dtype), torch.logsumexp(scores, -1)


def _flash(q: Any, k: Any, v: Any, *rest: Any, scale: float) -> Any:
    out, lse = _attention(q, k, v, None, scale)
    none = torch.empty(0)
    return out, lse, none, none, q.shape[2], k.shape[2], none, none, none


def _efficient(q: Any, k: Any, v: Any, bias: Any, *rest: Any, scale: float) -> Any:
    out, lse = _attention(q, k, v, bias, scale)
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    return out, lse, torch.empty(0), torch.empty(0)


_library = torch.library.Library("aten", "IMPL")


def _install_attention() -> None:
    _library.impl("_scaled_dot_product_flash_attention", _flash, "CPU")
    _library.impl("_scaled_dot_product_efficient_attention", _efficient, "CPU")


# ---- the clock ----

RATE = 2e9  # cycles a second
_busy_until = 0.0
slept: list[int] = []


def _sleep(cycles: int) -> None:
    global _busy_until
    slept.append(cycles)
    _busy_until = max(_busy_until, time.perf_counter()) + cycles / RATE


def _synchronize(device: Any = None) -> None:
    time.sleep(max(0.0, _busy_until - time.perf_counter()))


class Event:
    """Comes when the CPU has recorded it and the GPU sleeps no more."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = self.comes = 0.0

    def record(self, stream: Any = None) -> None:
        self.recorded = time.perf_counter()
        self.comes = max(self.recorded, _busy_until)

    def query(self) -> bool:
        return time.perf_counter() >= self.comes

    def synchronize(self) -> None:
        _synchronize()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * max(end.recorded - self.recorded, 1e-7)


def install() -> None:
    """For the rest of this process, on its main thread."""
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=2**37, multi_processor_count=132
    )
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": _synchronize,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 2**30,
        "memory_allocated": lambda *_: 2**29,
        "Event": Event,
        "_sleep": _sleep,
    }
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.synchronize = _synchronize
    torch.Tensor.set_ = _set  # which no mode sees
    torch.compile = lambda model=None, **_: model if model is not None else (lambda m: m)
    _install_attention()
    Devices().__enter__()


def install_kernels(launch: Any) -> None:
    """``pag_fast_kernels.launch`` takes the fake for a GPU, with the interpreter's tiles."""
    launch.supports = lambda device_type, index: device_type == "cuda"
    launch.generation = lambda device_type, index: "cpu"
