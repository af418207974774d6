"""What others put on a model, and what `pag_fast.runtime.compatibility` answers."""

from __future__ import annotations

import ast
import functools
import gc
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import diffusers
import older
import pytest
import tiny
import tiny_hosts
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import (
    CpuOffload,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from diffusers.hooks import (
    HookRegistry,
    LayerSkipConfig,
    SmoothedEnergyGuidanceConfig,
    apply_group_offloading,
    apply_layer_skip,
)
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.hooks.layer_skip import TransformerBlockSkipHook as LayerSkip
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from torch import nn
from torch.nn.utils import parametrize

from pag_fast.runtime.compatibility import (
    UNKNOWN,
    Answer,
    Compatibility,
    Finding,
    combined,
    explain_lines,
    look,
    refuse,
    row_wise,
)
from pag_fast.sharing.replacement import Replacement
from pag_fast.sharing.rows import BranchState

WEIGHTS = Answer.WEIGHTS_APART | Answer.NOTHING_KEPT
CACHE = Answer.UNSHARED | Answer.KEEP_ROWS | Answer.MAY_SKIP
MODELS = {
    **{n: getattr(tiny, n) for n in ("unet", "motion_unet", "sd3", "hunyuan", "pixart", "sana")},
    **{
        n: getattr(tiny_hosts, n)
        for n in ("flux", "qwen", "wan", "ltx", "cogvideox", "hunyuan_video", "lumina2")
    },
    "controlnet": functools.partial(tiny.controlnet, False),
    "controlnet_xl": functools.partial(tiny.controlnet, True),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def _unet() -> Any:
    return tiny.unet().eval()


def _flux() -> Any:
    return tiny_hosts.flux().eval()


def _answers(model: nn.Module, **options: Any) -> dict[str, Answer]:
    return {finding.what: finding.answer for finding in look(model, **options)}


@pytest.mark.parametrize("name", MODELS)
def test_stock_model_gives_no_findings(name: str) -> None:
    model = MODELS[name]().eval()
    assert look(model) == ()
    if hasattr(model, "cache_context"):
        with model.cache_context("cond"):  # leaves empty registries behind
            assert look(model) == ()
    assert Compatibility().look(model) == ()


# ---- caches and other hooks of diffusers ----


def _pab() -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


def _taylor() -> Any:
    return diffusers.TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.ff"])


def _faster(distilled: bool) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        is_guidance_distilled=distilled,
    )


@pytest.mark.parametrize(
    ("what", "config", "answer", "apart"),
    [
        ("FirstBlockCache", lambda: diffusers.FirstBlockCacheConfig(0.2), CACHE, CACHE),
        (
            "MagCache",
            lambda: diffusers.MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4),
            CACHE,
            CACHE,
        ),
        ("TaylorSeerCache", _taylor, CACHE, CACHE),
        ("PyramidAttentionBroadcast", _pab, CACHE, Answer.REFUSE),
        ("FasterCache", lambda: _faster(True), CACHE, Answer.REFUSE),
        ("FasterCache", lambda: _faster(False), Answer.REFUSE, Answer.REFUSE),
    ],
)
def test_caches(what: str, config: Any, answer: Answer, apart: Answer) -> None:
    if not hasattr(diffusers, f"{what}Config"):
        pytest.skip(f"this diffusers has no {what}")
    model = tiny_hosts.cogvideox().eval()
    model.enable_cache(config())
    assert _answers(model) == {what: answer}
    assert _answers(model, passes_apart=True) == {what: apart}
    model.disable_cache()
    assert look(model) == ()


def test_layerwise_casting() -> None:
    model = _flux()
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    assert _answers(model) == {"layerwise casting": WEIGHTS}


@older.newest(older.GROUP_OFFLOADING)
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str) -> None:
    model = _flux()
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, cpu, cpu, offload_type=kind, **blocks)
    assert _answers(model) == {"group offloading": WEIGHTS}


