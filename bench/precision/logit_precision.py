"""How exact is the gradient of a divergence when logits, or the gradient of the logits, are stored in 16 bits?

make demo-real                                # once, for the rows of a real model
python -m bench.precision.logit_precision --model runs/demo-real/models/SmolLM2-135M-Instruct

Two minutes on one core; tables, JSON and figure go to runs/logit_precision. Without --model only drawn rows are measured;
with --record, which needs --model, bench/results, docs/figures and the tables of docs/numerics.md are brought up to date.
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

from bench.precision.logit_rows import RowSource, drawn_rows, model_rows
from bench.record_demo import RESULTS, ROOT, machine_folder, replace_block
from bench.reports.logit_precision_report import tables, write_figure
from esr_distill.complete_files import write_json, write_text
from esr_distill.machine import machine_record

NOISE_LEVELS = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
CONFIDENCES = (1e-1, 1e-3, 1e-5, 1e-7)  # 1 - p of the student's likeliest token
TILE_COLUMNS = 128
ROWS_AT_ONCE = 8

Pair = tuple[np.ndarray, np.ndarray]  # student, teacher


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as float32."""
    bits = values.astype(np.float32, copy=False).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))


def round_to_float16(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest float16, as float32."""
    return values.astype(np.float16).astype(np.float32)


def below_row_maximum(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max(axis=-1, keepdims=True)


def tile_maxima(logits: np.ndarray) -> np.ndarray:
    """For each column the maximum of its tile of 128 columns."""
    maxima = np.maximum.reduceat(logits, np.arange(0, logits.shape[-1], TILE_COLUMNS), axis=-1)
    return np.repeat(maxima, TILE_COLUMNS, axis=-1)[:, : logits.shape[-1]]


def below_tile_maximum(logits: np.ndarray) -> np.ndarray:
    """float16 of the difference to the tile's maximum, which stays in float32."""
    maxima = tile_maxima(logits)
    return round_to_float16(logits - maxima) + below_row_maximum(maxima)


def tile_relative(student: np.ndarray, teacher: np.ndarray) -> Pair:
    """TRF16 as the op stores it: the teacher as the further difference to the student, where the student is near its maximum."""
    student_maxima, teacher_maxima = tile_maxima(student), tile_maxima(teacher)
    student_below, teacher_below = student - student_maxima, teacher - teacher_maxima
    student_stored = round_to_float16(student_below)
    is_difference = student_stored >= -8
    teacher_stored = round_to_float16(teacher_below - np.where(is_difference, student_below, 0))
    teacher_stored += np.where(is_difference, student_stored, 0)
    return student_stored + below_row_maximum(student_maxima), teacher_stored + below_row_maximum(teacher_maxima)


def each_side(store: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], Pair]:
    return lambda student, teacher: (store(student), store(teacher))


# What a row kernel reads back from each storage of float32 logits: float32 differences to the maximum of the row.
LOGIT_STORAGES: dict[str, Callable[[np.ndarray, np.ndarray], Pair]] = {
    "bfloat16": each_side(lambda logits: below_row_maximum(round_to_bfloat16(logits))),
    "float16": each_side(lambda logits: below_row_maximum(round_to_float16(logits))),
    "tile_relative_apart": each_side(below_tile_maximum),
    "tile_relative": tile_relative,
    "float32": each_side(below_row_maximum),
}


def count_shared_tiles(logits: np.ndarray) -> np.ndarray:
    """Number of likely tokens (p > 1e-3), and of those that have a likelier one in their tile."""
    weights = np.exp(below_row_maximum(logits))
    is_likely = weights > 1e-3 * weights.sum(axis=-1, keepdims=True)
    return np.array([is_likely.sum(), (is_likely & (logits < tile_maxima(logits))).sum()])


def row_scaled_float16(gradient: np.ndarray, divergence: str, value_N: np.ndarray) -> np.ndarray:
    """float16 of the gradient times the largest power of two that keeps its bound within 2**15, scaled back."""
    bound_N = 3 + 2 * (1 + PARAMETERS[divergence]) * value_N
    exponent_N_1 = (15 - np.ceil(np.log2(bound_N))).astype(np.int32)[:, None]
    return np.ldexp(round_to_float16(np.ldexp(gradient.astype(np.float32), exponent_N_1)), -exponent_N_1)


# Enter the bound of a gradient's entries, 3 + 2 (1 + |parameter|) value, which docs/numerics.md derives.
PARAMETERS = {"forward_kl": 0.0, "reverse_kl": 0.0, "jsd_0.5": 0.5}


