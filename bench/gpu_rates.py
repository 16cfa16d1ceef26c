"""How fast a device moves bytes and multiplies: measured here, or as its maker publishes it.

Published figures are peaks that no program reaches: floors by them are lower than floors by measured rates.
"""

from dataclasses import dataclass

import torch

from bench.record_demo import machine_folder
from bench.steps import rates
from bench.timing import Stopwatch
from esr_distill.machine import machine_record

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rates:
    """What a floor divides by.

    Attributes:
        copy_bytes_per_s: bytes read plus bytes written.
        flop_per_s: of large matrix products in the dtype that is computed in.
        name: of the device.
        source: where the two figures come from.
    """

    copy_bytes_per_s: float
    flop_per_s: float
    name: str
    source: str

    def __post_init__(self) -> None:
        for field in ("copy_bytes_per_s", "flop_per_s"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be > 0 and finite, got {getattr(self, field)!r}")


@dataclass(frozen=True)
class PublishedGPU:
    """A GPU by its data sheet, without sparsity. Links count one direction: half of what is advertised for NVLink.

    `device_name` is the name that torch reports; result folders are named after it.
    """

    device_name: str
    memory_gb: float
    copy_tb_per_s: float
    bfloat16_tflop_per_s: float
    float32_tflop_per_s: float
    link_gb_per_s: float
    link: str
    source: str

    def rates(self, dtype: str) -> Rates:
        """By the memory's bandwidth and the peak of products in `dtype`, "bfloat16" or "float32" (without TF32)."""
        tflop_per_s = {"bfloat16": self.bfloat16_tflop_per_s, "float32": self.float32_tflop_per_s}[dtype]
        return Rates(1e12 * self.copy_tb_per_s, 1e12 * tflop_per_s, self.device_name, f"published: {self.source}")

    @property
    def folder(self) -> str:
        return machine_folder({"gpu": self.device_name})


NVLINK_4, NVLINK_5 = "NVLink 4, one direction", "NVLink 5, one direction"
PCIE_4 = "PCIe 4.0 x16, one direction"
GPUS = {
    "b200": PublishedGPU("NVIDIA B200", 180, 8.0, 2250, 80, 900, NVLINK_5, "HGX B200 data sheet"),
    "h200": PublishedGPU("NVIDIA H200", 141, 4.8, 989, 67, 450, NVLINK_4, "H200 SXM data sheet"),
    "h100": PublishedGPU("NVIDIA H100 80GB HBM3", 80, 3.35, 989, 67, 450, NVLINK_4, "H100 SXM data sheet"),
    "a100": PublishedGPU(
        "NVIDIA A100-SXM4-80GB", 80, 2.039, 312, 19.5, 300, "NVLink 3, one direction", "A100 80GB SXM data sheet"
    ),
    "l40s": PublishedGPU("NVIDIA L40S", 48, 0.864, 362, 91.6, 32, PCIE_4, "L40S data sheet"),
    "l4": PublishedGPU("NVIDIA L4", 24, 0.3, 121, 30.3, 32, PCIE_4, "L4 data sheet"),
    "rtx4090": PublishedGPU(
        "NVIDIA GeForce RTX 4090", 24, 1.008, 165.2, 82.6, 32, PCIE_4, "Ada architecture white paper"
    ),
}


def published_gpu(name: str, option: str) -> PublishedGPU:
    """Raises ValueError for a name that is not in `GPUS`."""
    if name not in GPUS:
        raise ValueError(f"{option} must be among {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]


def measured_rates(device: torch.device, dtype: str, *, is_smoke: bool = False) -> Rates:
    """Copy rate and rate of a square product in `dtype` of this machine, measured now in a few seconds.

    Raises:
        ValueError: bfloat16 on a CPU, where it is converted and has no rate of its own.
    """
    stopwatch = Stopwatch(device)
    if dtype not in DTYPES or (dtype == "bfloat16" and not stopwatch.is_cuda):
        must_be = "among " + ", ".join(DTYPES) if stopwatch.is_cuda else "float32 where the rates are a CPU's"
        raise ValueError(f"dtype must be {must_be}, got {dtype!r}")
    measured = rates.measured_rates(stopwatch, DTYPES[dtype], is_smoke=is_smoke)
    source = f"measured: a copy, a square {dtype} product"
    return Rates(1e9 * measured["copy_gb_per_s"], measured["flop_per_s"], device_name(machine_record()), source)


def device_name(machine: dict) -> str:
    """Of the machine of a record: its GPU, or its processor with the threads that torch has."""
    threads = machine["torch_threads"]
    return machine["gpu"] or f"{machine['processor']}, {threads} thread{'' if threads == 1 else 's'}"
