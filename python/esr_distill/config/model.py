"""The two models."""

from dataclasses import dataclass, field
from typing import Literal

from esr_distill.config.lora import LoraSettings
from esr_distill.config.require import require

SELF = "self"


@dataclass(frozen=True)
class ModelConfig:
    """The two models.

    That the teacher is the student's own base model is a value of `teacher` and not an option beside it: two options could
    contradict each other, and one of them would then not be read. A folder of the name self is ./self.

    Args:
        student: Hub id or local folder of the model that is trained. Weights are read from safetensors only.
        teacher: Hub id or local folder of the frozen model that scores; same tokenizer. self is the student without its adapter
            (model.lora), in the same memory.
        dtype: Floating-point type of the student's weights. Small learning rates are lost in bfloat16 weights; prefer
            float32 with autocast, or an adapter, which is float32 in any case.
        teacher_dtype: Floating-point type of the teacher's weights.
        autocast: Run the float32 student under bfloat16 autocast.
        attn_implementation: Attention of both models, by transformers' name; auto is flash_attention_2 where flash-attn is
            installed and both models run in 16 bits on a CUDA device, else sdpa. What was chosen is printed.
        packing: How rollouts lie in the student's training forward and the teacher's. none pads them to the longest; varlen and
            flash put them one behind the other without padding, through PyTorch's varlen_attn or, with flash_attention_2,
            flash-attn's. auto is flash where flash_attention_2 was chosen, varlen for sdpa where both models run in 16 bits on a
            CUDA device, else none, and none for a model that cannot be packed. What was chosen is printed. The
            default is none for as long as neither kernel has been run on a GPU.
        device: Where both models live; auto takes CUDA when there is one.
        lora: Train an adapter in place of all weights.
        gradient_checkpointing: Keep only the inputs of the student's layers between forward and backward and compute the rest
            again: less memory, one more forward.
        teacher_offload: Keep the teacher in the CPU's memory and have it on the device only while it scores. Needs a CUDA device.
        student_gguf_file: Name of a GGUF file in model.student, from which weights and tokenizer are read (package gguf).
        teacher_gguf_file: The same for model.teacher.
        trust_remote_code: Run Python code that comes with the models. Read it first.
    """

    student: str = ""
    teacher: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool = False
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    packing: Literal["auto", "none", "varlen", "flash"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    lora: LoraSettings = field(default_factory=LoraSettings)
    gradient_checkpointing: bool = False
    teacher_offload: bool = False
    student_gguf_file: str | None = None
    teacher_gguf_file: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(bool(self.student), "model.student", "a hub id or a local folder", self.student)
        require(bool(self.teacher), "model.teacher", "a hub id, a local folder or self", self.teacher)
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
        require(self.student != SELF, "model.student", "a hub id or a local folder (./self is one)", self.student)
        if self.is_teacher_base:
            require(self.lora.use_peft, "model.teacher", "another model unless model.lora.use_peft is true", SELF)
            same = f"model.dtype = {self.dtype} for model.teacher self"
            require(self.teacher_dtype == self.dtype, "model.teacher_dtype", same, self.teacher_dtype)
            must_be = "unset for model.teacher self"
            require(self.teacher_gguf_file is None, "model.teacher_gguf_file", must_be, self.teacher_gguf_file)
            require(not self.teacher_offload, "model.teacher_offload", "false for model.teacher self", True)
        for name in ("student_gguf_file", "teacher_gguf_file"):
            value = getattr(self, name)
            require(value != "", f"model.{name}", "the name of a file or unset", value)
        is_packed = self.lora.load_in_4bit and self.student_gguf_file is not None
        require(not is_packed, "model.lora.load_in_4bit", "false for a student out of a GGUF file", True)

    @property
    def is_in_16_bits(self) -> bool:
        """Whether both models compute in bfloat16."""
        return (self.autocast or self.dtype == "bfloat16") and self.teacher_dtype == "bfloat16"

    @property
    def is_teacher_base(self) -> bool:
        """Whether the student without its adapter is the teacher."""
        return self.teacher == SELF

    @property
    def trains_in_train_mode(self) -> bool:
        """Whether the training forward needs modules in train mode: an adapter's dropout, or layers that are computed again."""
        return self.gradient_checkpointing or self.lora.has_dropout
