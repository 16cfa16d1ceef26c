"""One machine for every test: one thread, kernels interpreted and GPU tests skipped where there is no CUDA device."""

import os
from importlib.util import find_spec

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and find_spec("triton"):  # there is none outside Linux
    # Triton reads this when a kernel module is imported, and no test module is imported before this file.
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors of the tests are small: a second thread mostly waits, and on a busy machine it makes a training test six times
# slower. One thread also makes sums repeatable.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
