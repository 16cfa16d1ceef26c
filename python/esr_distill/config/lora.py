"""Adapters in place of whole weights."""

from dataclasses import dataclass, fields
from typing import Literal

from esr_distill.config.require import require

PAPER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters on a frozen student (LoRA, through the package peft). The names are those of peft and TRL, the defaults
    those of the paper (arXiv 2605.27028). Adapters are float32 whatever the base model's type.

    Args:
        use_peft: Train an adapter and leave the student's own weights as they are; false trains all weights.
        lora_r: Rank of each adapter.
        lora_alpha: The adapter's product is scaled by lora_alpha / lora_r.
        lora_dropout: Dropout of the adapter's input in the training forward; rollouts and evaluation have none.
        lora_target_modules: Last names of the layers with an adapter, or all-linear for all but the output head.
        start_from: Hub id or local folder of an adapter of the same shape from which training goes on; unset starts a new one,
            which changes nothing at first.
        load_in_4bit: Keep the student's own linear layers in 4 bits (QLoRA: nf4 with nested quantisation, through the package
            bitsandbytes). They compute in model.dtype. Needs a CUDA device; not run on one yet.
    """

    use_peft: bool = False
    lora_r: int = 32
    lora_alpha: float = 64
    lora_dropout: float = 0.05
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = PAPER_TARGETS
    start_from: str | None = None
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        require(self.lora_r >= 1, "model.lora.lora_r", ">= 1", self.lora_r)
        require(self.lora_alpha > 0, "model.lora.lora_alpha", "> 0", self.lora_alpha)
        require(0 <= self.lora_dropout < 1, "model.lora.lora_dropout", "in [0, 1)", self.lora_dropout)
        names = self.lora_target_modules
        is_named = names == "all-linear" or (len(names) > 0 and all(names))
        require(is_named, "model.lora.lora_target_modules", "all-linear or at least one name", names)
        if not self.use_peft:
            for field in fields(self):
                value = getattr(self, field.name)
                must_be = f"{field.default!r} or unset unless model.lora.use_peft is true"
                require(value == field.default, f"model.lora.{field.name}", must_be, value)

    @property
    def has_dropout(self) -> bool:
        return self.use_peft and self.lora_dropout > 0
