"""How much of the device's memory a run would take, stage by stage: an estimate, from what is loaded and a small forward.

Counted are weights, gradients, both moments, the teacher, the KV cache, what a forward keeps for backward (measured on a few
tokens and taken to grow with their number), hidden states and the workspace of the divergence. Logits of all positions are never
there. Not counted are the CUDA context, captured graphs and fragmentation. It is that of one process that does all of a step:
what several processes share is not taken off.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from esr_distill.checks.finding import Finding
from esr_distill.hidden_states import last_hidden_states
from esr_distill.models.teacher import OffloadedTeacher
from esr_distill.prompts import pad_prompts
from esr_distill.rollout import RolloutBatch
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.prefill import prefill
from esr_distill.training_run import TrainingRun

GIB = 2**30
WORKSPACE_SHARE = 16  # linear_divergence may hold this part of a CUDA device's memory
# Of size (N, V) in float32, about so many of which the plain reference holds at its peak.
REFERENCE_TENSORS = 14
LOGIT_BYTES = 12  # two logits in float32 and a kept gradient in float32, at most
SMALL_SHARE = 0.9  # of the memory: above it the estimate is too near to be relied on
FORWARD_TOKENS = (16, 48)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by stage and part.

    Attributes:
        stages: what is there at the same time: rollout, update (forwards, divergence, backward), optimizer, probe.
    """

    stages: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peaks(self) -> dict[str, int]:
        """Sum of the parts of each stage."""
        return {name: sum(parts.values()) for name, parts in self.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def weight_bytes(parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def estimate_memory(run: TrainingRun) -> MemoryEstimate:
    """All stages of a step with the longest prompt in every row, and of the probe where there is one."""
    config, student, teacher = run.config, run.student, run.teacher
    rollout = config.rollout
    rows, longest = rollout.batch_size, run.prompts.longest
    tokens = longest + rollout.horizon
    at_once = rows // config.optimizer.accumulation_steps
    scored = at_once * min(rollout.horizon, config.trained_tokens)
    trained = weight_bytes(parameter for parameter in student.parameters() if parameter.requires_grad)
    teacher_bytes = 0 if config.model.is_teacher_base else weight_bytes(teacher.parameters())
    waits = teacher_bytes if isinstance(teacher, OffloadedTeacher) else 0
    always = {
        "student weights": weight_bytes(student.parameters()),
        "teacher weights": teacher_bytes - waits,
        "moments": 2 * trained,
    }
    per_token, once = forward_bytes(run)
    if config.model.gradient_checkpointing:
        layers = student.config.get_text_config().num_hidden_layers
        per_token = per_token // layers + layers * hidden_bytes(run, student)
    cache = cache_bytes_per_token(run) if rollout.backend == "inprocess" else 0
    kept = {"KV cache": rows * tokens * cache}  # the engine keeps its cache for the next step
    # the model's and a float32 copy; transformers' generate keeps those of all steps
    logits = 8 * rows * width_of(student) * (rollout.horizon if rollout.backend == "hf_generate" else 1)
    stages = {
        "rollout": always | kept | {"logits that are drawn from": logits},
        "update": always
        | kept
        | {
            "gradients": trained,
            "kept for backward": at_once * tokens * per_token + once,
            "teacher's forward": waits + at_once * tokens * forward_only_bytes(run, teacher),
            "hidden states": (at_once * tokens + scored) * (hidden_bytes(run, student) + hidden_bytes(run, teacher)),
            "divergence": workspace_bytes(run, scored),
        },
        "optimizer": always | kept | {"gradients": trained, "temporary": trained},
    }
    settings = config.monitoring
    if settings.probe_every is not None:
        length = longest + settings.probe_tokens
        answers = min(rows, settings.probe_prompts)
        stages["probe"] = (
            always
            | kept
            | {
                "KV cache of the probe": answers * length * cache,
                "forwards of one answer": waits
                + length * (forward_only_bytes(run, student) + forward_only_bytes(run, teacher)),
                "divergence": workspace_bytes(run, settings.probe_tokens),
            }
        )
    return MemoryEstimate(stages)


def width_of(model) -> int:
    return model.get_output_embeddings().weight.shape[0]


def hidden_bytes(run: TrainingRun, model) -> int:
    """One hidden state, in the type in which the model computes."""
    size = 2 if run.config.model.autocast and model is run.student else next(model.parameters()).element_size()
    return model.config.get_text_config().hidden_size * max(size, 2)


def forward_only_bytes(run: TrainingRun, model) -> int:
    """Of one token, without gradient: two hidden states, and three tensors of the MLP's width at its widest moment."""
    config, hidden = model.config.get_text_config(), hidden_bytes(run, model)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 2 * hidden + 3 * width * hidden // config.hidden_size


def workspace_bytes(run: TrainingRun, scored: int) -> int:
    """What the divergence of `scored` positions holds, with the gradient of a head that trains in float32."""
    width = min(width_of(run.student), width_of(run.teacher))
    if run.device.type != "cuda":
        return REFERENCE_TENSORS * scored * width * 4
    head = run.student.get_output_embeddings().weight
    total = torch.cuda.get_device_properties(run.device).total_memory
    return min(total // WORKSPACE_SHARE, scored * width * LOGIT_BYTES) + (head.numel() * 4 if head.requires_grad else 0)


@torch.no_grad()
def cache_bytes_per_token(run: TrainingRun) -> int:
    """Keys and values of one token in all layers, in the type that attention takes, from a prefill of one prompt."""
    batch = pad_prompts(run.prompts.first(1), [0], request_ids=[0])
    with eval_mode(run.student), run.autocast():
        _, tensors = prefill(run.student, batch)
    return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in tensors for t in pair)


def forward_bytes(run: TrainingRun) -> tuple[int, int]:
    """What the student's forward keeps for backward: bytes a token, and bytes for any number of tokens (copies of weights that
    autocast makes). Two forwards of different lengths, in eval mode, where no layer is computed again.

    On a device other than the one that will train, attention may keep other tensors.
    """
    limit = getattr(run.student.config.get_text_config(), "max_position_embeddings", None) or FORWARD_TOKENS[1]
    long = min(FORWARD_TOKENS[1], limit)
    short = max(1, long // 3)
    if long == short:
        return 0, 0
    few, many = (kept_for_backward(run, count) for count in (short, long))
    per_token = max(0, (many - few) // (long - short))
    return per_token, max(0, few - short * per_token)


def kept_for_backward(run: TrainingRun, count: int) -> int:
    """Bytes of the tensors that a forward of one row of `count` tokens saves, without weights and buffers; each storage once."""
    student, device = run.student, run.device
    ids_1_T = torch.arange(count, device=device)[None] % width_of(student)
    mask_1_T = torch.ones_like(ids_1_T)
    length_1, none_1_K = torch.tensor([1], device=device), torch.zeros(1, 1, device=device)
    rollouts = RolloutBatch(ids_1_T, mask_1_T, count - 1, length_1, length_1 > 1, none_1_K, none_1_K)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*student.parameters(), *student.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        eval_mode(student),
        torch.enable_grad(),
        run.autocast(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        states = last_hidden_states(student, rollouts)
        total = sum(kept.values())
        del states
    return total


def memory_finding(run: TrainingRun, estimate: MemoryEstimate) -> Finding:
    """The estimate against what the device has, where it is a CUDA device."""
    peaks = estimate.peaks
    worst = max(peaks, key=peaks.get)
    values = {"stages": estimate.stages, "peaks": peaks, "is_estimate": True}
    message = "an estimate: " + ", ".join(f"{name} {peak / GIB:.2f} GiB" for name, peak in peaks.items())
    if run.device.type != "cuda":
        return Finding("memory", "ok", f"{message}; no CUDA device to compare with", values=values)
    free, total = torch.cuda.mem_get_info(run.device)
    available = free + torch.cuda.memory_reserved(run.device)  # what this check itself has is there for the run
    return compare_memory(message, worst, peaks[worst], available, values | {"available": available, "total": total})


def compare_memory(message: str, worst: str, peak: int, available: int, values: dict) -> Finding:
    """Whether `peak` bytes, in the stage `worst`, go into `available` ones."""
    message += f"; of {available / GIB:.2f} GiB that are free"
    fix = (
        f"lower rollout.batch_size or rollout.horizon, or set model.gradient_checkpointing, model.lora.use_peft, "
        f"model.teacher_offload or a 16-bit model.teacher_dtype (most is wanted in the stage {worst})"
    )
    if peak > available:
        return Finding("memory", "error", message, fix, values)
    if peak > SMALL_SHARE * available:
        return Finding("memory", "warning", f"{message}, with little to spare", fix, values)
    return Finding("memory", "ok", message, values=values)
