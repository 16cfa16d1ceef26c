"""Draw rollouts from a causal LM: one prefill, then one token a step with a KV cache until EOS or the horizon.

The loop knows no text and no loss. Padding, position ids and attention masks of generation are handled here and nowhere else.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import RolloutBatch, position_ids, response_mask
from esr_distill.sampler_settings import SamplerSettings
from esr_kernels import Impl, SamplerState, is_native_sampler_built, sample_tokens

# A device counter says how many rows still run; asking for it makes the host wait, so a GPU is asked only this often.
STEPS_BETWEEN_POLLS = {"cpu": 1, "cuda": 16}


def choose_sampler_impl(device: torch.device) -> Impl:
    """The native sampler where it is built for the device, else plain PyTorch: both draw the same tokens."""
    return Impl.FUSED if is_native_sampler_built(device) else Impl.REFERENCE


@torch.no_grad()
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
) -> RolloutBatch:
    """Sample one response of at most `horizon` tokens for each prompt.

    A row's tokens depend on (seed, its request id, its prompt) and the weights, not on its place in the batch or its
    neighbours. The first EOS is kept; nothing follows it. The model is put in eval mode meanwhile. With `vocab_size`
    only ids below it are drawn, and log-probs are of that cut distribution: a padded head has surplus ids that the
    loss leaves out and that the teacher may not have.

    Raises:
        FloatingPointError: the model gave NaN or infinity.
    """
    state = SamplerState.create(
        len(prompts.request_ids_B),
        horizon,
        eos_ids=eos_ids,
        sampling_temperature=sampler.sampling_temperature,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        min_p=sampler.min_p,
        seed=seed,
        request_ids=prompts.request_ids_B,
        pad_id=pad_id,
        device=prompts.prompt_ids_B_P.device,
    )
    impl = choose_sampler_impl(prompts.prompt_ids_B_P.device)
    poll_every = STEPS_BETWEEN_POLLS.get(prompts.prompt_ids_B_P.device.type, 1)
    with eval_mode(model):
        for step, logits_B_V in enumerate(next_token_logits(model, prompts, state)):
            sample_tokens(logits_B_V[:, :vocab_size], state, impl=impl)
            last = step + 1 == horizon
            if last or ((step + 1) % poll_every == 0 and state.active.item() == 0):
                break
    if state.invalid_B.any():
        raise FloatingPointError(
            f"rollout: the logits must be finite, got NaN or infinity in {int(state.invalid_B.sum())} rows"
        )
    return collect_rollouts(prompts, state)


def next_token_logits(model: PreTrainedModel, prompts: PromptBatch, state: SamplerState) -> Iterator[Tensor]:
    """Yield (B, V) logits for ever: first after the prompt, then after each `state.next_ids_B` that the caller drew."""
    mask_B_T = prompts.prompt_mask_B_P.long()
    output = model(
        input_ids=prompts.prompt_ids_B_P,
        attention_mask=mask_B_T,
        position_ids=position_ids(mask_B_T),
        use_cache=True,
        logits_to_keep=1,
    )
    position_B_1 = mask_B_T.sum(-1, keepdim=True)
    while True:
        yield output.logits[:, -1]
        mask_B_T = torch.cat([mask_B_T, torch.ones_like(position_B_1)], dim=1)
        output = model(
            input_ids=state.next_ids_B[:, None],
            attention_mask=mask_B_T,
            position_ids=position_B_1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        position_B_1 = position_B_1 + 1


def collect_rollouts(prompts: PromptBatch, state: SamplerState) -> RolloutBatch:
    """Join prompts and drawn tokens, cut to the longest response."""
    width = int(state.lengths_B.max())
    response_mask_B_K = response_mask(state.lengths_B, width)
    return RolloutBatch(
        token_ids_B_T=torch.cat([prompts.prompt_ids_B_P, state.token_ids_B_K[:, :width]], dim=1),
        attention_mask_B_T=torch.cat([prompts.prompt_mask_B_P, response_mask_B_K], dim=1).long(),
        prompt_width=prompts.prompt_ids_B_P.shape[1],
        response_lengths_B=state.lengths_B,
        stopped_by_eos_B=state.stopped_by_eos_B,
        logprobs_B_K=state.logprobs_B_K[:, :width],
        sampling_logprobs_B_K=state.sampling_logprobs_B_K[:, :width],
    )


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off inside; the mode that the model was in comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
