"""Accuracy, during a run and of one model by itself."""

from dataclasses import dataclass, field
from typing import Any, Literal

from esr_distill.config.data import DataConfig
from esr_distill.config.require import require
from esr_distill.sampler_settings import SamplerSettings

ScorerName = Literal["number_after_hash", "last_number", "boxed_exact", "boxed_math"]


@dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out problems with its own sampling and length limit (never the training horizon); greedy by default.

    Args:
        prompts: JSONL file with "prompt" and "answer"; unset means no evaluation.
        every: Evaluate each this many steps, and before the first and after the last.
        scorer: How the answer is found in a reply and compared; number_after_hash and last_number compare numbers, boxed_exact
            the text of the last box without spacing, boxed_math its mathematics (needs math-verify).
        max_tokens: Response tokens after which a reply counts as cut.
        samples_per_problem: Replies to each problem; more than 1 needs a sampling_temperature above 0.
        sampling_temperature: Temperature of sampling; 0 is greedy.
        top_k: Keep only the k most probable tokens; 0 is off.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 is off.
        min_p: Drop tokens less probable than min_p times the most probable one; 0 is off.
        seed: Seed of sampling, the same in every evaluation of a run.
        batch_size: Replies drawn at a time, in each process.
        limit: Use only the first this many problems.
    """

    prompts: str | None = None
    every: int = 50
    scorer: ScorerName = "last_number"
    max_tokens: int = 512
    samples_per_problem: int = 1
    sampling_temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    batch_size: int = 32
    limit: int | None = None

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", ">= 1", self.every)
        check_replies(self, "evaluation.")

    @property
    def sampler(self) -> SamplerSettings:
        return SamplerSettings(self.sampling_temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class EvalConfig:
    """Measure one model.

    Args:
        model: Hub id or local folder.
        prompts: JSONL file with "prompt" and "answer".
        chat_template: Wrap text prompts as one user message in the tokenizer's chat template.
        system_prompt: System message put before every chat prompt.
        enable_thinking: Passed to the chat template as enable_thinking; unset leaves the template its default.
        chat_template_kwargs: More arguments of the chat template, by name.
        response_prefix: Text put after the generation prompt, or after a plain prompt.
        dtype: Floating-point type of the weights.
        attn_implementation: Attention, by transformers' name; auto is flash_attention_2 where flash-attn is installed and the
            model runs in 16 bits on a CUDA device, else sdpa.
        device: Where the model lives; auto takes CUDA when there is one.
        model_gguf_file: Name of a GGUF file in model, from which weights and tokenizer are read (package gguf).
        trust_remote_code: Run Python code that comes with the model. Read it first.
        vocab_size: Draw only ids below it, as training with loss.vocab_size does; unset draws from the whole head.
        scorer: How the answer is found in a reply and compared; number_after_hash and last_number compare numbers, boxed_exact
            the text of the last box without spacing, boxed_math its mathematics (needs math-verify).
        max_tokens: Response tokens after which a reply counts as cut.
        samples_per_problem: Replies to each problem; more than 1 needs a sampling_temperature above 0.
        sampling_temperature: Temperature of sampling; 0 is greedy.
        top_k: Keep only the k most probable tokens; 0 is off.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 is off.
        min_p: Drop tokens less probable than min_p times the most probable one; 0 is off.
        seed: Seed of sampling.
        batch_size: Replies drawn at a time.
        limit: Use only the first this many problems.
        backend: Who draws; inprocess decodes by itself, hf_generate is transformers' generate (greedy only).
        output: JSON file for the result, with a row for each problem; unset only prints it.
        save_replies: Put prompts and replies into the rows of output.
        compare: Result of another evaluation on the same problems (a file that output named); this one minus it is printed.
    """

    model: str = ""
    prompts: str = ""
    chat_template: bool = True
    system_prompt: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    response_prefix: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model_gguf_file: str | None = None
    trust_remote_code: bool = False
    vocab_size: int | None = None
    scorer: ScorerName = "last_number"
    max_tokens: int = 512
    samples_per_problem: int = 1
    sampling_temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    batch_size: int = 32
    limit: int | None = None
    backend: Literal["inprocess", "hf_generate"] = "inprocess"
    output: str | None = None
    save_replies: bool = False
    compare: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.model), "model", "a hub id or a local folder", self.model)
        require(bool(self.prompts), "prompts", "the path of a JSONL file", self.prompts)
        gguf_file = self.model_gguf_file
        require(gguf_file != "", "model_gguf_file", "the name of a file or unset", gguf_file)
        vocab_size = self.vocab_size
        require(vocab_size is None or vocab_size >= 1, "vocab_size", ">= 1 or unset", vocab_size)
        check_replies(self, "")
        is_greedy = self.sampling_temperature == 0
        must_be = "inprocess for a sampling_temperature above 0"
        require(is_greedy or self.backend == "inprocess", "backend", must_be, self.backend)
        has_output = self.output is not None
        require(has_output or not self.save_replies, "save_replies", "false unless output is set", self.save_replies)

    @property
    def data(self) -> DataConfig:
        return DataConfig(
            self.prompts,
            self.chat_template,
            self.system_prompt,
            enable_thinking=self.enable_thinking,
            chat_template_kwargs=self.chat_template_kwargs,
            response_prefix=self.response_prefix,
        )

    @property
    def evaluation(self) -> EvaluationConfig:
        return EvaluationConfig(
            prompts=self.prompts,
            scorer=self.scorer,
            max_tokens=self.max_tokens,
            samples_per_problem=self.samples_per_problem,
            sampling_temperature=self.sampling_temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            batch_size=self.batch_size,
            limit=self.limit,
        )


def check_replies(settings: EvaluationConfig | EvalConfig, group: str) -> None:
    """What both configs ask of their common options; `group` stands before the names in messages."""

    def check(condition: bool, name: str, must_be: str) -> None:
        require(condition, f"{group}{name}", must_be, getattr(settings, name))

    check(settings.max_tokens >= 1, "max_tokens", ">= 1")
    check(settings.samples_per_problem >= 1, "samples_per_problem", ">= 1")
    check(settings.sampling_temperature >= 0, "sampling_temperature", ">= 0")
    check(settings.top_k >= 0, "top_k", ">= 0")
    check(0 <= settings.top_p <= 1, "top_p", "in [0, 1]")
    check(0 <= settings.min_p <= 1, "min_p", "in [0, 1]")
    check(0 <= settings.seed < 2**64, "seed", "in [0, 2**64)")
    check(settings.batch_size >= 1, "batch_size", ">= 1")
    check(settings.limit is None or settings.limit >= 1, "limit", ">= 1 or unset")
    if settings.sampling_temperature == 0:
        greedy = f"for {group}sampling_temperature 0, which is greedy"
        check(settings.samples_per_problem == 1, "samples_per_problem", f"1 {greedy}")
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            check(getattr(settings, name) == off, name, f"{off} {greedy}")
