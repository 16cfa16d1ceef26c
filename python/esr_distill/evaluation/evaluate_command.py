"""`esr-distill eval`: accuracy of one model on a file of problems, printed and written as JSON, alone or against another's."""

import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esr_distill.complete_files import write_json
from esr_distill.config import EvalConfig, RolloutConfig
from esr_distill.evaluation.accuracy import Accuracy, Estimate, PairedDifference
from esr_distill.evaluation.comparison import (
    OtherResult,
    differences,
    options_that_differ,
    problems_digest,
    read_other_result,
)
from esr_distill.evaluation.evaluate import Evaluation
from esr_distill.evaluation.grades import Grades, Reply
from esr_distill.evaluation.math_equivalence import math_verify_version
from esr_distill.evaluation.scorers import SCORERS
from esr_distill.input_error import InputError
from esr_distill.machine import machine_record
from esr_distill.models import choose_attention, choose_device, find_stop_ids, load_model, load_tokenizer
from esr_distill.progress import make_console, print_line
from esr_distill.prompts import PromptRecord, read_prompt_file
from esr_distill.rollout.choose_backend import make_backend


def evaluate_model(config: EvalConfig) -> int:
    """Print the measures; write them to `config.output` if that is set. Returns the exit status."""
    console = make_console()
    records = read_prompt_file(config.prompts, "prompts")[: config.limit]
    SCORERS[config.scorer].check("scorer", config.scorer)
    digest = problems_digest(records)
    other = None if config.compare is None else read_other_result(config.compare, digest, config.scorer)
    if config.output is not None:
        check_output(Path(config.output))
    device = choose_device(config.device)
    files = {"gguf_file": config.model_gguf_file, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model, "model", **files)
    attention = choose_attention(config.attn_implementation, device, is_in_16_bits=config.dtype == "bfloat16")
    model = load_model(config.model, "model", dtype=config.dtype, attn_implementation=attention, device=device, **files)
    check_vocab_size(config.vocab_size, tokenizer, model)
    evaluation = Evaluation.prepare(
        records,
        tokenizer,
        config.data,
        config.evaluation,
        stop=find_stop_ids(tokenizer, model, vocab_size=config.vocab_size),
        model=model,
        device=device,
        rollouts=make_backend(RolloutConfig(backend=config.backend)),
        group="",
        vocab_size=config.vocab_size,
    )
    start = time.perf_counter()
    replies = evaluation.replies(model, console)
    seconds = time.perf_counter() - start
    grades = evaluation.grade(replies)
    result = Accuracy.of(grades)
    difference = None if other is None else difference_record(config, grades, other)
    print_line(console, f"{config.model}: {result}")
    print_measures(result, difference, console)
    if config.output is not None:
        written = {
            "model": config.model,
            "prompts": config.prompts,
            **result.record(),
            "options": asdict(config),
            "problems_digest": digest,
            "machine": machine_record(),
            "math_verify": math_verify_version() if config.scorer == "boxed_math" else None,
            "rollout_seconds": seconds,
            **({} if difference is None else {"difference": difference}),
            "problems": problem_rows(grades, records, replies if config.save_replies else None),
        }
        write_json(Path(config.output), written)
    return 0


def check_vocab_size(vocab_size: int | None, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError for a cut that leaves out ids of the tokenizer, or is beyond the model's head."""
    if vocab_size is None:
        return
    largest, width = max(tokenizer.get_vocab().values()), model.get_output_embeddings().weight.shape[0]
    if not largest < vocab_size <= width:
        raise InputError(
            f"vocab_size must be above the tokenizer's largest id {largest} and at most {width}, the width of the model's "
            f"output head, got {vocab_size}"
        )


def check_output(path: Path) -> None:
    """Raise InputError where the result could not be written, before hours are spent on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output must be a file that can be written, got {str(path)!r} ({error.strerror})") from None
    if path.is_dir():
        raise InputError(f"output must be a file that can be written, got {str(path)!r}, which is a folder")


def difference_record(config: EvalConfig, grades: Grades, other: OtherResult) -> dict:
    """This evaluation minus the other one, as JSON values."""
    return {
        "minus": other.path,
        "other_model": other.model,
        "options_that_differ": options_that_differ(config, other),
        "estimates": {name: asdict(difference) for name, difference in differences(grades, other.grades).items()},
    }


def problem_rows(grades: Grades, records: list[PromptRecord], replies: list[Reply] | None) -> list[dict]:
    """The grades of each problem, with its prompt, its answer and the replies to it if they are given."""
    rows = grades.rows()
    if replies is None:
        return rows
    num_samples = len(replies) // len(records)
    return [
        {
            "prompt": record.prompt,
            "answer": record.answer,
            **row,
            "replies": [reply.text for reply in replies[number * num_samples : (number + 1) * num_samples]],
        }
        for number, (record, row) in enumerate(zip(records, rows, strict=True))
    ]


def print_measures(result: Accuracy, difference: dict | None, console: Console) -> None:
    """All measures with their standard errors, and the difference from the other evaluation if there is one."""
    table = Table()
    table.add_column("measure")
    table.add_column("value", justify="right")
    if difference is not None:
        table.add_column("difference", justify="right")
    k = result.samples_per_problem
    labels = {"accuracy": f"avg@{k}", "majority": f"maj@{k}"}
    shown = {f"pass@{2**power}" for power in range(k.bit_length())} | {f"pass@{k}"}  # the file has all of them
    for name, estimate in result.estimates.items():
        if name.startswith("pass@") and name not in shown:
            continue
        cells = [labels.get(name, name.replace("_", " ")), measure_text(name, estimate)]
        if difference is not None:
            found = difference["estimates"].get(name)
            cells.append("" if found is None else measure_text(name, PairedDifference(**found)))
        table.add_row(*cells)
    console.print(table)
    console.print("+- one standard error, clustered by problem")
    if difference is not None:
        print_line(console, f"difference: {result.count} problems, this model minus {difference['other_model']}")
        for name, (here, there) in difference["options_that_differ"].items():
            print_line(console, f"{name} is {here!r} here and {there!r} there")


def measure_text(name: str, estimate: Estimate | PairedDifference) -> str:
    """A share in percent, a length in tokens; differences with their sign."""
    is_difference = isinstance(estimate, PairedDifference)
    value, error = estimate.difference if is_difference else estimate.value, estimate.standard_error
    scale, unit = (1, " tokens") if name == "mean_length" else (100, " %")
    error_text = "" if error is None else f" +- {scale * error:.1f}"
    return f"{scale * value:{'+' if is_difference else ''}.1f}{error_text}{unit}"
