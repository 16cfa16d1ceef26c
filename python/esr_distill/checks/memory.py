"""How much of the device's memory a run would take, stage by stage: an estimate, from what is loaded and a small forward.

It is that of one process of the planned launch, with its part of the rollouts and, where the config says so, its shards. Counted
are weights, gradients, both moments, the teacher, the KV cache, what a forward keeps for backward (measured on a few tokens and
taken to grow with their number), hidden states and the workspace of the divergence. Logits of all positions are never there. The
parts of a stage are added up, although some of them follow each other. Not counted are loading, evaluation, the CUDA context,
captured graphs and fragmentation.
"""

from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch import Tensor

from esr_distill.checks.finding import Finding
from esr_distill.checks.planned_launch import ONE_PROCESS, PlannedLaunch
from esr_distill.checks.weight_memory import GatheredParts, own_bytes
from esr_distill.hidden_states import last_hidden_states
from esr_distill.models.teacher import OffloadedTeacher
from esr_distill.monitoring.teacher_rank import LOGITS_AT_A_TIME
from esr_distill.packed_attention import Packing, packing_of
from esr_distill.prompts import PromptStream, pad_prompts
from esr_distill.rollout import RolloutBatch
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.rollout.prefill import prefill
from esr_distill.training_run import TrainingRun

GIB = 2**30
WORKSPACE_SHARE = 16  # linear_divergence may hold this part of a CUDA device's memory
# Of size (N, V) in float32, about so many of which the plain reference holds at its peak.
REFERENCE_TENSORS = 14
RANK_TENSORS = 4  # the same of the teacher's ranks
LOGIT_BYTES = 12  # two logits in float32 and a kept gradient in float32, at most
SMALL_SHARE = 0.9  # of the memory: above it the estimate is too near to be relied on
FORWARD_TOKENS = (16, 48)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by stage and part.

    Attributes:
        stages: what is there at the same time: rollout, update (forwards, divergence, backward), optimizer; probe where there is
            one, saving with shards.
    """

    stages: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def peaks(self) -> dict[str, int]:
        """Sum of the parts of each stage."""
        return {name: sum(parts.values()) for name, parts in self.stages.items()}

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


def estimate_memory(run: TrainingRun, launch: PlannedLaunch = ONE_PROCESS) -> MemoryEstimate:
    """All stages of a step of one process, with the longest prompts in its rows, of the probe where there is one, and of saving
    where what is in shards becomes whole for it."""
    config, student, teacher = run.config, run.student, run.teacher
    rollout = config.rollout
    rows = rollout.batch_size // launch.processes
    width = run.prompts.longest + rollout.horizon
    at_once = rows // config.optimizer.accumulation_steps
    scored = at_once * min(rollout.horizon, config.trained_tokens)
    read, read_by_teacher = tokens_read(run, student, at_once), tokens_read(run, teacher, at_once)
    trained = own_bytes((p for p in student.parameters() if p.requires_grad), launch, launch.is_student_sharded)
    teacher_bytes = own_bytes(teacher.parameters(), launch, launch.is_teacher_sharded)
    if config.model.is_teacher_base:
        teacher_bytes = 0
    waits = teacher_bytes if isinstance(teacher, OffloadedTeacher) else 0
    per_token, once = forward_bytes(run)
    if config.model.gradient_checkpointing:
        layers = student.config.get_text_config().num_hidden_layers
        per_token = per_token // layers + layers * hidden_bytes(run, student)
    cache = cache_bytes_per_token(run) if rollout.backend == "inprocess" else 0
    always = {
        "student weights": own_bytes(student.parameters(), launch, launch.is_student_sharded),
        "teacher weights": teacher_bytes - waits,
        "moments": 2 * trained,
        "KV cache": rows * width * cache,  # the engine keeps its cache for the next step
    }
    gathered = GatheredParts.of(run, launch)
    # the model's and a float32 copy; transformers' generate keeps those of all steps
    logits = 8 * rows * width_of(student) * (rollout.horizon if rollout.backend == "hf_generate" else 1)
    stages = {
        "rollout": always | gathered.student | {"logits that are drawn from": logits},
        "update": always
        | gathered.teacher
        | gathered.update
        | {
            "gradients": trained,
            "kept for backward": read * per_token + once,
            "teacher's forward": waits + read_by_teacher * forward_only_bytes(run, teacher),
            "hidden states": (read + scored) * hidden_bytes(run, student)
            + (read_by_teacher + scored) * hidden_bytes(run, teacher),
            "divergence": workspace_bytes(run, scored),
        },
        "optimizer": always | {"gradients": trained, "temporary": trained},
    }
    settings = config.monitoring
    if settings.probe_every is not None:
        length = run.prompts.longest + settings.probe_tokens
        answers = min(rows, -(-settings.probe_prompts // launch.processes))
        stages["probe"] = (
            always
            | gathered.student
            | gathered.teacher
            | {
                "KV cache of the probe": answers * length * cache,
                "forwards of one answer": waits
                + length * (forward_only_bytes(run, student) + forward_only_bytes(run, teacher)),
                "divergence": max(workspace_bytes(run, settings.probe_tokens), rank_bytes(run, settings.probe_tokens)),
            }
        )
    if launch.is_student_sharded:
        stages["saving"] = always | gathered.student | gathered.moments
    return MemoryEstimate(stages)


def tokens_read(run: TrainingRun, model, rows: int) -> int:
    """Tokens that a model reads in one forward of so many rows, at most: padded rows are all as long as the longest, packed ones
    have the longest prompts once each before any comes again."""
    rollout, prompts = run.config.rollout, run.prompts
    if packing_of(model) is Packing.NONE or isinstance(prompts, PromptStream):
        return rows * (prompts.longest + rollout.horizon)
    longest_first = cycle(sorted(prompts.lengths, reverse=True))
    drawn = sum(islice(longest_first, rows // rollout.samples_per_prompt))
    return drawn * rollout.samples_per_prompt + rows * rollout.horizon


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


def rank_bytes(run: TrainingRun, scored: int) -> int:
    """What the ranks of so many tokens hold, after their divergence: some rows of logits, and a head in float32."""
    heads = [model.get_output_embeddings().weight for model in (run.student, run.teacher)]
    logits = min(LOGITS_AT_A_TIME, scored * max(len(head) for head in heads))
    return RANK_TENSORS * logits * 4 + max(0 if head.dtype == torch.float32 else head.numel() * 4 for head in heads)


@torch.no_grad()
def cache_bytes_per_token(run: TrainingRun) -> int:
    """Keys and values of one token in all layers, in the type that attention takes, from a prefill of one prompt."""
    batch = pad_prompts(run.prompts.first(1), [0], request_ids=[0])
    with eval_mode(run.student), run.autocast():
        _, tensors = prefill(run.student, batch)
    return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in tensors for t in pair)


def forward_bytes(run: TrainingRun) -> tuple[int, int]:
    """What the student's forward keeps for backward: bytes a token, and bytes for any number of tokens (copies of weights that
    autocast makes, of all weights with shards too). Two forwards of other lengths, in eval mode: no layer is computed again.

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


