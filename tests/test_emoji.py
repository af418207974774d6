"""The model that ships with the package: it draws what it is asked for, patched or not."""

from __future__ import annotations

import json

import pytest
import torch

import pag_fast
from pag_fast.cli import main
from pag_fast.tools import load as models
from pag_fast.tools.demo import METHODS, PATCHED, STOCK, WITHOUT, run_demo
from pag_fast.tools.metrics import NearestPicture, generate, prompt_accuracy, psnr

MEGABYTE = 1e6


@pytest.fixture(scope="module", autouse=True)
def _with_onednn():
    """Which the other tests are sooner done without: these convolutions are large enough."""
    torch._C._set_mkldnn_enabled(True)
    yield
    torch._C._set_mkldnn_enabled(False)


@pytest.fixture(scope="module")
def pictures():
    return models.emoji_pictures()


@pytest.fixture(scope="module")
def known(pictures):
    return NearestPicture(pictures.captions, pictures.images)


@pytest.fixture
def pipe():
    pipe = models.emoji()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _spread(captions, count):
    return [captions[i * len(captions) // count] for i in range(count)]


def test_size_in_the_repository():
    files = [file for file in models.EMOJI.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12 * MEGABYTE
    assert {"LICENSE", "README.md", "model_index.json"} <= {file.name for file in files}


def test_no_path_of_the_training_machine_is_shipped():
    for file in models.EMOJI.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text(encoding="utf-8")), file


def test_loads_as_any_saved_pipeline_does():
    from diffusers import StableDiffusionPAGPipeline

    for pipe in (
        StableDiffusionPAGPipeline.from_pretrained(models.EMOJI),
        models.load(str(models.EMOJI)),
    ):
        assert type(pipe) is StableDiffusionPAGPipeline
        assert {m.dtype for m in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
        pipe.set_progress_bar_config(disable=True)
        assert pipe("red apple", num_inference_steps=2).images[0].size == (64, 64)


def test_every_caption_word_is_one_token(pipe, pictures):
    for caption in pictures.captions:
        ids = pipe.tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= pipe.tokenizer.model_max_length
    # and whatever else is asked for still becomes tokens it has
    strange = pipe.tokenizer("Zebra crossing, 3 blue Ünïcörns!").input_ids
    assert len(strange) > 6
    assert max(strange) < pipe.text_encoder.config.vocab_size


def test_patched_pictures_are_stocks(pipe, pictures, known):
    """8 prompts, fp32: at least 80 dB each, and each shows the same emoji."""
    captions = _spread(pictures.captions, 8)
    jobs = [(caption, seed) for seed, caption in enumerate(captions)]
    call = {"num_inference_steps": 6, "guidance_scale": 4.0, "pag_scale": 3.0}
    stock = generate(pipe, jobs, **call)
    ours = generate(pag_fast.patch(pipe), jobs, **call)
    worst = min(psnr(a, b) for a, b in zip(ours, stock, strict=True))
    print(f"worst PSNR {worst:.1f} dB")
    assert worst >= 80
    assert known.ranks(ours, captions) == known.ranks(stock, captions)


def _accuracy(pipe, known, captions, **call):
    found = prompt_accuracy(pipe, known, captions, num_inference_steps=6, **call)
    print(f"{call}: top-1 {found.top1:.1%}, top-5 {found.top5:.1%} of {found.images}")
    return found


def test_accuracy_with_cfg(pipe, pictures, known):
    """At least 90 % of 20 prompts are nearest to the emoji that was asked for."""
    captions = _spread(pictures.captions, 20)
    found = _accuracy(pipe, known, captions, guidance_scale=4.0, pag_scale=0.0, seeds=(0,))
    assert found.images == 20
    assert found.top1 >= 0.90
    assert found.top5 >= found.top1


def test_pag_raises_accuracy_without_cfg(pipe, pictures, known):
    """Where the prompt is asked for faintly: 64 pictures, 42 % of them right without PAG.

    A plain caption leaves little to raise, see the table that ``examples/emoji/evaluate.py`` makes.
    """
    captions = _spread(pictures.captions, 64)
    call = {"guidance_scale": 1.0, "prompt_weight": 0.45, "seeds": (0,)}
    pag_fast.patch(pipe)
    without = _accuracy(pipe, known, captions, pag_scale=0.0, **call)
    with_pag = _accuracy(pipe, known, captions, pag_scale=1.5, **call)
    assert with_pag.top1 > without.top1 + 0.05


def test_prompt_weight_scales_the_prompt(pipe):
    jobs, call = [("red apple", 0), ("rocket", 1)], {"num_inference_steps": 2}
    full = generate(pipe, jobs, **call)
    # nearly 1 is nearly the same picture, and 0 is the empty prompt's
    assert psnr(generate(pipe, jobs, prompt_weight=1 - 1e-6, **call), full) > 60
    nothing = generate(pipe, jobs, prompt_weight=0.0, **call)
    assert psnr(generate(pipe, [("", 0), ("", 1)], **call), nothing) > 60
    assert psnr(nothing, full) < 30


def test_demo(pipe, known):
    before, layers = set(vars(pipe)), pipe.pag_applied_layers
    prompts = ["red apple", "dog face", "rocket"]
    demo = run_demo(pipe, prompts, steps=2, batch=2, known=known, progress=False)
    assert type(pipe).__name__ == "StableDiffusionPAGPipeline"
    assert set(vars(pipe)) == before | {n for n in vars(pipe) if n.startswith("_")}
    assert not hasattr(pipe, "_pag_fast")
    assert pipe.pag_applied_layers is layers
    assert min(demo.psnr) >= 80
    assert list(demo.methods) == list(METHODS)
    assert demo.methods[PATCHED].shows == demo.methods[STOCK].shows
    # a step of each of two batches was timed; PAG makes a difference, and prompts do
    assert len(demo.methods[STOCK].steps) == 2
    first = demo.methods[WITHOUT].pictures
    assert psnr(first, demo.methods[STOCK].pictures) < 40
    assert psnr(first[0], first[1]) < 40
    # the noise of a picture does not depend on the batch it is in
    alone = run_demo(pipe, prompts[:1], steps=2, progress=False)
    assert psnr(alone.methods[STOCK].pictures[0], demo.methods[STOCK].pictures[0]) >= 80
    with pag_fast.patched(pipe), pytest.raises(ValueError, match="unpatch"):
        run_demo(pipe, prompts, progress=False)


def test_demo_command(tmp_path, capsys):
    """Own prompts on a model from a folder: tables on the screen, a picture and a JSON on disk."""
    from PIL import Image

    arguments = ["demo", "--pipeline", str(models.EMOJI), "--prompt", "red apple"]
    arguments += ["--prompt", "a penguin", "--layers", "up_blocks.1", "--steps", "2"]
    arguments += ["--rounds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (
        "ms per step",
        "PSNR, dB",
        "a penguin",
        "perturbed layers",
        "× as fast as stock PAG",
    ):
        assert text in printed
    report = json.loads((tmp_path / "demo.json").read_text())
    assert [entry["prompt"] for entry in report["prompts"]] == ["red apple", "a penguin"]
    assert report["speedup"] > 0
    assert report["explanation"]["fork"].startswith("up_blocks.1")
    picture = Image.open(tmp_path / "demo.png").convert("RGB")
    assert len(set(picture.getdata())) > 1000


def test_the_page_shows_the_measured_tables():
    from examples.emoji.evaluate import RESULT, WEIGHTS, markdown, settings

    report = json.loads(RESULT.read_text())
    assert len(report["cells"]) == len(list(settings()))
    assert min(cell["images"] for cell in report["cells"]) >= 400
    page = (RESULT.parents[2] / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for weight in WEIGHTS:
        assert markdown(report["cells"], weight) in page