def values_and_gradients(student: np.ndarray, teacher: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{divergence: (value_N, gradient of the student's logits)}, from logits less their row maximum, in their dtype."""
    # numpy adds pairwise along contiguous rows only; one after the other, 151,936 float32 lose four digits.
    student, teacher = np.ascontiguousarray(student), np.ascontiguousarray(teacher)
    student_weights, teacher_weights = np.exp(student), np.exp(teacher)
    student_sum, teacher_sum = (weights.sum(axis=-1, keepdims=True) for weights in (student_weights, teacher_weights))
    p, q = student_weights / student_sum, teacher_weights / teacher_sum
    log_ratio = (student - teacher) - np.log(student_sum / teacher_sum)  # log(p / q)
    student_to_mixture = -np.log1p(0.5 * np.expm1(-log_ratio))  # log(p / m) with m = (p + q) / 2
    teacher_to_mixture = student_to_mixture - log_ratio
    terms_and_costs = {  # terms of the divergence; p times its derivative by p
        "forward_kl": (-q * log_ratio, -q),
        "reverse_kl": (p * log_ratio, p * log_ratio),
        "jsd_0.5": (0.5 * (p * student_to_mixture + q * teacher_to_mixture), 0.5 * p * student_to_mixture),
    }
    return {
        name: (terms.sum(axis=-1), cost - p * cost.sum(axis=-1, keepdims=True))
        for name, (terms, cost) in terms_and_costs.items()
    }


class ErrorSums:
    """Squared errors and squared norms of one noise level, summed over the rows seen so far."""

    def __init__(self) -> None:
        self.value_sum: dict[str, float] = {}
        self.squares: dict[tuple[str, str, str], np.ndarray] = {}

    def add(self, quantity: str, divergence: str, storage: str, actual: np.ndarray, exact: np.ndarray) -> None:
        squares = np.array([np.square(actual - exact).sum(), np.square(exact).sum()])
        key = (quantity, divergence, storage)
        self.squares[key] = self.squares.get(key, 0.0) + squares

    def record(self, rows: int) -> dict:
        """{divergence: {"value": mean, quantity: {storage: error in norm over the norm}}}."""
        divergences: dict = {name: {"value": total / rows} for name, total in self.value_sum.items()}
        for (quantity, divergence, storage), (error, norm) in self.squares.items():
            divergences[divergence].setdefault(quantity, {})[storage] = float(np.sqrt(error / norm))
        return divergences


def measure_block(sums: ErrorSums, student: np.ndarray, teacher: np.ndarray, weight_V_D: np.ndarray) -> None:
    """Add the errors of some rows of float64 logits: of d(logits), and of the hidden states' gradient in bfloat16."""
    exact = values_and_gradients(below_row_maximum(student), below_row_maximum(teacher))
    stored = {
        storage: values_and_gradients(*store(student.astype(np.float32), teacher.astype(np.float32)))
        for storage, store in LOGIT_STORAGES.items()
    }
    for divergence, (value_N, gradient) in exact.items():
        sums.value_sum[divergence] = sums.value_sum.get(divergence, 0.0) + float(value_N.sum())
        computed = {storage: results[divergence][1] for storage, results in stored.items()}
        kept = {
            "bfloat16": round_to_bfloat16(gradient.astype(np.float32)),
            "row_scaled_float16": row_scaled_float16(gradient, divergence, value_N),
        }
        for storage, actual in computed.items():
            sums.add("logits", divergence, storage, actual, gradient)
        for storage, actual in kept.items():
            sums.add("logits_gradient", divergence, storage, actual, gradient)

        half_weight_V_D = round_to_float16(weight_V_D)
        hidden_gradients = {
            "exact": gradient.astype(np.float32) @ weight_V_D,
            "bfloat16": kept["bfloat16"] @ weight_V_D,
            "row_scaled_float16": kept["row_scaled_float16"] @ half_weight_V_D,
            "bfloat16_then_bfloat16": round_to_bfloat16(computed["bfloat16"]) @ weight_V_D,
        }
        for storage in ("float32", "tile_relative_apart", "tile_relative"):
            both = row_scaled_float16(computed[storage], divergence, value_N)
            hidden_gradients[f"{storage}_then_row_scaled_float16"] = both @ half_weight_V_D
        exact_hidden_gradient = gradient @ weight_V_D.astype(np.float64)
        for storage, actual in hidden_gradients.items():
            sums.add("hidden_gradient", divergence, storage, round_to_bfloat16(actual), exact_hidden_gradient)


def measure_confident_rows(settings: dict, remainder: float) -> dict:
    """Largest relative error of the gradient of the likeliest token, which has p = 1 - remainder, in float32.

    Directly, and as minus the sum of the other tokens' gradients. The teacher's remainder is three times the student's.
    """
    generator = np.random.default_rng([settings["seed"], round(-np.log10(remainder))])
    others = generator.normal(0, 2.2, (2, settings["confident_rows"], settings["vocab_size"]))
    others[:, :, 0] = -np.inf
    sides = []
    for logits, rest in zip(others, (remainder, 3 * remainder), strict=True):
        logits += np.log(rest / (1 - rest)) - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        logits[:, 0] = 0.0
        sides.append(logits.astype(np.float32))
    exact = values_and_gradients(*(side.astype(np.float64) for side in sides))
    computed = values_and_gradients(*sides)
    errors = {}
    for divergence, (_, gradient) in computed.items():
        truth = exact[divergence][1][:, 0]
        ways = {"direct": gradient[:, 0], "minus_the_others": -gradient[:, 1:].sum(axis=-1)}
        errors[divergence] = {way: float(np.abs(actual / truth - 1).max()) for way, actual in ways.items()}
    return {"remainder": remainder, "divergences": errors}


def measure_source(read_rows: RowSource, settings: dict, advance: Callable[[int], None]) -> dict:
    """Errors by noise level for the rows of one source; the same rows and the same direction of the noise at each."""
    rows, vocab_size = settings["rows"], read_rows(0, 1).shape[-1]
    generator = np.random.default_rng(settings["seed"])
    weight_V_D = round_to_bfloat16(generator.normal(0, 0.02, (vocab_size, settings["hidden_size"])).astype(np.float32))
    sums = {noise: ErrorSums() for noise in settings["noise"]}
    counts = np.zeros(2)
    for start in range(0, rows, ROWS_AT_ONCE):
        teacher = read_rows(start, min(start + ROWS_AT_ONCE, rows))
        unit_noise = generator.standard_normal(teacher.shape)
        counts += count_shared_tiles(teacher)
        for noise, level in sums.items():
            measure_block(level, teacher + noise * unit_noise, teacher, weight_V_D)
            advance(len(teacher))
    return {
        "vocab_size": vocab_size,
        "likely_tokens_of_a_row": counts[0] / rows,
        "share_beside_a_likelier": counts[1] / counts[0],
        "levels": [{"noise": noise, "divergences": level.record(rows)} for noise, level in sums.items()],
    }


def measure(settings: dict, sources: dict[str, RowSource], console: Console) -> dict:
    """Run the whole experiment; memory is that of a few rows whatever `rows` is."""
    begin = time.perf_counter()
    measured = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        total = settings["rows"] * len(settings["noise"])
        for name, read_rows in sources.items():
            if not console.is_terminal:
                console.print(f"{name}: {settings['rows']} rows at {len(settings['noise'])} noise levels")
            task = progress.add_task(f"{name}, rows x noise levels", total=total)
            measured[name] = measure_source(read_rows, settings, partial(progress.advance, task))
    return {
        "settings": settings,
        "sources": measured,
        "confident": [measure_confident_rows(settings, remainder) for remainder in CONFIDENCES],
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine_with_numpy(),
    }


def machine_with_numpy() -> dict:
    machine = machine_record()
    return machine | {"versions": machine["versions"] | {"numpy": np.__version__}}


def keep(results: dict, output: Path) -> None:
    """Copy JSON and figure to their places in the repository and bring the tables of docs/numerics.md up to date."""
    folder = RESULTS / machine_folder(results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "logit_precision.json", folder / "logit_precision.json")
    shutil.copyfile(output / "logit_precision.png", figures / "logit_precision.png")
    document = ROOT / "docs" / "numerics.md"
    text = document.read_text(encoding="utf-8")
    for name, table in tables(results).items():
        text = replace_block(text, name, table)
    write_text(document, text)


def positive(number: Callable) -> Callable:
    """A parser of command-line numbers > 0."""

    def parse(text: str):
        value = number(text)
        if not 0 < value < np.inf:
            raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
        return value

    return parse


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal LM whose logits are measured too")
    parser.add_argument("--rows", type=positive(int), default=48)
    parser.add_argument("--vocab-size", type=positive(int), default=151_936, help="of the drawn rows")
    parser.add_argument(
        "--hidden-size", type=positive(int), default=64, help="columns of the output head for the hidden gradient"
    )
    parser.add_argument(
        "--confident-rows", type=positive(int), default=16, help="rows of the experiment on a token near p = 1"
    )
    parser.add_argument(
        "--noise", type=positive(float), nargs="+", default=NOISE_LEVELS, help="student minus teacher, std of logits"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "logit_precision", help="folder for JSON and figure"
    )
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
    write_json(output / "logit_precision.json", results)
    write_figure(results, output / "logit_precision.png")
    for name, table in tables(results).items():
        console.print(name, table, "", sep="\n", soft_wrap=True, markup=False, highlight=False)
    console.print(f"logit_precision.json and .png written to {output}", soft_wrap=True)
    if record:
        keep(results, output)
        console.print("and kept in bench/results, docs/figures and docs/numerics.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
