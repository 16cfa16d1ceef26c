"""What a training step holds in a device's memory, part by part, counted from shapes.

Not counted: what CUDA itself takes (a context, graphs of captured steps), fragmentation, prompts, and small tensors of a step.
"""

from collections.abc import Iterable
from typing import NamedTuple

from bench.floor import StepSetting
from bench.model_shape import ModelShape
from esr_distill.rollout.inprocess import PROMPT_COLUMNS, padded_columns
from esr_kernels import LogitStorage
from esr_kernels.output_projection.gradients import SLICE_IDS
from esr_kernels.output_projection.plan import Schedule, logit_bytes_per_row, padded_vocab_size, plan_linear_op

WORKSPACE_SHARE = 16  # `linear_divergence` may hold a sixteenth of the device's memory
FLOAT32_BYTES, ID_BYTES = 4, 8
ACTIVATIONS = "activations"
LAYERS_GATHERED = 2  # the one that runs and the next one


class MemoryPart(NamedTuple):
    """`phase` is "always", "rollout" or "update" (forwards, divergence, backward, optimizer)."""

    name: str
    bytes: float
    phase: str = "always"


def peak_bytes(parts: Iterable[MemoryPart]) -> float:
    """What lives all the time and the larger phase, as if the parts of a phase all lived at once: an upper estimate."""
    totals = dict.fromkeys(("always", "rollout", "update"), 0.0)
    for part in parts:
        totals[part.phase] += part.bytes
    return totals["always"] + max(totals["rollout"], totals["update"])


def cache_bytes(shape: ModelShape, rows: int, columns: int) -> int:
    """Keys and values, windows not taken off: the engine keeps all columns of every layer."""
    return rows * columns * shape.cache_bytes_per_token


