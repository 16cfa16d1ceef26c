"""Modules of bench are imported when a test asks for them: some need what a machine for the GPU tests may lack."""

import importlib

import pytest


@pytest.fixture(scope="module")
def bench():
    """Import a module of bench by name."""
    return lambda name: importlib.import_module(f"bench.{name}")
