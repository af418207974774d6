"""Denoising as diffusers' modular pipelines do it, and as slowly as can be, on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import tiny
import tiny_hosts
import torch
from copies import made_once
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from numerics import relative
from slow import FixedJoint
from tiny_models import XL_CONFIG, XL_UP

from pag_fast.models.layer_names import resolve

STEPS = 2
# every step is perturbed
ALWAYS = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
SLG_ALWAYS = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}


@dataclass
class Case:
    """A model and what it is called with.

    Attributes:
        pairs: arguments with a value for cond and one for uncond.
        fixed: arguments that are the same for all passes.
        layers: sets of layers to perturb: the middle of the model, several, the last.
        nested: arguments of the UNets of XL that go into ``added_cond_kwargs``.
        text: where text is in the sequences of attention (``""``: nowhere), the tokens of it in
            each sample, and those of the image; ``None`` for models with PAG processors.
    """

    model: Any
    pairs: dict[str, tuple[Any, Any]]
    fixed: dict[str, Any]
    layers: dict[str, Any]
    sample: torch.Tensor
    name: str = "hidden_states"
    nested: tuple[str, ...] = ()
    text: tuple[str, list[int], int] | None = None

    def __call__(self, model: Any, sample: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
        values = dict(values)
        if self.nested:
            values["added_cond_kwargs"] = {name: values.pop(name) for name in self.nested}
        return model(**{self.name: sample}, **self.fixed, **values, return_dict=False)[0]


def _pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*shape), torch.randn(*shape)


_UNET = {"default": None, "several": ["down_blocks.1.attentions.0", "up_blocks.1.attentions.1"]}
_XL = {
    "default": None,
    "several": ["down_blocks.2.attentions.0.transformer_blocks.1", "mid"],
    "up": ["up_blocks.1.attentions.0"],
}
_DIT = {"default": None, "several": [2, 3], "last": 5, "first": 0}


@made_once
def case(name: str, batch: int = 2, **overrides: Any) -> Case:
    """``"sd"``, ``"xl"``, ``"motion"``, ``"sd3"``, ``"sd35"``, ``"hunyuan"``, …

    ``overrides`` are of the configuration of ``"sd"`` or ``"sd3"``.
    """
    torch.manual_seed(0)
    sample, time = torch.randn(batch, 4, 8, 8), torch.tensor([500] * batch)
    text = {"encoder_hidden_states": _pair(batch, 5, 12)}
    if name in ("sd", "xl"):
        config = {**XL_CONFIG, **XL_UP} if name == "xl" else {}
        model, fixed = tiny.unet(**config, **overrides), {"timestep": time[0]}
        if name == "sd":
            return Case(tiny.randomise(model), text, fixed, _UNET, sample, "sample")
        text["text_embeds"] = _pair(batch, 10)
        text["time_ids"] = (torch.ones(batch, 6), torch.zeros(batch, 6))
        added = ("text_embeds", "time_ids")
        return Case(tiny.randomise(model), text, fixed, _XL, sample, "sample", added)
    if name == "motion":
        sample = torch.randn(batch, 4, 2, 8, 8)
        text = {"encoder_hidden_states": _pair(2 * batch, 5, 12)}
        layers = {"several": ["mid_block.motion_modules"], "last": ["up_blocks.2.motion_modules.1"]}
        model = tiny.randomise(tiny.motion_unet())
        return Case(model, text, {"timestep": time[0]}, layers, sample, "sample")
    fixed = {"timestep": time}
    if name in ("sd3", "sd35"):
        text["pooled_projections"] = _pair(batch, 10)
        model = tiny.sd3(sd35=name == "sd35", **overrides)
        layers = {**_DIT, "attn2": [r"blocks\.2\.attn2"]} if name == "sd35" else _DIT
        return Case(tiny.randomise(model), text, fixed, layers, sample)
    if name == "hunyuan":
        fixed["timestep"] = time.float()
        mask, mask_t5 = torch.ones(batch, 5), torch.ones(batch, 7)
        mask_t5[:, -2:] = 0
        text["encoder_hidden_states_t5"] = _pair(batch, 7, 16)
        fixed |= {"text_embedding_mask": mask, "text_embedding_mask_t5": mask_t5}
        fixed["image_rotary_emb"] = get_2d_rotary_pos_embed(
            8, ((0, 0), (4, 4)), (4, 4), output_type="pt"
        )
        return Case(tiny.randomise(tiny.hunyuan()), text, fixed, _DIT, sample)
    assert name in ("pixart", "sana")
    mask = torch.ones(batch, 5)
    mask[:, -1] = 0
    text["encoder_attention_mask"] = (mask, torch.ones(batch, 5))
    if name == "pixart":
        fixed["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return Case(tiny.randomise(getattr(tiny, name)()), text, fixed, _DIT, sample)


def _random_tables(tokens: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(tokens, channels // 2).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def new_case(name: str, batch: int = 2, **overrides: Any) -> Case:
    """``"flux"``, ``"qwen"``, ``"wan"``, ``"ltx"``, ``"cogvideox"``, ``"hunyuan_video"``, …"""
    torch.manual_seed(0)
    model = tiny.randomise(getattr(tiny_hosts, name)(**overrides))
    pairs = {"encoder_hidden_states": _pair(batch, 5, 12)}
    fixed: dict[str, Any] = {"timestep": torch.full((batch,), 0.5)}
    layers: dict[str, Any] = {"default": None, "several": [r"^(transformer_)?blocks\.[12]\."]}
    if name in ("flux", "hunyuan_video"):
        pairs["pooled_projections"] = _pair(batch, 10)
        fixed["guidance"] = torch.full((batch,), 3.5)
        layers["several"] = [r"^transformer_blocks\.1\.", r"single_transformer_blocks\.1\."]
    mask = torch.ones(batch, 5)
    mask[0, -2:] = 0  # the first prompt is shorter
    if name == "flux":
        sample, text = torch.randn(batch, 16, 16), ("first", [5], 16)
        fixed |= {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(5, 3)}
    elif name == "qwen":
        sample, text = torch.randn(batch, 16, 16), ("first", [5], 16)
        fixed["img_shapes"] = [[(1, 4, 4)]] * batch
        pairs["encoder_hidden_states_mask"] = (mask.bool(), torch.ones(batch, 5).bool())
    elif name == "ltx":
        sample, text = torch.randn(batch, 2 * 4 * 4, 4), ("", [0], 0)
        fixed |= {"num_frames": 2, "height": 4, "width": 4}
        pairs["encoder_attention_mask"] = (mask, torch.ones(batch, 5))
    elif name == "lumina2":
        lengths = [3] + [5] * (batch - 1)
        sample, text = torch.randn(batch, 4, 8, 8), ("first", lengths, 16)
        layers["several"] = [1, 2]
        fixed["encoder_attention_mask"] = mask.bool()
    elif name == "cogvideox":
        sample, text = torch.randn(batch, 2, 4, 8, 8), ("first", [5], 32)
        fixed["image_rotary_emb"] = _random_tables(32, 16)
    else:
        sample = torch.randn(batch, 4, 2, 8, 8)
        text = ("", [0], 0) if name == "wan" else ("last", [5], 32)
        if name == "hunyuan_video":
            pairs["encoder_attention_mask"] = (mask, torch.ones(batch, 5))
    return Case(model, pairs, fixed, layers, sample, text=text)


NEW_CASES = ("flux", "qwen", "wan", "ltx", "cogvideox", "hunyuan_video", "lumina2")


@dataclass
class Result:
    """Of one denoising: the guided prediction and the latents of each step, passes of each."""

    predictions: list[torch.Tensor] = field(default_factory=list)
    passes: list[list[str]] = field(default_factory=list)

    def __getitem__(self, step: int) -> torch.Tensor:
        return self.predictions[step]


@torch.no_grad()
def denoise(
    case: Case,
    guider: Any,
    *,
    steps: int = STEPS,
    model: Any = None,
    run: Callable[..., Any] | None = None,
    from_block_state: bool = False,
    before_pass: Callable[[int, str], Any] = lambda step, branch: None,
) -> Result:
    """The loop of modular pipelines, from ``set_state`` to the guider's call.

    ``model`` may be the case's model compiled, and ``run`` calls it.
    """
    model = case.model if model is None else model
    result, sample = Result(), case.sample
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(500))
        if from_block_state:
            state = SimpleNamespace()
            for name, (cond, uncond) in case.pairs.items():
                setattr(state, name, cond)
                setattr(state, f"negative_{name}", uncond)
            fields = {name: (name, f"negative_{name}") for name in case.pairs}
            batches = guider.prepare_inputs_from_block_state(state, fields)
        else:
            batches = guider.prepare_inputs(case.pairs)
        for batch in batches:
            guider.prepare_models(model)
            before_pass(step, batch.__guidance_identifier__)
            values = {name: getattr(batch, name) for name in case.pairs}
            batch.noise_pred = case(run or model, sample, values)
            guider.cleanup_models(model)
        prediction = guider(batches)[0]
        result.predictions.append(prediction)
        result.passes.append([batch.__guidance_identifier__ for batch in batches])
        sample = sample - 0.1 * (prediction if case.text is not None else prediction[:, :4])
    return result


class Naive:
    """A perturbed layer in the plainest way."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_) -> Any:
        if encoder_hidden_states is None:
            return attn.to_out[0](attn.to_v(hidden_states))
        return FixedJoint(1)._masked(attn, hidden_states, encoder_hidden_states)


