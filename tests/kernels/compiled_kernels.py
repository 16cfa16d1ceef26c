"""Compile Triton kernels for GPUs that are not here, and read what each costs: registers, shared memory, spills.

    python tests/kernels/compiled_kernels.py [--only WORD]    the table of all kernels; exit status 1 if one spills

Nothing runs on a GPU. The figures are those that `ptxas -v` reports for the code that a launch would compile.

A table of kernels is a Python file with a list `VARIANTS`; that of the library is `kernel_table.py` beside this file. The
tests set TRITON_INTERPRET, under which Triton compiles nothing, so they start this file as a program (`compile_table`).
"""

import argparse
import contextlib
import inspect
import io
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TABLE = Path(__file__).with_name("kernel_table.py")
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
# Compute capability -> bytes of shared memory that one program may use (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class KernelVariant:
    """One kernel as one kind of launch compiles it.

    `arguments` are those of the launch, by name, with "*bf16", "*fp32", "*i32", ... for a tensor of that type. Numbers, None
    and jit functions stand for themselves and are specialised as Triton does it: see `specialise`. Tensors are aligned to
    16 bytes, as PyTorch allocates them, but for those named in `unaligned`.
    """

    name: str
    kernel: Any  # what @triton.jit made
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    enable_fp_fusion: bool = True
    unaligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelFigures:
    """What one variant costs on one architecture. `error` is the compiler's message, with all figures 0."""

    variant: str
    kernel: str
    capability: int
    registers: int = 0  # per thread
    shared_bytes: int = 0  # per program
    spill_store_bytes: int = 0  # per thread
    spill_load_bytes: int = 0
    stack_bytes: int = 0  # local memory per thread: spills and arrays indexed at run time
    load_bits: int = 0  # widest load of one thread from global memory
    error: str = ""

    def fault(self) -> str:
        """Why this kernel must not be launched like this, or ""."""
        where = f"{self.variant} on sm_{self.capability}"
        limit = SHARED_LIMIT[self.capability]
        faults = [self.error] if self.error else []
        if self.spill_store_bytes or self.spill_load_bytes or self.stack_bytes:
            faults.append(
                f"spills to local memory with {self.registers} registers: {self.spill_store_bytes} bytes stored, "
                f"{self.spill_load_bytes} loaded, stack of {self.stack_bytes} per thread; "
                "a larger maxnreg, a smaller tile or more warps?"
            )
        if self.shared_bytes > limit:
            faults.append(f"needs {self.shared_bytes} bytes of shared memory, the architecture has {limit}")
        return f"{where}: {'; '.join(faults)}" if faults else ""


@dataclass
class Specialisation:
    """What Triton compiles for: the types, the values it fixes, and what it may assume of the others."""

    signature: dict[str, str] = field(default_factory=dict)
    constexprs: dict[str, Any] = field(default_factory=dict)
    attributes: dict[tuple[int], list[list]] = field(default_factory=dict)


def specialise(variant: KernelVariant) -> Specialisation:
    """The rules of a launch: None, 1, jit functions and tl.constexpr become constants; what divides by 16 is known to.

    An argument in do_not_specialize keeps its type only, one in do_not_specialize_on_alignment is not known to divide by 16.
    """
    from triton.runtime.jit import JITFunction

    kernel, arguments = variant.kernel, variant.arguments
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"kernel must be a jit function, made without TRITON_INTERPRET; got {kernel!r}")
    names = [parameter.name for parameter in kernel.params]
    if set(names) != set(arguments):
        missing, unknown = sorted(set(names) - set(arguments)), sorted(set(arguments) - set(names))
        raise ValueError(f"arguments must be those of the kernel; missing {missing}, unknown {unknown}")

    result = Specialisation()
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        is_free = parameter.do_not_specialize
        is_one = is_number and value == 1 and not is_free
        if parameter.is_constexpr or value is None or isinstance(value, JITFunction) or is_one:
            result.signature[name] = "constexpr"
            result.constexprs[name] = value
            continue
        is_aligned = False
        if isinstance(value, str):
            result.signature[name] = value
            is_aligned = value.startswith("*") and name not in variant.unaligned
        elif isinstance(value, bool):
            result.signature[name] = "u1"
        elif is_number:
            result.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = value % 16 == 0
        elif isinstance(value, float):
            result.signature[name] = "fp32"
        else:
            raise TypeError(f"argument {name} must be a number, None, a jit function or a type, got {value!r}")
        if is_aligned and not is_free and not parameter.do_not_specialize_on_alignment:
            result.attributes[(index,)] = [["tt.divisibility", 16]]
    return result


def launched(name: str, launch: Callable[..., object], *positional: Any, **keywords: Any) -> list[KernelVariant]:
    """The kernels that `launch(*positional, **keywords)` starts, with its arguments and number of warps. None of them runs.

    Tensors of device "meta" have shape, strides and dtype, which is all that is compiled for, and no memory.
    """
    import torch
    from triton.runtime.jit import JITFunction

    types = {
        torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
        torch.bool: "*i1",
    }  # fmt: skip
    variants = []

    def record(kernel, *values, grid, warmup, **named) -> None:
        options = {option: named.pop(option) for option in LAUNCH_OPTIONS if option in named}
        arguments = inspect.signature(kernel.fn).bind(*values, **named).arguments
        unaligned = []
        for argument, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[argument] = types[value.dtype]
                if value.storage_offset() * value.element_size() % 16:
                    unaligned.append(argument)
        label = f"{name}, {kernel.__name__}" if variants else name
        variants.append(KernelVariant(label, kernel, arguments, unaligned=tuple(unaligned), **options))

    with mock.patch.object(JITFunction, "run", record):
        launch(*positional, **keywords)
    if not variants:
        raise ValueError(f"{name}: no kernel was launched")
    return variants