def test_layer_skip_and_smoothed_energy() -> None:
    model = _flux()
    apply_layer_skip(model, LayerSkipConfig([1], fqn="transformer_blocks"))
    assert _answers(model) == {"layer skipping": Answer.UNSHARED | Answer.MAY_SKIP}
    model = _flux()
    hook = AttentionProcessorSkipHook(lambda *a, **k: None, skip_attention_scores=True)
    attention = model.transformer_blocks[1].attn
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(hook, "skip")
    with pytest.raises(ValueError, match="skip_attention_scores"):
        refuse(look(model))
    model = tiny_hosts.cogvideox().eval()
    energy = SmoothedEnergyGuidanceConfig([1], fqn="transformer_blocks")
    _apply_smoothed_energy_guidance_hook(model, energy, 1.0)
    answer = Answer.UNSHARED | Answer.WEIGHTS_APART
    assert _answers(model) == {"smoothed energy guidance": answer}


class _Hook(diffusers.hooks.ModelHook):
    pass


def test_hook_of_a_user_in_a_registry() -> None:
    model = _flux()
    HookRegistry.check_if_exists_or_initialize(model.proj_out).register_hook(_Hook(), "mine")
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and finding.where == "proj_out" and "_Hook" in finding.what


def test_split_inference_is_refused() -> None:
    model: Any = tiny.motion_unet().eval()

    class SplitInferenceModule(nn.Module):
        pass

    class Derived(SplitInferenceModule):
        pass

    model.extra = Derived()
    with pytest.raises(ValueError, match="enable_free_noise"):
        refuse(look(model))


# ---- accelerate ----


def test_accelerate_offloading() -> None:
    model = _unet()
    cpu_offload(model, torch.device("cpu"))
    answers = _answers(model)
    assert answers == {
        "offloading of accelerate, layer by layer": WEIGHTS,
        "offloaded weights": WEIGHTS,
        **({"a device map": Answer.WEIGHTS_APART} if "a device map" in answers else {}),
    }
    remove_hook_from_module(model, recurse=True)
    model = _unet()
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert _answers(model) == {"a device map": Answer.WEIGHTS_APART}


@pytest.mark.parametrize("chained", [False, True])
def test_offloading_of_whole_models(chained: bool) -> None:
    model = _unet()
    hook: Any = CpuOffload("cpu")
    add_hook_to_module(model, SequentialHook(hook, ModelHook()) if chained else hook)
    assert _answers(model) == {"offloading of whole models": Answer.WEIGHTS_APART}
    remove_hook_from_module(model)
    assert look(model) == ()


class _Watching(ModelHook):
    pass


def test_unknown_hook_of_accelerate_and_a_wrapper_on_top_and_below() -> None:
    model = _unet()
    add_hook_to_module(model.mid_block, _Watching())
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and "_Watching" in finding.what
    for below in (True, False):
        model = _unet()
        if below:
            _wrap(model.mid_block)
        add_hook_to_module(model.mid_block, ModelHook())
        if not below:
            assert look(model) == ()  # the base class does nothing
            _wrap(model.mid_block)
        (finding,) = look(model)
        assert finding.answer == UNKNOWN and finding.what.startswith("a forward replaced by")


def test_mixed_precision_of_accelerate() -> None:
    from accelerate import Accelerator

    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(
        _unet(), evaluation_mode=True
    )
    assert _answers(model) == {"mixed precision of accelerate": WEIGHTS}


# ---- hooks, forwards, classes ----


def _wrap(module: nn.Module) -> None:
    own = module.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]


