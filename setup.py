"""Build script. Metadata lives in pyproject.toml; the native sampler will be built here once csrc/ exists."""

from setuptools import setup

setup()
