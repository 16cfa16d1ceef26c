"""Mean cross entropy of hidden states and a head: PyTorch under torch.compile, and the peers that are installed.

All of them take `(hidden (N, D), weight (V, D), tokens (N))` and give one number, the mean of -log p over the tokens that are not
-100: no upstream gradient per token, which B2 asks for. That is why some make the gradient in forward.

Signatures were read in QuACK 0.6.5, cut-cross-entropy 25.1.1 and Liger 0.8.5. Run on a CPU against PyTorch, in Triton's
interpreter: Liger in float32, cut-cross-entropy in float16 and with another log1p, which the interpreter lacks. QuACK was
imported; it needs a GPU to run. Liger's cross entropy for Hopper wants a vocabulary that is a multiple of 256: 151,936 is not.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from bench.baselines.peers import NotInstalled, imported
from bench.baselines.pytorch import Float32Logits, leaves_of, results_of
from esr_kernels.testing.logprob_inputs import PrefixInputs
from esr_kernels.testing.oracle import Results

# (hidden (N, D), weight, tokens (N)) -> mean of -log p
MeanLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

IGNORED = -100  # as a token: its row is no part of the mean
QUACK_CHUNK_SIZE = 4096  # rows; its default


def of_bfloat16_logits(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    return cross_entropy(linear(hidden_N_D, weight_V_D).float(), tokens_N, ignore_index=IGNORED)


def of_float32_logits(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    return cross_entropy(Float32Logits.apply(hidden_N_D, weight_V_D), tokens_N, ignore_index=IGNORED)


def quack_chunked(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """Bfloat16 logits, a kernel over their rows and plain products; where it can, QuACK takes the other form by default.

    Raises:
        ValueError: the number of rows is no multiple of 8, which it asserts.
    """
    function = imported("QuACK", "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    if len(hidden_N_D) % 8:
        raise ValueError(f"QuACK: the number of rows must be a multiple of 8, got {len(hidden_N_D)}")
    options = {"chunk_size": QUACK_CHUNK_SIZE, "ignore_index": IGNORED, "reduction": "mean"}
    return function(hidden_N_D, weight_V_D, tokens_N, use_scaled_exp=False, **options)


def quack_scaled_exp(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """Exponentials in bfloat16 from the product's epilogue, scaled inside the products of the gradient: Hopper alone.

    Raises:
        NotInstalled: it does not run on this device or these shapes.
    """
    function = imported("QuACK", "quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    is_supported = imported("QuACK", "quack.linear_cross_entropy", "scaled_exp_lce_supported")
    if not is_supported(hidden_N_D, weight_V_D, QUACK_CHUNK_SIZE, "mean"):
        raise NotInstalled(
            "QuACK: its scaled-exp form needs Hopper, bfloat16 and a vocabulary that is a multiple of 128"
        )
    options = {"chunk_size": QUACK_CHUNK_SIZE, "ignore_index": IGNORED, "reduction": "mean"}
    return function(hidden_N_D, weight_V_D, tokens_N, use_scaled_exp=True, **options)


def cut_cross_entropy_mean(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """As it is by default: see `bench.baselines.peers.cut_cross_entropy_logprobs`."""
    function = imported("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")
    return function(hidden_N_D, weight_V_D, tokens_N, ignore_index=IGNORED, reduction="mean")


def liger_fused_linear(hidden_N_D: Tensor, weight_V_D: Tensor, tokens_N: Tensor) -> Tensor:
    """Liger's Triton kernel over chunks of bfloat16 logits; the host waits for the count of tokens."""
    module = "liger_kernel.ops.fused_linear_cross_entropy"
    function = imported("Liger", module, "LigerFusedLinearCrossEntropyFunction")
    no_bias, no_class_weights = None, None
    loss, *_ = function.apply(hidden_N_D, weight_V_D, tokens_N, no_bias, no_class_weights, IGNORED)
    return loss


CROSS_ENTROPY_PEERS: dict[str, MeanLoss] = {
    "QuACK chunked": quack_chunked,
    "QuACK scaled-exp": quack_scaled_exp,
    "cut-cross-entropy": cut_cross_entropy_mean,
    "Liger fused_linear_cross_entropy": liger_fused_linear,
}


def run_mean_on_rollouts(
    function: MeanLoss, inputs: PrefixInputs, upstream_B_K: Tensor, *, start: int, trained: tuple[str, ...]
) -> Results:
    """The mean over the response rows whose upstream gradient is not 0; it must be -1 / their count in each."""
    hidden, weight, leaves = leaves_of(inputs.hidden_B_T_D, inputs.head, trained)
    horizon = inputs.horizon
    tokens_B_K = inputs.token_ids_B_T[:, start : start + horizon].masked_fill(upstream_B_K == 0, IGNORED)
    hidden_B_K_D = hidden[:, start - 1 : start - 1 + horizon]
    loss = function(hidden_B_K_D.flatten(0, 1), weight, tokens_B_K.flatten())
    return results_of("loss", loss, leaves, None)
