"""Prompts with the responses that the student wrote, as one rectangle of token ids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esr_distill.prompts import PromptBatch


@dataclass(frozen=True)
class RolloutBatch:
    """B rollouts. Prompts are padded on the left, so every response starts at column `prompt_width`.

    Attributes:
        token_ids_B_T: (B, T) int64, prompt then response; T = prompt_width + K with K the longest response here.
        attention_mask_B_T: (B, T) int64, 1 at prompt and response tokens. Made from lengths, never by comparing ids with
            the pad id: models whose pad id is an EOS id are common, and their first EOS belongs to the response.
        prompt_width: P.
        response_lengths_B: (B,) int64, tokens drawn, the first EOS included.
        stopped_by_eos_B: (B,) bool, False where the horizon cut the rollout.
        logprobs_B_K: (B, K) float32, log-prob of each token under the student at temperature 1; 0 past the length.
        sampling_logprobs_B_K: (B, K) float32, log-prob under the distribution that was really sampled; 0 past the length. NaN in
            this or the one before where a backend is not told.
    """

    token_ids_B_T: Tensor
    attention_mask_B_T: Tensor
    prompt_width: int
    response_lengths_B: Tensor
    stopped_by_eos_B: Tensor
    logprobs_B_K: Tensor
    sampling_logprobs_B_K: Tensor

    @classmethod
    def join(
        cls,
        prompts: PromptBatch,
        response_ids_B_K: Tensor,
        *,
        lengths_B: Tensor,
        stopped_by_eos_B: Tensor,
        logprobs_B_K: Tensor,
        sampling_logprobs_B_K: Tensor,
    ) -> "RolloutBatch":
        """Prompts and responses, cut to the longest one; log-probs past a response's end become 0."""
        width = int(lengths_B.max())
        mask_B_K = response_mask(lengths_B, width)
        return cls(
            token_ids_B_T=torch.cat([prompts.prompt_ids_B_P, response_ids_B_K[:, :width]], dim=1),
            attention_mask_B_T=torch.cat([prompts.prompt_mask_B_P, mask_B_K], dim=1).long(),
            prompt_width=prompts.prompt_ids_B_P.shape[1],
            response_lengths_B=lengths_B,
            stopped_by_eos_B=stopped_by_eos_B,
            logprobs_B_K=logprobs_B_K[:, :width].masked_fill(~mask_B_K, 0.0),
            sampling_logprobs_B_K=sampling_logprobs_B_K[:, :width].masked_fill(~mask_B_K, 0.0),
        )

    @property
    def batch_size(self) -> int:
        return self.token_ids_B_T.shape[0]

    @property
    def response_ids_B_K(self) -> Tensor:
        return self.token_ids_B_T[:, self.prompt_width :]

    @property
    def position_ids_B_T(self) -> Tensor:
        return position_ids(self.attention_mask_B_T)


def prompt_inputs(prompts: PromptBatch) -> dict[str, Tensor]:
    """What a model is given to read the prompts, each prompt once however many samples it has."""
    mask_U_P = prompts.prompt_mask_B_P[:: prompts.samples_per_prompt].long()
    return {
        "input_ids": prompts.prompt_ids_B_P[:: prompts.samples_per_prompt],
        "attention_mask": mask_U_P,
        "position_ids": position_ids(mask_U_P),
    }


def position_ids(attention_mask_B_T: Tensor) -> Tensor:
    """Position of each token in its own sequence: left padding does not count, so a row's result does not depend on it."""
    return (attention_mask_B_T.cumsum(-1) - 1).clamp_min(0)


def response_mask(lengths_B: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width) bool, True in the first lengths_B[b] slots."""
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]
