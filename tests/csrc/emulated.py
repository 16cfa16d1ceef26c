"""Builds the programs of this folder and runs the sampler of csrc/ on the emulated device, for tests.

The emulator (emulator/) runs CUDA kernels compiled by g++: every thread of a block is a fiber, in an order of choice. There
are two builds of each program:

    Build.MEMORY    under AddressSanitizer and UndefinedBehaviorSanitizer
    Build.RACES     under the emulator's own race detector

Objects and programs are kept under build/, named by a hash of what they are made from.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from esr_kernels import SamplerState

FOLDER = Path(__file__).resolve().parent
SAMPLER = FOLDER.parents[1] / "csrc" / "sampler"
KEPT = FOLDER.parents[1] / "build" / "emulated"


class Build(Enum):
    MEMORY = "memory"
    RACES = "races"


class Order(Enum):
    """Which of the threads that can run does so next."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2


class EmulationFailed(Exception):
    """A program ended with an error: 3 for synchronisation, 4 for a race, 1 for a sanitizer's report."""

    def __init__(self, status: int, report: str):
        super().__init__(f"exit status {status}\n{report}")
        self.status = status
        self.report = report


FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", f"-I{FOLDER}", f"-I{FOLDER / 'emulator'}", f"-I{SAMPLER}"]
# A third of the compile time: the functions of csrc/ are inlined only where the compiler likes to.
AS_CUDA = ["-O1", "-Dalways_inline=unused", "-x", "c++", "-include", "emulated_cuda.h"]
SANITIZERS = ["-fsanitize=address,undefined", "-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all"]
EMULATOR_FLAGS = {
    Build.MEMORY: ["-O2", "-DEMULATOR_ADDRESS_SANITIZER"],
    Build.RACES: ["-O2", "-DEMULATOR_DETECTS_RACES"],
}
KERNEL_FLAGS = {Build.MEMORY: SANITIZERS, Build.RACES: ["-fsanitize=thread"]}
HOST_FLAGS = {Build.MEMORY: ["-O1", *SANITIZERS], Build.RACES: ["-O1"]}
# Races are reported by code address: it is that of the file where the program is not moved.
PLACEMENT = {Build.MEMORY: [], Build.RACES: ["-fno-pie"]}
LINK_FLAGS = {Build.MEMORY: SANITIZERS, Build.RACES: ["-no-pie"]}
PROGRAMS = {
    "emulated_sampler": [FOLDER / "emulated_sampler.cpp", SAMPLER / "sampler_cuda.cu", SAMPLER / "sampler_cpu.cpp"],
    "planted_kernels": [FOLDER / "planted_kernels.cu"],
    "access_set_check": [FOLDER / "access_set_check.cpp"],
}

_pool = ThreadPoolExecutor(os.cpu_count())


@cache
def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    return compiler


@cache
def _digest_of_headers(folder: Path) -> str:
    headers = sorted(folder.glob("*.h"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in headers)).hexdigest()


@cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _make(result: Path, command: list[str], *then: list[str]) -> Path:
    """Runs `command -o file`, then the other commands on that file; the result appears at once and whole."""
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=result.parent) as folder:
            made = Path(folder, result.name)
            _run([*command, "-o", str(made)])
            for more in then:
                _run([*more, str(made)])
            made.replace(result)
    return result


@cache
def _start_object(source: Path, build: Build) -> Future[Path]:
    renamings = []
    if source.suffix == ".cu":
        flags = [*AS_CUDA, *KERNEL_FLAGS[build]]
        if build is Build.RACES:
            # calls, not instructions, so that the detector sees what they touch
            flags += ["-mstringop-strategy=libcall"] if os.uname().machine == "x86_64" else []
            names = [f"--redefine-sym={name}=__tsan_{name}" for name in ("memcpy", "memmove", "memset")]
            renamings = [["objcopy", *names]]
    else:
        flags = EMULATOR_FLAGS[build] if source.parent.name == "emulator" else HOST_FLAGS[build]
    command = [_compiler(), *FLAGS, *flags, *PLACEMENT[build], "-c", str(source)]
    includes = [FOLDER / "emulator"] + ([FOLDER, SAMPLER] if source.parent.name != "emulator" else [])
    made_from = [_compiler_version(), *command, *map(str, renamings), *map(_digest_of_headers, includes)]
    digest = hashlib.sha256("\n".join(made_from).encode() + source.read_bytes()).hexdigest()[:16]
    return _pool.submit(_make, KEPT / f"{source.stem}-{build.value}-{digest}.o", command, *renamings)


def start_builds(*names: str) -> None:
    """Begins to compile both builds of these programs and returns at once."""
    for name in names:
        for build in Build:
            _start_objects(name, build)


def _start_objects(name: str, build: Build) -> list[Future[Path]]:
    sources = [*PROGRAMS[name], *sorted((FOLDER / "emulator").glob("*.cpp"))]
    if build is Build.MEMORY:
        sources = [source for source in sources if not source.name.startswith("race_")]
    return [_start_object(source, build) for source in sources]