def rollout_columns(setting: StepSetting, *, has_graphs: bool = True) -> int:
    """Of the engine's cache: on a GPU prompts end at a multiple of 64; the last token is drawn and never fed."""
    prompt = -(-setting.prompt // PROMPT_COLUMNS) * PROMPT_COLUMNS if has_graphs else setting.prompt
    return padded_columns(prompt + setting.horizon - 1)


def norm_bytes(width: int, value_bytes: int) -> int:
    """RMS norm of one vector: its input in float32, that divided by its size, and the reciprocal of its size."""
    return (FLOAT32_BYTES + value_bytes) * width + FLOAT32_BYTES


def layer_activation_bytes(shape: ModelShape) -> int:
    """What one layer keeps of one token for its backward, as transformers writes Qwen3 and Llama, with SDPA and no padding.

    Two norms and the inputs of the products after them (under autocast a copy for each product); head norms, where there are;
    queries, keys, values and the output of attention with one float32 for each head; of the MLP the gate before and after its
    activation, the other branch and their product, without a gate its two sides. With other norms or another attention this is
    an estimate.
    """
    value, stored = shape.value_bytes, shape.dtype_bytes
    copies = 2 if value == stored else 5
    kept = 2 * norm_bytes(shape.hidden, stored) + copies * value * shape.hidden
    if shape.has_head_norms:
        kept += (shape.heads + shape.kv_heads) * norm_bytes(shape.head_dim, value)
    kept += value * 2 * (shape.heads + shape.kv_heads) * shape.head_dim + FLOAT32_BYTES * shape.heads
    return kept + value * (4 if shape.mlp_matrices == 3 else 2) * shape.intermediate


def activation_bytes(shape: ModelShape, rows: int, tokens: int, *, is_checkpointed: bool = False) -> int:
    """What the forward of `rows` sequences keeps for backward, from ids to last hidden states.

    Checkpointed by layer: the input of every layer, and while backward is in a layer what that keeps.
    """
    per_layer = layer_activation_bytes(shape)
    layers = shape.layers * per_layer
    if is_checkpointed:
        layers = shape.layers * shape.dtype_bytes * shape.hidden + per_layer
    rotations = 2 * shape.dtype_bytes * shape.head_dim
    return rows * tokens * (layers + norm_bytes(shape.hidden, shape.dtype_bytes) + rotations + ID_BYTES)


def cast_copy_bytes(shape: ModelShape) -> int:
    """Copies of the layers' matrices that autocast makes and backward needs; 0 without autocast."""
    is_cast = shape.value_bytes != shape.dtype_bytes
    return shape.value_bytes * shape.layers * shape.layer_matrices if is_cast else 0


def teacher_forward_bytes(teacher: ModelShape, rows: int, tokens: int) -> int:
    """Without gradient: two hidden states, and three tensors of the MLP's width at its widest moment."""
    return rows * tokens * teacher.value_bytes * (2 * teacher.hidden + 3 * teacher.intermediate)


def divergence_bytes(student: ModelShape, teacher: ModelShape, setting: StepSetting, memory_bytes: float) -> int:
    """What `linear_divergence` plans to hold on a GPU of this memory, and what its backward adds.

    Logits of a chunk of rows on both sides and kept d(logits); in backward the hidden states' gradient in float32 and 16 bits and
    a slice of the head and of its gradient, or the whole head's in float32 where d(logits) were not kept.
    """
    vocab_size, rows = min(student.vocab_size, teacher.vocab_size), setting.num_rows
    itemsize = 2 if student.dtype_bytes == 2 else FLOAT32_BYTES
    plan = plan_linear_op(
        "linear_divergence",
        rows,
        vocab_size,
        num_sides=2,
        needs_hidden_gradient=True,
        needs_head_gradient=setting.is_head_trained,
        gradient_itemsize=itemsize,
        storage=LogitStorage.AUTO,
        workspace_bytes=int(memory_bytes // WORKSPACE_SHARE),
    )
    held = plan.chunk_rows * logit_bytes_per_row(vocab_size, plan.storage, itemsize)
    slice_weights = min(SLICE_IDS, vocab_size) * student.hidden
    if plan.schedule is Schedule.HIDDEN:
        return held + FLOAT32_BYTES * rows * student.hidden + itemsize * slice_weights
    held += (FLOAT32_BYTES + itemsize) * rows * student.hidden + (FLOAT32_BYTES + itemsize) * slice_weights
    if plan.schedule is Schedule.KEEP:
        return held + rows * padded_vocab_size(vocab_size) * itemsize
    return held + FLOAT32_BYTES * vocab_size * student.hidden


def gathered_bytes(shape: ModelShape) -> int:
    """Of sharded weights, what an update needs whole at a time: embedding and head, and two layers."""
    ends = shape.parameters() - shape.layers * (shape.layer_matrices + shape.layer_vectors)
    return shape.value_bytes * (ends + LAYERS_GATHERED * (shape.layer_matrices + shape.layer_vectors))


def memory_parts(
    student: ModelShape,
    teacher: ModelShape,
    setting: StepSetting,
    *,
    memory_bytes: float,
    gpus: int = 1,
    is_sharded: bool = False,
    is_checkpointed: bool = False,
) -> list[MemoryPart]:
    """The parts of one of `gpus` GPUs of `memory_bytes`, each with its own rollouts.

    Sharded: weights, gradients and moments of the student and the teacher's weights lie in equal parts on all GPUs. The student
    is gathered whole for the rollouts (every decode step reads all of it), layer by layer for the update, as the teacher is.
    """
    share = gpus if is_sharded else 1
    trained = student.dtype_bytes * student.trained_parameters(setting.is_head_trained)
    rows, tokens = setting.batch_size, setting.tokens
    parts = [
        MemoryPart("student weights", student.dtype_bytes * student.parameters() / share),
        MemoryPart("AdamW moments", 2 * trained / share),
        MemoryPart("teacher weights", teacher.dtype_bytes * teacher.parameters() / share),
        MemoryPart("KV cache", cache_bytes(student, rows, rollout_columns(setting))),
        MemoryPart("cache of the prefill", cache_bytes(student, setting.num_prompts, setting.prompt), "rollout"),
        MemoryPart("gradients", trained / share, "update"),
        MemoryPart(ACTIVATIONS, activation_bytes(student, rows, tokens, is_checkpointed=is_checkpointed), "update"),
        MemoryPart("teacher forward", teacher_forward_bytes(teacher, rows, tokens), "update"),
        MemoryPart("divergence", divergence_bytes(student, teacher, setting, memory_bytes), "update"),
    ]
    if cast_copy_bytes(student):
        parts.append(MemoryPart("autocast copies", cast_copy_bytes(student), "update"))
    if is_sharded:
        parts.append(MemoryPart("gathered for rollouts", student.value_bytes * student.parameters(), "rollout"))
        gathered = gathered_bytes(student) + gathered_bytes(teacher)
        parts.append(MemoryPart("gathered for the update", gathered, "update"))
    return parts
