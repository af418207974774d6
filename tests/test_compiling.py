"""``patch(pipe, compile=...)``: compiled in place, warmed, and undone."""

from __future__ import annotations

import pytest
import tiny
import tiny_hosts
import torch
from numerics import relative
from shallow import build, least
from tiny import PIPELINES, call_kwargs, latents
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

import pag_fast
from pag_fast import CompileConfig
from pag_fast.models.registry import repeated_blocks
from pag_fast.runtime.compiled.compilation import Compilation, _repeated
from pag_fast.sharing.plan import compiled_call

UNET, CONTROLNET = "StableDiffusionPAGPipeline", "StableDiffusionControlNetPAGPipeline"
SD3 = "StableDiffusion3PAGPipeline"
EAGER = CompileConfig(backend="eager")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# test_compile.py has every family, compiled by the user; a ControlNet has a UNet behind it
@pytest.mark.parametrize("name", [SD3, CONTROLNET])
def test_one_graph_for_prompts_scales_and_calls(name, snapshot):
    pipe, _ = least(name)
    stock = latents(pipe, call_kwargs(name, pipe))
    before = snapshot(pipe)
    pag_fast.patch(pipe, compile=EAGER)
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    wanted = 2 if name == CONTROLNET else 1
    assert graphs() == wanted
    changed = {"seed": 1, "pag_scale": 1.5, "guidance_scale": 3.0, "steps": 3}
    latents(pipe, call_kwargs(name, pipe, **changed))
    assert relative(latents(pipe, call_kwargs(name, pipe)), stock) < 1e-5
    assert graphs() == wanted
    pag_fast.unpatch(pipe)
    assert snapshot(pipe) == before
    for p in getattr(pipe, PIPELINES[name].denoiser).parameters():
        assert p.is_contiguous()
    assert torch.equal(latents(pipe, call_kwargs(name, pipe)), stock)


def test_attention_arguments_of_a_call():
    """Dynamo cannot read a stored signature once it has seen diffusers take such a dict apart."""
    name = SD3
    pipe, _ = least(name)
    arguments = {"joint_attention_kwargs": {"scale": 1.0}}
    stock = latents(pipe, call_kwargs(name, pipe, **arguments))
    pag_fast.patch(pipe, compile=pag_fast.CompileConfig(backend="eager"))
    assert relative(latents(pipe, call_kwargs(name, pipe, **arguments)), stock) < 1e-5


@torch.backends.mkldnn.flags(enabled=True)  # as users have it
def test_inductor():
    """Of a UNet; ``test_compile.py`` has a transformer."""
    pipe, _ = least(UNET)
    stock = latents(pipe, call_kwargs(UNET, pipe))
    pag_fast.patch(pipe, compile=True)
    for _ in range(2):
        assert relative(latents(pipe, call_kwargs(UNET, pipe)), stock) < 1e-5
    assert graphs() == 1


def test_queries_keys_and_values_are_one_product_in_the_graph():
    products = {}
    for fewer in (False, True):
        torch._dynamo.reset()
        pipe, _ = least(SD3)
        pag_fast.patch(pipe, compile=EAGER, fewer_launches=fewer)
        seen = []

        def backend(graph, inputs, seen=seen):
            seen.append(str(graph.code).count("linear("))
            return graph.forward

        del pipe.transformer._compiled_call_impl
        pipe.transformer.compile(backend=backend, fullgraph=True, dynamic=False)
        latents(pipe, call_kwargs(SD3, pipe))
        (products[fewer],) = seen
    # three become one for the tokens of the picture, and for those of the text
    assert products[True] == products[False] - 4


