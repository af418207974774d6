"""``explain`` and the command line: what they say is what is run."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast.cli import main

# a tiny VAE has a factor of 2, so that a size in pixels is twice the latents'
SIZE = {"height": 16, "width": 16}


@pytest.mark.parametrize("name", PIPELINES)
def test_explains_every_pipeline(name):
    pipe = build(name)
    before = str(pag_fast.explain(pipe, **SIZE))
    assert "not patched" in before
    pag_fast.patch(pipe)
    latents(pipe, call_kwargs(name, pipe))
    found = pag_fast.explain(pipe, **SIZE)
    assert found.fork == found.layers[0]
    assert found.steps == {"shared": 2}
    assert not found.notes
    for predicted in found.flops:
        assert predicted.bound <= predicted.patched < predicted.stock
    calls = {(call.model, call.cfg): call for call in found.calls}
    assert calls[PIPELINES[name].model, True].stock == 3
    assert calls[PIPELINES[name].model, False].patched == "1 → 2"
    if PIPELINES[name].controlnet:
        assert calls["ControlNetModel", True].patched == "1 → 2"
        assert calls["ControlNetModel", False].patched == "1"
    text = str(found)
    for layer in (found.layers[0], found.layers[-1]):
        assert layer in text
    assert found.fork in "\n".join(found.tree)


def test_data_and_table_agree():
    pipe = pag_fast.patch(build("StableDiffusionPAGPipeline"))
    found = pag_fast.explain(pipe, **SIZE)
    data = json.loads(json.dumps(found.as_dict()))
    assert data["layers"] == list(found.layers)
    assert data["flops"][0]["stock"] == found.flops[0].stock
    assert repr(found) == str(found)
    assert f"{found.flops[0].stock / found.flops[0].patched:.3f}×" in str(found)
    tree = "\n".join(found.tree)
    assert "uncond = cond = perturbed   until down_blocks.0.attentions.0" in tree


def test_predicted_rows_are_the_rows_that_run():
    """The UNet's last block runs on all branches, its first on what ``explain`` says."""
    name = "StableDiffusionPAGPipeline"
    pipe, rows = pag_fast.patch(build(name)), {}
    watched = {
        "merged": pipe.unet.down_blocks[0].resnets[0],
        "shared": pipe.unet.down_blocks[1].resnets[0],
        "split": pipe.unet.up_blocks[-1].resnets[-1],
    }
    for label, module in watched.items():
        module.register_forward_hook(
            lambda _, args, out, label=label: rows.__setitem__(label, out.shape[0])
        )
    latents(pipe, call_kwargs(name, pipe))
    call = pag_fast.explain(pipe, flops=False).calls[0]
    assert call.patched == " → ".join(str(rows[key]) for key in ("merged", "shared", "split"))


def test_an_ip_adapter_is_explained_too():
    from test_features import _with_ip_adapter

    pipe = pag_fast.patch(_with_ip_adapter(build("StableDiffusionPAGPipeline")))
    assert pag_fast.explain(pipe, **SIZE).flops


def test_refuses_what_cannot_be_patched():
    with pytest.raises(ValueError, match="not a pipeline that pag_fast can patch"):
        pag_fast.explain(torch.nn.Linear(2, 2))


# ---- command line ----


def test_layers(capsys):
    assert main(["layers"]) == 0
    assert "StableDiffusionXLPAGPipeline" in capsys.readouterr().out
    assert main(["layers", "SanaPAGPipeline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith("transformer_blocks")]
    assert len(table) == 20
    assert all(float(shared.rstrip("×")) <= float(stock.rstrip("×")) for _, shared, stock in table)
    assert main(["layers", "SanaPAGPipeline", "--no-cfg"]) == 0
    assert "2.000×" in capsys.readouterr().out


def test_ledger(capsys, tmp_path):
    out = tmp_path / "ledger.json"
    assert main(["ledger", "SanaPAGPipeline", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["cfg"] for row in rows] == [True, False]
    assert f"{rows[0]['stock'] / rows[0]['patched']:.3f}×" in printed


def test_env(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"pag_fast {pag_fast.__version__}" in out
    assert f"torch {torch.__version__}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "NoPipeline"], "Unknown pipeline 'NoPipeline'"),
        (["ledger", "NoPipeline"], "Unknown pipeline 'NoPipeline'"),
        (["demo", "--steps", "1"], "at least 2 steps"),
        (["demo", "--batch", "0"], "a batch of at least 1"),
        (["demo", "--layers", "nowhere"], "'nowhere'"),
        (["demo", "--pipeline", "no/such/folder"], "could not be loaded"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
