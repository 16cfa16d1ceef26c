"""Ctrl-C and SIGTERM while a run trains."""

import signal

from rich.console import Console


class StopSignal:
    """First Ctrl-C (or SIGTERM): stop after the current step. Second: stop at once, losing that step."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.received = False

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        self.console.print("stopping after this step or evaluation; once more stops at once")
