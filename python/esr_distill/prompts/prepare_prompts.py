"""Records as the prompts of a run: tokenised, and long enough for nothing to be cut later."""

from collections.abc import Sequence

from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_encoder import PromptEncoder
from esr_distill.prompts.prompt_set import PromptSet
from esr_distill.prompts.prompt_sources import PromptRecord, PromptSource
from esr_distill.prompts.prompt_stream import PromptStream


def prepare_prompts(
    records: Sequence[PromptRecord] | PromptSource, encoder: PromptEncoder, *, limit: int, limit_source: str
) -> tuple[PromptSet | PromptStream, int]:
    """What `next_prompt_batch` takes, and the number of prompts dropped: a set, or a stream where the source is one.

    `limit` is the longest prompt in tokens, the teacher's included, and `limit_source` says where that number comes from. A
    stream drops while it is read, so its number is 0.

    Raises:
        InputError: a prompt cannot be used, or is too long and `data.long_prompts` is "error", or none is left.
    """
    data = encoder.data
    if data.stream_prompts is not None:
        stream = PromptStream(
            records,
            encoder,
            window=data.stream_prompts,
            limit=limit,
            limit_source=limit_source,
            long_prompts=data.long_prompts,
        )
        return stream, 0
    prompts = encoder.encode(records)
    return fit_prompts(
        prompts, limit=limit, limit_source=limit_source, long_prompts=data.long_prompts, option=encoder.option
    )


def fit_prompts(
    prompts: PromptSet, *, limit: int, limit_source: str, long_prompts: str, option: str
) -> tuple[PromptSet, int]:
    """Prompts of at most `limit` tokens, the teacher's included, and the number dropped.

    Raises:
        InputError: a prompt is longer and `long_prompts` is "error", or none is left.
    """
    lengths = prompts.lengths
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    dropped = len(lengths) - len(kept)
    if dropped == 0:
        return prompts, 0
    if long_prompts == "error" or not kept:
        raise InputError(
            f"{option} must hold prompts of at most {limit} tokens ({limit_source}), "
            f"got {dropped} of {len(lengths)} that are longer, the longest {max(lengths)} tokens"
            + ("; data.long_prompts: drop leaves them out" if option == "data.prompts" and kept else "")
        )
    return prompts.subset(kept), dropped
