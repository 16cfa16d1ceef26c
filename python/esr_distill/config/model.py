"""The two models."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.require import require


@dataclass(frozen=True)
class ModelConfig:
    """The two models.

    Args:
        student: Hub id or local folder of the model that is trained.
        teacher: Hub id or local folder of the frozen model that scores; same tokenizer.
        dtype: Floating-point type of the student's weights. Small learning rates are lost in bfloat16 weights; prefer
            float32 with autocast.
        teacher_dtype: Floating-point type of the teacher's weights.
        autocast: Run the float32 student under bfloat16 autocast.
        attn_implementation: Attention of both models, by transformers' name; auto is flash_attention_2 where flash-attn is
            installed and both models run in 16 bits on a CUDA device, else sdpa. What was chosen is printed.
        device: Where both models live; auto takes CUDA when there is one.
    """

    student: str = ""
    teacher: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool = False
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        require(bool(self.student), "model.student", "a hub id or a local folder", self.student)
        require(bool(self.teacher), "model.teacher", "a hub id or a local folder", self.teacher)
        require(
            not (self.autocast and self.dtype != "float32"),
            "model.autocast",
            "false unless model.dtype is float32",
            True,
        )
        require(
            self.attn_implementation != "flash_attention_2" or self.is_in_16_bits,
            "model.attn_implementation",
            "auto, sdpa or eager unless both models run in bfloat16 (model.teacher_dtype, and model.dtype or model.autocast)",
            self.attn_implementation,
        )

    @property
    def is_in_16_bits(self) -> bool:
        """Whether both models compute in bfloat16."""
        return (self.autocast or self.dtype == "bfloat16") and self.teacher_dtype == "bfloat16"
