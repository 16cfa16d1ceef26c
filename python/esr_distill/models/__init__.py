"""Load students, teachers and tokenizers by hub id or local folder, and the token ids at which a response ends."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from esr_distill.input_error import InputError
from esr_distill.models.adapters import find_adapter, load_frozen_adapter
from esr_distill.models.generation_file import check_generation_file
from esr_distill.models.weight_formats import check_safetensors, four_bit_arguments, gguf_arguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StopIds:
    """Ids that end a response (every EOS id of either model), and the id that fills the columns after it."""

    eos_ids: tuple[int, ...]
    pad_id: int


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a CUDA device, else the CPU.

    Raises:
        InputError: "cuda" was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("model.device must be cpu or auto where PyTorch sees no CUDA device, got 'cuda'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def choose_attention(name: str, device: torch.device, *, is_in_16_bits: bool) -> str:
    """What "auto" stands for: flash attention where it can run, else PyTorch's own. Any other name is itself."""
    if name != "auto":
        return name
    can_flash = device.type == "cuda" and is_in_16_bits and is_flash_attn_2_available()
    return "flash_attention_2" if can_flash else "sdpa"


def load_model(
    source: str,
    option: str,
    *,
    dtype: str,
    attn_implementation: str,
    device: torch.device,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    in_4_bit: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode. Nothing is unpickled; code of the model's repository is run with `trust_remote_code` alone.

    A source that holds an adapter gives the base model that the adapter names, with the adapter on it, all of it frozen.

    Args:
        gguf_file: read this file of `source`, through transformers' own converter, in place of safetensors.
        in_4_bit: keep the linear layers in 4 bits and compute in `dtype`.

    Raises:
        InputError: neither a local model folder nor a hub id that can be reached; weights that are damaged, no safetensors, not
            there (transformers would draw them at random) or not finite; a damaged generation_config.json; a package that is
            missing.
    """
    if attn_implementation == "flash_attention_2" and device.type == "cpu":
        raise InputError("model.attn_implementation must be sdpa or eager on a CPU, got 'flash_attention_2'")
    loading = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    adapter = None if gguf_file is not None else find_adapter(source)
    if adapter is not None:
        base = base_of_adapter(source, adapter, option)
        base_option = f"the base model of {option}"
        model = load_model(base, base_option, dtype=dtype, device=device, in_4_bit=in_4_bit, **loading)
        load_frozen_adapter(model, source, option)
        return model.eval()
    if gguf_file is not None:
        files = gguf_arguments(source, gguf_file, option)
    else:
        check_safetensors(source, option)
        files = {"use_safetensors": True}
    if in_4_bit:
        files |= four_bit_arguments(DTYPES[dtype], device)
    check_generation_file(source, option)
    model, found = _load(
        AutoModelForCausalLM, source, option, dtype=DTYPES[dtype], output_loading_info=True, **loading, **files
    )
    if found["missing_keys"]:
        raise InputError(
            f"{option} must have saved weights for all of {type(model).__name__}, got none for "
            f"{sorted(found['missing_keys'])[0]} ({len(found['missing_keys'])} missing)"
        )
    check_finite_weights(model, option)
    return model.eval() if in_4_bit else model.to(device).eval()


def load_tokenizer(
    source: str, option: str, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model, or in its GGUF file. Raises InputError where there is none."""
    files = {} if gguf_file is None else {"gguf_file": gguf_arguments(source, gguf_file, option)["gguf_file"]}
    return _load(AutoTokenizer, source, option, trust_remote_code=trust_remote_code, **files)


def _load(auto_class, source: str, option: str, **kwargs):
    looks_local = Path(source).exists() or source.startswith((".", "/", "~"))
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = (
            "a folder with a saved model and tokenizer"
            if looks_local
            else "a local folder or a hub id that can be reached"
        )
        raise InputError(f"{option} must be {wanted}, got {source!r} ({first_line})") from error


def base_of_adapter(source: str, adapter: dict, option: str) -> str:
    """The model that an adapter was trained on, by its hub id or folder."""
    base = adapter.get("base_model_name_or_path")
    if not base:
        raise InputError(f"{option} must hold an adapter that names its base model, got {source!r}, which names none")
    if (Path(source) / "config.json").is_file() or find_adapter(base) is not None:
        raise InputError(
            f"{option} must hold a model, or an adapter of a whole model, got {source!r}, which mixes them"
        )
    return base


def check_finite_weights(model: PreTrainedModel, option: str) -> None:
    """Raise InputError naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{option} must have finite weights, got NaN or infinity in {name}")


def find_stop_ids(
    tokenizer: PreTrainedTokenizerBase,
    *models: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
) -> StopIds:
    """Every EOS id that a tokenizer or a model's generation config names.

    A student that ends with one id and a teacher that ends with another must both be understood as stopping: of a base model and
    an instruct model it is often the tokenizers alone that differ. The pad id only fills columns that nothing attends to: that of
    `tokenizer`, or the first EOS id where it has none or one that a model cannot embed.

    Args:
        teacher_tokenizer: the teacher's, where it is another one; same ids.
        vocab_size: `loss.vocab_size`, where the vocabulary is cut.

    Raises:
        InputError: there is no EOS id at all, or one that a model's vocabulary (or the cut one) does not have.
    """
    tokenizers = [tokenizer] if teacher_tokenizer is None else [tokenizer, teacher_tokenizer]
    named = [*(t.eos_token_id for t in tokenizers), *(model.generation_config.eos_token_id for model in models)]
    eos_ids = sorted({i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids])})
    if not eos_ids:
        raise InputError("the tokenizer or a model's generation config must name an end-of-sequence id, got none")
    widths = [model.get_output_embeddings().weight.shape[0] for model in models]
    limit = min(widths) if vocab_size is None else min(*widths, vocab_size)
    if eos_ids[-1] >= limit:
        raise InputError(f"end-of-sequence ids must be below the vocabulary size {limit}, got {eos_ids}")
    pad_id = tokenizer.pad_token_id
    return StopIds(tuple(eos_ids), eos_ids[0] if pad_id is None or pad_id >= min(widths) else pad_id)
