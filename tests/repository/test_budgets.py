"""Does every file stay within a page count, and every signature within a handful of options? See CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest
from source_tree import CODE_ROOMS, ROOT, files, plant, python_files

MAX_LINES = 400
MAX_PARAMETERS = 12
SOURCE_ENDINGS = (".py", ".cpp", ".cu", ".cuh", ".h")
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc"}


def long_files(root: Path) -> list[str]:
    found = []
    for path in files(root, *SOURCE_ENDINGS, rooms=CODE_ROOMS):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            found.append(f"{path.relative_to(root).as_posix()}: {lines} lines, at most {MAX_LINES}")
    return found


def wide_functions(root: Path) -> list[str]:
    """Functions with too many parameters; self and cls do not count, nor do kernels, whose strides are parameters."""
    found = []
    for name, tree in python_files(root):
        if name.endswith("_kernel.py"):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if count > MAX_PARAMETERS:
                label = getattr(node, "name", "lambda")
                found.append(f"{name}:{node.lineno}: {label} has {count} parameters, at most {MAX_PARAMETERS}")
    return found


def drawers(root: Path) -> list[str]:
    """Files and folders that are named after nothing: utils.py, test_helpers.py, common/."""
    found = set()
    for path in files(root, *SOURCE_ENDINGS, rooms=CODE_ROOMS):
        parts = path.relative_to(root).with_suffix("").parts
        for depth, part in enumerate(parts, start=1):
            if part.split("_")[-1] in DRAWERS:
                found.add("/".join(parts[:depth]))
    return sorted(found)


@pytest.mark.parametrize("check", [long_files, wide_functions, drawers])
def test_the_repository_keeps_its_budgets(check):
    found = check(ROOT)
    assert not found, "\n".join(found)


def test_long_file_is_found(tmp_path):
    plant(tmp_path, {"esr_kernels/a.py": "x = 1\n" * 400, "csrc/b.cu": "//\n" * 401, ".venv/c.py": "x = 1\n" * 500})
    assert long_files(tmp_path) == ["csrc/b.cu: 401 lines, at most 400"]


def test_wide_function_is_found(tmp_path):
    twelve = ", ".join(f"a{i}" for i in range(12))
    wide = f"class A:\n    def fits(self, {twelve}): ...\n    def wide({twelve}, *, b): ...\n"
    plant(tmp_path, {"python/esr_distill/a.py": wide, "esr_kernels/forward_kernel.py": wide})
    assert wide_functions(tmp_path) == ["python/esr_distill/a.py:3: wide has 13 parameters, at most 12"]


def test_drawer_is_found(tmp_path):
    names = ["esr_kernels/utils.py", "tests/string_helpers.py", "python/esr_distill/misc/a.py", "esr_kernels/prefix.py"]
    plant(tmp_path, dict.fromkeys(names, ""))
    assert drawers(tmp_path) == ["esr_kernels/utils", "python/esr_distill/misc", "tests/string_helpers"]
