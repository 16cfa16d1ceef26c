"""The teacher's forward over the prompts, begun while the student still writes: prompts are known before rollouts are.

Decoding reads weights and leaves most of a GPU's arithmetic idle; reading prompts is arithmetic. On a CUDA device the prefill
has a stream of its own and overlaps with the decode steps; on a CPU it is only done earlier. Not measured on a GPU yet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from esr_distill.input_error import InputError
from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import RolloutBatch, prompt_inputs


@dataclass
class PromptPrefill:
    """Hidden states (B, P, hidden) and KV cache of the prompts; each prompt is read once, however many samples it has."""

    hidden_B_P_E: Tensor
    cache: Cache
    stream: torch.cuda.Stream | None

    @classmethod
    @torch.no_grad()
    def start(cls, model: PreTrainedModel, prompts: PromptBatch, stream: torch.cuda.Stream | None) -> "PromptPrefill":
        """Enqueue the forward on `stream`, behind what the present stream holds now; None runs it where one is.

        Raises:
            InputError: the model keeps no KV cache.
        """
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        num_samples = prompts.samples_per_prompt
        with torch.cuda.stream(stream):  # does nothing for None
            output = model.base_model(**prompt_inputs(prompts), use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise InputError(
                    f"rollout.overlap_teacher must be false for a teacher without a KV cache, got {type(model).__name__}"
                )
            hidden_B_P_E = output.last_hidden_state.repeat_interleave(num_samples, dim=0)
            if num_samples > 1:
                cache.batch_repeat_interleave(num_samples)
        return cls(hidden_B_P_E, cache, stream)

    @torch.no_grad()
    def hidden_states(self, model: PreTrainedModel, rollouts: RolloutBatch) -> Tensor:
        """(B, T, hidden), as `last_hidden_states` of the whole rollouts. The cache grows: call it once."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        output = model.base_model(
            input_ids=rollouts.response_ids_B_K,
            attention_mask=rollouts.attention_mask_B_T,
            position_ids=rollouts.position_ids_B_T[:, rollouts.prompt_width :],
            past_key_values=self.cache,
            use_cache=True,
        )
        return torch.cat([self.hidden_B_P_E, output.last_hidden_state], dim=1)
