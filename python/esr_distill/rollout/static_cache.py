"""A KV cache of fixed size whose write position lies on the device, so that a decode step can be captured in a CUDA graph.

Every layer keeps all columns, those with a sliding window too: the mask says what a layer sees. That costs memory where a
window is shorter than prompt and horizon together; in return, nothing is rolled, and no step depends on a number of the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from esr_distill.input_error import InputError


class RolloutLayer(StaticLayer):
    """Keys and values (B, heads, columns, head size) of one layer; a token is written at the device's column."""

    def __init__(self, keys: Tensor, values: Tensor, column_1: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.column_1 = keys, values, column_1
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.visible = keys.shape[2]
        self.first_query = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Write one token; what attention reads are the first `visible` columns."""
        self.keys.index_copy_(2, self.column_1, key_states.to(self.dtype))
        self.values.index_copy_(2, self.column_1, value_states.to(self.dtype))
        return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible, 0

    def get_seq_length(self) -> int:
        """Column of the first query of a mask that is being made; steps bring their positions with them."""
        return self.first_query


class RolloutCache(Cache):
    """The layers of B rows. `rows` gives a cache of the first rows in the same memory."""

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor]], column_1: Tensor) -> None:
        super().__init__(layers=[RolloutLayer(keys, values, column_1) for keys, values in tensors])
        self.column_1 = column_1

    @classmethod
    def allocate(cls, prefilled: Sequence[tuple[Tensor, Tensor]], batch_size: int, num_columns: int) -> "RolloutCache":
        """Zeros in the dtypes and head sizes of a prefill: a column that is masked must not hold NaN."""
        shapes = [
            (tensor, (batch_size, tensor.shape[1], num_columns, tensor.shape[3]))
            for pair in prefilled
            for tensor in pair
        ]
        zeros = [tensor.new_zeros(shape) for tensor, shape in shapes]
        column_1 = torch.zeros(1, dtype=torch.int64, device=zeros[0].device)
        return cls(list(zip(zeros[::2], zeros[1::2], strict=True)), column_1)

    def holds(self, prefilled: Sequence[tuple[Tensor, Tensor]], batch_size: int, num_columns: int) -> bool:
        """Whether these rows fit into the memory that is here."""
        if len(prefilled) != len(self.layers):
            return False
        pairs = [
            (mine, other)
            for layer, (keys, values) in zip(self.layers, prefilled, strict=True)
            for mine, other in ((layer.keys, keys), (layer.values, values))
        ]
        return all(
            (mine.shape[1], mine.shape[3], mine.dtype, mine.device)
            == (other.shape[1], other.shape[3], other.dtype, other.device)
            and mine.shape[0] >= batch_size
            and mine.shape[2] >= num_columns
            for mine, other in pairs
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in (layer.keys, layer.values))

    def fill(self, prefilled: Sequence[tuple[Tensor, Tensor]], num_columns: int, samples_per_prompt: int) -> None:
        """Copy prompts, each to its samples, so that their last column is `num_columns` - 1.

        A layer with a sliding window brings its last columns alone; no later token sees the ones before.
        """
        for layer, pair in zip(self.layers, prefilled, strict=True):
            for mine, prompt in zip((layer.keys, layer.values), pair, strict=True):
                rows, width = prompt.shape[0] * samples_per_prompt, prompt.shape[2]
                columns = mine[:rows, :, num_columns - width : num_columns]
                columns.unflatten(0, (-1, samples_per_prompt)).copy_(prompt[:, None])

    def rows(self, count: int) -> "RolloutCache":
        return RolloutCache([(layer.keys[:count], layer.values[:count]) for layer in self.layers], self.column_1)

    def move_rows(self, order: Tensor, num_columns: int) -> None:
        """Row i becomes what row order[i] was, in the first `num_columns` columns."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                used = tensor[:, :, :num_columns]
                used[: len(order)] = used.index_select(0, order)

    def show(self, visible: int, first_query: int = 0) -> None:
        """Attention reads the first `visible` columns; `first_query` is for masks."""
        for layer in self.layers:
            layer.visible, layer.first_query = visible, first_query


def prefilled_tensors(cache: Cache | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer after a prefill, in the dtype in which attention will take them.

    Under autocast that is its own: keys come out of the rotation in float32, and attention would round all of them at every step.

    Raises:
        InputError: a layer that is no attention over keys and values, such as a recurrent state.
    """
    layers = [] if cache is None else cache.layers
    if not layers:
        raise InputError("rollout.backend inprocess needs a model with a KV cache, got one that returned none")
    tensors = []
    for layer in layers:
        pair = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not all(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in pair):
            raise InputError(
                "rollout.backend inprocess needs a model whose layers cache keys and values, got "
                f"{type(layer).__name__}; set rollout.backend to hf_generate"
            )
        device_type = pair[0].device.type
        is_rounded = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_rounded else pair[0].dtype
        tensors.append((pair[0].to(dtype), pair[1].to(dtype)))
    return tensors
