"""A reply that got stuck: its last three tokens are ones that it wrote many times."""

NGRAM = 3
MANY = 10


def end_repeats(token_ids: list[int]) -> int:
    """How often the last three tokens occur in the whole reply, this once included and overlaps counted; 0 for a reply of fewer.

    `token_ids` are without the EOS. A loop of p tokens that fills the last n gives about n / p, so a reply of 500 tokens shows
    loops of up to 50.
    """
    last = token_ids[-NGRAM:]
    if len(last) < NGRAM:
        return 0
    return sum(token_ids[start : start + NGRAM] == last for start in range(len(token_ids) - NGRAM + 1))


def is_repetitive(repeats: int) -> bool:
    """Whether `end_repeats` is above 10."""
    return repeats > MANY
