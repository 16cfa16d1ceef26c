"""The floor of a training step: what its bytes and its products take at the rates of a device, stage by stage.

python -m bench.floor --student qwen3-1.7b --teacher qwen3-8b --batch-size 64 --horizon 100 --prompt 200
python -m bench.floor --student folder --teacher folder --rates h200          # a named GPU, by its data sheet

Without --rates the rates are measured here: on a CUDA device, else on this CPU with float32 products. A stage takes at least its
bytes over the copy rate and its FLOP over the rate of products; what decodes is bound step by step. Counted is what no
schedule avoids, once; what one adds (logits that are written and read, a forward that is repeated, a cache that is copied, a
launch) is not part of it. The stages are those of python/esr_distill/train_step.py.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu_rates import DTYPES, GPUS, Rates, measured_rates, published_gpu
from bench.model_shape import ModelShape, load_shape

STAGES = ("rollout", "student_forward", "teacher_forward", "divergence", "backward", "optimizer")
ADAMW_VALUES = 7  # read weight, gradient and two moments; write weight and two moments
HEADINGS = ("stage", "TFLOP", "GB", "floor ms", "bound by")


@dataclass(frozen=True)
class StepSetting:
    """One step of one device. Every prompt has `prompt` tokens and every rollout `horizon`, so nothing is padded.

    Attributes:
        batch_size: rollouts.
        trained_tokens: of each rollout, its first ones; None is all.
        samples_per_prompt: rollouts for each prompt, which is read once for all of them.
        is_head_trained: whether the student's output head gets a gradient.
    """

    batch_size: int
    prompt: int
    horizon: int
    trained_tokens: int | None = None
    samples_per_prompt: int = 1
    is_head_trained: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt", "horizon", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"samples_per_prompt must be a divisor of batch_size {self.batch_size}, got {self.samples_per_prompt}"
            )
        if self.trained_tokens is not None and not 1 <= self.trained_tokens <= self.horizon:
            raise ValueError(f"trained_tokens must be 1 to horizon = {self.horizon}, got {self.trained_tokens}")

    @property
    def num_prompts(self) -> int:
        return self.batch_size // self.samples_per_prompt

    @property
    def tokens(self) -> int:
        """Of one rollout with its prompt."""
        return self.prompt + self.horizon

    @property
    def num_rows(self) -> int:
        """Positions that train."""
        return self.batch_size * (self.trained_tokens or self.horizon)


class Work(NamedTuple):
    flop: float
    bytes: float


@dataclass(frozen=True)
class StageFloor:
    """`bound` is "bytes" or "flop", whichever takes longer; of a sum, which of the two its seconds are mostly of."""

    flop: float
    bytes: float
    seconds: float
    bound: str

    @classmethod
    def of(cls, work: Work, rates: Rates) -> "StageFloor":
        of_bytes, of_flop = work.bytes / rates.copy_bytes_per_s, work.flop / rates.flop_per_s
        return cls(work.flop, work.bytes, max(of_bytes, of_flop), "bytes" if of_bytes >= of_flop else "flop")

    @classmethod
    def sum(cls, floors: Iterable["StageFloor"]) -> "StageFloor":
        """Of parts that follow each other."""
        floors = list(floors)
        seconds = sum(floor.seconds for floor in floors)
        by_bytes = sum(floor.seconds for floor in floors if floor.bound == "bytes")
        totals = sum(floor.flop for floor in floors), sum(floor.bytes for floor in floors)
        return cls(*totals, seconds, "bytes" if 2 * by_bytes >= seconds else "flop")


def body_flop(shape: ModelShape, tokens: int) -> float:
    """Layers on one sequence: 2 FLOP a weight and token; attention 4 for each pair of token and token seen, and head column.

    A token sees itself and those before it, at most a window: the two products of attention, without what is masked.
    """
    pairs = 0.0
    for layers, window in shape.layer_kinds:
        inside = min(tokens, window)
        pairs += layers * (inside * (inside + 1) / 2 + (tokens - inside) * inside)
    return 2 * tokens * shape.layers * shape.layer_matrices + 4 * shape.heads * shape.head_dim * pairs


def prefill_floor(shape: ModelShape, num_prompts: int, prompt: int, rates: Rates) -> StageFloor:
    """Read the prompts: the layers on all tokens, the head on the last of each; weights read once, the cache written once.

    The rows of the embedding that tokens take are left out, here and below: they are small.
    """
    flop = num_prompts * (body_flop(shape, prompt) + 2 * shape.head_weights)
    weights = shape.value_bytes * (shape.body_weights + shape.head_weights)
    return StageFloor.of(Work(flop, weights + num_prompts * prompt * shape.cache_bytes_per_token), rates)


def decode_step_floor(
    shape: ModelShape, rates: Rates, *, rows: int, context: int, prompt: int = 0, samples_per_prompt: int = 1
) -> StageFloor:
    """One token for each row: every weight once, the head's too, and keys and values of what the rows attend to.

    `context` counts the tokens a row attends to, the new one (whose keys and values are written) included. Of the first
    `prompt` of them the rows of one prompt share keys and values, which need be read once; our own cache copies them, and reads
    each copy.
    """
    flop = rows * 2 * (shape.layers * shape.layer_matrices + shape.head_weights)
    cached = 0.0
    for layers, window in shape.layer_kinds:
        own = min(context - prompt, window)
        of_prompt = min(prompt, window - own)
        cached += layers * shape.cache_bytes_per_layer * rows * (own + of_prompt / samples_per_prompt)
        flop += layers * rows * 4 * shape.heads * shape.head_dim * (own + of_prompt)
    weights = shape.value_bytes * (shape.body_weights + shape.head_weights)
    return StageFloor.of(Work(flop, weights + cached), rates)


def rollout_floor(shape: ModelShape, setting: StepSetting, rates: Rates) -> StageFloor:
    """A prefill, which gives the first token, and horizon - 1 decode steps one after the other, each bound by itself."""
    steps = (
        decode_step_floor(
            shape,
            rates,
            rows=setting.batch_size,
            context=setting.prompt + fed,
            prompt=setting.prompt,
            samples_per_prompt=setting.samples_per_prompt,
        )
        for fed in range(1, setting.horizon)
    )
    return StageFloor.sum([prefill_floor(shape, setting.num_prompts, setting.prompt, rates), *steps])


def forward_work(shape: ModelShape, setting: StepSetting) -> Work:
    """Layers on all rollouts whole, as the step reads them, without the head; weights read once."""
    return Work(setting.batch_size * body_flop(shape, setting.tokens), shape.value_bytes * shape.body_weights)


def divergence_work(
    student: ModelShape, teacher: ModelShape, num_rows: int, *, is_head_trained: bool = True
) -> tuple[Work, Work]:
    """Products of hidden states and heads on the rows that train: (in the divergence's stage, in backward).

    2 N V for each hidden column of the student's and the teacher's logits, and of each gradient. Where they fall is where
    `esr_kernels.linear_divergence` makes them. Its forward makes d(logits), but with a trained head both gradients are
    products of backward (that of the weight wants the upstream gradient inside its sum over rows); with a frozen head that of
    the hidden states is made in forward already, for an upstream gradient of 1, and backward only scales it. A schedule that
    projects again in backward adds to this; so does storing logits.

    Bytes: hidden states and heads read once by the stage that multiplies them, the gradient of the hidden states written once;
    the head's gradient is counted by `backward_work`. Where one vocabulary is larger the ids that both have are projected.
    """
    vocab_size = min(student.vocab_size, teacher.vocab_size)

    def reads(shape: ModelShape) -> float:
        return shape.value_bytes * shape.hidden * (vocab_size + num_rows)

    product = 2 * num_rows * vocab_size
    logits = Work(product * (student.hidden + teacher.hidden), reads(student) + reads(teacher))
    gradient_bytes = student.value_bytes * num_rows * student.hidden
    if is_head_trained:
        return logits, Work(2 * product * student.hidden, reads(student) + gradient_bytes)
    return Work(logits.flop + product * student.hidden, logits.bytes + gradient_bytes), Work(0, 0)


def backward_work(student: ModelShape, setting: StepSetting, head_products: Work) -> Work:
    """Twice the student's forward (each product has two gradients), and the head's products where they fall here.

    Weights are read once and the gradients of all that trains written once; clipping by their norm can be part of making and of
    using them. Reading activations is left out: they can be made again.
    """
    forward = forward_work(student, setting)
    gradients = student.dtype_bytes * student.trained_parameters(setting.is_head_trained)
    return Work(2 * forward.flop + head_products.flop, forward.bytes + gradients + head_products.bytes)


def optimizer_work(student: ModelShape, setting: StepSetting) -> Work:
    """AdamW: weight, gradient and two moments read, weight and two moments written, all in the dtype of the weights.

    Its few operations a weight are not products, and no bound.
    """
    return Work(0, ADAMW_VALUES * student.dtype_bytes * student.trained_parameters(setting.is_head_trained))


def step_floor(student: ModelShape, teacher: ModelShape, setting: StepSetting, rates: Rates) -> dict[str, StageFloor]:
    """The floor of each stage, by its name in the step, one after the other on one device."""
    divergence, head_products = divergence_work(
        student, teacher, setting.num_rows, is_head_trained=setting.is_head_trained
    )
    work = {
        "student_forward": forward_work(student, setting),
        "teacher_forward": forward_work(teacher, setting),
        "divergence": divergence,
        "backward": backward_work(student, setting, head_products),
        "optimizer": optimizer_work(student, setting),
    }
    floors = {stage: StageFloor.of(of_stage, rates) for stage, of_stage in work.items()}
    return {"rollout": rollout_floor(student, setting, rates)} | floors


def shares(measured_stage_seconds: Mapping[str, float], floors: Mapping[str, StageFloor]) -> dict[str, float]:
    """What part of the measured time the floor is, by stage and in "total"; 1 would be the speed of light.

    Raises:
        ValueError: the stages are not the same, or a time is not > 0.
    """
    if set(measured_stage_seconds) != set(floors):
        raise ValueError(f"measured stages must be {sorted(floors)}, got {sorted(measured_stage_seconds)}")
    for stage, seconds in measured_stage_seconds.items():
        if not seconds > 0:
            raise ValueError(f"measured seconds of {stage} must be > 0, got {seconds}")
    parts = {stage: floor.seconds / measured_stage_seconds[stage] for stage, floor in floors.items()}
    total = sum(floor.seconds for floor in floors.values()) / sum(measured_stage_seconds.values())
    return parts | {"total": total}


def digits(number: float) -> str:
    """Four digits, or all before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def table_rows(floors: Mapping[str, StageFloor]) -> list[tuple[str, ...]]:
    """Text of a row for each stage and for the sum; columns as in HEADINGS."""
    rows = []
    for stage, floor in [*floors.items(), ("total", StageFloor.sum(floors.values()))]:
        numbers = (digits(1e-12 * floor.flop), digits(1e-9 * floor.bytes), digits(1e3 * floor.seconds))
        rows.append((stage, *numbers, "" if stage == "total" else floor.bound))
    return rows


def describe(rates: Rates) -> str:
    return (
        f"{rates.name}: {digits(1e-9 * rates.copy_bytes_per_s)} GB/s, {digits(1e-12 * rates.flop_per_s)} TFLOP/s "
        f"({rates.source})"
    )


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Models and setting, as bench/plan.py has them too."""
    parser.add_argument("--student", required=True, help="a shape of bench/rollout_models.py, a folder or a hub id")
    parser.add_argument("--teacher", required=True, help="the same")
    parser.add_argument("--batch-size", type=int, default=64, help="rollouts in a step, of one device")
    parser.add_argument("--prompt", type=int, default=200, help="tokens of each prompt")
    parser.add_argument("--horizon", type=int, default=100, help="tokens of each rollout")
    parser.add_argument("--trained-tokens", type=int, help="of each rollout; default: all")
    parser.add_argument("--samples-per-prompt", type=int, default=1)
    parser.add_argument("--frozen-head", action="store_true", help="the student's output head gets no gradient")
    parser.add_argument("--dtype", choices=DTYPES, help="of products and weights; default: bfloat16, float32 on a CPU")
    parser.add_argument("--autocast", action="store_true", help="the student's weights are float32 under bfloat16")


def step_of(options: argparse.Namespace) -> tuple[ModelShape, ModelShape, StepSetting]:
    """The student, the teacher and the setting of parsed options. Raises ValueError for what cannot be."""
    if options.autocast and options.dtype != "bfloat16":
        raise ValueError(f"--autocast needs --dtype bfloat16, got {options.dtype}")
    setting = StepSetting(
        options.batch_size,
        options.prompt,
        options.horizon,
        options.trained_tokens,
        options.samples_per_prompt,
        not options.frozen_head,
    )
    student = load_shape(options.student, "--student", options.dtype, is_autocast=options.autocast)
    return student, load_shape(options.teacher, "--teacher", options.dtype), setting


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_step_options(parser)
    parser.add_argument("--rates", help=f"{', '.join(GPUS)}: by the data sheet; default: measured here")
    options, console = parser.parse_args(argv), Console()
    is_here = options.rates is None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("float32" if is_here and device.type == "cpu" else "bfloat16")
    try:
        student, teacher, setting = step_of(options)
        if is_here:
            rates = measured_rates(device, options.dtype)
        else:
            rates = published_gpu(options.rates, "--rates").rates(options.dtype)
    except ValueError as error:
        parser.error(str(error))
    floors = step_floor(student, teacher, setting, rates)
    table = Table(*HEADINGS)
    for row in table_rows(floors):
        table.add_row(*row)
    seconds = sum(floor.seconds for floor in floors.values())
    console.print(
        f"Floor of a step: {options.student} learns from {options.teacher}, {options.dtype}, {setting.batch_size} rollouts "
        f"of {setting.horizon} tokens after {setting.prompt}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(table)
    for line in (
        describe(rates),
        f"{1e-6 * student.parameters():,.1f} M and {1e-6 * teacher.parameters():,.1f} M parameters; "
        f"at most {setting.batch_size * setting.horizon / seconds:,.0f} tokens/s. A lower bound, not a prediction.",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
