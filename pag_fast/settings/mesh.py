"""A device mesh among the options: what it is; where it can be used is seen by ``patch``."""

from __future__ import annotations

import sys
from typing import Any


def check_is_mesh(value: Any) -> None:
    """Raises ValueError for what is no torch ``DeviceMesh``."""
    module = sys.modules.get("torch.distributed.device_mesh")  # whoever has a mesh has this
    if module is None or not isinstance(value, module.DeviceMesh):
        raise ValueError(
            'mesh must be one dimension of a torch DeviceMesh, such as mesh["branch"]; got '
            f"{value!r}."
        )