class _Cached:
    """A callable object in place of a forward."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


def _replace_class(module: nn.Module) -> None:
    base: Any = type(module)

    class Faster(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    module.__class__ = Faster


def _bound(module: Any) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    module.forward = forward.__get__(module)


UNKNOWNS = {
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _, args: None),
    "pre-hook with keywords": lambda m: m.register_forward_pre_hook(
        lambda _, args, kwargs: None, with_kwargs=True
    ),
    "hook": lambda m: m.register_forward_hook(lambda _, args, out: None),
    "partial hook": lambda m: m.register_forward_hook(functools.partial(lambda *a: None)),
    "object as a hook": lambda m: m.register_forward_hook(_Cached(lambda *a: None)),
    "wrapped forward": _wrap,
    "bound forward": _bound,
    "object as a forward": lambda m: setattr(m, "forward", _Cached(m.forward)),
    "partial": lambda m: setattr(m, "forward", functools.partial(_Cached(m.forward))),
    "class": _replace_class,
}


@pytest.mark.parametrize("how", UNKNOWNS)
@pytest.mark.parametrize("where", ["", "mid_block", "mid_block.attentions.0.proj_in"])
def test_what_is_unknown_runs_unshared(how: str, where: str) -> None:
    model = _unet()
    watch = Compatibility()
    assert watch.look(model) == ()
    UNKNOWNS[how](model.get_submodule(where))
    (finding,) = look(model)
    # torch's hooks of the model itself see every row: what they hand on is compared again
    outermost = UNKNOWN if where or "hook" not in how else Answer.KEEP_ROWS
    if outermost != UNKNOWN and "pre-hook" in how:
        outermost |= Answer.RECHECK | Answer.WEIGHTS_APART | Answer.NOTHING_KEPT
    assert finding.answer == outermost
    assert finding.where == (where or "the model itself")
    assert "test_compatibility" in finding.what
    assert watch.look(model) == (finding,)


def test_function_put_on_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, watch = _unet(), Compatibility()
    assert watch.look(model) == ()
    cls: Any = type(model.mid_block)
    own = cls.forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", forward)
        (finding,) = watch.look(model)
        assert finding.answer == UNKNOWN and finding.where == "mid_block"
    assert watch.look(model) == ()


def test_wrapper_module_and_renamed_classes() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    model = _unet()
    model.mid_block = Wrapper(model.mid_block)
    assert [f.answer for f in look(model)] == [UNKNOWN]
    model = _unet()
    base: Any = type(model.mid_block)
    model.mid_block.__class__ = type("Renamed", (base,), {})
    assert look(model) == ()


def test_global_hook() -> None:
    model, watch = _unet(), Compatibility()
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert combined(watch.look(model)) == UNKNOWN == combined(look(model))
    finally:
        handle.remove()
    assert watch.look(model) == ()


class _Twice(Replacement):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def test_our_own_replacements_are_none_of_others() -> None:
    model: Any = _unet()
    model.mid_block.forward = _Twice(BranchState(), model.mid_block)
    assert look(model) == ()
    add_hook_to_module(model.mid_block, ModelHook())  # captures ours
    assert look(model) == ()
    _wrap(model.conv_in)
    ours = _Twice(BranchState(), model.conv_in)
    ours.displace(vars(model.conv_in)["forward"])
    model.conv_in.forward = ours  # on top of another's
    assert [f.where for f in look(model)] == ["conv_in"]


def test_what_is_said_to_be_row_wise() -> None:
    model: Any = _unet()
    block = model.mid_block
    block.register_forward_hook(row_wise(lambda *a: None))
    block.register_forward_pre_hook(row_wise(functools.partial(lambda *a: None)))
    block.forward = row_wise(_Cached(block.forward))
    model.conv_in = row_wise(type("Mine", (nn.Conv2d,), {"forward": _forward}))(4, 8, 3)
    attention = block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(row_wise(_Store()))
    assert look(model) == ()
    marked = row_wise(lambda *a: None)

    @functools.wraps(marked)
    def wrapper(*args: Any) -> None:
        marked(*args)

    block.register_forward_hook(wrapper)  # a wrapper is another thing
    assert [f.answer for f in look(model)] == [UNKNOWN]


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def test_entry_of_a_patched_model_and_that_of_another() -> None:
    model: Any = _unet()
    model._compiled_call_impl = _Twice(BranchState(), model)
    assert look(model) == ()
    model._compiled_call_impl = _Cached(model._call_impl)
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and "a call replaced by" in finding.what


# ---- weights ----


def test_adapters_are_fine() -> None:
    from peft import LoraConfig

    model, watch = _flux(), Compatibility()
    assert watch.look(model) == ()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "proj_out"]))
    model.eval()
    assert look(model) == () == watch.look(model)


def test_freeu_and_fused_projections_are_fine() -> None:
    model = _unet()
    model.enable_freeu(0.9, 0.2, 1.2, 1.4)
    model.fuse_qkv_projections()
    assert look(model) == ()


class _Double(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_computed_weights() -> None:
    model, watch = _flux(), Compatibility()
    assert watch.look(model) == ()
    parametrize.register_parametrization(model.proj_out, "weight", _Double())
    assert _answers(model) == {"a parametrized weight": WEIGHTS}
    assert combined(watch.look(model)) == WEIGHTS
    model = _flux()
    torch.nn.utils.weight_norm(model.proj_out)
    assert _answers(model) == {"a normalised or pruned weight": WEIGHTS}


class _Packed(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_quantized_weights() -> None:
    model, watch = _flux(), Compatibility()
    assert watch.look(model) == ()
    packed = model.proj_out.weight.data.as_subclass(_Packed)  # as torchao's quantize_ does
    model.proj_out.weight = nn.Parameter(packed, requires_grad=False)
    assert _answers(model) == {"quantized layers": WEIGHTS}
    assert combined(watch.look(model)) == WEIGHTS
    model = _flux()
    cls = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.proj_out.__class__ = cls
    assert _answers(model) == {"quantized layers": WEIGHTS}


# ---- processors ----


class _Store:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return hidden_states


class _Derived(diffusers.models.attention_processor.AttnProcessor2_0):
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kw: Any) -> Any:
        return hidden_states


@pytest.mark.parametrize("processor", [_Store, _Derived])
def test_unknown_processor(processor: Any) -> None:
    model, watch = _unet(), Compatibility()
    assert watch.look(model) == ()
    model.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(processor())
    (finding,) = look(model)
    assert finding.answer == UNKNOWN and finding.where.endswith("attn2")
    assert watch.look(model) == (finding,)


def test_processors_that_are_known() -> None:
    model: Any = _unet()
    cls = type("CrossFrameAttnProcessor2_0", (), {"__module__": "diffusers.pipelines"})
    model.mid_block.attentions[0].transformer_blocks[0].attn1.processor = cls()
    with pytest.raises(ValueError, match="set_default_attn_processor"):
        refuse(look(model))
    model = _flux()
    if hasattr(model, "set_attention_backend"):
        model.set_attention_backend("native")
        assert set(_answers(model).values()) == {Answer.FINE}
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    assert "context parallelism" in _answers(model)


# ---- around the model ----


def test_surroundings() -> None:
    model, watch = _unet(), Compatibility()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {f.what: f.answer for f in watch.look(model)} == {"torch.autocast": WEIGHTS}
    torch.use_deterministic_algorithms(True)
    try:
        assert {f.answer for f in watch.look(model)} == {Answer.FINE}
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.look(model) == ()
    with torch.enable_grad():
        assert {f.what for f in watch.look(model)} == {"gradients"}
        model.requires_grad_(False)
        assert watch.look(model) == ()
    model.train()
    assert combined(watch.look(model)) == WEIGHTS
    dropout = next(m for m in model.modules() if isinstance(m, nn.Dropout))
    dropout.p = 0.5
    assert combined(Compatibility().look(model)) == UNKNOWN
    model.enable_gradient_checkpointing()
    with torch.enable_grad(), pytest.raises(ValueError, match="checkpointing"):
        refuse(look(model))


def test_compiled_parts_are_fine() -> None:
    model: Any = _unet()
    model.mid_block.forward = torch.compile(model.mid_block.forward, backend="eager")
    model.conv_in.compile(backend="eager")
    assert _answers(model) == {"torch.compile": Answer.FINE}
    _wrap(model.conv_out)
    model.conv_out.forward = torch.compile(model.conv_out.forward, backend="eager")
    assert combined(look(model)) == UNKNOWN


# ---- the watch ----


def test_watch_sees_what_comes_and_goes() -> None:
    model, watch = _flux(), Compatibility()
    assert watch.look(model) == ()
    model.enable_cache(diffusers.FirstBlockCacheConfig(0.2))
    assert combined(watch.look(model)) == CACHE
    block = model.transformer_blocks[0]
    block._diffusers_hook.register_hook(diffusers.hooks.ModelHook(), "above")
    assert combined(watch.look(model)) == UNKNOWN
    block._diffusers_hook.remove_hook("above")
    assert combined(watch.look(model)) == CACHE
    model.disable_cache()
    assert watch.look(model) == ()
    handle = block.attn.register_forward_hook(lambda *a: None)
    assert combined(watch.look(model)) == UNKNOWN
    handle.remove()
    handle = block.attn.to_q.register_forward_hook(lambda *a: None)
    assert [f.where for f in watch.look(model)] == ["transformer_blocks.0.attn.to_q"]
    handle.remove()
    assert watch.look(model) == ()
    block.attn.to_q = nn.Linear(16, 16)
    _wrap(block.attn.to_q)  # of a module that came later, in the place of its like
    assert [f.where for f in watch.look(model)] == ["transformer_blocks.0.attn.to_q"]


def test_watch_sees_a_hook_go_from_below_another_and_a_mark_on_the_model() -> None:
    model, watch = _flux(), Compatibility()
    model.enable_cache(diffusers.FirstBlockCacheConfig(0.2))
    registry = model.transformer_blocks[0]._diffusers_hook
    registry.register_hook(LayerSkip(dropout=1.0), "above")
    assert [f.what for f in watch.look(model)][:2] == ["FirstBlockCache", "layer skipping"]
    registry.remove_hook("fbc_leader_block_hook", recurse=False)
    assert watch.look(model)[0].what == "layer skipping"
    model = _flux()
    assert watch.look(model) == ()
    model._parallel_config = object()
    assert [f.what for f in watch.look(model)] == ["context parallelism"]


@older.newest("its cache_context gives the model a registry of hooks")
def test_watch_looks_again_only_when_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pag_fast.runtime import compatibility

    looked = []
    own = compatibility.attached
    monkeypatch.setattr(compatibility, "attached", lambda *a, **k: looked.append(a) or own(*a, **k))
    model, watch = _flux(), Compatibility()
    model.enable_cache(diffusers.FirstBlockCacheConfig(0.2))
    first = watch.look(model)
    with model.cache_context("cond"):
        assert watch.look(model) == first == watch.look(model)
    assert len(looked) == 1
    _wrap(model.proj_out)
    watch.look(model)
    assert len(looked) == 2


def test_watch_does_not_hold_the_model() -> None:
    model, watch = _unet(), Compatibility()
    watch.look(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_lines_for_explain() -> None:
    findings = (
        Finding("a", "", Answer.FINE, "nothing."),
        Finding("b", "x and 2 more", UNKNOWN, "unshared."),
    )
    assert explain_lines(findings) == ("b (x and 2 more): unshared.", "a: nothing.")
    refuse(findings)
    assert explain_lines(()) == ()


# ---- several processes ----

_PARALLEL = """
import torch, torch.distributed as dist
import tiny_hosts
from diffusers import ContextParallelConfig
from pag_fast.runtime.compatibility import look
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

