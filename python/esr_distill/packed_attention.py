"""Attention within the rows of a packed sequence: which kernel, on which models, and PyTorch's own as transformers' attention.

transformers hands `cu_seq_lens_q`, `max_length_q` and their twins for the keys from a model's forward on to its attention. Its
flash_attention_2 reads them; its sdpa does not, and would build a mask of (S, S) for one packed sequence. Hence `packed_sdpa`:
PyTorch's varlen_attn where a forward brings rows, and everywhere else the attention that rollouts are decoded with.
"""

import inspect
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from esr_distill.input_error import InputError
from esr_distill.models.teacher import Teacher
from esr_distill.packed_rows import PackedRows
from esr_distill.rollout.decode_attention import decode_sdpa

NAME = "esr_packed_sdpa"
ATTRIBUTE = "esr_packing"
# A mask of four dimensions is handed on to the attention as it is, and no other is made. This one says nothing.
NO_MASK_SHAPE = (1, 1, 1, 1)
# Asked for by name since PyTorch 2.12; before, fewer key heads than query heads are simply taken.
GROUPED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
# What an attention may be asked for beside softmax(q k) v over the keys of a row, and varlen_attn does not have.
NOT_IN_VARLEN = {
    "softcap": "caps scores",
    "s_aux": "has sinks",
    "position_bias": "adds a bias to scores",
    "cache": "reads a paged cache",
}


class Packing(Enum):
    """How `last_hidden_states` lays out rollouts."""

    NONE = "none"
    VARLEN = "varlen"
    FLASH = "flash"

    def describe(self) -> str:
        return {
            Packing.NONE: "padded",
            Packing.VARLEN: "packed, by PyTorch's varlen_attn",
            Packing.FLASH: "packed, by flash-attn's varlen kernel",
        }[self]


def choose_packing(name: str, attention: str, device: torch.device, *, is_in_16_bits: bool) -> Packing:
    """What `model.packing` stands for beside the attention that was chosen.

    auto packs where a kernel for it is there: flash-attn's for flash_attention_2, PyTorch's for sdpa in 16 bits on a CUDA device
    of compute capability 8.0 or more. Whether a model can be packed is seen when it is there (`pack_rows`).

    Raises:
        InputError: another name than auto that cannot run here.
    """
    if name == "none":
        return Packing.NONE
    if name == "auto" and attention == "flash_attention_2":
        return Packing.FLASH
    if name == "flash":
        if attention != "flash_attention_2":
            raise InputError(
                f"model.packing must be auto, none or varlen with attention {attention}, got 'flash' (it needs "
                "model.attn_implementation flash_attention_2)"
            )
        return Packing.FLASH
    missing = what_varlen_lacks(attention, device, is_in_16_bits)
    if name == "auto":
        return Packing.NONE if missing else Packing.VARLEN
    if missing:
        raise InputError(f"model.packing must be auto or none {missing}, got {name!r}")
    return Packing.VARLEN


def what_varlen_lacks(attention: str, device: torch.device, is_in_16_bits: bool) -> str | None:
    if attention != "sdpa":
        return f"with attention {attention}, unless it is flash (varlen needs model.attn_implementation sdpa)"
    if device.type != "cuda":
        return f"on {device.type} (varlen needs a CUDA device)"
    if not is_in_16_bits:
        return "unless both models run in bfloat16 (model.teacher_dtype, and model.dtype or model.autocast)"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"on a device of compute capability {capability[0]}.{capability[1]} (varlen needs 8.0)"
    return None


def packing_of(model: PreTrainedModel | Teacher) -> Packing:
    return getattr(transformers_model(model), ATTRIBUTE, Packing.NONE)


def set_packing(model: PreTrainedModel | Teacher, packing: Packing, option: str) -> None:
    """From now on the rows of this model are laid out so.

    For varlen the model's attention becomes `packed_sdpa`, and stays it: layers that are computed again in backward must find it.

    Raises:
        InputError: rows of this model cannot be packed.
    """
    model = transformers_model(model)
    if packing is not Packing.NONE:
        check_model(model, packing, option)
    elif model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
    if packing is Packing.VARLEN:
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise refusal(f"{option}, whose attention cannot be exchanged", model)
    setattr(model, ATTRIBUTE, packing)


def check_model(model: PreTrainedModel, packing: Packing, option: str) -> None:
    """Refuse what mixes tokens by other means than an attention that can be told where rows start."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise refusal(f"{option}, which has layers of kind {', '.join(others)}", model)
    if model._is_stateful:
        raise refusal(f"{option}, which carries a state from token to token", model)
    if not model._supports_flash_attn:
        raise refusal(f"{option}, for which transformers has no flash attention, and so no lengths of rows", model)
    attention, needed = model.config._attn_implementation, "sdpa" if packing is Packing.VARLEN else "flash_attention_2"
    if attention not in (needed, NAME):
        raise refusal(f"{option}, whose attention is {attention} and not {needed}", model)


def refusal(what: str, module: nn.Module) -> InputError:
    return InputError(f"model.packing must be none for {what}, got {type(module).__name__}")


def transformers_model(model: PreTrainedModel | Teacher) -> PreTrainedModel:
    return model.model if isinstance(model, Teacher) else model


def packed_inputs(rows: PackedRows, packing: Packing) -> dict[str, object]:
    """What a model's body is given so that its attention keeps to the rows."""
    mask = None  # flash_attention_2 takes any other for padding to be removed
    if packing is Packing.VARLEN:
        mask = torch.ones(NO_MASK_SHAPE, dtype=torch.bool, device=rows.starts.device)
    return {
        "input_ids": rows.token_ids_1_S,
        "attention_mask": mask,
        "position_ids": rows.position_ids_1_S,
        "cu_seq_lens_q": rows.starts,
        "cu_seq_lens_k": rows.starts,
        "max_length_q": rows.longest,
        "max_length_k": rows.longest,
    }


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Each token of a packed sequence attends to those of its row up to itself; without rows, what `decode_sdpa` does.

    (1, heads, S, size) queries on (1, key heads, S, size) keys -> (1, S, heads, size).
    """
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.shape == NO_MASK_SHAPE and query.shape[2] > 1:
            raise refusal("a model that hands no lengths of rows on to its attention", module)
        return decode_sdpa(module, query, key, value, attention_mask, scaling=scaling, **others)
    check_is_plain(module, others)
    kernel_type = kernel_type_of(query)
    # A row is at most max_length_q long, and a window counts the token itself while the kernel counts those to its left.
    is_limited = sliding_window is not None and sliding_window < max_length_q
    output_S_H_D = varlen_attn(
        *(tensor[0].transpose(0, 1).to(kernel_type) for tensor in (query, key, value)),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(sliding_window - 1 if is_limited else -1, 0),
        **GROUPED_HEADS,
    )
    return output_S_H_D[None], None


def check_is_plain(module: nn.Module, others: dict[str, object]) -> None:
    for name, reason in NOT_IN_VARLEN.items():
        if others.get(name) is not None:
            raise refusal(f"attention that {reason}, unless it is flash", module)
    if others.get("dropout"):
        raise refusal("attention that drops weights", module)
    is_causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refusal("attention that looks at later tokens", module)


def kernel_type_of(query: Tensor) -> torch.dtype:
    """Rotary angles leave queries and keys in float32 under autocast, and autocast does not know varlen_attn."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


AttentionInterface.register(NAME, packed_sdpa)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
