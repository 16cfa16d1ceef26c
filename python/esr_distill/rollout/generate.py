"""`generate_rollouts`: responses to a batch of prompts, for those who need no backend of their own."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.backend import RolloutBackend
from esr_distill.rollout.inprocess import InProcessBackend
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.rollout.rollout_request import RolloutRequest
from esr_distill.sampler_settings import SamplerSettings


def generate_rollouts(
    model: PreTrainedModel,
    prompts: PromptBatch,
    *,
    horizon: int,
    sampler: SamplerSettings,
    eos_ids: Sequence[int],
    pad_id: int,
    seed: int,
    vocab_size: int | None = None,
    backend: RolloutBackend | None = None,
) -> RolloutBatch:
    """Sample one response of at most `horizon` tokens for each row of `prompts`.

    A row's tokens depend on (seed, its request id, its prompt) and the weights, not on its place in the batch or its
    neighbours. The first EOS is kept; nothing follows it. The model is put in eval mode meanwhile. With `vocab_size`
    only ids below it are drawn, and log-probs are of that cut distribution: a padded head has surplus ids that the
    loss leaves out and that the teacher may not have.

    Args:
        backend: who draws; by default an `InProcessBackend` that is released afterwards. Keep one, and its cache and graphs serve
            the next call.

    Raises:
        InputError: a request that cannot be met (`check_request`).
        FloatingPointError: the model gave NaN or infinity.
    """
    request = RolloutRequest(horizon, sampler, tuple(eos_ids), pad_id, seed, vocab_size)
    return (backend or InProcessBackend()).generate(model, prompts, request)
