"""Two evaluations on the same problems: this one minus another that a file holds, question by question."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from esr_distill.complete_files import read_json
from esr_distill.config import EvalConfig
from esr_distill.evaluation.accuracy import PairedDifference, paired_difference, values_by_question
from esr_distill.evaluation.grades import Grades
from esr_distill.input_error import InputError
from esr_distill.prompts import PromptRecord

# Options that may explain a difference as well as the models do: they are named where they differ.
NAMED_OPTIONS = (
    "chat_template",
    "system_prompt",
    "model_gguf_file",
    "dtype",
    "vocab_size",
    "max_tokens",
    "samples_per_problem",
    "sampling_temperature",
    "top_k",
    "top_p",
    "min_p",
)


@dataclass(frozen=True)
class OtherResult:
    """An evaluation from a result file: its model, options and grades."""

    path: str
    model: str
    options: dict
    grades: Grades


def problems_digest(records: list[PromptRecord]) -> str:
    """SHA-256 of prompts and answers in their order, whatever the tokenizer and the template."""
    return hashlib.sha256(json.dumps([[record.prompt, record.answer] for record in records]).encode()).hexdigest()


def read_other_result(path: str, digest: str, scorer: str) -> OtherResult:
    """The result at `path`, which must be of the same problems and scorer.

    Raises:
        InputError: no such file, no result of `esr-distill eval`, other problems, or another scorer.
    """
    if not Path(path).is_file():
        raise InputError(f"compare must be a result file of esr-distill eval, got {path!r}, which is no file")
    try:
        result = read_json(Path(path))
        other_digest, options = result["problems_digest"], dict(result["options"])
        other = OtherResult(path, str(result["model"]), options, Grades.from_rows(result["problems"]))
        other_scorer = options["scorer"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"compare must be a result file of esr-distill eval, got {path!r} ({found})") from None
    if other_digest != digest:
        raise InputError(
            f"compare must be a result on the same problems (prompts, answers, order and limit), got {path!r}, "
            f"which has {len(other.grades.answers)} with digest {str(other_digest)[:12]}, not {digest[:12]}"
        )
    if other_scorer != scorer:
        raise InputError(f"compare must be a result of scorer {scorer}, got {path!r}, which is of {other_scorer}")
    return other


def differences(grades: Grades, other: Grades) -> dict[str, PairedDifference]:
    """`grades` minus `other` for each measure that both have. Majority votes are compared only among equal numbers of samples:
    a vote of more is another quantity."""
    values, other_values = values_by_question(grades), values_by_question(other)
    shared = [name for name in values if name in other_values]
    if grades.correct_Q_S.shape != other.correct_Q_S.shape:
        shared.remove("majority")
    return {name: paired_difference(values[name], other_values[name]) for name in shared}


def options_that_differ(config: EvalConfig, other: OtherResult) -> dict[str, list]:
    """Name to [here, there], of the options that may explain a difference."""
    pairs = {name: [getattr(config, name), other.options.get(name)] for name in NAMED_OPTIONS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
