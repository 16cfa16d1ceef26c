"""Sizes of the cases: those of Qwen3-1.7B learning from Qwen3-8B for a GPU, tiny ones to prove that every case runs."""

from dataclasses import dataclass

import torch

from esr_kernels.testing.cases import MODEL_SHAPES, VOCAB_SIZES, Shape


@dataclass(frozen=True)
class Settings:
    device: str
    is_smoke: bool
    compile_backend: str
    half_dtype: torch.dtype  # of logits that are given; hidden states and heads are bfloat16
    shape: Shape
    logit_rows: int  # of K1, K3 and the tiles
    many_rows: int
    vocab_sizes: tuple[int, ...]
    row_counts: tuple[int, ...]
    recompute_bytes: int  # a workspace too small to keep d(logits) of `shape`
    keep_bytes: int  # one that keeps those of `many_rows`, and of `full_horizon`
    rollouts: int  # of the prefix cases, which start after `prompt_columns`
    prompt_columns: int
    horizon: int
    full_horizon: int  # of rollouts that are not stopped early
    numbers_of_ids: tuple[int, ...]  # of top-k
    gaps: tuple[float, ...]  # between teacher and student logits; reverse KL is about half the square
    tiles: tuple[tuple[int, int], ...]  # (block_vocab, num_warps)
    slice_ids: tuple[int, ...]
    projection_columns: tuple[int, ...]
    batch_sizes: tuple[int, ...]  # of the sampler: C1 and C4, and C1 in float32
    float32_batch_sizes: tuple[int, ...]
    filter_batch_sizes: tuple[int, ...]  # C2
    extreme_batch_sizes: tuple[int, ...]  # C3
    calls_per_sample: int
    cached_logit_bytes: int  # up to this size one batch of logits is read again and again; larger ones take turns

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size


def full_settings() -> Settings:
    shape = MODEL_SHAPES["qwen3-1.7b<-8b"]
    names = ("llama2", "llama3", "qwen3-tokenizer", "qwen3", "gemma")
    return Settings(
        device="cuda",
        is_smoke=False,
        compile_backend="inductor",
        half_dtype=torch.bfloat16,
        shape=shape,
        logit_rows=shape.rows,
        many_rows=64_000,
        vocab_sizes=tuple(VOCAB_SIZES[name] for name in names),
        row_counts=(320, 1056, 2112, 3200, 4096, 4224, 6400),
        recompute_bytes=2_000_000_000,
        keep_bytes=26_000_000_000,
        rollouts=32,
        prompt_columns=200,
        horizon=100,
        full_horizon=2000,
        numbers_of_ids=(64, 256),
        gaps=(1.0, 0.3, 0.1, 0.03),
        tiles=(
            *((1024, 2), (1024, 4), (2048, 4), (2048, 8), (2048, 16)),
            *((4096, 8), (4096, 16), (4096, 32), (8192, 16), (8192, 32)),
        ),
        slice_ids=(4096, 8192, 16384, 32768, 65536, shape.vocab_size),
        projection_columns=(1024, 2048, 4096, 8192, 16384),
        batch_sizes=(1, 8, 32, 64, 128, 256, 512),
        float32_batch_sizes=(32, 512),
        filter_batch_sizes=(32, 128, 512),
        extreme_batch_sizes=(32, 512),
        calls_per_sample=20,
        cached_logit_bytes=25_000_000,
    )


def smoke_settings() -> Settings:
    """On a CPU in Triton's interpreter, which cuts bfloat16 off where the hardware rounds: logits are float16."""
    return Settings(
        device="cpu",
        is_smoke=True,
        compile_backend="aot_eager",
        half_dtype=torch.float16,
        shape=Shape(rows=2, vocab_size=200, student_size=16, teacher_size=24),
        logit_rows=1,
        many_rows=4,
        vocab_sizes=(128, 200),
        row_counts=(1, 3),
        recompute_bytes=3_500,
        keep_bytes=12_000,
        rollouts=2,
        prompt_columns=3,
        horizon=2,
        full_horizon=4,
        numbers_of_ids=(3, 5),
        gaps=(1.0, 0.1),
        tiles=((256, 2),),
        slice_ids=(128, 200),
        projection_columns=(128, 256),
        batch_sizes=(1, 3),
        float32_batch_sizes=(3,),
        filter_batch_sizes=(3,),
        extreme_batch_sizes=(2,),
        calls_per_sample=1,
        cached_logit_bytes=500,
    )
