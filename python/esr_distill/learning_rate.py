"""The learning-rate schedule as one pure function of the step."""

import math


def learning_rate_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """What the peak learning rate is multiplied by at optimizer step `step` (0-based) of `steps`.

    Rises linearly over the first `warmup_steps` steps, never 0 (a step that changes nothing would still be paid for),
    is 1 right after them, then follows `schedule`: "constant", or down toward 0 at step `steps` as a line or half a
    cosine.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
