"""Samplers as one would write them with PyTorch, and those of transformers. They return ids; log-probs are a call more.

torch.multinomial        of the softmax in float32
exponential race         argmax of p / Exp(1), under torch.compile
Hugging Face             its warpers one after the other, as generate() applies them, then torch.multinomial
one sort                 filters that may differ from row to row, on one sorted copy, then torch.multinomial
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bench.baselines.peers import imported
from bench.baselines.pytorch import compiled, logprobs_of_logits
from bench.cases.sampler_inputs import SamplerInputs, SamplerSetting
from esr_kernels.testing.oracle import Results

DrawIds = Callable[[SamplerInputs], Tensor]
Draw = Callable[[SamplerInputs], Results]


def multinomial(inputs: SamplerInputs) -> Tensor:
    return drawn_ids(inputs.logits_B_V.softmax(-1, dtype=torch.float32))


def drawn_ids(probs_B_V: Tensor) -> Tensor:
    return torch.multinomial(probs_B_V, 1).squeeze(1)


def ids_only(draw_ids: DrawIds) -> Draw:
    return lambda inputs: {"token_ids": draw_ids(inputs)}


def with_logprobs(draw_ids: DrawIds) -> Draw:
    """The ids, and their log-probs under the softmax of the logits."""

    def draw(inputs: SamplerInputs) -> Results:
        ids_B = draw_ids(inputs)
        return {"token_ids": ids_B, "logprobs": logprobs_of_logits(inputs.logits_B_V, ids_B.long())}

    return draw


def race(logits_B_V: Tensor) -> Tensor:
    probs_B_V = logits_B_V.softmax(-1, dtype=torch.float32)
    return (probs_B_V / torch.empty_like(probs_B_V).exponential_()).argmax(-1)


def race_with_logprobs(logits_B_V: Tensor) -> tuple[Tensor, Tensor]:
    ids_B = race(logits_B_V)
    return ids_B, logprobs_of_logits(logits_B_V, ids_B)


def compiled_races(backend: str) -> tuple[Draw, Draw]:
    """Ids alone, and with log-probs in the same graph."""
    torch.compiler.reset()  # the cases have more shapes than its cache holds
    draw_ids, draw_both = compiled(race, backend), compiled(race_with_logprobs, backend)
    return (
        lambda inputs: {"token_ids": draw_ids(inputs.logits_B_V)},
        lambda inputs: dict(zip(("token_ids", "logprobs"), draw_both(inputs.logits_B_V), strict=True)),
    )


@cache
def hugging_face(setting: SamplerSetting) -> DrawIds:
    """One setting for all rows is all that the warpers take."""
    wanted = {
        "TemperatureLogitsWarper": (setting.temperature, setting.temperature != 1),
        "TopKLogitsWarper": (setting.top_k, setting.top_k > 0),
        "TopPLogitsWarper": (setting.top_p, setting.top_p < 1),
        "MinPLogitsWarper": (setting.min_p, setting.min_p > 0),
    }

    def draw(inputs: SamplerInputs) -> Tensor:
        scores_B_V = inputs.logits_B_V.float()
        for name, (value, is_on) in wanted.items():
            if is_on:
                warper = imported("transformers", "transformers.generation.logits_process", name)(value)
                scores_B_V = warper(None, scores_B_V)  # none of them looks at the ids
        return drawn_ids(scores_B_V.softmax(-1))

    return draw


def one_sort(inputs: SamplerInputs) -> Tensor:
    temperature, top_k, top_p, min_p = (values_B[:, None] for values_B in inputs.parameters)
    scores_B_V, ids_B_V = (inputs.logits_B_V.float() / temperature).sort(-1, descending=True)
    scores_B_V.masked_fill_(torch.arange(scores_B_V.shape[1], device=scores_B_V.device) >= top_k, -torch.inf)
    probs_B_V = scores_B_V.softmax(-1)
    before_B_V = probs_B_V.cumsum(-1) - probs_B_V
    is_off_B_V = (before_B_V >= top_p) | (probs_B_V < min_p * probs_B_V[:, :1])
    rank_B_1 = torch.multinomial(probs_B_V.masked_fill_(is_off_B_V, 0), 1)
    return ids_B_V.gather(1, rank_B_1).squeeze(1)
