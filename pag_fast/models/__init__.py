"""What is known about each class of denoiser, ControlNets among them."""

from __future__ import annotations
