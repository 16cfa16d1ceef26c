"""LoRA adapters on a transformers model: added, read, written and switched off. All that knows the package peft.

The layers of the model itself get an adapter, in place, so the student stays the transformers model that it was: its body, its
output head and the rollouts of its present weights need nothing of peft. Adapters are float32 whatever the model's type, as
small learning rates are lost in bfloat16.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from esr_distill.config.lora import LoraSettings
from esr_distill.input_error import InputError
from esr_distill.models.generation_file import check_generation_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in the file, as peft has it


def has_adapter(model: PreTrainedModel) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


def add_adapter(model: PreTrainedModel, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and give the layers that `settings` name an adapter, which changes nothing yet.

    Raises:
        InputError: peft is not installed; a name that no layer has; the output head or the embeddings among the layers.
    """
    require_peft("model.lora.use_peft")
    from peft import LoraConfig

    names = settings.lora_target_modules
    if names != "all-linear":
        check_target_modules(model, names)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names if names == "all-linear" else list(names),
    )
    # Half of an adapter is drawn at random, by torch's own generator. manual_seed of torch would seed CUDA's too.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        inject(model, config)


def inject(model: PreTrainedModel, config) -> None:
    model.add_adapter(config)
    model.train(model.training)  # new modules, dropout among them, are in train mode
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def require_peft(option: str) -> None:
    if find_spec("peft") is None:
        raise InputError(f"{option} must be left out where the package peft is not installed (pip install peft)")


def check_target_modules(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Every name is that of linear layers inside the model's body: peft would go on without the others."""
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    layers: dict[str, list[bool]] = {}  # by last name: whether a matrix is applied, for each module of that name
    for name, module in model.named_modules():
        if module not in embeddings:
            weight = getattr(module, "weight", None)
            is_linear = isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)
            layers.setdefault(name.rsplit(".", 1)[-1], []).append(is_linear)
    known = sorted(name for name, are_linear in layers.items() if all(are_linear))
    for name in names:
        if name not in known:
            raise InputError(
                f"model.lora.lora_target_modules must be last names of linear layers of {type(model).__name__} "
                f"({', '.join(known)}), got {name!r}"
            )


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is its base model. Nothing is copied or merged."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors, which share the model's memory, by the names of the layers."""
    from peft import get_peft_model_state_dict

    # By default peft asks the hub whether embeddings have grown.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter, in peft's format, and the model's generation config."""
    (config,) = model.peft_config.values()
    config = copy.copy(config)
    config.inference_mode = True  # whoever loads it gets a frozen one unless asked otherwise
    config.save_pretrained(folder)
    weights = {PREFIX + name: tensor.contiguous() for name, tensor in adapter_weights(model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    model.generation_config.save_pretrained(folder)


def find_adapter(source: str) -> dict | None:
    """The adapter's config in a local folder or a hub repository, None where there is none."""
    if Path(source).exists():
        path = Path(source) / CONFIG_FILE
        path = path if path.is_file() else None
    else:
        try:
            path = find_adapter_config_file(source)
        except (OSError, ValueError):  # no such repository, which the loading of a model says better
            return None
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def load_frozen_adapter(model: PreTrainedModel, source: str, option: str) -> None:
    """Give the model the adapter of `source`, to be used and not trained.

    Raises:
        InputError: peft is not installed, or the adapter is none for this model.
    """
    require_peft(option)
    from peft import PeftConfig

    weights = read_weights(source, option)
    check_generation_file(source, option)
    try:
        with torch.random.fork_rng(devices=[]):
            inject(model, PeftConfig.from_pretrained(source))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{option} must hold an adapter for {type(model).__name__}, got {source!r} ({error})"
        ) from error
    copy_weights(model, weights, source, option)
    model.requires_grad_(False)
    # Who was trained to stop at other ids than the base model says so beside the adapter; adapters of others often say nothing.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(source)


def load_trained_adapter(model: PreTrainedModel, settings: LoraSettings, source: str, option: str) -> None:
    """Put the weights of a saved adapter into the one that `add_adapter` made.

    Raises:
        InputError: there is none, or it is another function of its weights than `settings` say.
    """
    saved = find_adapter(source)
    if saved is None:
        raise InputError(f"{option} must hold an adapter ({CONFIG_FILE}), got {source!r}, which has none")
    plain = {"peft_type": "LORA", "r": settings.lora_r, "lora_alpha": settings.lora_alpha}
    variants = dict.fromkeys(("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"))
    for name, wanted in (plain | variants).items():
        value = saved.get(name)
        if value != wanted and (wanted is not None or value):
            must_be = "unset or false" if wanted is None else f"{wanted!r}"
            raise InputError(f"{option} must hold an adapter whose {name} is {must_be}, got {value!r} in {source!r}")
    copy_weights(model, read_weights(source, option), source, option)


def read_weights(source: str, option: str) -> dict[str, Tensor]:
    """From safetensors: a pickle (adapter_model.bin) can run code when it is read."""
    try:
        return load_file(cached_file(source, WEIGHTS_FILE))
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{option} must hold {WEIGHTS_FILE}, got {source!r} ({first_line})") from error


@torch.no_grad()
def copy_weights(model: PreTrainedModel, weights: dict[str, Tensor], source: str, option: str) -> None:
    """All tensors of the model's adapter, neither more nor less."""
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    own = adapter_weights(model)
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (own, weights)]
    different = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
    if different:
        name = different[0][0]
        raise InputError(
            f"{option} must hold the adapter of the layers and the rank that are set, got {source!r}, where {name} is "
            f"{shapes[1].get(name, 'missing')} and must be {shapes[0].get(name, 'left out')}"
        )
    for name, tensor in own.items():
        if not torch.isfinite(weights[name]).all():
            raise InputError(f"{option} must have finite weights, got NaN or infinity in {name}")
        tensor.copy_(weights[name])
