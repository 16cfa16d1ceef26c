"""Every option of the loop, defined once: frozen dataclasses, checked on construction, parsed by the command line.

The defaults are those of the paper (arXiv 2605.27028): horizon 100, rollouts at temperature 0.7 and top-p 0.95, reverse KL
over the whole vocabulary, averaged over the positions of a rollout and then over rollouts.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from esr_distill.input_error import InputError
from esr_distill.sampler_settings import SamplerSettings

ScorerName = Literal["number_after_hash", "last_number"]
DivergenceName = Literal[
    "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha_divergence"
]


def _require(condition: bool, option: str, must_be: str, value: object) -> None:
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not (condition and is_finite):
        raise InputError(f"{option} must be {must_be}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The two models.

    Args:
        student: Hub id or local folder of the model that is trained.
        teacher: Hub id or local folder of the frozen model that scores; same tokenizer.
        dtype: Floating-point type of the student's weights. Small learning rates are lost in bfloat16 weights; prefer
            float32 with autocast.
        teacher_dtype: Floating-point type of the teacher's weights.
        autocast: Run the float32 student under bfloat16 autocast.
        attn_implementation: Attention of both models, by transformers' name; auto is flash_attention_2 where flash-attn is
            installed and both models run in 16 bits on a CUDA device, else sdpa. What was chosen is printed.
        device: Where both models live; auto takes CUDA when there is one.
    """

    student: str = ""
    teacher: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool = False
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        _require(bool(self.student), "model.student", "a hub id or a local folder", self.student)
        _require(bool(self.teacher), "model.teacher", "a hub id or a local folder", self.teacher)
        _require(
            not (self.autocast and self.dtype != "float32"),
            "model.autocast",
            "false unless model.dtype is float32",
            True,
        )
        _require(
            self.attn_implementation != "flash_attention_2" or self.is_in_16_bits,
            "model.attn_implementation",
            "auto, sdpa or eager unless both models run in bfloat16 (model.teacher_dtype, and model.dtype or model.autocast)",
            self.attn_implementation,
        )

    @property
    def is_in_16_bits(self) -> bool:
        """Whether both models compute in bfloat16."""
        return (self.autocast or self.dtype == "bfloat16") and self.teacher_dtype == "bfloat16"


@dataclass(frozen=True)
class DataConfig:
    """The prompts.

    Args:
        prompts: JSONL file (.jsonl, .jsonl.xz or .jsonl.gz); each line has "prompt", a text or a list of chat messages.
        chat_template: Wrap text prompts as one user message in the tokenizer's chat template.
        system_prompt: System message put before every chat prompt.
        max_prompt_tokens: Longest prompt allowed; unset means whatever fits into both models' context.
        long_prompts: What to do with longer prompts, stop with an error or drop them and say how many.
    """

    prompts: str = ""
    chat_template: bool = True
    system_prompt: str | None = None
    max_prompt_tokens: int | None = None
    long_prompts: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        _require(bool(self.prompts), "data.prompts", "the path of a JSONL file", self.prompts)
        limit = self.max_prompt_tokens
        _require(limit is None or limit >= 1, "data.max_prompt_tokens", ">= 1 or unset", limit)
        _require(
            self.system_prompt is None or self.chat_template,
            "data.system_prompt",
            "unset when data.chat_template is false",
            self.system_prompt,
        )


@dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are drawn.

    Args:
        horizon: Response tokens after which a rollout stops (EOS stops it earlier). ESR is a short horizon.
        batch_size: Rollouts in a step.
        samples_per_prompt: Rollouts for each prompt, which is read once for all of them; batch_size is a multiple of it.
        sampling_temperature: Temperature of sampling; 0 is greedy.
        top_k: Keep only the k most probable tokens; 0 is off.
        top_p: Keep the smallest set of tokens whose probability reaches top_p; 1 is off.
        min_p: Drop tokens less probable than min_p times the most probable one; 0 is off.
        backend: Who draws; inprocess decodes with the trainer's own weights, hf_generate is transformers' generate, vllm is a
            server (docs/vllm.md).
        vllm_url: Where the server of the vllm backend listens, such as http://host:8000.
        vllm_weights_folder: Folder that trainer and server see, through which the server gets the weights.
        vllm_weights_folder_on_server: Path of that folder on the server; unset is the same.
        cuda_graphs: On a CUDA device, capture a decode step and replay it; false launches every kernel of every step.
        overlap_teacher: Let the teacher read the prompts while rollouts are drawn, on a CUDA device in a stream of its own;
            that time is part of the rollout's.
        compile_step: Pass the decode step of inprocess through torch.compile, which takes its time in the first rollout.
    """

    horizon: int = 100
    batch_size: int = 16
    samples_per_prompt: int = 1
    sampling_temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    backend: Literal["inprocess", "hf_generate", "vllm"] = "inprocess"
    vllm_url: str | None = None
    vllm_weights_folder: str | None = None
    vllm_weights_folder_on_server: str | None = None
    cuda_graphs: bool = True
    overlap_teacher: bool = False
    compile_step: bool = False

    def __post_init__(self) -> None:
        _require(self.horizon >= 1, "rollout.horizon", ">= 1", self.horizon)
        _require(self.batch_size >= 1, "rollout.batch_size", ">= 1", self.batch_size)
        samples, batch_size = self.samples_per_prompt, self.batch_size
        divides = samples >= 1 and batch_size % samples == 0
        _require(divides, "rollout.samples_per_prompt", f">= 1 and a divisor of batch_size {batch_size}", samples)
        is_inprocess = self.backend == "inprocess"
        _require(
            is_inprocess or self.cuda_graphs, "rollout.cuda_graphs", "true unless rollout.backend is inprocess", False
        )
        _require(
            is_inprocess or not self.compile_step,
            "rollout.compile_step",
            "false unless rollout.backend is inprocess",
            True,
        )
        _require(self.sampling_temperature >= 0, "rollout.sampling_temperature", ">= 0", self.sampling_temperature)
        _require(self.top_k >= 0, "rollout.top_k", ">= 0", self.top_k)
        _require(0 <= self.top_p <= 1, "rollout.top_p", "in [0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "rollout.min_p", "in [0, 1]", self.min_p)

        for name in ("vllm_url", "vllm_weights_folder"):
            value, is_vllm = getattr(self, name), self.backend == "vllm"
            must_be = "set for rollout.backend vllm" if is_vllm else "unset unless rollout.backend is vllm"
            _require((value is not None) == is_vllm, f"rollout.{name}", must_be, value)
        on_server = self.vllm_weights_folder_on_server
        _require(
            on_server is None or self.backend == "vllm",
            "rollout.vllm_weights_folder_on_server",
            "unset unless rollout.backend is vllm",
            on_server,
        )

    @property
    def sampler(self) -> SamplerSettings:
        return SamplerSettings(self.sampling_temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Args:
        divergence: Divergence between student and teacher at each position.
        divergence_parameter: beta of jsd, lam of the skew KLs, alpha of alpha_divergence; unset for the others.
        loss_temperature: Temperature of both distributions in the loss.
        prefix_tokens: Train only the first this many response tokens; unset trains the whole rollout.
        normalizer: sequence_mean averages over a rollout's positions, then over rollouts (the paper's code); token_mean
            averages over all positions of the batch; sum adds over positions and averages over rollouts (the paper's equation).
        merge_stop_ids: Score all end-of-sequence ids of both models as one event.
        vocab_size: Cut both vocabularies to this many ids before the softmax, for padded heads of unequal width.
    """

    divergence: DivergenceName = "reverse_kl"
    divergence_parameter: float | None = None
    loss_temperature: float = 1.0
    prefix_tokens: int | None = None
    normalizer: Literal["sequence_mean", "token_mean", "sum"] = "sequence_mean"
    merge_stop_ids: bool = True
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        _require(self.loss_temperature > 0, "loss.loss_temperature", "> 0", self.loss_temperature)
        tokens, vocab_size = self.prefix_tokens, self.vocab_size
        _require(tokens is None or tokens >= 1, "loss.prefix_tokens", ">= 1 or unset", tokens)
        _require(vocab_size is None or vocab_size >= 1, "loss.vocab_size", ">= 1 or unset", vocab_size)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: Peak learning rate.
        betas: Decay rates of the two moments.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are scaled down to this norm.
        schedule: Shape of the learning rate after the warm-up.
        warmup_fraction: Share of the steps in which the learning rate rises from 0.
    """

    learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = 0.1

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate", "> 0", self.learning_rate)
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "in [0, 1)", self.betas)
        _require(self.weight_decay >= 0, "optimizer.weight_decay", ">= 0", self.weight_decay)
        _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", "> 0", self.max_grad_norm)
        _require(0 <= self.warmup_fraction < 1, "optimizer.warmup_fraction", "in [0, 1)", self.warmup_fraction)


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
        _require(self.every >= 1, "evaluation.every", ">= 1", self.every)
        _require(self.max_tokens >= 1, "evaluation.max_tokens", ">= 1", self.max_tokens)
        _require(self.batch_size >= 1, "evaluation.batch_size", ">= 1", self.batch_size)
        _require(self.limit is None or self.limit >= 1, "evaluation.limit", ">= 1 or unset", self.limit)


@dataclass(frozen=True)
class RunConfig:
    """The run itself.

    Args:
        output_dir: Folder of checkpoints, metrics.jsonl and the resolved config.yaml.
        steps: Optimizer steps.
        seed: Seed of the order of prompts and of sampling.
        save_every: Steps between checkpoints; the last step is always saved.
        keep_checkpoints: How many of the newest checkpoints are kept.
    """

    output_dir: str = "runs/esr"
    steps: int = 200
    seed: int = 0
    save_every: int = 50
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _require(bool(self.output_dir), "run.output_dir", "a folder", self.output_dir)
        _require(self.steps >= 1, "run.steps", ">= 1", self.steps)
        _require(0 <= self.seed < 2**64, "run.seed", "in [0, 2**64)", self.seed)
        _require(self.save_every >= 1, "run.save_every", ">= 1", self.save_every)
        _require(self.keep_checkpoints >= 1, "run.keep_checkpoints", ">= 1", self.keep_checkpoints)


@dataclass(frozen=True)
class TrainConfig:
    """A distillation run: horizon, trained positions, divergence, normaliser, stop rule and the two temperatures are
    independent of each other; Early Stopping Rollout, full rollouts and loss-masked full rollouts are combinations."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        tokens, horizon = self.loss.prefix_tokens, self.rollout.horizon
        _require(tokens is None or tokens <= horizon, "loss.prefix_tokens", f"<= rollout.horizon = {horizon}", tokens)

    @property
    def trained_tokens(self) -> int:
        """Response tokens of each rollout that train: the prefix if one is set, else all up to the horizon."""
        return self.loss.prefix_tokens or self.rollout.horizon


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
        _require(bool(self.model), "model", "a hub id or a local folder", self.model)
        _require(bool(self.prompts), "prompts", "the path of a JSONL file", self.prompts)

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