def test_the_step_without_the_perturbed_branch_is_compiled_in_the_first():
    """With an adaptive scale the branch drops on the way: no step after the first compiles.

    ``test_hosts.py`` has a window, with compiled blocks.
    """
    pipe, _ = least(UNET)
    kwargs = {"steps": 6, "pag_adaptive_scale": 0.005}
    stock = latents(pipe, call_kwargs(UNET, pipe, **kwargs))
    after = []

    def callback(pipe, step, timestep, tensors):
        after.append(graphs())
        return tensors

    pag_fast.patch(pipe, compile=EAGER)
    out = latents(pipe, call_kwargs(UNET, pipe, callback_on_step_end=callback, **kwargs))
    assert relative(out, stock) < 1e-5
    steps = dict(pipe._pag_fast.steps)
    assert steps["perturbed branch dropped"] > 0 and steps["shared"] > 0
    assert len(after) == 6 and after[0] > 1 and set(after) == {after[0]}
    latents(pipe, call_kwargs(UNET, pipe, **kwargs))
    assert graphs() == after[0]


def test_regional_compiles_blocks_only():
    pipe = build(UNET)
    stock = latents(pipe, call_kwargs(UNET, pipe))
    pag_fast.patch(pipe, compile=CompileConfig(backend="eager", regional=True))
    compiled = {type(m).__name__ for m in pipe.unet.modules() if compiled_call(m) is not None}
    assert compiled == {"BasicTransformerBlock"}
    assert relative(latents(pipe, call_kwargs(UNET, pipe)), stock) < 1e-5
    pag_fast.unpatch(pipe)
    assert all(compiled_call(m) is None for m in pipe.unet.modules())


# a pipeline of each denoiser, and the blocks that are compiled in it
REPEATED = {
    "StableDiffusion3PAGPipeline": {"JointTransformerBlock"},
    "HunyuanDiTPAGPipeline": {"HunyuanDiTBlock"},
    "SanaPAGPipeline": {"SanaTransformerBlock"},
    "PixArtSigmaPAGPipeline": {"BasicTransformerBlock"},
    "AnimateDiffPAGPipeline": {"BasicTransformerBlock"},
    CONTROLNET: {"BasicTransformerBlock"},
    "FluxPipeline": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    "QwenImagePipeline": {"QwenImageTransformerBlock"},
    "WanPipeline": {"WanTransformerBlock"},
    "LTXPipeline": {"LTXVideoTransformerBlock"},
    "CogVideoXPipeline": {"CogVideoXBlock"},
    "HunyuanVideoPipeline": {
        "HunyuanVideoTransformerBlock",
        "HunyuanVideoSingleTransformerBlock",
        "HunyuanVideoPatchEmbed",
        "HunyuanVideoTokenRefiner",
    },
    "Lumina2Pipeline": {"Lumina2TransformerBlock"},
}


# joint attention, a UNet with a ControlNet, two kinds of blocks with uncond in a pass of its own,
# and what is compiled as a whole nowhere
_TRACED = (SD3, CONTROLNET, "FluxPipeline", "Lumina2Pipeline")


@pytest.mark.parametrize("name", REPEATED)
def test_regional_of_every_family(name):
    """The blocks that diffusers names, and those of the models in which it names none.

    ``test_hosts.py`` and ``test_compile.py`` trace the blocks of the others, in whole models.
    """
    module = tiny_hosts if name in tiny_hosts.HOSTS else tiny
    made, layers = least(name)
    pipe = pag_fast.patch(made, layers)
    eager = module.latents(pipe, module.call_kwargs(name, pipe))
    pag_fast.patch(pipe, layers, compile=CompileConfig(backend="eager", regional=True))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    compiled = [m for m in denoiser.modules() if compiled_call(m) is not None]
    assert {type(m).__name__ for m in compiled} == REPEATED[name]
    if name not in _TRACED:
        return
    assert relative(module.latents(pipe, module.call_kwargs(name, pipe)), eager) < 1e-5
    assert graphs() > 0
    again = graphs()
    module.latents(pipe, module.call_kwargs(name, pipe))
    assert graphs() == again