def memory_finding(run: TrainingRun, estimate: MemoryEstimate, launch: PlannedLaunch = ONE_PROCESS) -> Finding:
    """The estimate against what the device has, where it is a CUDA device, and what was left out of it."""
    peaks = estimate.peaks
    worst = max(peaks, key=peaks.get)
    values = {
        "stages": estimate.stages,
        "peaks": peaks,
        "is_estimate": True,
        "processes": launch.processes,
        "shard": launch.options.shard,
    }
    found = ", ".join(f"{name} {peak / GIB:.2f} GiB" for name, peak in peaks.items())
    message = f"an estimate for {launch.describe()}: {found}; not counted: {', '.join(left_out(run))}"
    if run.device.type != "cuda":
        message += f"; no CUDA device to compare with; the divergence is counted as the {run.device.type} takes it"
        return Finding("memory", "ok", message, values=values)
    if launch.processes > 1:
        message += "; whether the other processes' devices are like this one cannot be known here"
    free, total = torch.cuda.mem_get_info(run.device)
    available = free + torch.cuda.memory_reserved(run.device)  # what this check itself has is there for the run
    return compare_memory(message, worst, peaks[worst], available, values | {"available": available, "total": total})


def left_out(run: TrainingRun) -> list[str]:
    """In words."""
    found = ["loading", "evaluation"]
    is_packed = any(packing_of(model) is not Packing.NONE for model in (run.student, run.teacher))
    if is_packed and isinstance(run.prompts, PromptStream):
        found.append("what packing saves (how long the prompts of a stream will be cannot be known)")
    return found


def compare_memory(message: str, worst: str, peak: int, available: int, values: dict) -> Finding:
    """Whether `peak` bytes, in the stage `worst`, go into `available` ones."""
    message += f"; of {available / GIB:.2f} GiB that are free"
    fix = (
        f"lower rollout.batch_size or rollout.horizon, or set model.gradient_checkpointing, model.lora.use_peft, "
        f"model.teacher_offload, a 16-bit model.teacher_dtype or, with several processes, devices.shard (most is wanted in the "
        f"stage {worst})"
    )
    if peak > available:
        return Finding("memory", "error", message, fix, values)
    if peak > SMALL_SHARE * available:
        return Finding("memory", "warning", f"{message}, with little to spare", fix, values)
    return Finding("memory", "ok", message, values=values)
