"""Guiders: passes that run as a graph of their own, or in full where they cannot be resumed."""

from __future__ import annotations

import diffusers
import pytest
import torch
from modular import ALWAYS, STEPS, case, denoise, differences, perturbed, slow, snapshot
from numerics import relative

from pag_fast.runtime.access.entry import Entry
from pag_fast.runtime.compatibility import row_wise

guiders = pytest.importorskip("pag_fast.guiders", exc_type=ImportError)

from diffusers.hooks import LayerSkipConfig  # noqa: E402

PAG = guiders.PerturbedAttentionGuidance


# ---- torch.compile ----


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "how", "graphs"),
    [("sd3", "wrapped", 2), ("sd", "in place", 2), ("sd3", "blocks", 3)],
)
def test_the_perturbed_pass_is_one_more_graph(name, how, graphs, fresh_dynamo):
    """Of SD3's blocks the last has a graph of its own in any case."""
    from torch._dynamo.testing import CompileCounter

    small = {
        "sd3": {"num_layers": 2},
        "sd": {
            "block_out_channels": (8,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        },
    }
    setup, counter = case(name, **small[name]), CompileCounter()
    guider = PAG(perturbed_guidance_stop=0.7)
    expected = denoise(setup, guider, steps=4)
    assert [len(passes) for passes in expected.passes] == [2, 3, 2, 2]
    model = setup.model
    if how == "wrapped":
        model = torch.compile(model, fullgraph=True, backend=counter)
        stock = diffusers.PerturbedAttentionGuidance(
            perturbed_guidance_config=LayerSkipConfig([0], fqn="transformer_blocks")
        )
        with pytest.raises(ValueError, match="Could not find transformer_blocks"):
            denoise(setup, stock, model=model, steps=20)
        counter.clear()
        torch._dynamo.reset()
    elif how == "in place":
        model.compile(fullgraph=True, backend=counter)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        result = denoise(setup, guider, model=model, steps=4)
        assert max(differences(result, expected)) < 1e-5
    assert counter.frame_count == graphs
    assert not guider._warned


# ---- where a pass cannot be resumed ----


def test_modules_with_hooks_of_diffusers_run_in_full():
    """A cache or an offloading by groups expects every block to run."""
    from diffusers.hooks import HookRegistry, ModelHook

    setup = case("sd3")
    expected = denoise(setup, PAG(**ALWAYS))
    block = setup.model.transformer_blocks[1]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "test")
    guider = PAG(**ALWAYS)
    assert max(differences(denoise(setup, guider), expected)) < 1e-6
    assert [m for m in guider._warned if "hooks of diffusers" in m]


def test_a_pass_with_other_arguments_runs_in_full():
    setup = case("sd3")
    guider = PAG(**ALWAYS)
    guider.set_state(step=0, num_inference_steps=1, timestep=torch.tensor(0))
    cond = guider.prepare_inputs(setup.pairs)[0]
    values = {name: getattr(cond, name) for name in setup.pairs}
    with torch.no_grad():
        guider.prepare_models(setup.model)
        setup(setup.model, setup.sample, values)
        guider.cleanup_models(setup.model)
        guider.prepare_models(setup.model)
        guider.cleanup_models(setup.model)
        guider.prepare_models(setup.model)
        out = setup(setup.model, setup.sample + 1, values)
        guider.cleanup_models(setup.model)
        with perturbed(setup, None)():
            expected = setup(setup.model, setup.sample + 1, values)
    assert relative(out, expected) < 1e-5
    assert [m for m in guider._warned if "other arguments" in m]


class _OtherPrompt(PAG):
    """The perturbed pass has another prompt, from one step on."""

    first = 0

    def prepare_inputs(self, data):
        batches = super().prepare_inputs(data)
        for batch in batches:
            if self._step >= self.first and batch.__guidance_identifier__ == "pred_cond_skip":
                batch.encoder_hidden_states = 2.0 * batch.encoder_hidden_states
        return batches


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_another_prompt_from_a_step_on(name, first):
    """Equal arguments in one step do not make those of the next equal."""
    setup = case(name)
    guider = _OtherPrompt(5.0, 3.0, perturbed_guidance_layers=setup.layers["several"], **ALWAYS)
    guider.first = first
    found = denoise(setup, guider, steps=3)
    cond, uncond = ({n: pair[i] for n, pair in setup.pairs.items()} for i in (0, 1))
    x, expected = setup.sample, []
    for step in range(3):
        more = {"encoder_hidden_states": 2.0 * cond["encoder_hidden_states"]}
        with torch.no_grad():
            c, u = setup(setup.model, x, cond), setup(setup.model, x, uncond)
            with perturbed(setup, setup.layers["several"])():
                p = setup(setup.model, x, {**cond, **more} if step >= first else cond)
        expected.append(u + 5.0 * (c - u) + 3.0 * (c - p))
        x = x - 0.1 * (expected[-1] if setup.text is not None else expected[-1][:, :4])
    for ours, truth in zip(found.predictions, expected, strict=True):
        assert relative(ours, truth) < 1e-5