@contextmanager
def naive(attentions: Sequence[Any]) -> Iterator[None]:
    """The attentions perturbed by :class:`Naive`."""
    before = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.set_processor(Naive())
    yield
    for attention, processor in zip(attentions, before, strict=True):
        attention.set_processor(processor)


@torch.no_grad()
def slow(
    case: Case,
    perturbed: Callable[[], Any],
    *,
    guidance_scale: float,
    scale: float,
    steps: int = STEPS,
    active: Sequence[int],
    original: bool = False,
) -> Result:
    """Three whole forwards a step, one after the other.

    ``perturbed()`` is the context in which the third one runs, in the steps ``active``.
    """
    result, sample = Result(), case.sample
    cond, uncond = ({name: pair[i] for name, pair in case.pairs.items()} for i in (0, 1))
    for step in range(steps):
        c = case(case.model, sample, cond)
        off = guidance_scale == (0.0 if original else 1.0)
        u = None if off else case(case.model, sample, uncond)
        p = None
        if step in active:
            with perturbed():
                p = case(case.model, sample, cond)
        base = c if original or (u is None and p is None) else p if u is None else u
        prediction = base
        if u is not None:
            prediction = prediction + guidance_scale * (c - u)
        if p is not None:
            prediction = prediction + scale * (c - p)
        result.predictions.append(prediction)
        sample = sample - 0.1 * (prediction if case.text is not None else prediction[:, :4])
    return result


