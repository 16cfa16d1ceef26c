"""Last hidden states and output heads of transformers models: the two halves of a causal LM's forward.

The head is not applied here, so that only the positions that train are ever projected onto the vocabulary. Where rows are packed
(`pack_rows`), the body meets no padding either.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.input_error import InputError
from esr_distill.packed_attention import Packing, packed_inputs, packing_of, set_packing
from esr_distill.packed_rows import HiddenRows, PackedRows
from esr_distill.prompt_prefill import PromptPrefill
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_kernels import OutputHead

# Of the norm of the hidden states. Rounding to bfloat16 is far below it, a row that sees the one before it far above.
MAX_PACKING_ERROR = 0.25


def last_hidden_states(
    model: PreTrainedModel, rollouts: RolloutBatch, prefill: PromptPrefill | None = None
) -> Tensor | HiddenRows:
    """What the model's own output head would be given, for prompt and response: (B, T, hidden), or `HiddenRows` of a model whose
    rows are packed, which are read in the same way.

    With a `prefill` of the prompts only the responses are still to be read, and these are padded.
    """
    if prefill is not None:
        return prefill.hidden_states(model, rollouts)
    packing = packing_of(model)
    if packing is Packing.NONE:
        return padded_hidden_states(model, rollouts)
    rows = PackedRows.of(rollouts)
    output = model.base_model(**packed_inputs(rows, packing), use_cache=False)
    return HiddenRows(output.last_hidden_state[0], rows.place_B_T)


def padded_hidden_states(model: PreTrainedModel, rollouts: RolloutBatch) -> Tensor:
    output = model.base_model(
        input_ids=rollouts.token_ids_B_T,
        attention_mask=rollouts.attention_mask_B_T,
        position_ids=rollouts.position_ids_B_T,
        use_cache=False,
    )
    return output.last_hidden_state


def pack_rows(model: PreTrainedModel, packing: Packing, option: str, *, or_pad: bool = False) -> str:
    """Lay out the rows of this model so, from now on, after a comparison of packed with padded ones. In words for the log.

    Args:
        or_pad: leave the rows padded where they cannot be packed, as model.packing auto does, and say why.

    Raises:
        InputError: rows of this model cannot be packed, or have other hidden states then.
    """
    try:
        set_packing(model, packing, option)
        if packing is not Packing.NONE:
            check_packed_rows(model, option)
    except InputError as error:
        set_packing(model, Packing.NONE, option)
        if not or_pad:
            raise
        return f"{Packing.NONE.describe()} ({error})"
    return packing.describe()


@torch.no_grad()
def check_packed_rows(model: PreTrainedModel, option: str) -> None:
    """Compare packed with padded hidden states on rows of three, one and four tokens."""
    device = next(model.parameters()).device
    mask_B_T = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1]], device=device)
    ids_B_T = torch.arange(12, device=device).view(3, 4) % model.config.get_text_config().vocab_size
    lengths_B = mask_B_T[:, 2:].sum(1)
    none_B_K = torch.zeros(3, 2, device=device)
    rollouts = RolloutBatch(ids_B_T, mask_B_T, 2, lengths_B, lengths_B > 0, none_B_K, none_B_K)
    row_N, column_N = mask_B_T.nonzero(as_tuple=True)
    padded_N_D = padded_hidden_states(model, rollouts)[row_N, column_N].float()
    try:
        packed_N_D = last_hidden_states(model, rollouts)[row_N, column_N].float()
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:  # of the kernel or of the model, each with its own words
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model.packing must be none for {option} ({first_line}), got {type(model).__name__}"
        ) from error
    difference = ((packed_N_D - padded_N_D).norm() / padded_N_D.norm()).item()
    if not difference <= MAX_PACKING_ERROR:
        raise InputError(
            f"model.packing must be none for {option}, whose packed rows have hidden states that differ from padded ones by "
            f"{difference:.3g} of their norm, got {type(model).__name__}"
        )


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
