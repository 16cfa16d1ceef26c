"""The student's training forward in train mode, where an adapter's dropout or gradient checkpointing needs it.

Rollouts and evaluation are drawn in eval mode, whoever draws them. A student without an adapter's dropout and without gradient
checkpointing is in eval mode throughout. In train mode the dropout of the model itself stays off: it would make the policy that
trains another one than the policy that wrote the rollout, by far more than an adapter's dropout does.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from esr_distill.input_error import InputError
from esr_distill.rollout.eval_mode import eval_mode


def switch_off_dropout(model: PreTrainedModel) -> None:
    """Make train mode compute what eval mode does. Call it before an adapter is added, whose dropout is wanted.

    The model's config, which is saved, keeps its numbers.

    Raises:
        InputError: the model's train mode differs by something else.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # transformers' attention and layer drop read a number of their module
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    check_train_mode(model)


@torch.no_grad()
def check_train_mode(model: PreTrainedModel) -> None:
    ids_1_T = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    with eval_mode(model):
        in_eval_mode_1_T_D = model.base_model(input_ids=ids_1_T, use_cache=False).last_hidden_state
        model.train()
        in_train_mode_1_T_D = model.base_model(input_ids=ids_1_T, use_cache=False).last_hidden_state
    if not torch.allclose(in_train_mode_1_T_D, in_eval_mode_1_T_D, rtol=1e-3, atol=1e-5):
        difference = (in_train_mode_1_T_D - in_eval_mode_1_T_D).abs().max().item()
        raise InputError(
            "model.gradient_checkpointing and model.lora.lora_dropout must be off for a student that computes something else in "
            f"train mode, got {type(model).__name__}, whose hidden states differ by {difference:.3g}"
        )


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Layers keep their input alone for backward, in train mode; in eval mode, and so in rollouts, nothing changes.

    Raises:
        InputError: the model has no such layers.
    """
    # transformers renamed it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"model.gradient_checkpointing must be false for {type(model).__name__} ({error})") from None
    # Set for the reentrant kind: with a frozen embedding it would only cost a gradient that nobody asks for.
    model.disable_input_require_grads()


def seed_dropout(seed: int, rank: int = 0) -> None:
    """Masks of dropout come from torch's own generators, whose states checkpoints keep. Each process has masks of its own."""
    torch.manual_seed((seed + rank) % 2**64)  # of which torch takes 64 bits