def perturbed(setup: Case, layers: Any) -> Callable[[], Any]:
    """Makes the context of the naive perturbed forward; by default in the model's middle."""
    if layers is None:
        layers = _middle(setup)
    attentions = list(resolve(setup.model, layers).values())
    if setup.text is None:
        return lambda: naive(attentions)
    return lambda: tiny_hosts.perturbing(attentions, *setup.text)


def _middle(setup: Case) -> Any:
    if hasattr(setup.model, "down_blocks"):
        return "mid"
    if hasattr(setup.model, "single_transformer_blocks"):
        return r"^single_transformer_blocks\.0\."
    stack = next(getattr(setup.model, n, None) for n in ("transformer_blocks", "blocks", "layers")
                 if hasattr(setup.model, n))  # fmt: skip
    return len(stack) // 2


def differences(result: Result, expected: Result) -> list[float]:
    """Relative difference of the guided prediction, of each step."""
    return [relative(a, b) for a, b in zip(result.predictions, expected.predictions, strict=True)]


def snapshot(model: Any) -> dict[str, Any]:
    """Everything about a model that a guider could leave behind."""
    return {
        name: (set(vars(m)), vars(m).get("forward"), getattr(m, "processor", None),
               vars(m).get("_compiled_call_impl"), len(m._forward_hooks),
               len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }  # fmt: skip
