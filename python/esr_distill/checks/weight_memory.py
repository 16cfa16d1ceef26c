"""What one process holds of a model's weights, in bytes: all of them, or a shard and, for a time, what it gathers.

As `devices/sharding.py` divides them: every weight by its first dimension; layer by layer, with the rest of the body (embeddings,
last norm) as one more group; the output head apart.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from esr_distill.checks.planned_launch import PlannedLaunch
from esr_distill.devices.sharding import layers_of
from esr_distill.training_run import TrainingRun

# While one group is used, the next one's weights are on their way, or the last one's gradients.
AT_A_TIME = 2


@dataclass(frozen=True)
class GatheredWeights:
    """What is whole for a time of a model that each process has a shard of.

    Attributes:
        all: every weight, to draw or to save.
        layers: the most that is whole between the beginning of a forward and the end of a backward.
        gradients_in_sum: gradients of whole groups, until they are summed and in shards: those of the largest group, and the
            copy that is sent.
        head: the output head, whole while the divergence is taken and until backward is through.
    """

    all: int
    layers: int
    gradients_in_sum: int
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel, *, stays: bool = False) -> "GatheredWeights":
        """`stays` is for a body whose gathered weights are kept from forward to backward."""
        body, head = model.base_model, model.get_output_embeddings()
        layers = sorted(weight_bytes(layer.parameters()) for layer in layers_of(body))
        all_of_body = weight_bytes(body.parameters())
        rest = all_of_body - sum(layers)
        return cls(
            all=weight_bytes(model.parameters()),
            layers=all_of_body if stays else rest + sum(layers[-AT_A_TIME:]),
            gradients_in_sum=AT_A_TIME * max([rest, *layers]),
            head=weight_bytes(head.parameters()),
        )


@dataclass(frozen=True)
class GatheredParts:
    """What is whole for a time although it is in shards, by part; nothing of a model that is not.

    Attributes:
        student: while rollouts are drawn, probed or saved.
        teacher: for its forward and the divergence.
        update: of the student, for its forward, the divergence and backward.
        moments: while they are saved.
    """

    student: dict[str, int] = field(default_factory=dict)
    teacher: dict[str, int] = field(default_factory=dict)
    update: dict[str, int] = field(default_factory=dict)
    moments: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, run: TrainingRun, launch: PlannedLaunch) -> "GatheredParts":
        if not launch.is_student_sharded:
            return cls()
        student = GatheredWeights.of(run.student, stays=not launch.options.reshard_after_forward)
        of_head = 0 if run.device.type == "cuda" else student.head  # fused, the divergence has this gradient
        teacher = {}
        if launch.is_teacher_sharded:
            weights = GatheredWeights.of(run.teacher)
            teacher = {"teacher's gathered layers": weights.layers, "teacher's whole output head": weights.head}
        return cls(
            student={"whole student": student.all},
            teacher=teacher,
            update={
                "student's gathered layers": student.layers,
                "student's whole output head": student.head,
                "gradients not yet in shards": student.gradients_in_sum + of_head,
            },
            moments={"whole moments": 2 * student.all},
        )


def own_bytes(parameters: Iterable[Tensor], launch: PlannedLaunch, is_sharded: bool) -> int:
    """What one process always has of them."""
    return shard_bytes(parameters, launch.processes) if is_sharded else weight_bytes(parameters)


def weight_bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def shard_bytes(parameters: Iterable[Tensor], processes: int) -> int:
    """The first process's, which has most where rows do not divide evenly."""
    return sum(
        -(-parameter.shape[:1].numel() // processes) * parameter.shape[1:].numel() * parameter.element_size()
        for parameter in parameters
    )
