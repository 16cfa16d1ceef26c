"""Settings that were chosen from compiled resources and counted bytes, to be chosen from measurements.

tiles    columns and warps of a program of the row kernels: forward, backward, and forward with gradient as in
         `linear_divergence` (float32 logits, float16 gradient)
slices   ids per slice of the two gradient products, columns per slice of tile-relative projection
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases.comparison import Candidate, Group
from bench.cases.linear_cases import HEAD_TRAINED, linear_group, our_call
from bench.cases.logit_cases import KLS, drawn_logits, token_gate
from bench.cases.our_candidates import FLOAT32, TILE_RELATIVE, our_candidate
from bench.cases.settings import Settings
from bench.ceilings import Ceilings
from esr_kernels import LogitStorage
from esr_kernels.logit_rows import LogitRows
from esr_kernels.output_projection import gradients, plan, projection
from esr_kernels.row_gradient import RowGradient
from esr_kernels.testing.cases import DIVERGENCES
from esr_kernels.testing.inputs import make_upstream
from esr_kernels.testing.oracle import Results
from esr_kernels.tile_config import TileConfig
from esr_kernels.token_divergence.backward_kernel import launch_divergence_gradient
from esr_kernels.token_divergence.forward_kernel import launch_divergence_rows
from esr_kernels.token_divergence.row_tensors import RowOutputs, RowState

GRADIENT_BOUND_16_BIT = 2e-3


class PreparedRows(NamedTuple):
    """What the row kernels get: logits of both sides, and the sums of a forward call for the backward kernel."""

    student: LogitRows
    teacher: LogitRows
    state: RowState


def tile_groups(settings: Settings) -> list[Callable[[], Group]]:
    return [
        partial(tile_group, settings, kernel, name, dtype)
        for name in ("reverse_kl", "jsd_0.5")
        for kernel, dtype in (
            ("forward", settings.half_dtype),
            ("forward", torch.float32),
            ("backward", settings.half_dtype),
            ("backward", torch.float32),
            ("forward with gradient", torch.float32),
        )
    ]


def tile_group(settings: Settings, kernel: str, name: str, dtype: torch.dtype) -> Group:
    rows, vocab_size = settings.logit_rows, settings.vocab_size
    pairs = [drawn_logits(settings, rows, vocab_size, dtype, seed=seed) for seed in range(2)]
    prepared = [prepare(LogitRows(pair[0], 1.0), LogitRows(pair[1], 1.0), name) for pair in pairs]
    upstream_N = make_upstream(rows, seed=1, device=settings.device)
    run, results, norm_limit = {
        "forward": (run_forward, forward_results, None),
        "backward": (run_backward, backward_results, None),
        "forward with gradient": (run_forward_with_gradient, weighted_results, GRADIENT_BOUND_16_BIT),
    }[kernel]
    reads, written = {
        "forward": (2, 0),
        "backward": (2, dtype.itemsize),
        "forward with gradient": (2, 2),
    }[kernel]
    # The kernels' own reads, most of which hit the cache after the first
    sweeps = (name not in KLS if kernel != "backward" else 0) + 1 + (kernel == "forward with gradient")
    per_logit = reads * dtype.itemsize * sweeps + written
    candidates = [
        Candidate(
            f"{block_vocab} columns, {num_warps} warps",
            partial(run, name=name, tile=TileConfig(block_vocab, num_warps)),
            norm_limit=norm_limit,
            facts={"schedule_bytes": per_logit * rows * vocab_size},
            results=results,
        )
        for block_vocab, num_warps in settings.tiles
    ]
    return Group(
        case="tiles",
        setting={
            "op": "token_divergence",
            "divergence": name,
            "dtype": str(dtype).removeprefix("torch."),
            "pass": kernel,
            "N": rows,
            "V": vocab_size,
            "upstream": "normal, one per row" if kernel == "backward" else None,
        },
        inputs=prepared,
        upstream=upstream_N,
        gate=token_gate(pairs[0], name, upstream_N),
        gate_upstream=upstream_N,
        candidates=candidates,
        counted_bytes=(reads * dtype.itemsize + written) * rows * vocab_size,
        counted_flop=0,
    )


def prepare(student: LogitRows, teacher: LogitRows, name: str) -> PreparedRows:
    outputs, state = RowOutputs.allocate(student.logits), RowState.allocate(student.logits)
    vocab_size = student.logits.shape[1]
    launch_divergence_rows(student, teacher, DIVERGENCES[name].kernel(), None, None, vocab_size, outputs, state=state)
    return PreparedRows(student, teacher, state)


def run_forward(inputs: PreparedRows, upstream_N: Tensor, *, name: str, tile: TileConfig) -> RowOutputs:
    logits = inputs.student.logits
    outputs, state = RowOutputs.allocate(logits), RowState.allocate(logits)
    kernel = DIVERGENCES[name].kernel()
    launch_divergence_rows(
        inputs.student, inputs.teacher, kernel, None, None, logits.shape[1], outputs, state=state, tile=tile
    )
    return outputs


def forward_results(outputs: RowOutputs, upstream_N: Tensor) -> Results:
    return {field.removesuffix("_N"): tensor for field, tensor in outputs._asdict().items()}


def run_backward(inputs: PreparedRows, upstream_N: Tensor, *, name: str, tile: TileConfig) -> Tensor:
    kernel, vocab_size = DIVERGENCES[name].kernel(), inputs.student.logits.shape[1]
    arguments = (upstream_N, inputs.student, inputs.teacher, kernel, inputs.state, None, vocab_size)
    return launch_divergence_gradient(*arguments, tile=tile)


def backward_results(gradient_N_V: Tensor, upstream_N: Tensor) -> Results:
    return {"grad_student_logits": gradient_N_V}


def run_forward_with_gradient(
    inputs: PreparedRows, upstream_N: Tensor, *, name: str, tile: TileConfig
) -> tuple[RowOutputs, Tensor, Tensor]:
    """As `linear_divergence` launches it, but the gradient does not overwrite the logits, which the next call needs."""
    logits = inputs.student.logits
    outputs = RowOutputs.allocate(logits)
    gradient_N_V, unit_N = torch.empty_like(logits, dtype=torch.float16), torch.empty_like(outputs.divergence_N)
    launch_divergence_rows(
        inputs.student,
        inputs.teacher,
        DIVERGENCES[name].kernel(),
        None,
        None,
        logits.shape[1],
        outputs,
        gradient=RowGradient(gradient_N_V, unit_N, torch.float16),
        tile=tile,
    )
    return outputs, gradient_N_V, unit_N


def weighted_results(raw: tuple[RowOutputs, Tensor, Tensor], upstream_N: Tensor) -> Results:
    outputs, gradient_N_V, unit_N = raw
    gradient_N_V = gradient_N_V.float() * (unit_N * upstream_N)[:, None]
    return {"divergence": outputs.divergence_N, "grad_student_logits": gradient_N_V}


def slice_groups(settings: Settings, ceilings: Ceilings) -> list[Callable[[], Group]]:
    return [
        partial(slice_group, settings, ceilings, "SLICE_IDS", settings.slice_ids, FLOAT32, (gradients,)),
        partial(
            slice_group,
            settings,
            ceilings,
            "PROJECTION_COLUMNS",
            settings.projection_columns,
            TILE_RELATIVE,
            (plan, projection),
        ),
    ]


def slice_group(
    settings: Settings,
    ceilings: Ceilings,
    constant: str,
    values: tuple[int, ...],
    storage: LogitStorage,
    modules: tuple[ModuleType, ...],
) -> Group:
    group = linear_group(settings, ceilings, "slices", "reverse_kl", ours=[])
    base = our_candidate(our_call(group.inputs[0], "reverse_kl", HEAD_TRAINED), storage, None)
    for value in values:
        run = partial(run_with_constant, base.run, constant, value, modules)
        group.candidates.append(
            Candidate(f"{constant} = {value}", run, storage=storage, facts={**base.facts, constant: value})
        )
    return group


def run_with_constant(run: Callable, constant: str, value: int, modules: tuple[ModuleType, ...], *arguments) -> Results:
    with constant_as(constant, value, modules):
        return run(*arguments)


@contextmanager
def constant_as(constant: str, value: int, modules: tuple[ModuleType, ...]) -> Iterator[None]:
    """The constant in each module that reads it, restored afterwards.

    Raises:
        AttributeError: a module does not have it.
    """
    before = [getattr(module, constant) for module in modules]
    try:
        for module in modules:
            setattr(module, constant, value)
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            setattr(module, constant, old)
