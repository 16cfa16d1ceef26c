"""Does what the documents name exist? Paths, file trees, make targets, environment variables; no machine's own paths."""

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import CODE_ROOMS, ROOT, files, plant, python_files

# In backticks, a name with one of these endings is a file of this repository; other endings may be what a run writes.
SOURCE_ENDINGS = (".py", ".md", ".toml", ".txt", ".cpp", ".cu", ".cuh", ".h", ".sh")
# Folders that a command makes; paths in them need not exist in a clone.
MADE_FOLDERS = ("runs", ".venv", ".wheels", "bench/results")
ROOMS = (*CODE_ROOMS, "docs", ".ci", "esr_distill")
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|Users|root|tmp|work|opt|mnt|workspace)/\w|\b[A-Z]:\\\\?Users")
MARKDOWN_LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}[^\n]*)?\n)*(?: {4}[^\n]*\n?)", re.MULTILINE)
PATH = re.compile(r"[\w.][\w./-]*")
ROOM_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, ROOMS))})/[\w./-]*\w/?")


def documents(root: Path) -> Iterator[tuple[str, str]]:
    for path in files(root, ".md"):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """Fenced blocks, and blocks indented by four spaces after an empty line."""
    return FENCE.findall(text) + [textwrap.dedent(block) for block in INDENTED.findall(FENCE.sub("", text))]


def docstrings_and_comments(root: Path) -> Iterator[tuple[str, str]]:
    for name, tree in python_files(root):
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, ast.get_docstring(node) or ""
        source = (root / name).read_text(encoding="utf-8")
        yield name, "\n".join(re.findall(r"^\s*#(.*)$", source, re.MULTILINE))


def paths_on_disk(root: Path) -> set[str]:
    """Every file and folder with every tail of its path: rollout/generate.py stands for the whole path."""
    tails = set()
    for path in files(root):
        parts = path.relative_to(root).parts
        for end in range(1, len(parts) + 1):
            tails.update("/".join(parts[start:end]) for start in range(end))
    return tails


def is_repository_path(token: str) -> bool:
    """Whether a word in backticks claims to be a path here: it starts in a room or has a source file's ending."""
    if not PATH.fullmatch(token) or token.endswith("..."):
        return False
    in_room = "/" in token and token.removeprefix("./").split("/")[0] in ROOMS
    return in_room or (token.endswith(SOURCE_ENDINGS) and token not in SOURCE_ENDINGS)


def missing_paths(root: Path) -> list[str]:
    """Paths named in backticks (documents, docstrings, comments), in links, and unquoted in docstrings, not on disk."""
    known = paths_on_disk(root)
    found = []

    def expect(name: str, token: str) -> None:
        path = token.removeprefix("./").split("::")[0].rstrip("/")
        if not path.startswith(tuple(folder + "/" for folder in MADE_FOLDERS)) and path not in MADE_FOLDERS:
            if path not in known:
                found.append(f"{name}: {token} does not exist")

    for name, text in documents(root):
        for token in CODE_SPAN.findall(FENCE.sub("", text)):
            if is_repository_path(token):
                expect(name, token)
        for target in MARKDOWN_LINK.findall(text):
            target = target.split("#")[0]
            if target and not re.match(r"[a-z]+:", target) and not (root / name).parent.joinpath(target).exists():
                found.append(f"{name}: link {target} does not exist")
    for name, text in docstrings_and_comments(root):
        tokens = {token for token in CODE_SPAN.findall(text) if is_repository_path(token)}
        for token in sorted(tokens | set(ROOM_PATH.findall(text))):
            expect(name, token)
    return found


def drawn_trees(text: str) -> Iterator[list[tuple[str, bool]]]:
    """The file trees in code blocks, each a list of (path, is a folder).

    A tree is a block whose first line names a folder ("docs/   what is there"); depth is by indentation or box drawing.
    A line's leading words that look like paths are drawn paths; the first word that does not begins the description.
    """
    for block in code_blocks(text):
        lines = [line.rstrip() for line in block.splitlines() if line.strip()]
        if not any(re.match(r"[│├└─ ]*[\w./-]+/(\s|$)", line) for line in lines[:2]):
            continue
        drawn: list[tuple[str, bool]] = []
        parents: list[tuple[int, str]] = []
        for line in lines:
            body = line.lstrip("│├└─ ")
            column = len(line) - len(body)
            while parents and parents[-1][0] >= column:
                parents.pop()
            above = parents[-1][1] if parents else ""
            for word in re.split(r"\s{2,}|#", body)[0].split():
                if not PATH.fullmatch(word):
                    break
                path = (above + word).removeprefix("./")
                drawn.append((path.rstrip("/"), word.endswith("/")))
                if word.endswith("/"):
                    parents.append((column, path))
        yield drawn


