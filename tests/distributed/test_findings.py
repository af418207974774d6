"""What parallelism of diffusers and of PyTorch shows on a model, in two processes."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

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
