"""Code of others on a pipeline without PAG, which sees the rows that PAG adds to its batch."""

from __future__ import annotations

import pytest
import torch
from built_hosts import denoiser_of
from numerics import relative
from tiny_hosts import HOSTS, build, call_kwargs, latents

import pag_fast
from pag_fast.runtime.compatibility import row_wise

SD, XL, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"


def _patched(name, **options):
    pipe = build(name)
    return pipe, pag_fast.patched(pipe, HOSTS[name].layers["middle"], pag_scale=3.0, **options)


def _halves(module, args, kwargs):
    """Uncond and cond, told apart by where they are."""
    if args:
        args = (args[0] * 1.0, *args[1:])
        args[0][: len(args[0]) // 2] *= 1.1
    return args, kwargs


def _last_row(module, args, out):
    return (torch.cat([out[0][:-1], 1.1 * out[0][-1:]]), *out[1:])


def _put_on(model, where):
    if where == "in front":
        return model.register_forward_pre_hook(_halves, with_kwargs=True)
    return model.register_forward_hook(_last_row)


@pytest.mark.parametrize("where", ["in front", "behind"])
@pytest.mark.parametrize("name", [SD, XL])
def test_a_hook_of_the_model_is_told_of(name, where):
    pipe, patched = _patched(name)
    with patched, pytest.warns(UserWarning, match="gets PAG's rows behind those of the pipeline"):
        _put_on(denoiser_of(pipe), where)
        latents(pipe, call_kwargs(name, pipe))
    pipe, patched = _patched(name, strict=True)
    with patched, pytest.raises(ValueError, match=f"a forward hook.* {where} .*gets PAG's rows"):
        _put_on(denoiser_of(pipe), where)
        latents(pipe, call_kwargs(name, pipe))


def test_what_is_marked_is_trusted():
    pipe, patched = _patched(SD, strict=True)
    with patched:
        before = latents(pipe, call_kwargs(SD, pipe))
        denoiser_of(pipe).register_forward_hook(row_wise(lambda *_: None))
        assert relative(latents(pipe, call_kwargs(SD, pipe)), before) < 1e-6


def _two_rows(module, args, kwargs):
    text = kwargs["encoder_hidden_states"]
    source = torch.Generator().manual_seed(5)
    kwargs["encoder_hidden_states"] = torch.randn(2, *text.shape[1:], generator=source)
    return args, kwargs


def _adds_two_rows(module, args, out):
    return out + torch.ones(2, *out.shape[1:])


def _forward_of_two_rows(model):
    own = model.forward

    def forward(*args, **kwargs):
        return own(*args, **_two_rows(model, args, kwargs)[1])

    model.forward = forward


@pytest.mark.parametrize(
    "put_on",
    [
        lambda model: model.register_forward_pre_hook(_two_rows, with_kwargs=True),
        lambda model: model.mid_block.register_forward_hook(_adds_two_rows),
        _forward_of_two_rows,
    ],
    ids=["a hook in front", "a residual", "a forward"],
)
@pytest.mark.filterwarnings("ignore:pag_fast")
def test_rows_that_are_fixed_are_a_sentence(put_on):
    pipe, patched = _patched(SD)
    put_on(denoiser_of(pipe))
    latents(pipe, call_kwargs(SD, pipe))  # two rows, as the pipeline makes them
    with patched, pytest.raises(ValueError, match="which may expect the pipeline's own rows alone"):
        latents(pipe, call_kwargs(SD, pipe))
    latents(pipe, call_kwargs(SD, pipe))


def test_an_error_of_the_models_own_stays_what_it_is():
    pipe, patched = _patched(FLUX)
    block = denoiser_of(pipe).transformer_blocks[0]

    @row_wise
    def fails(*_):
        raise RuntimeError("no memory left")

    block.register_forward_hook(fails)
    with patched, pytest.raises(RuntimeError, match="no memory left"):
        latents(pipe, call_kwargs(FLUX, pipe))