def wrong_trees(root: Path) -> list[str]:
    """Drawn paths that are not on disk, and folders on disk beside drawn ones that are not drawn.

    Siblings count only where a folder is drawn at that level: drawing esr_kernels/ commits a tree to every top-level
    folder, drawing one operator's folder to every operator.
    """
    on_disk = {path.relative_to(root).as_posix() for path in files(root)}
    folders = {parent.as_posix() for path in on_disk for parent in Path(path).parents if parent != Path(".")}
    found = []
    for name, text in documents(root):
        for drawn in drawn_trees(text):
            for path, is_folder in drawn:
                made = path.startswith(tuple(folder + "/" for folder in MADE_FOLDERS)) or path in MADE_FOLDERS
                if not made and path not in (folders if is_folder else on_disk):
                    found.append(f"{name}: the tree draws {path}{'/' if is_folder else ''}, which does not exist")
            drawn_paths = {path for path, _ in drawn}
            # A line python/esr_distill/ draws python/ too.
            drawn_paths |= {parent.as_posix() for path in drawn_paths for parent in Path(path).parents}
            levels = {Path(path).parent for path in drawn_paths & folders}
            for folder in sorted(folders - drawn_paths):
                if Path(folder).parent in levels and not folder.startswith("."):
                    found.append(f"{name}: the tree leaves out {folder}/")
    return found


