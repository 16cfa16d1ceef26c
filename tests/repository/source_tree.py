"""The files of a source tree, as the repository tests see them: what git ignores is not looked at."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE_ROOMS = ("esr_kernels", "python", "csrc", "tests", "bench")
IGNORED_FOLDERS = {"__pycache__", "build", "dist", "runs"}


def is_ignored(folder: str) -> bool:
    """Folders that hold no source: builds, results, caches, virtual environments."""
    return folder in IGNORED_FOLDERS or folder.endswith(".egg-info") or (folder.startswith(".") and folder != ".ci")


def files(root: Path, *endings: str, rooms: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files under `root` (only under `rooms` when given) whose names end with one of `endings` (any when none given)."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or any(is_ignored(part) for part in parts[:-1]):
            continue
        if (not rooms or parts[0] in rooms) and (not endings or path.name.endswith(endings)):
            yield path


def python_files(root: Path, *rooms: str) -> Iterator[tuple[str, ast.Module]]:
    """(path relative to root, syntax tree) of every Python file in `rooms` (all code rooms when none given)."""
    for path in files(root, ".py", rooms=rooms or CODE_ROOMS):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))


def plant(root: Path, sources: dict[str, str]) -> Path:
    """Write a small source tree: the planted violations of the tests."""
    for name, text in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root
