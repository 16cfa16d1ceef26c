"""`sample_tokens`: one token per running row, in place on a `SamplerState`."""

from torch import Tensor

from esr_kernels.checks import FLOAT_DTYPES, check_same_device, check_tensor
from esr_kernels.impl import Impl, check_impl
from esr_kernels.sample_tokens.native import sample_tokens_native
from esr_kernels.sample_tokens.reference import sample_tokens_reference
from esr_kernels.sample_tokens.state import SamplerState

_OP = "sample_tokens"


def sample_tokens(logits_B_V: Tensor, state: SamplerState, *, impl: Impl | str = Impl.FUSED) -> None:
    """Draw one token for every row that is not finished and advance `state` in place. Equivalent PyTorch, one row:

        scores = top_k_top_p_min_p(logits / sampling_temperature)
        token = torch.multinomial(scores.softmax(-1), 1)

    Distribution. Filters in the order temperature, top-k, top-p on the renormalised top-k (the smallest set of largest
    probabilities whose mass reaches top_p, never empty), min-p relative to the largest probability. Equal logits at the
    boundary of top-k or top-p are decided for the lower id. Temperature 0 is argmax, lowest id.

    Randomness. One uniform number u of 53 bits per row (`random_stream.uniform_bits`, Philox4x32-10 of seed, request id and
    position `lengths_B`), and the inverse CDF in id order: with w_v = exp((z_v - max z) / temperature) over the kept ids,
    the token is the first kept id whose cumulative w exceeds u * sum(w). A row's tokens depend on its own logits, seed,
    request id and parameters alone. The w are integers with 44 bits after the point (`fixed_point`), so both
    implementations give the same tokens and log-probs bit for bit, and an id 30.5 nats below the likeliest is not drawn.

    Effect on a running row. The token and its two log-probs go to column `lengths_B`, `lengths_B` grows by 1,
    `next_ids_B` is the token. A row is finished by its first EOS (kept) or by its horizon-th token: its `next_ids_B` is
    then `pad_id`, and later calls neither read its logits nor change anything of it. `active` counts the running rows.

    Edge cases. -inf logits have probability 0. A row holding NaN, +inf or nothing finite sets `invalid_B`, takes the
    largest entry that is not NaN (lowest id; 0 if all are NaN) and log-probs NaN; other rows are not affected.

    Args:
        logits_B_V: any float dtype, on the device of `state`; not changed, no gradient. float64 is rounded to float32
            (reference) or refused (FUSED).
        state: see `SamplerState`.
        impl: FUSED is the native sampler (csrc/), which makes the host wait for nothing; the reference sorts and reads a few
            flags on the host.

    Raises:
        TypeError, ValueError: wrong type, shape or device; an EOS or pad id is not below V.
        NotImplementedError: `impl` is FUSED and the native sampler is not built for this device.
    """
    if not isinstance(state, SamplerState):
        raise TypeError(f"{_OP}: state must be a SamplerState, got {type(state).__name__}")
    sizes = {"B": state.batch_size}
    check_tensor(_OP, "logits_B_V", logits_B_V, "B V", sizes, FLOAT_DTYPES)
    check_same_device(_OP, logits_B_V=logits_B_V, state=state.token_ids_B_K)
    for name, ids in (("state.eos_ids", state.eos_ids), ("state.pad_id", (state.pad_id,))):
        if max(ids, default=-1) >= sizes["V"]:
            raise ValueError(f"{_OP}: {name} must be in [0, V) = [0, {sizes['V']}), got {max(ids)}")
    run = sample_tokens_native if check_impl(_OP, impl) is Impl.FUSED else sample_tokens_reference
    run(logits_B_V, state)