torch.set_grad_enabled(False)
torch.accelerator.device_count = lambda: 1
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))

def fsdp(model):
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

def context(model):
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))

def tensor(model):
    parallelize_module(model, mesh, {"transformer_blocks.0.attn.to_q": ColwiseParallel()})

def distributed(model):
    distribute_module(model.proj_out, mesh)

for case in (fsdp, context, tensor, distributed):
    model = tiny_hosts.flux().eval()
    case(model)
    if dist.get_rank() == 0:
        print("got", case.__name__, {f.what: f.answer.name for f in look(model)}, flush=True)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not hasattr(diffusers, "ContextParallelConfig"), reason="diffusers is older")
def test_parallelism(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path[:0] = {sys.path!r}\n" + _PARALLEL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    run = subprocess.run(
        [sys.executable, *launch, str(script)], capture_output=True, text=True, timeout=300
    )
    lines = [line.split(maxsplit=2)[1:] for line in run.stdout.splitlines() if "got " in line]
    found = {name: ast.literal_eval(answers) for name, answers in lines}
    apart = "WEIGHTS_APART|NOTHING_KEPT"
    assert found == {
        "fsdp": {"FSDP": apart, "weights held in parts": apart},
        "context": {"context parallelism": "FINE"},
        "tensor": {"tensor parallelism": apart},
        "distributed": {"tensor parallelism": apart},
    }, run.stderr[-2000:]
