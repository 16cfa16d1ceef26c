"""Makes Triton's interpreter behave like the hardware where it does not, and unwritten outputs visible."""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from esr_kernels import Impl

# Triton exists for Linux only; elsewhere the references are tested and the kernels are not.
if find_spec("triton") is None:
    collect_ignore_glob = [
        "test_fused_*.py",
        "test_elementary_functions.py",
        "test_gradient_bounds.py",
        "test_new_divergence.py",
        "test_row_kernel_tiles.py",
    ]

# -inf - -inf, or the maximum of nothing but NaN, is no warning on a GPU.
INTERPRETER_WARNINGS = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(INTERPRETER_WARNINGS)


@pytest.fixture(autouse=os.environ.get("TRITON_INTERPRET") == "1")
def interpreter_like_hardware(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float32 rounds to the nearest bfloat16, where the interpreter cuts its bits off.

    And twice as fast: the interpreter patches triton.language anew for every jit function that a kernel calls; once for
    each module and launch is enough.
    """
    from triton.runtime import interpreter

    convert, patch_language, launch = (
        interpreter._convert_float,
        interpreter._patch_lang,
        interpreter.GridExecutor.__call__,
    )
    patched_modules = set()

    def rounded(values, source, target, rounding_mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, rounding_mode)
        return torch.from_numpy(np.asarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    def launch_with_clean_language(*args, **kwargs):
        patched_modules.clear()
        return launch(*args, **kwargs)

    def patch_once(function):
        if function.__module__ not in patched_modules:
            patched_modules.add(function.__module__)
            return patch_language(function)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_with_clean_language)
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=list(Impl), ids=lambda impl: impl.name.lower())
def sampler_impl(request: pytest.FixtureRequest) -> Impl:
    """Both samplers; where there is a C++ compiler, a native one that is not built is a failure."""
    if request.param is Impl.FUSED and shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("the native sampler is built with a C++ compiler")
    return request.param


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its kin give NaN, or the largest integer: an output that a kernel does not write cannot pass."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
