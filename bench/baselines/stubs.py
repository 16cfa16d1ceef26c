"""Kernels of TRL and verl out of their bare wheels, where packages that their trainers import are absent.

The kernel files import torch, Triton and transformers alone, but stand in packages whose `__init__` imports ray, or beside files
that import pandas and datasets. So a module named here can be imported with

    hollow packages     parents that are found on disk as ever and whose `__init__` is not run
    stand-ins           modules of the project itself in place of those that cannot be imported; what is taken from them plays
                        no part on one GPU

Nothing outside of the project is stood in for: whoever asks whether pandas, datasets or ray is installed hears the truth. The
plain import goes first (`bench.baselines.peers.imported`), and a module that stands in is said on the log.
"""

import ast
import logging
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

LOG = logging.getLogger(__name__)


class Bare(NamedTuple):
    """What a module is imported with: packages from the outside in, and the contents of modules by their names."""

    hollow: tuple[str, ...] = ()
    stand_ins: dict[str, dict[str, object]] = {}


def no_gathering(*parameters: object) -> nullcontext:
    """What TRL's `maybe_gather_lm_head_ctx` returns wherever DeepSpeed does not split the head."""
    return nullcontext()


TRL = Bare(stand_ins={"trl.trainer.utils": {"maybe_gather_lm_head_ctx": no_gathering}})
VERL_KERNELS = Bare(("verl", "verl.utils"))
# The two classes are annotations there.
VERL_DISTILLATION = Bare(
    (*VERL_KERNELS.hollow, "verl.trainer", "verl.trainer.distillation", "verl.trainer.distillation.fsdp"),
    {"verl.workers.config": {"DistillationConfig": object, "DistillationLossConfig": object}},
)
BARE = {
    "trl.kernels.chunked_divergence": TRL,
    "trl.kernels.chunked_logprob": TRL,
    "trl.trainer.utils": TRL,
    "verl.utils.kernel.linear_cross_entropy": VERL_KERNELS,
    "verl.utils.kernel.kernels": VERL_KERNELS,
    "verl.trainer.distillation.fsdp.losses": VERL_DISTILLATION,
}


def import_bare(module: str) -> ModuleType:
    """Import a module of `BARE` with what it takes; modules that are loaded already stay.

    Raises:
        ImportError: it is not named in `BARE`, or cannot be imported so either.
    """
    if module not in BARE:
        raise ImportError(f"{module} must be among {', '.join(BARE)} to be imported from a bare wheel")
    bare = BARE[module]
    folders_of(module)  # raises where the project is not there at all
    for name in bare.hollow:
        if name not in sys.modules:
            add_module(name, hollow_package(name))
    for name, contents in bare.stand_ins.items():
        if name not in sys.modules:
            LOG.warning("%s cannot be imported: a stand-in has %s", name, ", ".join(contents))
            add_module(name, stand_in(name, contents))
    return import_module(module)


def add_module(name: str, module: ModuleType) -> None:
    """As an import does: known by its name, and an attribute of its package where that is loaded."""
    sys.modules[name] = module
    package, _, leaf = name.rpartition(".")
    if package in sys.modules:
        setattr(sys.modules[package], leaf, module)


def hollow_package(name: str) -> ModuleType:
    folders = folders_of(name)
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = folders
    package = ModuleType(name)
    package.__spec__, package.__path__ = spec, folders
    return package


def stand_in(name: str, contents: dict[str, object]) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    return module


def folders_of(name: str) -> list[str]:
    """Folders of a package, without running any of it.

    Raises:
        ImportError: the project is not there.
    """
    project, *inner = name.split(".")
    try:
        spec = find_spec(project)
    except ValueError as error:  # a module without a spec, as tests put there
        raise ImportError(f"{project}: {error}") from error
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"No module named {project!r}")
    return [str(Path(folder, *inner)) for folder in spec.submodule_search_locations]


def function_in_source(module: str, qualified_name: str, names: dict[str, object]) -> Callable:
    """A function, or a static method, from the source of a module that is not run; `names` are the globals that it reads.

    For a function of a few lines of PyTorch in a file whose imports are a whole trainer.

    Raises:
        ImportError: the file, or the function in it, is not there.
    """
    package, _, leaf = module.rpartition(".")
    path = next((path for folder in folders_of(package) if (path := Path(folder, f"{leaf}.py")).is_file()), None)
    if path is None:
        raise ImportError(f"No module named {module!r}")
    node: ast.AST | None = ast.parse(path.read_text(encoding="utf-8"))
    for part in qualified_name.split("."):
        inner = (n for n in getattr(node, "body", ()) if isinstance(n, (ast.ClassDef, ast.FunctionDef)))
        node = next((n for n in inner if n.name == part), None)
    if not isinstance(node, ast.FunctionDef):
        raise ImportError(f"cannot find function {qualified_name!r} in {path.name} of {module!r}")
    node.decorator_list = []
    contents = dict(names)
    exec(compile(ast.Module([node], []), str(path), "exec"), contents)
    return contents[node.name]
