"""Packages by hand: discovery would trip over the top-level folders that are none."""

from __future__ import annotations

from setuptools import setup

setup(packages=["pag_fast", "pag_fast.branches", "pag_fast.processors"])