def ptxas_figures(log: str) -> dict[str, int]:
    """Figures of `ptxas -v`: the largest of the functions it compiled, spills added up."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not frames:
        raise ValueError(f"ptxas reported no registers or no stack frame: {log!r}")
    stack, stores, loads = zip(*(map(int, frame) for frame in frames), strict=True)
    return {
        "registers": max(registers),
        "stack_bytes": max(stack),
        "spill_store_bytes": sum(stores),
        "spill_load_bytes": sum(loads),
    }


def widest_load(ptx: str) -> int:
    """Bits of the widest ld.global instruction, 0 when there is none."""
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return max((int(count or 1) * int(bits) for count, bits in loads), default=0)


def compile_variant(variant: KernelVariant, capability: int) -> KernelFigures:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(variant.kernel, "__name__", str(variant.kernel))
    ptxas_log = io.StringIO()
    try:
        launch = specialise(variant)
        source = ASTSource(variant.kernel, launch.signature, launch.constexprs, launch.attributes)
        options = {option: getattr(variant, option) for option in LAUNCH_OPTIONS}
        with contextlib.redirect_stdout(ptxas_log):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        figures = ptxas_figures(ptxas_log.getvalue())
    except Exception as error:  # the table shows every kernel, also those after one that does not compile
        return KernelFigures(variant.name, kernel, capability, error=f"{type(error).__name__}: {error}")
    load_bits = widest_load(compiled.asm["ptx"])
    shared_bytes = compiled.metadata.shared
    return KernelFigures(variant.name, kernel, capability, shared_bytes=shared_bytes, load_bits=load_bits, **figures)


VARIANTS: list[KernelVariant] = []  # of this process; children of a fork inherit them, as jit functions cannot be sent


def compile_job(job: tuple[int, int]) -> KernelFigures:
    index, capability = job
    return compile_variant(VARIANTS[index], capability)


def compile_variants(variants: list[KernelVariant], processes: int) -> list[KernelFigures]:
    """Figures of every variant on every architecture, in that order, freshly compiled."""
    from triton import knobs

    names = [variant.name for variant in variants]
    if len(set(names)) != len(names):
        raise ValueError(f"kernel variants must have different names, got {names}")
    VARIANTS[:] = variants
    jobs = [(index, capability) for index in range(len(variants)) for capability in SHARED_LIMIT]
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        knobs.compilation.always_compile = True  # two variants may be the same code, and a cached one has no log
        knobs.nvidia.dump_ptxas_log = True
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            return pool.map(compile_job, jobs, chunksize=1)


def compile_table(table: Path = KERNEL_TABLE, timeout: float = 600) -> list[KernelFigures]:
    """`compile_variants` of a table's VARIANTS in a fresh interpreter, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--table", str(table), "--json", str(figures)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if not figures.exists():
            raise RuntimeError(f"the compiler of {table.name} ended with status {done.returncode}:\n{done.stderr}")
        return [KernelFigures(**entry) for entry in json.loads(figures.read_text(encoding="utf-8"))]


def format_table(figures: list[KernelFigures]) -> str:
    """One line for each variant; for each architecture the registers and spilled bytes of a thread, the bytes of shared
    memory of a program and the bits of the widest load."""
    by_variant: dict[str, dict[int, str]] = {}
    for f in figures:
        spilled = max(f.spill_store_bytes + f.spill_load_bytes, f.stack_bytes)
        cell = "error" if f.error else f"{f.registers:4}{f.shared_bytes:7}{spilled:7}{f.load_bits:5}"
        by_variant.setdefault(f.variant, {})[f.capability] = f"{cell:>23}"
    width = max(map(len, by_variant), default=0)
    heads = "".join(f" | {f'sm_{capability}':>23}" for capability in SHARED_LIMIT)
    units = f"{'':{width}}" + " | regs shared  spill load" * len(SHARED_LIMIT)
    rows = [f"{name:{width}}" + "".join(f" | {cells[c]}" for c in SHARED_LIMIT) for name, cells in by_variant.items()]
    return "\n".join([f"{'':{width}}{heads}", units, *rows])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", type=Path, default=KERNEL_TABLE, help="Python file with a list VARIANTS")
    parser.add_argument("--only", default="", help="compile the variants whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here instead of printing a table")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(argv)

    sys.path.insert(0, str(Path(__file__).parent))
    variants = runpy.run_path(str(options.table))["VARIANTS"]
    figures = compile_variants([v for v in variants if options.only in v.name], options.processes)
    if options.json:
        options.json.write_text(json.dumps([asdict(entry) for entry in figures]), encoding="utf-8")
        return 0
    faults = [entry.fault() for entry in figures if entry.fault()]
    print(format_table(figures), *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
