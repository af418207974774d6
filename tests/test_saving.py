"""Every way to save or copy a model whose weights lie together sees whole tensors."""

from __future__ import annotations

import copy
import io
import os
import pickle

import pytest
import torch
from accelerate import Accelerator
from joined import equal, joined, output, wholes  # noqa: F401
from numerics import relative
from safetensors.torch import load_file, save_file, save_model


def _files(folder):
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


def _torch_saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _prepared(unet, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(unet)
    accelerator.save_state(folder)


FOLDERS = {
    "pipeline": lambda pipe, folder: pipe.save_pretrained(folder),
    "model": lambda pipe, folder: pipe.unet.save_pretrained(folder),
    "shards": lambda pipe, folder: pipe.unet.save_pretrained(folder, max_shard_size="40KB"),
    "bin": lambda pipe, folder: pipe.unet.save_pretrained(folder, safe_serialization=False),
    "save_model": lambda pipe, folder: save_model(pipe.unet, f"{folder}/model.safetensors"),
    "save_file": lambda pipe, folder: save_file(
        pipe.unet.state_dict(), f"{folder}/model.safetensors"
    ),
    "accelerate": lambda pipe, folder: Accelerator(cpu=True).save_model(pipe.unet, folder),
}


@pytest.mark.parametrize("way", FOLDERS)
def test_files_are_those_of_stock(joined, way, tmp_path, recwarn):  # noqa: F811
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for pipe, folder in ((joined.pipe, ours), (joined.stock, theirs)):
        folder.mkdir()
        FOLDERS[way](pipe, str(folder))
    ours, theirs = _files(ours), _files(theirs)
    assert sorted(ours) == sorted(theirs)
    # zip files hold the name of the folder; JSON may name the versions of a build
    for name in theirs:
        if name.endswith((".safetensors", ".json")):
            assert ours[name] == theirs[name], name
        elif name.endswith(".bin"):
            equal(*(torch.load(io.BytesIO(x[name])) for x in (ours, theirs)))
            assert abs(len(ours[name]) - len(theirs[name])) < 64
    assert not [w for w in recwarn if "shared" in str(w.message).lower()]
    assert relative(joined.run(), output(joined.stock.unet)) < 1e-6 and joined.members()


def test_accelerate_saves_its_state(joined, tmp_path):  # noqa: F811
    _prepared(joined.pipe.unet, str(tmp_path))
    equal(
        dict(sorted(load_file(str(tmp_path / "model.safetensors")).items())),
        dict(sorted(joined.stock.unet.state_dict().items())),
    )
    assert relative(joined.run(), output(joined.stock.unet)) < 1e-6


COPIES = {
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: torch.load(io.BytesIO(_torch_saved(x)), weights_only=False),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("what", ["pipe", "unet", "state_dict"])
def test_copies_are_whole_and_their_own(joined, way, what):  # noqa: F811
    def of(pipe):
        return {"pipe": pipe, "unet": pipe.unet}.get(what) or pipe.unet.state_dict()

    made = COPIES[way](of(joined.pipe))
    state = made if what == "state_dict" else (made.unet if what == "pipe" else made).state_dict()
    equal(state, joined.stock.unet.state_dict())
    for tensor in state.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    if what != "state_dict":
        # vae and all: of one size
        sizes = [len(_torch_saved(of(pipe))) for pipe in (joined.pipe, joined.stock)]
        assert abs(sizes[0] - sizes[1]) <= 64 * 10, sizes
        unet = made.unet if what == "pipe" else made
        expected = output(joined.stock.unet)
        assert relative(output(unet), expected) < 1e-6
        with torch.no_grad():
            next(x for n, x in unet.named_parameters() if n.endswith("attn1.to_k.weight")).mul_(3)
        assert relative(joined.run(), expected) < 1e-6 < relative(output(unet), expected)


def _spawned(unet, queue):
    sizes = [p.untyped_storage().nbytes() for p in unet.parameters()]
    queue.put((output(unet).tolist(), sizes))
    with torch.no_grad():
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(3.0)
    queue.put(None)


def test_spawn(joined):  # noqa: F811
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_spawned, args=(joined.pipe.unet, queue))
    process.start()
    try:
        there, sizes = queue.get()
        assert sizes == [p.numel() * p.element_size() for p in joined.stock.unet.parameters()]
        assert relative(torch.tensor(there, dtype=torch.float64), output(joined.stock.unet)) < 1e-6
        assert queue.get() is None
    finally:
        process.join(120)
    assert process.exitcode == 0
    # the weights are shared with the other process now, and what it writes is seen here
    with torch.no_grad():
        joined.stock.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(3.0)
    for _ in range(3):
        assert relative(joined.run(), output(joined.stock.unet)) < 1e-6
    assert not wholes(joined.pipe.unet)
