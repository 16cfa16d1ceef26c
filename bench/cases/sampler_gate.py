"""The gate of the sampler cases: ours to the bit against the reference, every implementation against the exact distribution.

The exact distribution is made in float64 as the warpers of Hugging Face define it, in the order temperature, top-k (ids that
tie with the k-th stay), top-p, min-p. A few hundred draws must

    support     all have a positive probability in it, up to rounding at the boundary of a filter
    surprise    have the mean log-probability that draws from it have, within 6 standard errors: what draws too likely ids,
                or too unlikely ones, is refused

What applies no filter, another temperature, or takes the likeliest id fails so; where all ids are equally likely the second
says nothing. What is asked of ours goes further: ids and both log-probs equal those of the reference in every bit. Log-probs of
others are compared in nats.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bench.baselines.sampler_baselines import Draw
from bench.cases.comparison import gate_rows
from bench.cases.sampler_inputs import SLOTS, RewoundState, RowParameters, SamplerInputs, make_state
from esr_kernels import Impl, LogitStorage, SamplerState, sample_tokens
from esr_kernels.testing.oracle import Results

DRAWS = 256
MOST_CALLS = 64
# More random numbers than an implementation takes for one id of a row from one place of its stream.
POSITIONS_OF_A_CALL = 4096
REFERENCE_ROWS = 16
# Of a float32 sum over the vocabulary and of a float32 logit: how far the boundary of a filter may lie from the exact one.
BOUNDARY_MASS, BOUNDARY_NATS = 1e-4, 1e-4
SURPRISE_LIMIT = 6.0
# A log-prob of another implementation off by more is that of something else.
LOGPROB_NATS = 1e-2
# Results of ours that are compared to the bit.
BITWISE = ("token_ids", "logprobs", "sampling_logprobs")
assert MOST_CALLS <= SLOTS


def number_of_calls(batch_size: int) -> int:
    return min(MOST_CALLS, -(-DRAWS // batch_size))


def drawn(draw: Draw, inputs: SamplerInputs) -> Results:
    """As many calls as make enough draws: (C, B) of each result. The state and the positions of others advance."""
    RewoundState(inputs.state).rewind()
    calls = []
    for _ in range(number_of_calls(len(inputs.logits_B_V))):
        calls.append(draw(inputs))
        inputs.positions_B.add_(POSITIONS_OF_A_CALL)
    return {name: torch.stack([call[name].flatten() for call in calls]) for name in calls[0]}


class ExactDistribution(NamedTuple):
    """Float64, for the rows R of the gate."""

    raw_logprobs_R_V: Tensor  # temperature 1, no filter
    scores_R_V: Tensor  # log-probs at the temperature, not filtered
    probs_R_V: Tensor  # filtered
    is_allowed_R_V: Tensor  # of positive probability, or so near to it that rounding decides

    @classmethod
    def of(cls, logits_R_V: Tensor, parameters: RowParameters) -> "ExactDistribution":
        temperature, top_k, top_p, min_p = (values_R[:, None] for values_R in parameters)
        logits_R_V = logits_R_V.double()
        scores_R_V = (logits_R_V / temperature.double()).log_softmax(-1)
        if (top_k == logits_R_V.shape[1]).all() and (top_p == 1).all() and (min_p == 0).all():
            is_allowed_R_V = scores_R_V > -torch.inf
            return cls(logits_R_V.log_softmax(-1), scores_R_V, scores_R_V.exp(), is_allowed_R_V)
        ranked_R_V = scores_R_V.sort(-1, descending=True).values
        kth_score = ranked_R_V.gather(1, top_k.long() - 1)
        ranked_R_V.masked_fill_(ranked_R_V < kth_score, -torch.inf)
        probs_R_V = ranked_R_V.softmax(-1)
        before_R_V = probs_R_V.cumsum(-1) - probs_R_V
        min_p_score = ranked_R_V[:, :1] + min_p.double().log()

        def least_score(mass: float, nats: float) -> Tensor:
            in_top_p_R_V = (top_p == 1) | (before_R_V < top_p.double() + mass)
            least = ranked_R_V.masked_fill(~in_top_p_R_V | ranked_R_V.isinf(), torch.inf).amin(-1, keepdim=True)
            return torch.maximum(torch.maximum(kth_score, least), min_p_score) - nats

        is_kept_R_V = scores_R_V >= least_score(0.0, 0.0)
        filtered_R_V = scores_R_V.masked_fill(~is_kept_R_V, -torch.inf).softmax(-1)
        is_allowed_R_V = scores_R_V >= least_score(BOUNDARY_MASS, BOUNDARY_NATS)
        return cls(logits_R_V.log_softmax(-1), scores_R_V, filtered_R_V, is_allowed_R_V)

    def surprise(self, ids_C_R: Tensor) -> float:
        """Mean log-probability of the draws less what it should be, in standard errors."""
        mean_R_1 = (self.probs_R_V * self.scores_R_V).sum(-1, keepdim=True)
        variance_R = (self.probs_R_V * (self.scores_R_V - mean_R_1).square()).sum(-1)
        deviation_C_R = self.scores_R_V.gather(1, ids_C_R.T).T - mean_R_1.T
        # Where all draws are equally likely, rounding must not be divided by nothing.
        return float(deviation_C_R.sum() / (len(ids_C_R) * variance_R.sum()).sqrt().clamp(min=1e-6))


class SamplerGate:
    """Has the methods of `comparison.Gate` that a benchmark calls."""

    def __init__(self, inputs: SamplerInputs) -> None:
        logits_B_V = inputs.logits_B_V
        batch_size, self.vocab_size = logits_B_V.shape
        self.rows = gate_rows(batch_size, logits_B_V.device)
        parameters = RowParameters(*(values_B[self.rows] for values_B in inputs.parameters))
        self.exact = ExactDistribution.of(logits_B_V[self.rows], parameters)
        self.reference_rows = self.rows[:: -(-len(self.rows) // REFERENCE_ROWS)]
        state = make_state(inputs.settings, self.reference_rows)
        num_calls = number_of_calls(batch_size)
        for _ in range(num_calls):
            sample_tokens(logits_B_V[self.reference_rows], state, impl=Impl.REFERENCE)
        self.reference = {name: getattr(state, f"{name}_B_K")[:, :num_calls].T for name in BITWISE}

    def errors(self, actual: Results) -> dict[str, float]:
        """Largest error of a log-prob in nats, and the surprise of the draws."""
        ids_C_R = self._ids_of_rows(actual)
        errors = {"surprise": self.exact.surprise(ids_C_R)}
        if "logprobs" in actual:
            exact_C_R = self.exact.raw_logprobs_R_V.gather(1, ids_C_R.T).T
            errors["logprobs"] = float((actual["logprobs"][:, self.rows] - exact_C_R).abs().max())
        return errors

    def check(self, actual: Results, norm_limit: float | None = None) -> None:
        """To the bit where no limit is given, as for ours; by the distribution always.

        Raises:
            AssertionError: what is drawn is something else.
        """
        if norm_limit is None:
            for name in BITWISE:
                check_bits(name, actual[name][:, self.reference_rows], self.reference[name])
        ids_C_R = self._ids_of_rows(actual)
        is_allowed_R_C = self.exact.is_allowed_R_V.gather(1, ids_C_R.T)
        outside = int((~is_allowed_R_C).sum())
        assert outside == 0, f"{outside} of {ids_C_R.numel()} drawn ids have probability 0 under the filters"
        errors = self.errors(actual)
        surprise, error = errors["surprise"], errors.get("logprobs", 0.0)
        assert abs(surprise) <= SURPRISE_LIMIT, (
            f"draws are {'too likely' if surprise > 0 else 'too unlikely'}: their mean log-probability is {surprise:.1f} "
            f"standard errors from that of the distribution, at most {SURPRISE_LIMIT:g}"
        )
        assert error <= LOGPROB_NATS, f"logprobs: off by {error:.3g} nats, at most {LOGPROB_NATS}"

    def _ids_of_rows(self, actual: Results) -> Tensor:
        ids_C_R = actual["token_ids"][:, self.rows].long()
        assert ((0 <= ids_C_R) & (ids_C_R < self.vocab_size)).all(), "draws ids outside the vocabulary"
        return ids_C_R


def check_bits(name: str, actual_C_R: Tensor, expected_C_R: Tensor) -> None:
    bits = torch.int32 if expected_C_R.dtype == torch.float32 else torch.int64
    assert actual_C_R.dtype == expected_C_R.dtype, f"{name}: dtype {actual_C_R.dtype}, not {expected_C_R.dtype}"
    is_equal_C_R = actual_C_R.contiguous().view(bits) == expected_C_R.contiguous().view(bits)
    wrong = int((~is_equal_C_R).sum())
    assert wrong == 0, f"{name}: {wrong} of {is_equal_C_R.numel()} differ from the reference, bit for bit"


def sampler_gate(inputs: SamplerInputs) -> Callable[[LogitStorage], SamplerGate]:
    """Made when it is first asked for; `storage` plays no part."""
    make_gate = cache(lambda: SamplerGate(inputs))
    return lambda storage: make_gate()


def results_of_state(state: SamplerState) -> Results:
    """What the last call wrote, row by row."""
    columns_B_1 = state.lengths_B[:, None] - 1
    return {name: getattr(state, f"{name}_B_K").gather(1, columns_B_1).squeeze(1) for name in BITWISE}
