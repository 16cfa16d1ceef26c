"""Candidates of ours that start from hidden states: one op in each storage and workspace, with the plan that it will choose."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases.comparison import Candidate, Inputs
from esr_kernels import LogitStorage
from esr_kernels.output_projection.matrix_product import gradient_dtype
from esr_kernels.output_projection.plan import LinearPlan, default_workspace_bytes, plan_linear_op
from esr_kernels.testing.oracle import Results

FLOAT32, TILE_RELATIVE, AUTO = LogitStorage.FLOAT32, LogitStorage.TILE_RELATIVE_FP16, LogitStorage.AUTO
Setting = tuple[LogitStorage, int | None]  # storage, workspace in bytes or None for the default


class LinearOpCall(NamedTuple):
    """A linear op on the inputs of a group, before storage and workspace are chosen."""

    op: str
    evaluate: Callable[..., Results]  # (inputs, upstream, logits=, workspace_bytes=)
    num_rows: int
    vocab_size: int
    device: torch.device
    gradient_itemsize: int
    num_sides: int  # 2 where a teacher is projected too
    trained: tuple[str, ...]

    @classmethod
    def of(
        cls,
        op: str,
        evaluate: Callable[..., Results],
        hidden: Tensor,
        weight_V_D: Tensor,
        *,
        num_rows: int,
        num_sides: int,
        trained: tuple[str, ...],
    ) -> "LinearOpCall":
        itemsize = gradient_dtype(hidden, weight_V_D).itemsize
        return cls(op, evaluate, num_rows, weight_V_D.shape[0], hidden.device, itemsize, num_sides, trained)

    def plan(self, storage: LogitStorage, workspace_bytes: int | None) -> LinearPlan:
        """What the op will choose, for the record."""
        return plan_linear_op(
            self.op,
            self.num_rows,
            self.vocab_size,
            num_sides=self.num_sides,
            needs_hidden_gradient=bool(self.trained),
            needs_head_gradient=any(name.endswith("weight") for name in self.trained),
            gradient_itemsize=self.gradient_itemsize,
            storage=storage,
            workspace_bytes=workspace_bytes or default_workspace_bytes(self.device),
        )


def our_candidate(call: LinearOpCall, storage: LogitStorage, workspace_bytes: int | None) -> Candidate:
    """The op with this storage and workspace."""
    plan = call.plan(storage, workspace_bytes)

    def run(inputs: Inputs, upstream: Tensor | None) -> Results:
        return call.evaluate(inputs, upstream, logits=storage, workspace_bytes=workspace_bytes)

    return Candidate(
        f"ours, {storage.value}" + ("" if workspace_bytes is None else f", workspace {workspace_bytes / 1e9:.3g} GB"),
        run,
        storage=plan.storage,
        facts={
            "storage": plan.storage.value,
            "schedule": plan.schedule.value,
            "chunk_rows": plan.chunk_rows,
            "workspace_bytes": workspace_bytes,
        },
    )
