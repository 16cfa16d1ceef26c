"""The seam between the loop and whoever draws its rollouts."""

from typing import Protocol

from transformers import PreTrainedModel

from esr_distill.prompts import PromptBatch
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.rollout.rollout_request import RolloutRequest


class RolloutBackend(Protocol):
    """Draws responses with a model's present weights.

    The rows of a response stop at their first EOS or at the horizon, and the log-probs are those of the distribution that the
    tokens were drawn from, under the weights that `model` has when `generate` is called.
    """

    def generate(self, model: PreTrainedModel, prompts: PromptBatch, request: RolloutRequest) -> RolloutBatch:
        """One response for every row of `prompts`."""

    def release(self) -> None:
        """Give back the memory that is held between calls. The backend can be used again."""

    def describe(self, model: PreTrainedModel) -> str:
        """What will run, in words, for the log."""