def unknown_targets(root: Path) -> list[str]:
    """Calls of make, in a code span or a line of a code block, with a target that the Makefile does not have."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    named = []
    for name, text in [*documents(root), *docstrings_and_comments(root)]:
        commands = CODE_SPAN.findall(FENCE.sub("", text))
        for block in code_blocks(text):
            commands += block.splitlines()
        for command in commands:
            call = re.match(r"\s*(?:\$ )?make((?:\s+[\w./=-]+)+)", command)
            words = call.group(1).split() if call else []
            named += [(name, word) for word in words if "=" not in word and not word.startswith("-")]
    return [f"{name}: make {word} is no target of the Makefile" for name, word in named if word not in targets]


def machine_paths(root: Path) -> list[str]:
    """Absolute paths that only one machine has, in any text file."""
    found = []
    for path in files(root, *SOURCE_ENDINGS, ".yaml", ".yml", ".in", "Makefile", "run", "gpu"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(root).as_posix()}:{number}: {line.strip()}")
    return found


def environment_variables(root: Path) -> dict[str, str]:
    """Name to first place of every environment variable that the code touches; a name that is no literal is "?"."""
    used: dict[str, str] = {}
    for name, tree in python_files(root, "setup.py", "esr_kernels", "python", "bench", "tests"):
        if name.startswith("tests/repository/"):
            continue
        for node in ast.walk(tree):
            key = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("os.environ", "environ"):
                key = node.slice
            elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) in ("os.environ", "environ"):
                key = node.left
            elif isinstance(node, ast.Call) and node.args:
                if re.fullmatch(r"(os\.)?(environ\.(get|pop|setdefault)|getenv)", ast.unparse(node.func)):
                    key = node.args[0]
            if key is not None:
                variable = key.value if isinstance(key, ast.Constant) else "?"
                used.setdefault(str(variable), f"{name}:{node.lineno}")
    for path in files(root, ".cpp", ".cu", ".h", rooms=("csrc",)):
        for variable in re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")):
            used.setdefault(variable, path.relative_to(root).as_posix())
    return used


def undocumented_variables(root: Path) -> list[str]:
    """Variables that the code touches and docs/environment.md has no table row for, and rows that no code touches."""
    used = environment_variables(root)
    text = (root / "docs/environment.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([A-Z][A-Z0-9_]*)` \|", text, re.MULTILINE))
    found = [f"{place}: {name} is not in docs/environment.md" for name, place in used.items() if name not in documented]
    return found + [f"docs/environment.md: no code touches {name}" for name in sorted(documented - set(used))]


CHECKS = [missing_paths, wrong_trees, unknown_targets, machine_paths, undocumented_variables]


@pytest.mark.parametrize("check", CHECKS)
def test_the_documents_are_true(check):
    found = check(ROOT)
    assert not found, "\n".join(found)


def test_missing_paths_are_found(tmp_path):
    here = {
        "README.md": "`docs/design.md` `docs/gone.md` `runs/demo/a.py` [a](docs/design.md#x) [b](docs/lost.md) `a/b`\n"
        "```\n`docs/in_a_fence.md`\n```\n[c](https://example.org/x.md)",
        "docs/design.md": "[up](../README.md) `design.md` `stale.py` `op/api.py` `op/old.py` `loss.py::f` `api.py::f`",
        "esr_kernels/op/api.py": '"""See docs/numbers.md and `op/api.py`."""\n# and tests/kernels, tests/none/\n',
        "tests/kernels/test_a.py": "",
    }
    found = missing_paths(plant(tmp_path, here))
    assert found == [
        "README.md: docs/gone.md does not exist",
        "README.md: link docs/lost.md does not exist",
        "docs/design.md: stale.py does not exist",
        "docs/design.md: op/old.py does not exist",
        "esr_kernels/op/api.py: docs/numbers.md does not exist",
        "esr_kernels/op/api.py: tests/none/ does not exist",
    ]


TREE = """
```
README.md  Makefile
esr_kernels/      the ops
  impl.py checks.py   two files
  op_a/           an operator
    api.py        signature
python/esr_distill/   the loop
{more}
```
"""


@pytest.mark.parametrize("is_fenced", [True, False])
@pytest.mark.parametrize(
    "more, wrong",
    [
        ("tests/", []),
        ("", ["README.md: the tree leaves out tests/"]),
        ("tests/\n  gone/", ["README.md: the tree draws tests/gone/, which does not exist"]),
        ("tests/   checks\n  test_b.py", ["README.md: the tree draws tests/test_b.py, which does not exist"]),
    ],
)
def test_wrong_tree_is_found(tmp_path, more, wrong, is_fenced):
    names = ["Makefile", "esr_kernels/impl.py", "esr_kernels/checks.py", "esr_kernels/op_a/api.py", "tests/test_a.py"]
    plant(tmp_path, dict.fromkeys([*names, "python/esr_distill/train.py"], ""))
    tree = TREE.format(more=more)
    if not is_fenced:
        tree = textwrap.indent(tree.replace("```", ""), "    ")
    plant(tmp_path, {"README.md": f"The tree:\n{tree}"})
    assert wrong_trees(tmp_path) == wrong


def test_undrawn_operator_is_found_in_a_box_drawing(tmp_path):
    tree = "```\nesr_kernels/\n├── impl.py   # switch\n└── op_a/\n    └── api.py\n```\n"
    plant(tmp_path, dict.fromkeys(["esr_kernels/impl.py", "esr_kernels/op_a/api.py", "esr_kernels/op_b/api.py"], ""))
    plant(tmp_path, {"README.md": tree})
    assert wrong_trees(tmp_path) == ["README.md: the tree leaves out esr_kernels/op_b/"]


def test_unknown_target_is_found(tmp_path):
    text = "`make demo` `make PYTHON=python3.12 lint` make sure\n```\nmake test bench  # both\n$ make check\n```\n"
    text += "\n    make demo\n\n    make docs  # pages\n\nand\n    make do\n"
    plant(tmp_path, {"README.md": text, "Makefile": "demo:\n\ttrue\ntest: demo\n\ttrue\ncheck:\n"})
    assert unknown_targets(tmp_path) == [
        "README.md: make lint is no target of the Makefile",
        "README.md: make bench is no target of the Makefile",
        "README.md: make docs is no target of the Makefile",
    ]


def test_machine_path_is_found(tmp_path):
    home, tmp = "/" + "home/me/run", "/" + "tmp/x"
    plant(tmp_path, {"README.md": f"see {home}\n", "esr_kernels/a.py": f"P = '{tmp}'\nQ = 'https://a.org/{tmp}'\n"})
    assert machine_paths(tmp_path) == [f"README.md:1: see {home}", f"esr_kernels/a.py:1: P = '{tmp}'"]


def test_undocumented_variable_is_found(tmp_path):
    code = "import os\nos.environ['A']\nos.getenv('B', '1')\n'C' in os.environ\nos.environ.get(name)\nd['D']\n"
    table = "| Variable | Effect |\n|---|---|\n| `A` | x |\n| `C` | y |\n| `E` | z |\n"
    plant(tmp_path, {"python/esr_distill/a.py": code, "docs/environment.md": table})
    assert undocumented_variables(tmp_path) == [
        "python/esr_distill/a.py:3: B is not in docs/environment.md",
        "python/esr_distill/a.py:5: ? is not in docs/environment.md",
        "docs/environment.md: no code touches E",
    ]