def test_repeated_blocks_of_subclasses():
    """A subclass that names blocks of its own has those of its base class, too."""

    class Named(torch.nn.Module):
        _repeated_blocks = ("Outer",)

    class Mine(Named):
        _repeated_blocks = ("Inner",)

        def __init__(self):
            super().__init__()
            self.outer, self.inner = Outer(), Inner()

    class Inner(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

    class Later(Inner):
        pass

    assert repeated_blocks(Mine) == {"Outer", "Inner"}
    model = Mine()
    model.later = Later()
    # a block inside of another one is part of its graph
    assert list(_repeated(model)) == [model.outer, model.inner, model.later]
    assert repeated_blocks(torch.nn.Linear) == frozenset()


def test_channels_last_comes_and_goes():
    pipe = build(UNET)
    layouts = {n: p.stride() for n, p in pipe.unet.named_parameters()}
    last = torch.channels_last
    with pag_fast.patched(pipe, compile=EAGER):
        convs = [p for p in pipe.unet.parameters() if p.ndim == 4]
        assert convs and all(p.is_contiguous(memory_format=last) for p in convs)
    assert {n: p.stride() for n, p in pipe.unet.named_parameters()} == layouts
    # a model that the user has converted stays converted
    pipe.unet.to(memory_format=last)
    layouts = {n: p.stride() for n, p in pipe.unet.named_parameters()}
    with pag_fast.patched(pipe, compile=EAGER):
        pass
    assert {n: p.stride() for n, p in pipe.unet.named_parameters()} == layouts


# what is compiled, when, and whose it is shows in calls that take the same ways, untraced
@torch.compiler.set_stance("force_eager")
def test_settings_that_come_back_are_compiled_again():
    pipe = pag_fast.patch(least(SD3)[0], compile=EAGER)
    stock = latents(pipe, call_kwargs(SD3, pipe))
    with pag_fast.patched(pipe):
        assert compiled_call(pipe.transformer) is None
    latents(pipe, call_kwargs(SD3, pipe))
    assert compiled_call(pipe.transformer) is not None
    pag_fast.patch(pipe)
    assert compiled_call(pipe.transformer) is None
    assert relative(latents(pipe, call_kwargs(SD3, pipe)), stock) < 1e-5


@torch.compiler.set_stance("force_eager")
def test_a_model_put_in_its_place_is_compiled_in_its_place():
    pipe = pag_fast.patch(least(SD3)[0], compile=EAGER)
    first, other = pipe.transformer, least(SD3)[0]
    pipe.transformer = other.transformer
    latents(pipe, call_kwargs(SD3, pipe))
    assert compiled_call(first) is None
    assert compiled_call(other.transformer) is not None
    pag_fast.unpatch(pipe)
    assert compiled_call(other.transformer) is None


@torch.compiler.set_stance("force_eager")
def test_what_the_user_has_compiled_stays_the_users():
    pipe = least(SD3)[0]
    pipe.transformer.compile(backend="eager", fullgraph=True)
    own = compiled_call(pipe.transformer)
    with pag_fast.patched(pipe, compile=EAGER):
        assert compiled_call(pipe.transformer) is own
        latents(pipe, call_kwargs(SD3, pipe))
    assert compiled_call(pipe.transformer) is own


@torch.compiler.set_stance("force_eager")
def test_cuda_graphs_hand_out_copies_and_mark_steps(monkeypatch):
    """What a GPU would replay in place: here the calls that make that safe are counted."""
    pipe, _ = least(CONTROLNET)
    stock = latents(pipe, call_kwargs(CONTROLNET, pipe))
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    pag_fast.patch(pipe, compile=EAGER)
    object.__setattr__(pipe._pag_fast.compilation.config, "cuda_graphs", True)
    returned, after_model = [], Compilation.after_model

    def recorded(self, out):
        returned.append((out, after_model(self, out)))
        return returned[-1][1]

    monkeypatch.setattr(Compilation, "after_model", recorded)
    pipe._pag_fast.compilation._has_compiler = True
    assert relative(latents(pipe, call_kwargs(CONTROLNET, pipe)), stock) < 1e-5
    # one of the ControlNet and one of the UNet a step
    assert (len(marks), len(returned)) == (2, 4)
    for out, copied in returned:
        for x, y in zip(tree_leaves(out), tree_leaves(copied), strict=True):
            assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()
