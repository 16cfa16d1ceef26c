"""How many tokens the rollouts of a step may have."""

import math

from esr_distill.config import HorizonScheduleConfig

MEMORY = 0.9  # weight of the past in the mean of the agreement
MARGIN = 0.05  # below the wanted agreement, before the horizon shrinks


class HorizonSchedule:
    """The horizon by step. An adaptive one is a function of the records of the steps before, in their order: a run that is
    resumed observes those of its metrics file again.

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
            return math.ceil(config.fraction * self.largest)
        if config.kind == "adaptive":
            return self.adapted
        if config.kind == "linear":
            grown = config.start + (self.largest - config.start) * step // self.steps
        else:
            grown = config.start + config.increment * (step // config.every)
        return max(1, min(self.largest, grown))

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
