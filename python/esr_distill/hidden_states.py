"""Last hidden states and output heads of transformers models: the two halves of a causal LM's forward.

The head is not applied here, so that only the positions that train are ever projected onto the vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.input_error import InputError
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_kernels import OutputHead


def last_hidden_states(model: PreTrainedModel, rollouts: RolloutBatch, prefill: PromptPrefill | None = None) -> Tensor:
    """(B, T, hidden): what the model's own output head would be given, for prompt and response.

    With a `prefill` of the prompts only the responses are still to be read.
    """
    if prefill is not None:
        return prefill.hidden_states(model, rollouts)
    output = model.base_model(
        input_ids=rollouts.token_ids_B_T,
        attention_mask=rollouts.attention_mask_B_T,
        position_ids=rollouts.position_ids_B_T,
        use_cache=False,
    )
    return output.last_hidden_state


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's LM head as a value that shares its weights, with the logit scale and soft cap of its config."""
    layer = model.get_output_embeddings()
    scale = getattr(model.config, "logit_scale", None) or 1.0
    divisor = getattr(model.config, "logits_scaling", None) or 1.0
    return OutputHead(
        layer.weight,
        getattr(layer, "bias", None),
        logit_scale=scale / divisor,
        softcap=getattr(model.config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def check_output_head(model: PreTrainedModel, option: str) -> None:
    """Compare hidden states through `output_head` with the model's own logits on four tokens.

    Raises:
        InputError: the model does something else between its last hidden state and its logits.
    """
    device = next(model.parameters()).device
    ids_1_T = torch.arange(4, device=device)[None] % model.config.get_text_config().vocab_size
    own = model(input_ids=ids_1_T, use_cache=False).logits
    ours = output_head(model).logits(model.base_model(input_ids=ids_1_T, use_cache=False).last_hidden_state)
    error = (own.float() - ours.float()).abs().max().item()
    # The model projects in its own dtype or in that of autocast; bfloat16 keeps 8 bits of the largest logit.
    allowed = own.abs().max().item() * (1e-4 if own.dtype == torch.float32 else 2**-6) + 1e-6
    if not error <= allowed:
        raise InputError(
            f"{option} must be a model whose logits are a linear head (bias, scale, soft cap) of its last hidden state, "
            f"got {type(model).__name__}, whose logits differ from that by {error:.3g}"
        )