def test_a_pass_of_several_forwards_runs_in_full():
    """Sliding windows: what was recorded last belongs to one window alone."""
    setup, guider = case("sd3"), PAG(**ALWAYS)
    values = {name: pair[0] for name, pair in setup.pairs.items()}
    windows = [setup.sample, setup.sample + 1]
    with torch.no_grad(), perturbed(setup, None)():
        expected = [setup(setup.model, window, values) for window in windows]
    for step in range(2):
        guider.set_state(step=step, num_inference_steps=2, timestep=torch.tensor(0))
        for _ in range(3):
            guider.prepare_models(setup.model)
            with torch.no_grad():
                out = [setup(setup.model, window, values) for window in windows]
            guider.cleanup_models(setup.model)
        for window, truth in zip(out, expected, strict=True):
            assert relative(window, truth) < 1e-5


def test_an_output_that_is_written_into_is_not_taken_over():
    setup = case("sd3")

    @row_wise
    def write(module, args, kwargs):
        kwargs["hidden_states"].mul_(1.5)

    block = setup.model.transformer_blocks[3]
    handle = block.register_forward_pre_hook(write, with_kwargs=True)
    result = denoise(setup, guider := PAG(**ALWAYS))
    scales = {"guidance_scale": 7.5, "scale": 2.8}
    expected = slow(setup, perturbed(setup, 3), active=range(STEPS), **scales)
    handle.remove()
    assert max(differences(result, expected)) < 1e-5
    assert [m for m in guider._warned if "nothing usable" in m]


def test_another_model_or_other_modules():
    first, second = case("sd3"), case("pixart")
    guider = PAG(**ALWAYS)
    expected = [denoise(setup, guider)[-1] for setup in (first, second)]
    assert torch.equal(denoise(first, guider)[-1], expected[0])
    blocks = first.model.transformer_blocks
    blocks[3] = case("sd3").model.transformer_blocks[3]
    assert torch.equal(denoise(first, guider)[-1], expected[0])
    assert torch.equal(denoise(second, guider)[-1], expected[1])


# ---- what others have put on the model ----
SCALES = {"guidance_scale": 7.5, "scale": 2.8}


def test_a_cache_that_knows_no_passes_is_refused():
    setup = case("sd3")
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.hooks.apply_pyramid_attention_broadcast(setup.model, config)
    before = snapshot(setup.model)
    with pytest.raises(ValueError, match="PyramidAttentionBroadcast keeps one output for all"):
        denoise(setup, PAG(**ALWAYS))
    assert snapshot(setup.model) == before


@pytest.mark.parametrize("where", ["model", "block", "forward"])
def test_what_is_not_known_sees_every_module_run(where):
    setup, calls, guider = case("sd3"), [], PAG(**ALWAYS)
    block = setup.model.transformer_blocks[1]
    original = block.forward

    def hook(*args, **kwargs):
        calls.append(1)

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    if where == "forward":
        block.forward = forward
    else:
        (block if where == "block" else setup.model).register_forward_pre_hook(hook)
    result = denoise(setup, guider)
    assert len(calls) == 3 * STEPS
    expected = slow(setup, perturbed(setup, None), active=range(STEPS), **SCALES)
    assert max(differences(result, expected)) < 1e-5
    (warning,) = guider._warned
    assert warning.startswith("The perturbed pass runs as a whole: ")


def test_rows_that_a_hook_in_front_of_the_model_changes():
    """Cond's forward had another input behind the hook, though the same in front of it."""
    setup, count = case("sd3"), []

    def hook(model, args, kwargs):
        count.append(1)
        sample = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": sample + 0.25 * (len(count) % 3)}

    setup.model.register_forward_pre_hook(hook, with_kwargs=True)
    result = denoise(setup, PAG(**ALWAYS))
    count.clear()
    expected = slow(setup, perturbed(setup, None), active=range(STEPS), **SCALES)
    assert max(differences(result, expected)) < 1e-5


def test_a_guider_that_is_done_has_no_entry_on_the_model():
    setup = case("sd3")
    entries = []
    denoise(
        setup,
        PAG(**ALWAYS),
        before_pass=lambda *_: entries.append(vars(setup.model).get("_compiled_call_impl")),
    )
    assert all(isinstance(entry, Entry) for entry in entries)
    assert "_compiled_call_impl" not in vars(setup.model)
