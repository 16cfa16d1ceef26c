"""One machine for every test: kernels interpreted without a CUDA device, no more threads than cores, GPU tests skipped."""

import os

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    # Triton reads this when a kernel module is imported, and no test module is imported before this file.
    os.environ["TRITON_INTERPRET"] = "1"

# sched_getaffinity knows a container's cores where cpu_count does not; macOS has only the latter.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
torch.set_num_threads(min(torch.get_num_threads(), CORES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
