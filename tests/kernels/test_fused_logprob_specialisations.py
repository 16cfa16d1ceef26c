"""Does Triton compile the log-prob kernels again where rollouts, horizons, prompts, chunks or temperatures change?

python -m pytest tests/kernels/test_fused_logprob_specialisations.py

Run as a program, this file prints what a launch of each size would be compiled for, by the rules of compiled_kernels.py. The
tests start it so, for under Triton's interpreter nothing is compiled. Nothing runs on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import ROOT, launched, specialise

from esr_kernels.gather_logprobs.forward_kernel import LogprobOutputs, SourceRows, launch_logprob_rows
from esr_kernels.logit_rows import LogitRows
from esr_kernels.output_projection.picked_logits_kernel import PickedLogits, launch_pick_logits
from esr_kernels.prefix_logprobs.backward_kernel import launch_logprob_gradient
from esr_kernels.row_gradient import RowGradient

# Rollouts, columns, horizon, temperature: some divide by 16 and others do not, and some are 1.
SIZES = [
    (4, 100, 10, 0.7),
    (4, 101, 10, 1.0),
    (1, 100, 16, 1.0),
    (1, 9, 1, 2.0),
    (4, 112, 10, 0.7),
    (3, 16, 7, 0.5),
    (16, 200, 100, 1.0),
]
VOCABULARIES = {"qwen3": 151936, "gpt2": 50257}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def prefix_slots(vocab_size: int, batch_size: int, num_columns: int, horizon: int, temperature: float) -> None:
    num_slots = batch_size * horizon
    logits, ids = empty(batch_size, num_columns, vocab_size, dtype=torch.bfloat16), empty(num_slots, dtype=torch.int64)
    source = SourceRows(empty(num_slots, dtype=torch.int64), empty(3, num_slots))
    outputs = LogprobOutputs(empty(num_slots, 1), empty(num_slots), empty(num_slots, dtype=torch.bool))
    launch_logprob_rows(LogitRows(logits, 1 / temperature), ids[:, None], vocab_size, outputs, source=source)
    launch_logprob_gradient(empty(num_slots), logits, source, ids, 1 / temperature)


def gathered_rows(vocab_size: int, batch_size: int, num_columns: int, horizon: int, temperature: float) -> None:
    """A chunk of rows that starts anywhere in the tensors that hold few numbers per row."""
    num_rows, start, width = batch_size * horizon, num_columns % 7, -(-vocab_size // 128) * 128
    ids, unit = empty(start + num_rows, 5, dtype=torch.int64)[start:], empty(start + num_rows)[start:]
    logits, picked = LogitRows(empty(num_rows, width), 1 / temperature), empty(num_rows, 5)
    launch_pick_logits(logits, slice(0, vocab_size), PickedLogits(ids, picked, False))
    gradient = RowGradient(empty(num_rows, width, dtype=torch.float16), unit, torch.float16)
    upstream, outputs = empty(start + num_rows, 5)[start:], LogprobOutputs(empty(num_rows, 5))
    options = {"picked_N_K": picked, "upstream_N_K": upstream, "gradient": gradient}
    launch_logprob_rows(logits, ids, vocab_size, outputs, **options)


LAUNCHES = {"prefix_slots": prefix_slots, "gathered_rows": gathered_rows}


def specialisations(vocab_size: int) -> dict[str, list[list[str]]]:
    """For each launch and each of SIZES what its kernels are compiled for."""
    found = {}
    for name, launch in LAUNCHES.items():
        variants = [launched(name, launch, vocab_size, *sizes) for sizes in SIZES]
        found[name] = [[str(vars(specialise(variant))) for variant in kernels] for kernels in variants]
    return found


@pytest.fixture(scope="module")
def without_interpreter() -> dict[str, dict[str, list[list[str]]]]:
    """`specialisations` of each of VOCABULARIES."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_x6_no_kernel_compiles_again_for_other_sizes_or_temperatures(without_interpreter, vocabulary):
    for name, kinds in without_interpreter[vocabulary].items():
        assert len(kinds) == len(SIZES) and len(kinds[0]) == 2  # two kernels a launch
        others = [sizes for sizes, kind in zip(SIZES, kinds, strict=True) if kind != kinds[0]]
        assert others == [], f"{name} is compiled again for {others}"


def test_x6_another_vocabulary_would_be_seen(without_interpreter):
    """As 50257 does not divide by 16, its kernels know less of it."""
    first, other = (without_interpreter[vocabulary] for vocabulary in VOCABULARIES)
    assert all(first[name][0] != other[name][0] for name in LAUNCHES)


if __name__ == "__main__":
    print(json.dumps({name: specialisations(vocab_size) for name, vocab_size in VOCABULARIES.items()}))
