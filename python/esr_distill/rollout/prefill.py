"""Prompts are read once, by the model as it is configured, before any token is drawn."""

from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import prompt_inputs
from esr_distill.rollout.static_cache import prefilled_tensors


def prefill(model: PreTrainedModel, prompts: PromptBatch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits (B, V) after the prompts, and keys and values of the prompts, each prompt once however many samples it has."""
    output = model(**prompt_inputs(prompts), use_cache=True, logits_to_keep=1)
    logits_B_V = output.logits[:, -1].repeat_interleave(prompts.samples_per_prompt, dim=0)
    return logits_B_V, prefilled_tensors(getattr(output, "past_key_values", None))
