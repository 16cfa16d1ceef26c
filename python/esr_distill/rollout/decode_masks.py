"""Attention masks of coming decode steps, all at once: a step then picks its own by a number on the device."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from esr_distill.input_error import InputError
from esr_distill.rollout.static_cache import RolloutCache

ONLY = ""  # the key of a model whose layers all share one mask
Masks = dict[str, Tensor]  # by kind of layer: (B, 1, steps, columns), added to the scores


def make_decode_masks(
    model: PreTrainedModel,
    prompt_mask_B_C: Tensor,
    cache: RolloutCache,
    *,
    first_column: int,
    num_steps: int,
    visible: int,
) -> Masks:
    """What the tokens in `num_steps` columns see of the first `visible` columns, as transformers masks them for this model.

    `prompt_mask_B_C` says which of the first C columns hold a prompt token; all later ones are seen up to the token's own.
    """
    batch_size, num_prompt_columns = prompt_mask_B_C.shape
    seen_B_C = torch.nn.functional.pad(prompt_mask_B_C, (0, visible - num_prompt_columns), value=True)
    embedding = model.get_input_embeddings().weight
    cache.show(visible, first_query=first_column)
    create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    made = create(
        config=model.config,
        inputs_embeds=embedding.new_empty((batch_size, num_steps, 0)),  # shape and dtype are all that is read
        attention_mask=seen_B_C,
        past_key_values=cache,
        position_ids=None,
    )
    masks = made if isinstance(made, dict) else {ONLY: made}
    for mask in masks.values():
        if mask is None or mask.shape != (batch_size, 1, num_steps, visible):
            got = None if mask is None else tuple(mask.shape)
            raise InputError(
                f"rollout.backend inprocess needs masks (rows, 1, steps, columns) from {type(model).__name__}, got {got}; set "
                "rollout.backend to hf_generate"
            )
    return {name: additive(mask, cache.layers[0].dtype) for name, mask in masks.items()}


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """In memory of its own, and as attention adds it: from bools every layer would make that anew in every step."""
    if mask.dtype != torch.bool:
        return mask.contiguous()  # an expanded one could not be written to
    return torch.zeros_like(mask, dtype=dtype, memory_format=torch.contiguous_format).masked_fill_(~mask, -torch.inf)


def mask_of_step(masks: Masks, step_1: Tensor, visible: int) -> Tensor | dict[str, Tensor]:
    """The mask of one token, in the form in which the model takes it; `step_1` is an index on the device."""
    picked = {name: mask.index_select(2, step_1)[..., :visible] for name, mask in masks.items()}
    return picked[ONLY] if ONLY in picked else picked
