"""How a token is drawn from logits: the four numbers every sampler takes, in the order in which they are applied."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplerSettings:
    """Temperature (0 is greedy), then top-k (0 is off), top-p (1 is off) and min-p (0 is off)."""

    sampling_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


GREEDY = SamplerSettings(sampling_temperature=0.0)
