"""Prompts that are read while training, a window at a time, for sources that do not fit or do not end."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_encoder import PromptEncoder
from esr_distill.prompts.prompt_set import PromptSet, epoch_order
from esr_distill.prompts.prompt_sources import PromptSource


class PromptStream:
    """The prompts of a source, again from its beginning when it ends, of which `window` are held at a time.

    Turn i is in window i // window, which holds the next so many prompts of the source in an order drawn from (seed, window), so
    the prompt of a turn is a function of source, seed and turn: going on at any step draws what an uninterrupted run would have,
    after reading past what came before. Only the newest window is held. Prompts that are too long count for nothing.
    """

    def __init__(
        self,
        source: PromptSource,
        encoder: PromptEncoder,
        *,
        window: int,
        limit: int,
        limit_source: str,
        long_prompts: str,
    ) -> None:
        """Reads the first window. `limit` is the longest prompt in tokens, `limit_source` where that number comes from.

        Raises:
            InputError: a prompt in it cannot be used, or is too long and `long_prompts` is "error"; all are too long.
        """
        self.source, self.encoder, self.window = source, encoder, window
        self.limit, self.limit_source, self.long_prompts = limit, limit_source, long_prompts
        self._start()
        self._digest, self._longest = self._held.digest, self._held.longest

    @property
    def digest(self) -> str:
        """SHA-256 of the first window's token ids: what tells one stream from another before a run begins."""
        return self._digest

    def digest_before(self, turns: int) -> str:
        """SHA-256 of the windows that the first `turns` turns are drawn from. What comes after them may still change."""
        self._window(max(turns - 1, 0) // self.window)
        return self._read.hexdigest()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt in the first window."""
        return self._longest

    def first(self, count: int) -> PromptSet:
        """The first `count` prompts, at most a window of them."""
        return self._window(0).first(count)

    def at_turns(self, turns: Sequence[int], seed: int) -> PromptSet:
        """The prompts whose turn it is. Turns that fall back behind the window held read the source again."""
        parts = []
        for turn in turns:
            number, place = divmod(turn, self.window)
            held = self._window(number)
            parts.append(held.subset([epoch_order(self.window, seed, number)[place]]))
        return PromptSet.join(parts)

    def _window(self, number: int) -> PromptSet:
        if number < self._number:
            self._start()
        while self._number < number:
            self._read_window()
        return self._held

    def _start(self) -> None:
        self._prompts, self._read, self._number = self._endless(), hashlib.sha256(), -1
        self._read_window()

    def _read_window(self) -> None:
        self._held = PromptSet.join(list(islice(self._prompts, self.window)))
        self._read.update(self._held.digest.encode())
        self._number += 1

    def _endless(self) -> Iterator[PromptSet]:
        """Each prompt of the source that fits, by itself, for ever."""
        while True:
            found = False
            for number, record in enumerate(self.source.records(), 1):
                prompt = self.encoder.encode([record])
                if prompt.longest <= self.limit:
                    found = True
                    yield prompt
                elif self.long_prompts == "error":
                    raise InputError(
                        f"{self.encoder.option} must hold prompts of at most {self.limit} tokens ({self.limit_source}), "
                        f"got {prompt.longest} tokens in prompt {number}; data.long_prompts: drop leaves such out"
                    )
            if not found:
                raise InputError(
                    f"{self.encoder.option} must hold prompts of at most {self.limit} tokens ({self.limit_source}), "
                    "got none in the whole stream"
                )
