"""Rollouts by transformers' own `generate`: slow, and what the in-process backend is tested against."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.rollout_batch import RolloutBatch, response_mask
from esr_distill.rollout.rollout_request import RolloutRequest, check_request


class HFGenerateBackend:
    """`model.generate` with the settings of the request and none of the model's own.

    Greedy rollouts are those of `InProcessBackend`. Sampled ones are others: `generate` draws with torch's generator, here seeded
    by (seed, first request id), so a row's tokens depend on its batch. The logits of all steps are kept to compute log-probs:
    8 bytes times rows, horizon and vocabulary.
    """

    def release(self) -> None:
        """Nothing is held between calls."""

    def describe(self, model: PreTrainedModel) -> str:
        return f"rollouts: hf_generate, attention {model.config._attn_implementation}; sampler: torch.multinomial"

    @torch.no_grad()
    def generate(self, model: PreTrainedModel, prompts: PromptBatch, request: RolloutRequest) -> RolloutBatch:
        """One response for each row.

        Raises:
            InputError: a request that cannot be met.
            FloatingPointError: the model gave NaN or infinity.
        """
        check_request(model, prompts, request)
        cut = LogitsProcessorList([] if request.vocab_size is None else [CutVocabulary(request.vocab_size)])
        device = prompts.prompt_ids_B_P.device
        with (
            eval_mode(model),
            only_generation_config(model, generation_config(request)),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            # 64 bits: both numbers are spread over all of them
            torch.manual_seed((request.seed * 0x9E3779B97F4A7C15 + int(prompts.request_ids_B[0])) % 2**64)
            output = model.generate(
                prompts.prompt_ids_B_P,
                attention_mask=prompts.prompt_mask_B_P.long(),
                logits_processor=cut,
            )
        width = prompts.prompt_ids_B_P.shape[1]
        tokens_B_K = output.sequences[:, width:]
        lengths_B, stopped_B = find_ends(tokens_B_K, request.eos_ids)
        mask_B_K = response_mask(lengths_B, tokens_B_K.shape[1])
        raw = [logits_B_V[:, : request.vocab_size] for logits_B_V in output.logits]
        # NaN, +inf or nothing finite; a model may put -inf on ids that it never writes
        is_valid_B_K = torch.stack([logits_B_V.amax(-1).isfinite() for logits_B_V in raw], dim=1)
        if not is_valid_B_K[mask_B_K].all():
            raise FloatingPointError("rollout: the logits must be finite, got NaN or infinity")
        is_greedy = request.sampler.sampling_temperature == 0
        logprobs_B_K = drawn_logprobs(raw, tokens_B_K)
        return RolloutBatch.join(
            prompts,
            tokens_B_K,
            lengths_B=lengths_B,
            stopped_by_eos_B=stopped_B,
            logprobs_B_K=logprobs_B_K,
            sampling_logprobs_B_K=torch.zeros_like(logprobs_B_K)
            if is_greedy
            else drawn_logprobs(list(output.scores), tokens_B_K),
        )


@contextmanager
def only_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a config leaves open from the model's own, such as a repetition penalty."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


class CutVocabulary(LogitsProcessor):
    """Ids from `vocab_size` on are never drawn."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.nn.functional.pad(
            scores[:, : self.vocab_size], (0, scores.shape[1] - self.vocab_size), value=-torch.inf
        )


def generation_config(request: RolloutRequest) -> GenerationConfig:
    sampler = request.sampler
    is_greedy = sampler.sampling_temperature == 0
    filters = (
        {}
        if is_greedy
        else {
            "temperature": sampler.sampling_temperature,
            "top_k": sampler.top_k,
            "top_p": sampler.top_p,
            "min_p": sampler.min_p or None,
        }
    )
    return GenerationConfig(
        do_sample=not is_greedy,
        **filters,
        max_new_tokens=request.horizon,
        eos_token_id=list(request.eos_ids) or None,
        pad_token_id=request.pad_id,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )


def find_ends(tokens_B_K: Tensor, eos_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Length of each row with its first EOS, and whether it has one."""
    is_eos_B_K = torch.isin(tokens_B_K, tokens_B_K.new_tensor(eos_ids))
    stopped_B = is_eos_B_K.any(-1)
    return torch.where(stopped_B, is_eos_B_K.int().argmax(-1) + 1, tokens_B_K.shape[1]), stopped_B


def drawn_logprobs(scores: list[Tensor], tokens_B_K: Tensor) -> Tensor:
    """Log-prob of each token under the softmax of its step's scores, (B, K) float32."""
    columns = [
        scores_B_V.float().log_softmax(-1).gather(1, tokens_B_1.clamp(max=scores_B_V.shape[1] - 1))
        for scores_B_V, tokens_B_1 in zip(scores, tokens_B_K.split(1, dim=1), strict=True)
    ]
    return torch.cat(columns, dim=1)
