"""Student and teacher of a run: loaded as the config says, fitted with an adapter, checked against each other."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.config import ModelConfig, TrainConfig
from esr_distill.devices import Devices
from esr_distill.devices.sharded_loading import load_in_shards
from esr_distill.devices.sharding import is_sharded
from esr_distill.hidden_states import check_output_head, pack_rows
from esr_distill.input_error import InputError
from esr_distill.models import choose_attention, load_model, load_tokenizer
from esr_distill.models.adapters import add_adapter, has_adapter, load_trained_adapter
from esr_distill.models.teacher import AdapterFreeTeacher, OffloadedTeacher, Teacher, on_device
from esr_distill.models.train_mode import enable_gradient_checkpointing, switch_off_dropout
from esr_distill.packed_attention import choose_packing


@dataclass(frozen=True)
class ModelPair:
    """A student in eval mode, the teacher that scores it, their tokenizers (one vocabulary, maybe two chat templates), the
    attention of both, and how each lays out its rows, in words."""

    student: PreTrainedModel
    teacher: PreTrainedModel | Teacher
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    attention: str
    rows: str

    def describe(self, config: ModelConfig) -> str:
        """Both models in words, for the log."""
        trained = sum(parameter.numel() for parameter in self.student.parameters() if parameter.requires_grad)
        count = self.student.num_parameters() - (trained if config.lora.use_peft else 0)
        dtype = "4 bits" if config.lora.load_in_4bit else config.dtype
        student = f"student {config.student} ({_millions(count)} parameters, {dtype}"
        if config.lora.use_peft:
            student += f"; trained: {_millions(trained)} of an adapter of rank {config.lora.lora_r}"
        if config.is_teacher_base:
            return f"{student}), teacher: the student without its adapter"
        parameters = sum(parameter.numel() for parameter in self.teacher.parameters())
        place = ", in the CPU's memory while it does not score" if config.teacher_offload else ""
        return f"{student}), teacher {config.teacher} ({_millions(parameters)}, {config.teacher_dtype}{place})"


def student_autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """Where the student runs: under bfloat16 autocast if `model.autocast` asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.model.autocast)


def load_pair(config: TrainConfig, devices: Devices, checkpoint: str | None = None) -> ModelPair:
    """Load and check both models. `checkpoint` has the student's weights, or its adapter's, from where the run goes on.

    The student is whole in every process; a teacher that `devices.shard` names is in shards already.

    Raises:
        InputError: a model that cannot be used, or two that do not belong together.
    """
    settings, device = config.model, devices.device
    tokenizer = load_tokenizer(
        settings.student,
        "model.student",
        gguf_file=settings.student_gguf_file,
        trust_remote_code=settings.trust_remote_code,
    )
    theirs = tokenizer
    if not settings.is_teacher_base:
        theirs = load_tokenizer(
            settings.teacher,
            "model.teacher",
            gguf_file=settings.teacher_gguf_file,
            trust_remote_code=settings.trust_remote_code,
        )
        preflight.check_tokenizer_pair(tokenizer, theirs)
    attention = choose_attention(settings.attn_implementation, device, is_in_16_bits=settings.is_in_16_bits)
    packing = choose_packing(settings.packing, attention, device, is_in_16_bits=settings.is_in_16_bits)
    student = load_student(config, attention, device, checkpoint)
    if settings.is_teacher_base:
        teacher = student
    elif config.devices.shard == "both":
        teacher = load_sharded_teacher(settings, attention, devices)
    else:
        teacher = load_teacher(settings, attention, device)
    preflight.check_vocab_sizes(student, teacher, config)
    preflight.check_token_ids(tokenizer, student, teacher, config)
    with student_autocast(config, device):
        check_output_head(student, "model.student")
        rows = pack_rows(student, packing, "model.student", or_pad=settings.packing == "auto")
    if settings.is_teacher_base:
        return ModelPair(student, AdapterFreeTeacher(student), tokenizer, theirs, attention, rows)
    with on_device(teacher.parameters() if settings.teacher_offload else (), device):
        if not is_sharded(teacher):
            check_output_head(teacher, "model.teacher")
        teacher_rows = pack_rows(teacher, packing, "model.teacher", or_pad=settings.packing == "auto")
    return ModelPair(
        student,
        OffloadedTeacher(teacher, device) if settings.teacher_offload else teacher,
        tokenizer,
        theirs,
        attention,
        rows if rows == teacher_rows else f"student {rows}, teacher {teacher_rows}",
    )


def load_student(
    config: TrainConfig, attention: str, device: torch.device, checkpoint: str | None = None
) -> PreTrainedModel:
    """The model that is trained, in eval mode, with the adapter and the gradient checkpointing that the config asks for."""
    settings, lora = config.model, config.model.lora
    is_whole = checkpoint is not None and not lora.use_peft
    student = load_model(
        checkpoint if is_whole else settings.student,
        "model.student",
        dtype=settings.dtype,
        attn_implementation=attention,
        device=device,
        gguf_file=None if is_whole else settings.student_gguf_file,
        trust_remote_code=settings.trust_remote_code,
        in_4_bit=lora.load_in_4bit,
    )
    if has_adapter(student):
        raise InputError(
            f"model.student must be a whole model, got {settings.student!r}, which holds an adapter; set model.student to the "
            "adapter's base model, and model.lora.start_from to the adapter to go on with it"
        )
    if settings.trains_in_train_mode:
        switch_off_dropout(student)
    if lora.use_peft:
        add_adapter(student, lora, config.run.seed)
        if checkpoint is not None:
            load_trained_adapter(student, lora, checkpoint, "the checkpoint")
        elif lora.start_from is not None:
            load_trained_adapter(student, lora, lora.start_from, "model.lora.start_from")
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(student)
    return student


def load_teacher(settings: ModelConfig, attention: str, device: torch.device) -> PreTrainedModel:
    """The frozen model that scores, on the device, or on the CPU where it is to be offloaded."""
    if settings.teacher_offload:
        teacher = read_teacher(settings, on_cpu(attention), torch.device("cpu"))
        teacher.set_attn_implementation(attention)
        return teacher
    return read_teacher(settings, attention, device)


def load_sharded_teacher(settings: ModelConfig, attention: str, devices: Devices) -> PreTrainedModel:
    """The frozen model that scores, in shards. Its head is checked where it is whole."""

    def load() -> PreTrainedModel:
        teacher = read_teacher(settings, on_cpu(attention), torch.device("cpu"))
        check_output_head(teacher, "model.teacher")
        teacher.set_attn_implementation(attention)
        return teacher

    return load_in_shards(load, devices, "model.teacher")


def on_cpu(attention: str) -> str:
    """The attention to load a model with that is to run elsewhere: its own one may need a GPU to be there."""
    return attention if attention == "eager" else "sdpa"


def read_teacher(settings: ModelConfig, attention: str, device: torch.device) -> PreTrainedModel:
    teacher = load_model(
        settings.teacher,
        "model.teacher",
        dtype=settings.teacher_dtype,
        attn_implementation=attention,
        device=device,
        gguf_file=settings.teacher_gguf_file,
        trust_remote_code=settings.trust_remote_code,
    )
    return teacher.requires_grad_(False)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"
