"""Rows of teacher logits for `logit_precision.py`: drawn to look like a language model's, or a real model's."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from esr_distill.hidden_states import output_head
from esr_distill.models import load_model, load_tokenizer
from esr_distill.real_demo.gsm8k import load_problems

# (first row, end) -> float64 logits, (rows, V)
RowSource = Callable[[int, int], np.ndarray]
ROWS_PER_TEXT = 8


def drawn_rows(vocab_size: int, seed: int) -> RowSource:
    """A Gaussian bulk, 3 to 60 raised tokens of which one leads, a common offset.

    The ids of raised tokens are log-uniform: vocabularies are ordered by the frequency of their merges, so that likely
    tokens lie together at low ids.
    """

    def row(index: int) -> np.ndarray:
        generator = np.random.default_rng([seed, index])
        logits = generator.normal(5, 2.2, vocab_size)
        ids = np.unique((vocab_size ** generator.random(generator.integers(3, 61))).astype(np.int64)) - 1
        logits[ids] = 5 + generator.uniform(4, 18, ids.size)
        logits[generator.choice(ids)] = 5 + generator.uniform(16, 26)
        return logits

    return lambda start, end: np.stack([row(index) for index in range(start, end)])


def model_rows(folder: Path, rows: int) -> RowSource:
    """The next-token logits of a causal LM on worked solutions of the test set of GSM8K, projected in float64."""
    tokenizer = load_tokenizer(str(folder), "--model")
    model = load_model(str(folder), "--model", dtype="float32", attn_implementation="sdpa", device=torch.device("cpu"))
    logits = []
    for problem in load_problems("test")[: -(-rows // ROWS_PER_TEXT)]:
        ids_1_T = tokenizer(f"{problem.question}\n{problem.solution}", return_tensors="pt").input_ids
        solution_length = len(tokenizer(problem.solution).input_ids)
        columns = np.linspace(-solution_length, -2, ROWS_PER_TEXT).astype(int)
        with torch.no_grad():
            hidden = model.base_model(ids_1_T, use_cache=False).last_hidden_state[0, columns]
            logits.append(output_head(model).logits(hidden.double()).numpy())
    logits = np.concatenate(logits)[:rows]
    return lambda start, end: logits[start:end]
