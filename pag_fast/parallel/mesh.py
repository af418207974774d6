"""Which meshes branches are placed on."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

SIZES = (2, 3)


def check_mesh(mesh: Any) -> None:
    """Refuse what branches cannot be placed on.

    Raises:
        ValueError: not one named dimension of a ``DeviceMesh`` of 2 or 3 ranks, of which this
            process is one.
    """
    if not dist.is_initialized():
        raise ValueError(
            "mesh needs the process group that it was made in, and torch.distributed is not "
            "initialised: start the program with torchrun and call "
            "torch.distributed.init_process_group() or init_device_mesh()."
        )
    names = mesh.mesh_dim_names
    if mesh.ndim != 1 or not names:
        found = f"{mesh.ndim} dimensions" if mesh.ndim != 1 else "one without a name"
        named = f" {names}" if names else ""
        raise ValueError(
            'mesh must be one dimension of a DeviceMesh, such as mesh["branch"]; got '
            f"{found}{named}."
        )
    if mesh.size() not in SIZES:
        raise ValueError(
            f"Branches are placed on 2 or 3 ranks, and the dimension {names[0]!r} has "
            f"{mesh.size()}: with more devices make a mesh of two dimensions and give several "
            "groups a picture each."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"This process, rank {dist.get_rank()}, is none of the mesh's {mesh.size()}: patch "
            "where it is."
        )
