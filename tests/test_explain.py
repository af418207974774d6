"""``explain`` and the command line: what they say is what is run."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version

import diffusers
import pytest
import shallow
import tiny_hosts
import torch
from numerics import observing
from shallow_cards import shallow_card
from tiny import FAMILIES, PIPELINES, build, call_kwargs, latents

import pag_fast
from pag_fast.analysis.published import CARDS
from pag_fast.cli import main
from pag_fast.models.layer_names import self_attentions
from pag_fast.pipelines import registry as hosts
from pag_fast.tools.load import EMOJI

# a tiny VAE has a factor of 2, so that a size in pixels is twice the latents'
SIZE = {"height": 16, "width": 16}
HOSTED = [name for name, spec in tiny_hosts.HOSTS.items() if spec.brings_a_model]


@pytest.mark.parametrize(
    "name", [name for name, spec in PIPELINES.items() if not (spec.image or spec.mask)]
)
def test_explains_every_pipeline(name):
    pipe = shallow.build(name)
    before = str(pag_fast.explain(pipe, **SIZE, flops=name == "StableDiffusionPAGPipeline"))
    assert "not patched" in before
    pag_fast.patch(pipe)
    latents(pipe, call_kwargs(name, pipe))
    found = pag_fast.explain(pipe, **SIZE, flops=name in FAMILIES)
    assert bool(found.flops) == (name in FAMILIES)
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


_LAST = {
    "Lumina2Pipeline": "norm_out",
    "ZImagePipeline": "all_final_layer.2-1",
    "Krea2Pipeline": "final_layer",
    "HiDreamImagePipeline": "final_layer",
}


@pytest.mark.parametrize("name", HOSTED)
def test_explains_pipelines_without_pag(name):
    spec, pipe = tiny_hosts.HOSTS[name], tiny_hosts.build(name)
    kwargs = tiny_hosts.call_kwargs(name, pipe)
    size = {k: kwargs[k] for k in ("height", "width")}
    if "num_frames" in kwargs:
        size["frames"] = kwargs["num_frames"]
    pag_fast.patch(pipe, spec.layers["middle"])
    rows, model = [], pipe.transformer
    last = model.get_submodule(_LAST.get(name, "proj_out"))
    last.register_forward_hook(observing(lambda _, args, out: rows.append(len(out))))
    tiny_hosts.latents(pipe, kwargs)
    found = pag_fast.explain(pipe, **size)
    assert found.fork == found.layers[0] and found.fork in "\n".join(found.tree)
    assert not found.notes and not found.source
    for predicted in found.flops:
        assert predicted.bound <= predicted.patched < predicted.stock
    on = [call for call in found.calls if call.cfg]
    has_cfg = hosts.HOSTS[name].passes != "alone"
    assert sum(call.stock for call in on) == (3 if has_cfg else 0)
    # the calls of the first step, and the rows on which the last layer of each runs
    assert [int(call.patched.split(" → ")[-1]) for call in on] == rows[: len(on)]
    assert len(on) == (1 + hosts.HOSTS[name].sequential if has_cfg else 0)
    pag_fast.unpatch(pipe)
    if name in ("FluxPipeline", "HunyuanVideoPipeline"):  # deep enough for their own layers
        before = pag_fast.explain(pipe, **size)
        assert before.source == hosts.HOSTS[name].source and before.source in str(before)
        assert not before.is_patched and before.flops


def test_a_second_denoiser_is_named():
    pipe = tiny_hosts.build("WanPipeline")
    pipe.register_modules(transformer_2=tiny_hosts.wan())
    pag_fast.patch(pipe, ["blocks.1"])
    assert "transformer_2 is perturbed in the same layers as transformer" in str(
        pag_fast.explain(pipe, flops=False)
    )


def test_data_and_table_agree():
    pipe = pag_fast.patch(shallow.build("StableDiffusionPAGPipeline"))
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
        "merged": pipe.unet.down_blocks[0].resnets[0].conv1,
        "shared": pipe.unet.down_blocks[1].resnets[0].conv1,
        "split": pipe.unet.up_blocks[-1].resnets[-1].conv1,
    }
    for label, module in watched.items():
        module.register_forward_hook(
            observing(lambda _, args, out, label=label: rows.__setitem__(label, out.shape[0]))
        )
    latents(pipe, call_kwargs(name, pipe))
    call = pag_fast.explain(pipe, flops=False).calls[0]
    assert call.patched == " → ".join(str(rows[key]) for key in ("merged", "shared", "split"))


def test_an_ip_adapter_is_explained_too():
    from random_adapters import with_ip_adapter

    pipe = pag_fast.patch(with_ip_adapter(shallow.build("StableDiffusionPAGPipeline")))
    assert pag_fast.explain(pipe, **SIZE).flops


def test_refuses_what_cannot_be_patched():
    with pytest.raises(ValueError, match="not a pipeline that pag_fast can patch"):
        pag_fast.explain(torch.nn.Linear(2, 2))


# ---- command line ----


def _rows(text):
    """Cells of the lines that name a layer; a range is its first and its last number."""
    pattern = re.compile(r"(\S*attn\S*) +([\d.]+)(?: to ([\d.]+))?× +([\d.]+)×(?: +(default))?")
    return [match.groups() for line in text.splitlines() if (match := pattern.fullmatch(line))]


def test_layers(capsys, tmp_path):
    assert main(["layers"]) == 0
    listed = capsys.readouterr().out
    assert "StableDiffusionXLPAGPipeline" in listed and "WanPipeline-1.3B" in listed
    assert main(["layers", "SanaPAGPipeline", "--json", str(tmp_path / "costs.json")]) == 0
    text = capsys.readouterr().out
    rows = _rows(text)
    assert len(rows) == 20
    assert [row[0] for row in rows if row[-1]] == ["transformer_blocks.8.attn1"]
    costs = [float(row[1]) for row in rows]
    assert costs == sorted(costs, reverse=True) and costs[0] < 1.5 < 1.7 * costs[-1]
    data = json.loads((tmp_path / "costs.json").read_text("utf-8"))
    assert [f"{x['over_cfg']:.3f}" for x in data["layers"]] == [row[1] for row in rows]
    # the default layer alone is the choice: what is counted is what is least, or 1 % more
    assert 1.0 <= data["default_over_cfg"] / data["layers"][8]["over_cfg"] <= 1.01
    assert f"{data['default_over_cfg']:.3f}×" in text
    assert main(["layers", "SanaPAGPipeline", "--cfg", "off", "--height", "512"]) == 0
    text = capsys.readouterr().out
    assert "512×1024" in text and {row[3] for row in _rows(text)} == {"2.000"}


def test_layers_of_one_transformer_share_a_line():
    costs = pag_fast.layer_costs(build("StableDiffusionXLPAGPipeline"), **SIZE)
    grouped, every = _rows(str(costs)), _rows(costs.table(every=True))
    assert [row[0] for row in every] == [layer.name for layer in costs.layers]
    names = [row[0] for row in grouped]
    assert len(set(names)) == len(names) < len(every)
    mid = [row for row in every if row[0].startswith("mid_block")]
    name, first, last, _, default = next(row for row in grouped if row[0].startswith("mid_block"))
    assert name == f"mid_block.attentions.0.transformer_blocks.0-{len(mid) - 1}.attn1"
    assert [first, last, default] == [mid[0][1], mid[-1][1], "default"]


def test_layers_of_the_users_own_model(capsys, tmp_path):
    """Costs need its configurations alone, and are those of the pipeline with its weights."""
    name = "LTXPipeline"
    pipe = tiny_hosts.build(name)
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    size = ["--height", "64", "--width", "64", "--frames", "9"]
    assert main(["layers", str(tmp_path), *size, "--json", str(tmp_path / "costs.json")]) == 0
    rows = _rows(capsys.readouterr().out)
    data = json.loads((tmp_path / "costs.json").read_text("utf-8"))
    same = pag_fast.layer_costs(pipe, height=64, width=64, frames=9)
    assert data == json.loads(json.dumps(same.as_dict()))
    assert [x.name for x in same.layers] == [row[0] for row in rows] == list(_order(pipe))
    # the published model's default layer is none of four: nothing is marked
    assert same.default_over_cfg is None and not same.source
    with pag_fast.patched(pipe, ["blocks.1"]):
        chosen = pag_fast.layer_costs(pipe, height=64, width=64, frames=9)
    assert [x.name for x in chosen.layers if x.default] == ["transformer_blocks.1.attn1"]
    flops = pag_fast.explain(pag_fast.patch(pipe, ["blocks.1"]), height=64, width=64, frames=9)
    on = flops.flops[0]
    assert chosen.default_over_cfg == pytest.approx(1.5 * on.patched / on.stock, rel=1e-12)


def _order(pipe):
    """The attentions in the order in which they run."""
    seen = []
    names = self_attentions(pipe.transformer)
    handles = [
        module.register_forward_pre_hook(observing(lambda *_, name=name: seen.append(name)))
        for name, module in names.items()
    ]
    tiny_hosts.latents(pipe, tiny_hosts.call_kwargs(type(pipe).__name__, pipe, steps=1))
    for handle in handles:
        handle.remove()
    return dict.fromkeys(seen)


def test_sag_has_no_layers_to_choose():
    parts = build("StableDiffusionPAGPipeline").components
    names = inspect.signature(diffusers.StableDiffusionSAGPipeline.__init__).parameters
    pipe = diffusers.StableDiffusionSAGPipeline(
        **{name: part for name, part in parts.items() if name in names},
        requires_safety_checker=False,
    )
    with pytest.raises(ValueError, match="has no layers to choose"):
        pag_fast.layer_costs(pipe)


def test_layers_of_the_model_that_ships(capsys):
    assert main(["layers", "emoji"]) == 0
    marked = [row[0] for row in _rows(capsys.readouterr().out) if row[-1]]
    assert marked and all(name.startswith("up_blocks.1.") for name in marked)


@pytest.fixture
def small_sana(monkeypatch):
    card = replace(shallow_card("SanaPAGPipeline"), documented_layers=("transformer_blocks.1",))
    monkeypatch.setitem(CARDS, "SanaPAGPipeline", card)


@pytest.mark.usefixtures("small_sana")
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
    assert f"torch {version('torch')}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "NoPipeline"], "Unknown pipeline 'NoPipeline'"),
        (["layers", "no/such/folder"], "could not be read as a pipeline"),
        (["layers", ""], "'' could not be read as a pipeline of diffusers: it names nothing."),
        (
            ["layers", "SanaPAGPipeline", "--frames", "9"],
            "frames is for pipelines that make videos",
        ),
        (
            ["layers", "SanaPAGPipeline", "--height", "0"],
            "--height must be a whole number of at least 1",
        ),
        (["layers", "Lumina2Pipeline", "--height", "1000"], "does not run at 1000×1024"),
        (["ledger", "NoPipeline"], "Unknown pipeline 'NoPipeline'"),
        (["demo", "--steps", "1"], "--steps must be a whole number of at least 2"),
        (["demo", "--batch", "0"], "--batch must be a whole number of at least 1"),
        (["demo", "--layers", "nowhere"], "'nowhere'"),
        (["demo", "--pipeline", "no/such/folder"], "could not be loaded"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ("[1, 2]", None),
        ("null", None),
        ("not JSON", None),
        ("{}", None),
        ('{"_class_name": ["a"]}', None),
        ('{"_class_name": "NoSuchPipeline"}', None),
        ('{"_class_name": "AutoencoderKL"}', None),
        (None, "[]"),
        (None, "{"),
        (None, '{"_class_name": "UNet2DConditionModel", "block_out_channels": "x"}'),
        (None, '{"_class_name": "UNet2DConditionModel", "cross_attention_dim": null}'),
    ],
)
@pytest.mark.parametrize("command", [["layers"], ["verify", "--pipeline"], ["demo", "--pipeline"]])
def test_damaged_configurations_are_sentences(command, index, part, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    shutil.copytree(EMOJI, folder)
    if index is not None:
        (folder / "model_index.json").write_text(index)
    if part is not None:
        (folder / "unet" / "config.json").write_text(part)
    assert main([*command, str(folder)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(".")


def test_files_that_are_not_there(capsys, tmp_path):
    assert main(["layers", str(tmp_path)]) == 2
    assert "could not be read as a pipeline" in capsys.readouterr().err


@pytest.mark.usefixtures("small_sana")
def test_a_disk_that_is_full_is_a_sentence(capsys, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    assert main(["ledger", "SanaPAGPipeline", "--json", str(tmp_path / "x.json")]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_model_index_that_is_no_object_is_named(capsys, tmp_path):
    (tmp_path / "model_index.json").write_text("[1, 2]")
    for command in (["layers"], ["verify", "--pipeline"]):
        assert main([*command, str(tmp_path)]) == 2
        assert "its model_index.json holds a list, not an object" in capsys.readouterr().err