@cache
def built_program(name: str, build: Build) -> Path:
    """The program's path; waits until it is built."""
    objects = [str(future.result()) for future in _start_objects(name, build)]
    digest = hashlib.sha256("\n".join(objects).encode()).hexdigest()[:16]
    return _make(KEPT / f"{name}-{build.value}-{digest}", [_compiler(), *LINK_FLAGS[build], *objects])


def run_program(name: str, build: Build, *words: str) -> str:
    """What the program prints; EmulationFailed where it ends with an error."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(built_program(name, build)), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})
    if done.returncode != 0:
        raise EmulationFailed(done.returncode, done.stderr)
    return done.stdout


@dataclass(frozen=True)
class LaunchPlan:
    """As in csrc/sampler/sampler.h; the defaults leave the choice to the sampler."""

    blocks_per_row: int = 0
    threads_per_block: int = 0
    row_in_shared_memory: int = -1


@dataclass(frozen=True)
class EmulatedDevice:
    compute_capability_major: int = 9
    num_multiprocessors: int = 132
    shared_bytes_per_block: int = 227 * 1024


@dataclass(frozen=True)
class EmulatedLaunch:
    """Calls of the sampler on logits (B, V) and a state, which stays as it is: results are copies.

    In the program's memory rows are `row_stride` elements apart (V where None), NaN in between, and the first one begins
    `first_row_offset` bytes after an address that 16 divides.
    """

    logits_B_V: Tensor
    state: SamplerState
    is_cpu_half: bool = False
    plan: LaunchPlan = LaunchPlan()
    device: EmulatedDevice = EmulatedDevice()
    order: Order = Order.ASCENDING
    order_seed: int = 0
    num_calls: int = 1
    row_stride: int | None = None
    first_row_offset: int = 0


DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of esr::LogitDtype
CHANGED = (
    "token_ids_B_K", "logprobs_B_K", "sampling_logprobs_B_K", "lengths_B", "finished_B", "stopped_by_eos_B", "next_ids_B",
    "active", "invalid_B",
)  # fmt: skip
CONSTANT = ("sampling_temperature_B", "top_k_B", "top_p_B", "min_p_B", "seed_B", "request_ids_B", "eos_ids_E")


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _case_of(launch: EmulatedLaunch) -> bytes:
    logits, state, plan, device = launch.logits_B_V, launch.state, launch.plan, launch.device
    B, V = logits.shape
    stride = V if launch.row_stride is None else launch.row_stride
    if stride < V or launch.first_row_offset % logits.element_size() != 0:
        raise ValueError(f"row_stride must be at least {V}, got {stride}; first_row_offset must be whole logits")
    header = [
        int(launch.is_cpu_half), DTYPES.index(logits.dtype), B, V, state.horizon, stride, launch.first_row_offset,
        len(state.eos_ids_E), state.pad_id,
        plan.blocks_per_row, plan.threads_per_block, plan.row_in_shared_memory,
        device.compute_capability_major, device.num_multiprocessors, device.shared_bytes_per_block,
        launch.order.value, launch.order_seed, launch.num_calls,
    ]  # fmt: skip
    strided = torch.full((B, stride), torch.nan, dtype=logits.dtype)
    strided[:, :V] = logits
    used = strided.reshape(-1)[: (B - 1) * stride + V] if B > 0 else strided.reshape(-1)
    arrays = [used, *(getattr(state, name) for name in (*CHANGED, *CONSTANT))]
    return np.array(header, dtype=np.int64).tobytes() + b"".join(map(_bytes_of, arrays))


def run_emulated(launches: list[EmulatedLaunch], build: Build = Build.MEMORY) -> list[dict[str, Tensor]]:
    """Each launch's arrays afterwards, by the names of SamplerState, and under "error" the cudaError_t (0-d int64)."""
    with tempfile.TemporaryDirectory() as folder:
        cases, results = Path(folder, "cases"), Path(folder, "results")
        cases.write_bytes(np.int64(len(launches)).tobytes() + b"".join(map(_case_of, launches)))
        run_program("emulated_sampler", build, str(cases), str(results))
        data = bytearray(results.read_bytes())
    outcomes, offset = [], 0
    for launch in launches:
        outcome = {}
        for name in ("error", *CHANGED):
            like = torch.zeros((), dtype=torch.int64) if name == "error" else getattr(launch.state, name)
            size = like.numel() * like.element_size()
            outcome[name] = torch.frombuffer(data[offset : offset + size] or bytearray(1), dtype=torch.uint8)[:size]
            outcome[name] = outcome[name].clone().view(like.dtype).reshape(like.shape)
            offset += size
        outcomes.append(outcome)
    if offset != len(data):
        raise RuntimeError(f"the results have {len(data)} bytes, expected {offset}")
    return outcomes
