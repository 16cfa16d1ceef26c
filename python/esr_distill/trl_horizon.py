"""The horizon schedules of the loop as a callback of TRL's trainers, read in TRL 1.16.0, which is not imported here."""

from transformers import Trainer, TrainerCallback

from esr_distill.config import HorizonScheduleConfig
from esr_distill.config.require import require
from esr_distill.horizon_schedule import HorizonSchedule
from esr_distill.input_error import InputError

LONGEST = "completions/max_length"  # the metric of TRL's trainers that says how long the rollouts became


class HorizonCallback(TrainerCallback):
    """Stops the rollouts of each step of a TRL trainer at the horizon that the loop would give them.

        trainer = DistillationTrainer(student, teacher, args=DistillationConfig(max_completion_length=1000), ...)
        trainer.add_callback(HorizonCallback(trainer, HorizonScheduleConfig("stairs", start=100, increment=100, every=50)))
        trainer.train()

    max_completion_length (max_new_tokens in GKD) is the largest horizon H. A step is an optimizer step, counted from 0 over the
    whole run, so that a resumed run has the horizons of one that was not stopped; a linear schedule ends at
    trainer.state.max_steps, and changes with it. While a step runs, trainer.generation_config.max_new_tokens is its horizon, and
    with vLLM trainer.vllm_generation.max_completion_length too; at other times they are H, so that evaluation has the full
    length. The trainer's logs say "horizon", the mean over the steps since the last.

    Rollouts that end by themselves are shorter. Responses of a data set, on which GKD and GOLD also train where lmbda is below 1,
    are not cut. GOLD's max_length is shared: a shorter horizon leaves more of it to the prompt.

    Args:
        trainer: TRL's DistillationTrainer, GKDTrainer or GOLDTrainer, or one that draws as they do.
        schedule: Any but an adaptive one, which is moved by agreement at the end of the horizon: TRL measures none.

    Raises:
        InputError: the horizon would not be that of a step's rollouts: an adaptive schedule, a trainer that takes the length from
            elsewhere, tools, a batch that is drawn for several steps, a callback that was made for another trainer.
        RuntimeError: in training, rollouts were longer than the horizon, where the trainer logs how long they became.
    """

    def __init__(self, trainer: Trainer, schedule: HorizonScheduleConfig) -> None:
        check_schedule(schedule)
        check_trainer(trainer)
        self.trainer, self.config = trainer, schedule
        self.largest: int = trainer.generation_config.max_new_tokens
        self.schedule: HorizonSchedule | None = None
        self.horizon = self.largest

    def on_train_begin(self, args, state, control, **_):
        if state is not self.trainer.state:
            raise InputError("HorizonCallback must be added to the trainer that it was made for, got another trainer")
        self.schedule = HorizonSchedule(self.config, self.largest, state.max_steps)

    def on_step_begin(self, args, state, control, **_):
        drawn_before = getattr(self.trainer, "_step", 0) % args.gradient_accumulation_steps
        must_be = (
            f"a multiple of gradient_accumulation_steps {args.gradient_accumulation_steps} where step {state.global_step} "
            "begins, or its rollouts are those of the step before"
        )
        require(drawn_before == 0, "trainer._step", must_be, getattr(self.trainer, "_step", 0))
        self.horizon = self.schedule.horizon(state.global_step)
        self.stop_rollouts_after(self.horizon)
        self.trainer._metrics["train"]["horizon"].append(self.horizon)  # TRL's logs are the means of these lists

    def on_step_end(self, args, state, control, **_):
        self.stop_rollouts_after(self.largest)
        lengths = self.trainer._metrics["train"].get(LONGEST)
        if lengths and lengths[-1] > self.horizon:
            raise RuntimeError(
                f"TRL: rollouts must have at most {self.horizon} tokens in step {state.global_step - 1}, got {lengths[-1]:.0f}"
            )

    def stop_rollouts_after(self, tokens: int) -> None:
        self.trainer.generation_config.max_new_tokens = tokens
        if getattr(self.trainer, "use_vllm", False):
            self.trainer.vllm_generation.max_completion_length = tokens


def check_schedule(schedule: HorizonScheduleConfig) -> None:
    must_be = "fixed, linear, stairs or fraction in TRL's trainers, which do not measure the agreement that moves an adaptive one"
    require(schedule.kind != "adaptive", "horizon.kind", must_be, schedule.kind)


def check_trainer(trainer: Trainer) -> None:
    """Is it by generation_config that each step's rollouts are drawn, in that step?"""
    if not (hasattr(trainer, "generation_config") and hasattr(trainer, "_metrics")):
        raise InputError(
            "trainer must have generation_config and _metrics, as TRL's DistillationTrainer, GKDTrainer and GOLDTrainer have, "
            f"got a {type(trainer).__name__}"
        )
    largest = getattr(trainer.generation_config, "max_new_tokens", None)
    is_count = isinstance(largest, int) and largest >= 1
    require(is_count, "max_completion_length", ">= 1: it is the largest horizon", largest)
    if getattr(trainer, "use_vllm", False):
        vllm_length = getattr(getattr(trainer, "vllm_generation", None), "max_completion_length", None)
        must_be = f"{largest}, as the trainer's, where use_vllm is set"
        require(vllm_length == largest, "trainer.vllm_generation.max_completion_length", must_be, vllm_length)
    tools = [getattr(tool, "__name__", tool) for tool in getattr(trainer, "tools", None) or []]
    require(not tools, "tools", "unset: their replies have no horizon", tools)
    check_arguments(trainer.args)


def check_arguments(args: object) -> None:
    for name in ("max_new_tokens", "max_tokens"):
        value = (getattr(args, "generation_kwargs", None) or {}).get(name)
        require(value is None, f"generation_kwargs.{name}", "unset: the horizon is set by the schedule", value)
    # By these TRL's GRPOTrainer and its kin draw once for several steps.
    accumulation = args.gradient_accumulation_steps
    drawn_for = getattr(args, "steps_per_generation", None) or accumulation
    must_be = f"at most gradient_accumulation_steps {accumulation}, or rollouts serve several steps"
    require(drawn_for <= accumulation, "steps_per_generation", must_be, drawn_for)
    iterations = getattr(args, "num_iterations", 1)
    require(iterations == 1, "num_iterations", "1, or rollouts serve several steps", iterations)
