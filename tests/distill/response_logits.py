"""What a whole model says of the tokens of a rollout, without the loop's own parts: what a step is compared with."""

import numpy as np
import torch
from transformers import PreTrainedModel

from esr_distill.rollout import RolloutBatch


def response_logits(model: PreTrainedModel, rollouts: RolloutBatch, row: int) -> tuple[np.ndarray, list[int]]:
    """Logits (T, V) in float64 before each response token of a row, which is read alone and without padding; and the tokens."""
    length = int(rollouts.response_lengths_B[row])
    end = rollouts.prompt_width + length
    ids_T = rollouts.token_ids_B_T[row, :end][rollouts.attention_mask_B_T[row, :end].bool()]
    with torch.no_grad():
        logits_T_V = model(input_ids=ids_T[None], use_cache=False).logits[0, -length - 1 : -1]
    return logits_T_V.double().numpy(), ids_T[-length:].tolist()
