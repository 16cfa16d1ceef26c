"""Builds the native sampler (csrc/) and says what it built and why. Metadata lives in pyproject.toml.

ESR_KERNELS_CUDA=1 builds the CUDA half whatever PyTorch is here, 0 leaves it out; by default it is built where nvcc and a
PyTorch with CUDA are. ESR_KERNELS_CUDA_ARCHS chooses its architectures ("80 90 100"). No network is used.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = "0x020b000000000000"  # 2.11: the stable ABI that is built against; later versions load the same library
ARCHS = os.environ.get("ESR_KERNELS_CUDA_ARCHS", "80 90 100").split()
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC", "--threads=0"]
COMPILE_FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}"]


def note(text: str) -> None:
    print(f"esr_kernels: {text}", file=sys.stderr, flush=True)


def choose_halves() -> list[str]:
    """The halves that can be built here, each decision with its reason."""
    asked = os.environ.get("ESR_KERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"esr_kernels: ESR_KERNELS_CUDA must be 0, 1 or empty, got {asked!r}")
    try:
        import torch
    except ImportError:
        missing = "PyTorch cannot be imported while building: install it first, then use --no-build-isolation"
    else:
        compiler = os.environ.get("CXX", "c++").split()[0]
        missing = None if shutil.which(compiler) else f"no C++ compiler ({compiler})"
    if missing and asked == "1":
        sys.exit(f"esr_kernels: ESR_KERNELS_CUDA=1, but {missing}")
    if missing:
        note(f"native sampler NOT built: {missing}; sample_tokens runs with impl=Impl.REFERENCE only")
        return []
    note(f"native sampler, CPU half: built with {compiler} against torch {torch.__version__}")
    nvcc = shutil.which("nvcc")
    if asked == "1" and not nvcc:
        sys.exit("esr_kernels: ESR_KERNELS_CUDA=1, but there is no nvcc on the PATH")
    if asked == "1" or (asked == "" and nvcc and torch.version.cuda):
        note(f"native sampler, CUDA half: built with {nvcc} for sm_{', sm_'.join(ARCHS)}")
        return ["cpu", "cuda"]
    reason = "ESR_KERNELS_CUDA=0" if asked else "this torch has no CUDA" if nvcc else "no nvcc on the PATH"
    note(f"native sampler, CUDA half: not built ({reason})")
    return ["cpu"]


class BuildSampler(build_ext):
    """The stable ABI needs no Python in the library, so its name carries no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit function: torch.ops.load_library loads it

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        if ext.name.endswith("_cuda"):
            compiled = Path(self.build_temp, "sampler_cuda.o")
            compiled.parent.mkdir(parents=True, exist_ok=True)
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
            newest = f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"  # for GPUs to come
            self.spawn(
                ["nvcc", *NVCC_FLAGS, *targets, newest, "-c", "csrc/sampler/sampler_cuda.cu", "-o", str(compiled)]
            )
            ext.extra_objects = [str(compiled)]
            settings = subprocess.run(["nvcc", "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
            toolkit = re.search(r"\bTOP=(.*)", settings)[1].strip()  # nvcc on the PATH may be a link or a script
            ext.library_dirs += [str(Path(toolkit, folder)) for folder in ("lib64", "lib")]
        super().build_extension(ext)


def sampler_half(half: str) -> Extension:
    sources = ["csrc/registration.cpp"] + ["csrc/sampler/sampler_cpu.cpp"] * (half == "cpu")
    # libtorch.so brings libtorch_cuda.so in a PyTorch that has it; the linker would leave it out as unused
    torch_libraries = ["-Wl,--no-as-needed"] * (sys.platform == "linux") + ["-ltorch", "-ltorch_cpu"]
    return Extension(
        f"esr_kernels.sample_tokens._sampler_{half}",
        sources,
        depends=[str(path) for path in Path("csrc").rglob("*.*")],
        libraries=["cudart_static", "rt", "dl", "pthread"] * (half == "cuda"),
        extra_compile_args=[*COMPILE_FLAGS, f"-DESR_SAMPLER_{half.upper()}"],
        extra_link_args=torch_libraries,
    )


setup(ext_modules=[sampler_half(half) for half in choose_halves()], cmdclass={"build_ext": BuildSampler})
