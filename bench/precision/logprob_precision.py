"""How exact are log-probs, and the gradient of a top-k divergence, when logits are stored in 16 bits?

make demo-real                                # once, for the rows of a real model
python -m bench.precision.logprob_precision --model runs/demo-real/models/SmolLM2-135M-Instruct

A minute on one core; tables and JSON go to runs/logprob_precision. Without --model only drawn rows are measured; with --record,
which needs --model, bench/results and the tables of docs/numerics.md are brought up to date.

Tokens are drawn from the rows. The teacher of the top-k divergence is the row, known at its K likeliest ids; the student is the
row plus Gaussian noise.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from bench.precision.logit_precision import (
    below_row_maximum,
    below_tile_maximum,
    machine_with_numpy,
    positive,
    round_to_bfloat16,
    round_to_float16,
)
from bench.precision.logit_rows import RowSource, drawn_rows, model_rows
from bench.record_demo import RESULTS, ROOT, machine_folder, replace_block
from bench.reports.logit_precision_report import markdown, scientific
from esr_distill.complete_files import write_json, write_text

NOISE_LEVELS = (1.0, 0.5, 0.2, 0.1, 0.05)
ROWS_AT_ONCE = 8
LABELS = {
    "bfloat16": "logits in bfloat16 (2 B)",
    "float16": "logits in float16 (2 B)",
    "tile_relative": "TRF16 (2.03 B)",
    "tile_relative_and_ids": "TRF16, the ids in float32 (2.03 B)",
    "float32": "logits in float32 (4 B)",
}


def with_exact_ids(logits: np.ndarray, ids_N_K: np.ndarray) -> np.ndarray:
    """TRF16 of all columns but the ids, as the ops read it."""
    stored = below_tile_maximum(logits)
    exact = np.take_along_axis(below_row_maximum(logits), ids_N_K, axis=-1)
    np.put_along_axis(stored, ids_N_K, exact, axis=-1)
    return stored


# (float32 logits, ids that the op is asked about) to what a row kernel reads: float32 differences to the row's maximum
STORAGES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "bfloat16": lambda logits, ids: below_row_maximum(round_to_bfloat16(logits)),
    "float16": lambda logits, ids: below_row_maximum(round_to_float16(logits)),
    "tile_relative": lambda logits, ids: below_tile_maximum(logits),
    "tile_relative_and_ids": with_exact_ids,
    "float32": lambda logits, ids: below_row_maximum(logits),
}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In the dtype of the logits."""
    logits = np.ascontiguousarray(logits)  # numpy adds pairwise along contiguous rows only
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def logprob_and_gradient(logits: np.ndarray, tokens_N_1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-prob of each row's token, and its gradient 1[token] - p."""
    logprobs = log_softmax(logits)
    gradient = -np.exp(logprobs)
    others = gradient.copy()
    np.put_along_axis(others, tokens_N_1, 0, axis=-1)  # 1 - p of the token, as the kernel has it
    np.put_along_axis(gradient, tokens_N_1, -others.sum(axis=-1, keepdims=True), axis=-1)
    return np.take_along_axis(logprobs, tokens_N_1, axis=-1)[:, 0], gradient


def topk_gradients(
    logits: np.ndarray, ids_N_K: np.ndarray, teacher_logprobs_N_K: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{divergence: (value_N, gradient of the logits)} over K ids and the tail."""
    rest = np.ascontiguousarray(logits.copy())
    np.put_along_axis(rest, ids_N_K, -np.inf, axis=-1)
    tail_N_1 = np.log(np.exp(rest).sum(axis=-1, keepdims=True))
    events = np.concatenate([np.take_along_axis(logits, ids_N_K, axis=-1), tail_N_1], axis=-1)
    log_p = log_softmax(events)
    log_q = np.concatenate(
        [teacher_logprobs_N_K, np.log1p(-np.exp(teacher_logprobs_N_K).sum(axis=-1, keepdims=True))], axis=-1
    ).astype(logits.dtype)
    p, q, log_ratio = np.exp(log_p), np.exp(log_q), log_p - log_q
    value_N_1 = (p * log_ratio).sum(axis=-1, keepdims=True)
    of_events = {
        "reverse_kl": (value_N_1[:, 0], p * (log_ratio - value_N_1)),
        "forward_kl": ((-q * log_ratio).sum(axis=-1), p - q),
    }
    share = np.exp(rest - tail_N_1)  # of each other id in the tail
    gradients = {}
    for name, (value_N, event_gradient) in of_events.items():
        gradient = share * event_gradient[:, -1:]
        np.put_along_axis(gradient, ids_N_K, event_gradient[:, :-1], axis=-1)
        gradients[name] = value_N, gradient
    return gradients


def draw_tokens(logits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One token per row, drawn from it."""
    cumulative = np.cumsum(np.exp(log_softmax(logits)), axis=-1)
    drawn = generator.random((len(logits), 1)) * cumulative[:, -1:]
    return (cumulative < drawn).sum(axis=-1, keepdims=True)


class Errors:
    """Squared errors against squared norms, and the largest error of a log-prob."""

    def __init__(self) -> None:
        self.squares: dict[tuple[str, str], np.ndarray] = {}
        self.largest: dict[str, float] = {}

    def add(self, quantity: str, storage: str, actual: np.ndarray, exact: np.ndarray) -> None:
        squares = np.array([np.square(actual - exact).sum(), np.square(exact).sum(), exact.size])
        key = quantity, storage
        self.squares[key] = self.squares.get(key, 0.0) + squares

    def relative(self, quantity: str) -> dict[str, float]:
        """Error in norm over the norm, by storage."""
        return {s: float(np.sqrt(x[0] / x[1])) for (q, s), x in self.squares.items() if q == quantity}

    def root_mean_square(self, quantity: str) -> dict[str, float]:
        return {s: float(np.sqrt(x[0] / x[2])) for (q, s), x in self.squares.items() if q == quantity}


def measure_source(read_rows: RowSource, settings: dict, advance: Callable[[int], None]) -> dict:
    rows, generator = settings["rows"], np.random.default_rng(settings["seed"])
    of_tokens, of_levels = Errors(), {noise: Errors() for noise in settings["noise"]}
    values = {noise: {"reverse_kl": 0.0, "forward_kl": 0.0} for noise in settings["noise"]}
    logprob_sum = 0.0
    for start in range(0, rows, ROWS_AT_ONCE):
        teacher = read_rows(start, min(start + ROWS_AT_ONCE, rows))
        tokens_N_1 = draw_tokens(below_row_maximum(teacher), generator)
        exact_logprob, exact_gradient = logprob_and_gradient(below_row_maximum(teacher), tokens_N_1)
        logprob_sum += float(exact_logprob.sum())
        for storage, store in STORAGES.items():
            logprob, gradient = logprob_and_gradient(store(teacher.astype(np.float32), tokens_N_1), tokens_N_1)
            of_tokens.add("logprob", storage, logprob, exact_logprob)
            of_tokens.add("gradient", storage, gradient, exact_gradient)
            largest = float(np.abs(logprob - exact_logprob).max())
            of_tokens.largest[storage] = max(of_tokens.largest.get(storage, 0.0), largest)

        ids_N_K = np.argpartition(-teacher, settings["num_ids"], axis=-1)[:, : settings["num_ids"]]
        teacher_logprobs = np.take_along_axis(log_softmax(below_row_maximum(teacher)), ids_N_K, axis=-1)
        teacher_logprobs = teacher_logprobs.astype(np.float32).astype(np.float64)  # as they are served
        unit_noise = generator.standard_normal(teacher.shape)
        for noise, errors in of_levels.items():
            student = teacher + noise * unit_noise
            exact = topk_gradients(below_row_maximum(student), ids_N_K, teacher_logprobs)
            for storage, store in STORAGES.items():
                actual = topk_gradients(store(student.astype(np.float32), ids_N_K), ids_N_K, teacher_logprobs)
                for name, (_, gradient) in actual.items():
                    errors.add(name, storage, gradient, exact[name][1])
            for name, (value_N, _) in exact.items():
                values[noise][name] += float(value_N.sum()) / rows
            advance(len(teacher))
    levels = [
        {"noise": noise, "value": values[noise], **{name: errors.relative(name) for name in values[noise]}}
        for noise, errors in of_levels.items()
    ]
    return {
        "mean_logprob": logprob_sum / rows,
        "logprob": of_tokens.root_mean_square("logprob"),
        "largest_logprob": of_tokens.largest,
        "gradient": of_tokens.relative("gradient"),
        "topk": levels,
    }


def measure(settings: dict, sources: dict[str, RowSource], console: Console) -> dict:
    begin, measured = time.perf_counter(), {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, read_rows in sources.items():
            total = settings["rows"] * len(settings["noise"])
            task = progress.add_task(f"{name}, rows x noise levels", total=total)
            measured[name] = measure_source(read_rows, settings, partial(progress.advance, task))
    seconds = round(time.perf_counter() - begin, 1)
    return {"settings": settings, "sources": measured, "seconds": seconds, "machine": machine_with_numpy()}


def tables(results: dict) -> dict[str, str]:
    """Every table by the name of its block in docs/numerics.md."""
    sources = results["sources"]
    columns = {"logprob": "log p, rms", "largest_logprob": "log p, largest", "gradient": "d(logits), in norm"}
    headings = [f"{source}, {label}" for source in sources for label in columns.values()]
    rows = [
        [label, *(scientific(sources[source][column][storage]) for source in sources for column in columns)]
        for storage, label in LABELS.items()
    ]
    levels = [(source, level) for source in sources for level in sources[source]["topk"]]
    topk_rows = [["reverse KL (nats)", *(scientific(level["value"]["reverse_kl"]) for _, level in levels)]]
    topk_rows += [
        [label, *(scientific(level["reverse_kl"][storage]) for _, level in levels)] for storage, label in LABELS.items()
    ]
    topk_headings = [f"{source}, noise {level['noise']:g}" for source, level in levels]
    return {
        "logprob-precision": markdown(["error of", *headings], rows),
        "topk-precision": markdown(["error of d(logits)", *topk_headings], topk_rows),
    }


def keep(results: dict, output: Path) -> None:
    """Copy the JSON to its place in the repository and bring the tables of docs/numerics.md up to date."""
    folder = RESULTS / machine_folder(results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "logprob_precision.json", folder / "logprob_precision.json")
    document = ROOT / "docs" / "numerics.md"
    text = document.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        text = replace_block(text, name, table)
    write_text(document, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal LM whose logits are measured too")
    parser.add_argument("--rows", type=positive(int), default=48)
    parser.add_argument("--num-ids", type=positive(int), default=64, help="K of the top-k divergence")
    parser.add_argument("--vocab-size", type=positive(int), default=151_936, help="of the drawn rows")
    parser.add_argument(
        "--noise", type=positive(float), nargs="+", default=NOISE_LEVELS, help="student minus teacher, std of logits"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "logprob_precision", help="folder for the JSON")
    parser.add_argument("--record", action="store_true", help="keep the result in the repository")
    settings = vars(parser.parse_args(argv))
    output, record, model = settings.pop("output"), settings.pop("record"), settings.pop("model")
    if record and model is None:
        parser.error("--record needs --model")
    settings["noise"] = list(settings["noise"])
    sources = {"drawn": drawn_rows(settings["vocab_size"], settings["seed"])}
    if model is not None:
        sources[model.resolve().name] = model_rows(model, settings["rows"])
    console = Console()
    results = measure(settings, sources, console)
    write_json(output / "logprob_precision.json", results)
    for name, table in tables(results).items():
        console.print(name, table, "", sep="\n", soft_wrap=True, markup=False, highlight=False)
    console.print(f"logprob_precision.json written to {output}", soft_wrap=True)
    if record:
        keep(results, output)
        console.print("and kept in bench/results and docs/numerics.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
