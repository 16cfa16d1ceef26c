"""How many tokens the rollouts of a step may have."""

import math
from fractions import Fraction

from esr_distill.config import HorizonScheduleConfig
from esr_distill.input_error import InputError

MEMORY = 0.9  # weight of the past in the mean of the agreement
MARGIN = 0.05  # below the wanted agreement, before the horizon shrinks


class HorizonSchedule:
    """The horizon by step. An adaptive one is a function of the records of the steps before, in their order; what it has come
    to is `state`, which a run that goes on puts back.

        schedule = HorizonSchedule(config.horizon, config.rollout.horizon, config.run.steps)
        for step in range(steps):
            record = train(horizon=schedule.horizon(step))
            schedule.observe(record)
    """

    def __init__(self, config: HorizonScheduleConfig, largest: int, steps: int) -> None:
        self.config, self.largest, self.steps = config, largest, steps
        self.adapted = min(config.start or largest, largest)
        self.agreement: float | None = None

    def horizon(self, step: int) -> int:
        """`step` counts from 0."""
        config = self.config
        if config.kind == "fixed":
            return self.largest
        if config.kind == "fraction":
            # the decimal number that was given: 0.55 in binary is a little more, and 100 of it would be 56
            return math.ceil(Fraction(str(config.fraction)) * self.largest)
        if config.kind == "adaptive":
            return self.adapted
        if config.kind == "linear":
            grown = config.start + (self.largest - config.start) * step // self.steps
        else:
            grown = config.start + config.increment * (step // config.every)
        return max(1, min(self.largest, grown))

    @property
    def state(self) -> dict | None:
        """What an adaptive horizon has come to, as JSON values; None for the others, which need nothing but the step."""
        return {"horizon": self.adapted, "agreement": self.agreement} if self.config.kind == "adaptive" else None

    def restore(self, state: dict) -> None:
        """Go on from `state`."""
        self.adapted, self.agreement = state["horizon"], state["agreement"]

    def observe(self, record: dict) -> None:
        """The metrics of a step; "late_agreement" is None where no rollout came into the last quarter of its horizon."""
        measured = record["late_agreement"]
        if self.config.kind != "adaptive" or measured is None:
            return
        past = measured if self.agreement is None else self.agreement
        self.agreement = MEMORY * past + (1 - MEMORY) * measured
        if self.agreement >= self.config.agreement:
            self.adapted = min(self.largest, self.adapted + self.config.increment)
        elif self.agreement < self.config.agreement - MARGIN:
            self.adapted = max(min(self.config.start, self.largest), self.adapted - self.config.increment)

    def observe_again(self, records: list[dict], done: int) -> None:
        """Come to where the run was after `done` steps, for checkpoints of older versions, which do not hold the state.

        Raises:
            InputError: the records are not those of all these steps.
        """
        steps = [record["step"] for record in records]
        if steps != list(range(1, done + 1)):
            raise InputError(
                f"metrics.jsonl must hold the steps 1 to {done} for horizon.kind adaptive to go on, got {len(steps)} of them"
            )
        for record in records:
            self.observe(record)
