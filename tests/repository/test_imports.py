"""Do dependencies run one way? The arrows are those of docs/design.md; imports inside functions count too."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import ROOT, plant, python_files

# The rooms of the loop that make one noun each; train_step.py calls them in order. They may share types, not functions.
LOOP_STEPS = ("prompts", "rollout", "hidden_states", "prefix_positions", "distill_loss")


def imported_names(name: str, tree: ast.Module) -> Iterator[tuple[int, str, str | None]]:
    """(line, absolute module, imported name or None) of every import in a file, import_module("literal") included."""
    package = name.removeprefix("python/").removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, module, alias.name
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "importorskip"):
                yield node.lineno, str(node.args[0].value), None


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def public_names(root: Path) -> set[str]:
    """`esr_kernels.__all__`, read without importing."""
    for name, tree in python_files(root, "esr_kernels"):
        if name == "esr_kernels/__init__.py":
            for node in tree.body:
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
                    return set(ast.literal_eval(node.value))
    return set()


def broken_arrow(name: str, module: str, imported: str | None, public: set[str]) -> str | None:
    """Why `name` may not import `imported` from `module`, or None when it may."""
    file = name.rsplit("/", 1)[-1]
    target = f"{module}.{imported}" if imported else module
    room = name.split("/")[0]
    holds_kernel = file.endswith("_kernel.py") or file == "online_logsumexp.py"
    if room in ("esr_kernels", "python") and is_within(module, "tests", "bench"):
        return "the library imports neither tests nor bench"
    if room not in ("tests", "bench") and is_within(target, "esr_kernels.testing"):
        if not name.startswith("esr_kernels/testing/"):
            return "esr_kernels.testing is for tests and bench"
    if room == "esr_kernels":
        if is_within(module, "transformers", "accelerate", "esr_distill"):
            return "esr_kernels knows torch and triton only"
        if is_within(module, "triton") and not holds_kernel:
            return "triton belongs to *_kernel.py and online_logsumexp.py"
        last_words = {part.split("_")[-1] for part in target.split(".")}
        if file.endswith("_kernel.py") and "reference" in target.split("."):
            return "a kernel does not import a reference"
        if file == "reference.py" and "kernel" in last_words:
            return "a reference does not import a kernel"
    if room == "python":
        if is_within(module, "triton"):
            return "the loop has no kernels"
        if is_within(module, "esr_kernels") and (module != "esr_kernels" or imported not in public):
            return "the loop imports public names only: from esr_kernels import X"
        importer, imported_from = loop_step(name.removeprefix("python/").removesuffix(".py")), loop_step(module)
        if importer and imported_from and importer != imported_from and imported and not imported[0].isupper():
            return "the steps of the loop share types, not functions"
    return None


def loop_step(module: str) -> str | None:
    """The step of the loop that a module is, or is part of; the rollouts themselves (rollout_batch) are a type."""
    parts = module.replace("/", ".").split(".")
    if parts[-1] == "rollout_batch":
        return None
    return parts[1] if len(parts) > 1 and parts[0] == "esr_distill" and parts[1] in LOOP_STEPS else None


def broken_arrows(root: Path) -> list[str]:
    public = public_names(root)
    found = []
    for name, tree in python_files(root):
        for line, module, imported in imported_names(name, tree):
            reason = broken_arrow(name, module, imported, public)
            if reason:
                found.append(f"{name}:{line}: {module}{f' import {imported}' if imported else ''}: {reason}")
    return found


def loaded_by(statement: str, *suspects: str, path: tuple[Path, ...] = (ROOT, ROOT / "python")) -> list[str]:
    """Which of `suspects` are among the loaded modules after `statement` in a fresh interpreter."""
    program = f"import sys\n{statement}\nprint(*[name for name in {suspects!r} if name in sys.modules])"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_the_arrows_hold():
    found = broken_arrows(ROOT)
    assert not found, "\n".join(found)


def test_public_names_are_read_from_source():
    assert {"Impl", "OutputHead"} <= public_names(ROOT)


def test_importing_esr_kernels_is_light():
    assert loaded_by("import esr_kernels", "triton", "transformers", "accelerate", "esr_distill") == []


def test_importing_esr_kernels_leaves_cuda_alone():
    check = "import esr_kernels, torch\nassert not torch.cuda.is_initialized(), 'CUDA was initialised'"
    assert loaded_by(check, "torch") == ["torch"]


def test_importing_esr_distill_is_light():
    assert loaded_by("import esr_distill", "torch", "triton", "transformers", "accelerate", "matplotlib") == []


def test_heavy_import_is_found(tmp_path):
    plant(tmp_path, {"heavy/__init__.py": "from heavy import inner", "heavy/inner.py": "import wave"})
    assert loaded_by("import heavy", "wave", "heavy.inner", "heavy.outer", path=(tmp_path,)) == ["wave", "heavy.inner"]


@pytest.mark.parametrize(
    "name, source, reason",
    [
        ("esr_kernels/a.py", "import transformers.models", "knows torch and triton only"),
        ("esr_kernels/a.py", "def f():\n    from accelerate import Accelerator", "knows torch and triton only"),
        ("esr_kernels/a.py", "from esr_distill.config import X", "knows torch and triton only"),
        ("esr_kernels/op/api.py", "import triton.language as tl", "triton belongs to"),
        ("esr_kernels/op/api.py", "import importlib\nimportlib.import_module('triton')", "triton belongs to"),
        ("esr_kernels/op/forward_kernel.py", "from .reference import f", "a kernel does not import a reference"),
        ("esr_kernels/op/forward_kernel.py", "from esr_kernels.op import reference", "a kernel does not import"),
        ("esr_kernels/op/reference.py", "from . import forward_kernel", "a reference does not import a kernel"),
        ("esr_kernels/op/reference.py", "from esr_kernels.b.backward_kernel import f", "a reference does not import"),
        ("esr_kernels/a.py", "from esr_kernels.testing.inputs import f", "for tests and bench"),
        ("python/esr_distill/a.py", "from esr_kernels import testing", "for tests and bench"),
        ("python/esr_distill/a.py", "import tests.tiny_models", "neither tests nor bench"),
        ("esr_kernels/a.py", "import bench", "neither tests nor bench"),
        ("python/esr_distill/a.py", "from esr_kernels.impl import Impl", "public names only"),
        ("python/esr_distill/a.py", "import esr_kernels.impl", "public names only"),
        ("python/esr_distill/a.py", "from esr_kernels import checks", "public names only"),
        ("python/esr_distill/a.py", "import triton", "the loop has no kernels"),
        (
            "python/esr_distill/prompts/__init__.py",
            "from esr_distill.rollout.generate import f",
            "share types, not functions",
        ),
        ("python/esr_distill/rollout/a.py", "from ..hidden_states import f", "share types, not functions"),
    ],
)
def test_broken_arrow_is_found(tmp_path, name, source, reason):
    plant(tmp_path, {"esr_kernels/__init__.py": '__all__ = ["Impl"]', name: source})
    found = broken_arrows(tmp_path)
    assert len(found) == 1 and found[0].startswith(name) and reason in found[0], found


def test_allowed_imports_pass(tmp_path):
    allowed = {
        "esr_kernels/__init__.py": '__all__ = ["Impl"]\nfrom esr_kernels.op.reference import f',
        "esr_kernels/op/forward_kernel.py": "import triton\nfrom esr_kernels.online_logsumexp import f",
        "esr_kernels/online_logsumexp.py": "import triton.language as tl",
        "esr_kernels/op/reference.py": "import torch\nfrom ..checks import f",
        "esr_kernels/testing/inputs.py": "from esr_kernels.testing.cases import f",
        "python/esr_distill/a.py": "import torch, transformers\nfrom esr_kernels import Impl",
        "python/esr_distill/prompts/__init__.py": "from esr_distill.rollout.rollout_batch import RolloutBatch",
        "python/esr_distill/prefix_positions.py": "from esr_distill.rollout.rollout_batch import response_mask",
        "python/esr_distill/rollout/a.py": "from esr_distill.rollout.b import f",
        "python/esr_distill/train_step.py": "from esr_distill.prompts import f",
        "tests/test_a.py": "import esr_kernels.testing.cases, triton",
        "bench/bench_a.py": "from esr_kernels.testing import cases",
    }
    assert broken_arrows(plant(tmp_path, allowed)) == []
