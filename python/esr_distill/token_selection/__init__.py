"""Which of the drawn tokens train, and with what weight: rules of `config.SelectionConfig` on a batch of rollouts."""

from esr_distill.token_selection.selection import TokenSelection

__all__ = ["TokenSelection"]
