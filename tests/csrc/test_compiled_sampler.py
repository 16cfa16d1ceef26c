"""Does sampler_cuda.cu compile for every architecture without spills and within its registers?

python -m pytest tests/csrc/test_compiled_sampler.py
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "sampler" / "sampler_cuda.cu"
NUM_KERNELS = 6  # three dtypes, a row in shared memory or not
MOST_REGISTERS = 128  # 512 threads of 128 registers fill a multiprocessor

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def test_no_spills(tmp_path):
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas=-v", "-c", str(SOURCE)]
    running = {
        arch: subprocess.Popen(
            ["nvcc", *flags, f"-arch=sm_{arch}", "-o", str(tmp_path / f"{arch}.o")], stderr=subprocess.PIPE, text=True
        )
        for arch in ("80", "90a", "100")
    }
    for arch, process in running.items():
        report = process.communicate()[1]
        assert process.returncode == 0, report
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
        assert spills == [("0", "0")] * NUM_KERNELS, (arch, spills)
        assert len(registers) == NUM_KERNELS and max(registers) <= MOST_REGISTERS, (arch, registers)
