"""Prompts are read once, by the model as it is configured, before any token is drawn."""

from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import position_ids
from esr_distill.rollout.static_cache import prefilled_tensors


def prefill(model: PreTrainedModel, prompts: PromptBatch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits (B, V) after the prompts, and keys and values of the prompts, each prompt once however many samples it has."""
    every = slice(None, None, prompts.samples_per_prompt)
    prompt_mask_U_P = prompts.prompt_mask_B_P[every].long()
    output = model(
        input_ids=prompts.prompt_ids_B_P[every],
        attention_mask=prompt_mask_U_P,
        position_ids=position_ids(prompt_mask_U_P),
        use_cache=True,
        logits_to_keep=1,
    )
    logits_B_V = output.logits[:, -1].repeat_interleave(prompts.samples_per_prompt, dim=0)
    return logits_B_V, prefilled_tensors(getattr(output, "past_key_values", None))
