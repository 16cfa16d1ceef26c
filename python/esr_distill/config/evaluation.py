"""Accuracy, during a run and of one model by itself."""

from dataclasses import dataclass
from typing import Literal

from esr_distill.config.data import DataConfig
from esr_distill.config.require import require

ScorerName = Literal["number_after_hash", "last_number"]


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out problems, greedy, with its own length limit (never the training horizon).

    Args:
        prompts: JSONL file with "prompt" and "answer"; unset means no evaluation.
        every: Evaluate each this many steps, and before the first and after the last.
        scorer: How the answer is found in a reply.
        max_tokens: Response tokens after which a reply counts as cut.
        batch_size: Problems answered at a time.
        limit: Use only the first this many problems.
    """

    prompts: str | None = None
    every: int = 50
    scorer: ScorerName = "last_number"
    max_tokens: int = 512
    batch_size: int = 32
    limit: int | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", ">= 1", self.every)
        require(self.max_tokens >= 1, "evaluation.max_tokens", ">= 1", self.max_tokens)
        require(self.batch_size >= 1, "evaluation.batch_size", ">= 1", self.batch_size)
        require(self.limit is None or self.limit >= 1, "evaluation.limit", ">= 1 or unset", self.limit)


@dataclass(frozen=True)
class EvalConfig:
    """Measure one model.

    Args:
        model: Hub id or local folder.
        prompts: JSONL file with "prompt" and "answer".
        chat_template: Wrap text prompts as one user message in the tokenizer's chat template.
        system_prompt: System message put before every chat prompt.
        dtype: Floating-point type of the weights.
        attn_implementation: Attention, by transformers' name; auto is flash_attention_2 where flash-attn is installed and the
            model runs in 16 bits on a CUDA device, else sdpa.
        device: Where the model lives; auto takes CUDA when there is one.
        scorer: How the answer is found in a reply.
        max_tokens: Response tokens after which a reply counts as cut.
        batch_size: Problems answered at a time.
        limit: Use only the first this many problems.
        backend: Who draws; inprocess decodes by itself, hf_generate is transformers' generate.
        output: JSON file for the result; unset only prints it.
    """

    model: str = ""
    prompts: str = ""
    chat_template: bool = True
    system_prompt: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scorer: ScorerName = "last_number"
    max_tokens: int = 512
    batch_size: int = 32
    limit: int | None = None
    backend: Literal["inprocess", "hf_generate"] = "inprocess"
    output: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.model), "model", "a hub id or a local folder", self.model)
        require(bool(self.prompts), "prompts", "the path of a JSONL file", self.prompts)

    @property
    def data(self) -> DataConfig:
        return DataConfig(self.prompts, self.chat_template, self.system_prompt)

    @property
    def evaluation(self) -> EvaluationConfig:
        return EvaluationConfig(
            prompts=self.prompts,
            scorer=self.scorer,
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            limit=self.limit,
        )
