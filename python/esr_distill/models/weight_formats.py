"""In what form weights may lie on the disk and in memory: safetensors, GGUF, 4 bits; never a pickle."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, GgufConfig

from esr_distill.input_error import InputError

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_safetensors(source: str, option: str) -> None:
    """Raise InputError for a local folder whose only weights are pickles, which can run code when they are read."""
    if not Path(source).is_dir() or any(Path(source).glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in Path(source).iterdir() if path.suffix in PICKLE_ENDINGS)
    if pickles:
        raise InputError(
            f"{option} must be a folder with weights in safetensors, got {source!r} with {pickles[0]}, a pickle, which can "
            "run code when it is read; convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )


def gguf_arguments(source: str, gguf_file: str, option: str) -> dict:
    """What transformers needs to read a GGUF file into ordinary weights.

    Raises:
        InputError: a package that is missing, or no such file in a local folder.
    """
    option = f"{option}_gguf_file"
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{option} must be unset without the packages gguf and accelerate, got no {' and no '.join(missing)} "
            "(pip install gguf accelerate)"
        )
    if Path(source).exists() and not (Path(source) / gguf_file).is_file():
        raise InputError(f"{option} must be the name of a file in {source!r}, got {gguf_file!r}")
    # Without dequantize the weights stay packed and can be neither trained nor saved.
    return {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}


def four_bit_arguments(dtype: torch.dtype, device: torch.device) -> dict:
    """What transformers needs to load linear layers in 4 bits: nf4, nested quantisation of the scales, products in `dtype`.

    Raises:
        InputError: no CUDA device, or a package that is missing.
    """
    option = "model.lora.load_in_4bit"
    if device.type != "cuda":
        raise InputError(f"{option} must be false without a CUDA device, got true on {device.type}")
    missing = [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{option} must be false without the packages bitsandbytes and accelerate, got no {' and no '.join(missing)} "
            "(pip install bitsandbytes accelerate)"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}
