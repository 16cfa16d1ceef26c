"""What is asked of a rollout backend, and the checks that all backends share."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from esr_distill.input_error import InputError
from esr_distill.prompts import PromptBatch
from esr_distill.sampler_settings import SamplerSettings


@dataclass(frozen=True)
class RolloutRequest:
    """How responses are drawn, whoever draws them.

    Attributes:
        horizon: response tokens after which a row stops, at least 1.
        sampler: temperature and filters.
        eos_ids: ids that end a row; the first one that is drawn belongs to the response.
        pad_id: fills the columns after a response's end.
        seed: with a row's request id it names the row's random stream.
        vocab_size: only ids below it are drawn, and log-probs are of that cut distribution; None is the whole head.
    """

    horizon: int
    sampler: SamplerSettings
    eos_ids: tuple[int, ...]
    pad_id: int
    seed: int
    vocab_size: int | None = None


def check_request(model: PreTrainedModel, prompts: PromptBatch, request: RolloutRequest) -> None:
    """What would go wrong later, on the device or without a word.

    Raises:
        InputError: a horizon below 1, ids that the vocabulary does not have, an empty prompt, rows that share no prompt,
            or more tokens than the model has positions for.
    """
    width = model.get_output_embeddings().weight.shape[0]
    limit = width if request.vocab_size is None else request.vocab_size
    _require(request.horizon >= 1, "horizon", ">= 1", request.horizon)
    _require(1 <= limit <= width, "vocab_size", f"in [1, {width}]", request.vocab_size)
    for eos_id in request.eos_ids:
        _require(0 <= eos_id < limit, "eos_ids", f"in [0, {limit}), the vocabulary", eos_id)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    _require(request.pad_id is not None, "pad_id", "an id of the vocabulary", None)
    _require(0 <= request.pad_id < num_embeddings, "pad_id", f"in [0, {num_embeddings})", request.pad_id)

    batch_size, num_samples = prompts.prompt_ids_B_P.shape[0], prompts.samples_per_prompt
    _require(batch_size >= 1, "the batch", "at least one prompt", batch_size)
    _require(batch_size % num_samples == 0, "the batch", f"a multiple of samples_per_prompt {num_samples}", batch_size)
    lengths_B = prompts.prompt_mask_B_P.sum(-1)
    shortest, longest = int(lengths_B.min()), int(lengths_B.max())
    _require(shortest >= 1, "a prompt", "at least one token", shortest)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    _require(
        positions is None or longest + request.horizon <= positions,
        "prompt and horizon",
        f"at most the model's {positions} positions together",
        f"{longest} + {request.horizon}",
    )


def _require(condition: bool, what: str, must_be: str, value: object) -> None:
    if not condition:
        raise InputError(f"rollout: {what} must be {must_be}, got {value!r}")
