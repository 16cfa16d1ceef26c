"""Public entry of `linear_divergence`: what it computes, the checks, and the choice of implementation."""

from collections.abc import Iterable

from torch import Tensor

from esr_kernels.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_no_teacher_grad,
    check_positive,
    check_same_device,
    check_tensor,
    check_token_set,
    check_workspace_bytes,
)
from esr_kernels.divergence import Divergence, ReverseKL, check_divergence
from esr_kernels.divergence_output import DivergenceOutput
from esr_kernels.impl import Impl, check_impl, require_kernels
from esr_kernels.linear_divergence.reference import linear_divergence_reference
from esr_kernels.logit_storage import LogitStorage, check_logit_storage
from esr_kernels.output_head import OutputHead, as_output_head
from esr_kernels.token_divergence.api import shared_vocab_size

OP = "linear_divergence"


def linear_divergence(
    student_hidden_N_D: Tensor,
    student_head: OutputHead | Tensor,
    teacher_hidden_N_E: Tensor,
    teacher_head: OutputHead | Tensor,
    divergence: Divergence = ReverseKL(),  # noqa: B008 (a frozen value)
    *,
    loss_temperature: float = 1.0,
    token_ids_N: Tensor | None = None,
    stop_ids: Iterable[int] = (),
    vocab_size: int | None = None,
    logits: LogitStorage = LogitStorage.AUTO,
    workspace_bytes: int | None = None,
    impl: Impl = Impl.FUSED,
) -> DivergenceOutput:
    """Divergence between student and teacher, one value per row, from hidden states and output heads.

    Equivalent::

        token_divergence(student_head.logits(student_hidden_N_D), teacher_head.logits(teacher_hidden_N_E), ...)

    where `logits` projects in float32 whatever the inputs' dtype (float64 for float64 hidden states, and also inside
    an autocast region), and applies bias, scale and soft cap. Everything said there about divergences
    (arXiv 2605.27028, Eq. 1-2, for the default), stop events, outputs and edge cases holds here.

    The two sides may have different hidden sizes, dtypes, biases, scales and soft caps. A weight tied to an embedding
    needs nothing special: autograd adds the two gradients.

    A NaN hidden state makes its own row NaN, and the gradient of that row. The gradient of the head sums over rows,
    so it is NaN as soon as one row with a nonzero upstream gradient is.

    Under FUSED, 16-bit hidden states and weights of one dtype are multiplied as they are and summed in float32; other pairs of
    dtypes are multiplied in float32, which is slow on a GPU. Stored logits and d(logits) are never bfloat16: d(logits) are
    float16 with a power of two per row, and the head's weight is converted to float16, slice by slice, to meet them. A
    bfloat16 weight must stay below 1000 in magnitude, beyond which the input gradient is NaN; its entries below 1e-6 lose
    digits there. A bfloat16 gradient then differs from the exact one by little more than its own rounding. With
    `LogitStorage.TILE_RELATIVE_FP16` a log-probability may be off by 2^-11 of its distance to the largest of its tile.

    FLOP, in units of 2 N V: D + E to project, D for each gradient. Memory beyond inputs and results, with n rows per chunk and
    g = 2 bytes (4 for float32 models):

        no gradient           8 n V  (FLOAT32), 4 n V (TILE_RELATIVE_FP16)
        frozen head           the same, 4 N D and a slice of 16384 ids of the weight in 2 bytes: the input gradient is made in
                              forward; in backward 4 N D
        trained head          the same, and g N V of d(logits) kept for backward, where they fit in `workspace_bytes`; then in
                              backward 6 N D and a slice of 16384 ids of the weight in 2 and of its gradient in 4 bytes
        ... where they do not D + E units more in backward, 8 n V or 4 n V there, and 4 V D for the weight's gradient

    Nothing waits for the device; results repeat bit by bit.

    Args:
        student_hidden_N_D: (N, D), any float dtype. N = 0 is legal.
        student_head: `OutputHead` or a bare weight (V, D). A head that does not require grad gets none.
        teacher_hidden_N_E: (N, E), any float dtype; must not require grad.
        teacher_head: `OutputHead` or a bare weight (V, E); its weight and bias must not require grad.
        divergence, loss_temperature, token_ids_N, stop_ids, vocab_size: as in `token_divergence`. With `vocab_size`
            only those rows of the heads are projected; the others get gradient 0.
        logits: how FUSED stores logits; changes bytes and rounding, not the definition. AUTO takes FLOAT32 unless too few
            rows of it fit in `workspace_bytes`. REFERENCE keeps float32.
        workspace_bytes: > 0 or None; the most memory FUSED may hold for logits and kept d(logits), None for a sixteenth of
            the device's memory (1 GiB on a CPU). What does not fit is chunked by rows and, where the head is trained,
            computed again in backward. Chunks change sums by float32 rounding only. REFERENCE holds all N x V logits of
            both sides and does not chunk.
        impl: `Impl.FUSED` or `Impl.REFERENCE`.

    Returns:
        `DivergenceOutput`; `divergence_N` is differentiable with respect to the student's hidden states, weight and
        bias.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or numbers; unequal vocabularies without `vocab_size`; a teacher that
            requires grad.
        TypeError: `impl` is FUSED and an input is float64.
        ValueError: `workspace_bytes` does not hold the logits of one row.
        NotImplementedError: `impl` is FUSED and Triton or a CUDA device is missing.
    """
    student_head = as_output_head(OP, "student_head", student_head)
    teacher_head = as_output_head(OP, "teacher_head", teacher_head)
    sizes: dict[str, int] = {}
    check_tensor(OP, "student_hidden_N_D", student_hidden_N_D, "N D", sizes, FLOAT_DTYPES)
    check_tensor(OP, "student_head.weight", student_head.weight, "V D", sizes, FLOAT_DTYPES)
    teacher_sizes = {"N": sizes["N"]}
    check_tensor(OP, "teacher_hidden_N_E", teacher_hidden_N_E, "N E", teacher_sizes, FLOAT_DTYPES)
    check_tensor(OP, "teacher_head.weight", teacher_head.weight, "V E", teacher_sizes, FLOAT_DTYPES)
    if token_ids_N is not None:
        check_tensor(OP, "token_ids_N", token_ids_N, "N", sizes, INTEGER_DTYPES)
    tensors = {
        "student_hidden_N_D": student_hidden_N_D,
        "student_head.weight": student_head.weight,
        "student_head.bias": student_head.bias,
        "token_ids_N": token_ids_N,
    }
    teacher_tensors = {
        "teacher_hidden_N_E": teacher_hidden_N_E,
        "teacher_head.weight": teacher_head.weight,
        "teacher_head.bias": teacher_head.bias,
    }
    check_same_device(OP, **tensors, **teacher_tensors)
    check_no_teacher_grad(OP, **teacher_tensors)
    check_divergence(OP, divergence)
    loss_temperature = check_positive(OP, "loss_temperature", loss_temperature)
    vocab_size = shared_vocab_size(OP, sizes["V"], teacher_sizes["V"], vocab_size)
    stop_ids = check_token_set(OP, "stop_ids", stop_ids, vocab_size)
    logits = check_logit_storage(OP, logits)
    check_workspace_bytes(OP, workspace_bytes)
    arguments = (
        student_hidden_N_D,
        student_head,
        teacher_hidden_N_E,
        teacher_head,
        divergence,
        loss_temperature,
        token_ids_N,
        stop_ids,
        vocab_size,
    )
    if check_impl(OP, impl) is Impl.REFERENCE:
        return linear_divergence_reference(*arguments)
    require_kernels(
        OP, **{name: tensor for name, tensor in tensors.items() if name != "token_ids_N"}, **teacher_tensors
    )
    from esr_kernels.linear_divergence.autograd import linear_divergence_fused  # imports Triton

    return linear_divergence_fused(*arguments, logits, workspace_bytes)
