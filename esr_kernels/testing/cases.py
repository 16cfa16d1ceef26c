"""Named shapes and named divergences, so that a test and a benchmark mean the same thing by one name."""

from dataclasses import dataclass

from esr_kernels.divergence import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)


@dataclass(frozen=True)
class Shape:
    """N rows over V ids; hidden sizes D of the student and E of the teacher where an op starts from hidden states."""

    rows: int
    vocab_size: int
    student_size: int
    teacher_size: int


# For the interpreter, whose time grows with rows. A kernel's tile has at most 4096 columns: two shapes take several.
SMALL_SHAPES = {
    "ragged": Shape(rows=37, vocab_size=1000, student_size=19, teacher_size=35),
    "odd-vocab": Shape(rows=5, vocab_size=5003, student_size=24, teacher_size=40),
    "qwen3-scaled": Shape(rows=4, vocab_size=128 * 37, student_size=32, teacher_size=48),  # as 151936: 128 x a prime
    "one-tile": Shape(rows=4, vocab_size=128, student_size=16, teacher_size=32),
    "below-a-tile": Shape(rows=4, vocab_size=67, student_size=9, teacher_size=10),
    "one-row": Shape(rows=1, vocab_size=515, student_size=17, teacher_size=23),
    "empty": Shape(rows=0, vocab_size=300, student_size=12, teacher_size=20),
}

# Sizes of published models, 32 rollouts of 100 positions each. For a GPU.
MODEL_SHAPES = {
    "qwen3-0.6b<-1.7b": Shape(rows=3200, vocab_size=151936, student_size=1024, teacher_size=2048),
    "qwen3-0.6b<-4b": Shape(rows=3200, vocab_size=151936, student_size=1024, teacher_size=2560),
    "qwen3-1.7b<-8b": Shape(rows=3200, vocab_size=151936, student_size=2048, teacher_size=4096),
    "qwen3-4b<-32b": Shape(rows=3200, vocab_size=151936, student_size=2560, teacher_size=5120),
    "llama3-1b<-8b": Shape(rows=3200, vocab_size=128256, student_size=2048, teacher_size=4096),
    "smollm2-135m<-1.7b": Shape(rows=3200, vocab_size=49152, student_size=576, teacher_size=2048),
    "gpt2<-gpt2-xl": Shape(rows=3200, vocab_size=50257, student_size=768, teacher_size=1600),
}

# Vocabularies as models pad them, as tokenizers count them, and one that is odd.
VOCAB_SIZES = {
    "qwen3": 151936,  # 128 x 1187
    "qwen3-tokenizer": 151669,
    "qwen2.5-7b": 152064,
    "odd-multiple-of-128": 129920,
    "llama3": 128256,
    "gpt2": 50257,
    "llama2": 32000,
    "gemma": 262144,
}

# Every class, with parameters inside their domain and at the ends where a divergence becomes another one.
DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd_0": GeneralizedJSD(0.0),
    "jsd_0.1": GeneralizedJSD(0.1),
    "jsd_0.5": GeneralizedJSD(0.5),
    "jsd_0.9": GeneralizedJSD(0.9),
    "jsd_1": GeneralizedJSD(1.0),
    "skew_forward_0": SkewForwardKL(0.0),
    "skew_forward_0.1": SkewForwardKL(0.1),
    "skew_forward_0.7": SkewForwardKL(0.7),
    "skew_reverse_0": SkewReverseKL(0.0),
    "skew_reverse_0.1": SkewReverseKL(0.1),
    "skew_reverse_0.7": SkewReverseKL(0.7),
    "total_variation": TotalVariation(),
    "alpha_-1.5": AlphaDivergence(-1.5),
    "alpha_0": AlphaDivergence(0.0),
    "alpha_0.3": AlphaDivergence(0.3),
    "alpha_0.5": AlphaDivergence(0.5),
    "alpha_0.8": AlphaDivergence(0.8),
    "alpha_1": AlphaDivergence(1.0),
    "alpha_2": AlphaDivergence(2.0),
}

# One member of each class: for checks of what does not depend on the parameter.
ONE_OF_EACH_CLASS = {
    name: DIVERGENCES[name]
    for name in (
        "forward_kl",
        "reverse_kl",
        "jsd_0.5",
        "skew_forward_0.1",
        "skew_reverse_0.1",
        "total_variation",
        "alpha_0.5",
    )
}
