"""torch.compile with inductor's auto-chunker (TORCHINDUCTOR_AUTO_CHUNKER=1), which cuts the rows of a loss in 8 chunks.

As of torch 2.13 it cuts a loss that is a sum over rows. One value per row with an upstream gradient of its own is an error in
it, a mean and Jensen-Shannon (its logaddexp) are left whole, in torch 2.11 both KLs too: so the loss is the sum, and a graph that
it leaves whole is a row that says so. By default it wants logits 8 times larger than hidden states and head together, which
they are not at 3200 rows: the threshold is 1 here. Run on a CPU for both KLs: gradients of the hidden states as without it; that
of the head, a sum of chunks in bfloat16, off by 4e-3 of its norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.baselines.peers import NotInstalled
from bench.baselines.pytorch import gradient_of_rows, student_leaves
from esr_kernels.testing.inputs import LinearInputs
from esr_kernels.testing.oracle import Results

# A graph from a cache would not say whether it was cut.
OPTIONS = {"auto_chunker.enable": True, "auto_chunker.amplify_ratio_threshold": 1, "fx_graph_cache": False}


class AutoChunked:
    """The sum over rows of a function of tensors; compiled when it is first called."""

    def __init__(self, function: Callable[..., Tensor], backend: str) -> None:
        self.function, self.backend = function, backend
        self.compiled: Callable[..., Tensor] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        """
        Raises:
            NotInstalled: this torch has no auto-chunker, or leaves the graph whole.
        """
        if self.compiled is not None:
            return self.compiled(*tensors)
        if self.backend != "inductor":
            raise NotInstalled(f"auto-chunker: the backend must be inductor, got {self.backend}")
        from torch._inductor import config, metrics

        if not (hasattr(config, "auto_chunker") and hasattr(metrics, "num_auto_chunking")):
            raise NotInstalled(f"auto-chunker: torch {torch.__version__} has none")
        compiled = torch.compile(
            lambda *tensors: self.function(*tensors).sum(),
            backend=self.backend,
            dynamic=False,
            fullgraph=True,
            options=OPTIONS,
        )
        before = metrics.num_auto_chunking
        value = compiled(*tensors)
        if metrics.num_auto_chunking == before:
            raise NotInstalled(f"auto-chunker: torch {torch.__version__} leaves this graph whole")
        self.compiled = compiled
        return value


def run_auto_chunked(function: AutoChunked, inputs: LinearInputs, upstream_N: Tensor, *, trains_head: bool) -> Results:
    """Gradient of the hidden states, from the sum over rows."""
    hidden, weight, leaves = student_leaves(inputs, trains_head=trains_head)
    value = function(hidden, weight, inputs.teacher_hidden_N_E, inputs.teacher_head.weight)
    return gradient_of_rows(value, leaves, upstream_N, 1)
