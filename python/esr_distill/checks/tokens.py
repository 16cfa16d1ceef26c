"""Do both models mean the same by every id, and at which ids does a response end?"""

from collections.abc import Iterable

from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from esr_distill import preflight
from esr_distill.checks.finding import Finding
from esr_distill.config import ModelConfig
from esr_distill.input_error import InputError
from esr_distill.models import load_tokenizer
from esr_distill.training_run import TrainingRun


def tokenizer_finding(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Finding:
    """Whether the maps from tokens to ids are equal."""
    try:
        preflight.check_tokenizer_pair(student, teacher)
    except InputError as error:
        fix = "take a teacher of the student's family; ids that mean something else cannot be scored"
        return Finding("tokenizers", "error", str(error), fix)
    count = len(student.get_vocab())
    return Finding("tokenizers", "ok", f"both map the same {count} tokens to the same ids", values={"tokens": count})


def stop_sources(run: TrainingRun, teacher_tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The EOS ids that each file of each side names; nothing where there is no such file or it names none."""
    settings = run.config.model
    teacher = settings.student if settings.is_teacher_base else settings.teacher
    return {
        "the student's tokenizer": ids_of(run.tokenizer.eos_token_id),
        "the student's generation config": saved_generation_ids(settings.student),
        "the student's config": ids_of(run.student.config.get_text_config().eos_token_id),
        "the teacher's tokenizer": ids_of(teacher_tokenizer.eos_token_id),
        "the teacher's generation config": saved_generation_ids(teacher),
        "the teacher's config": ids_of(run.teacher.config.get_text_config().eos_token_id),
    }


def ids_of(value: int | list[int] | None) -> list[int]:
    return [] if value is None else sorted(value if isinstance(value, list) else [value])


def saved_generation_ids(source: str) -> list[int]:
    """From the file, since a run gives its student's generation config the merged ids."""
    try:
        return ids_of(GenerationConfig.from_pretrained(source).eos_token_id)
    except OSError:  # there is none: transformers takes the model's config
        return []


def stop_finding(
    sources: dict[str, list[int]], merged: Iterable[int], are_merged: bool, tokenizer: PreTrainedTokenizerBase
) -> Finding:
    """Which ids end a response, and whether the loss takes them for one event.

    `merged` are the ids at which rollouts stop, `are_merged` is `loss.merge_stop_ids`.
    """
    merged = sorted(merged)

    def named(ids: Iterable[int]) -> str:
        return ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)})" for i in ids)

    values = {"sources": sources, "stop_ids": merged, "merged_in_loss": are_merged}
    left_out = {i: name for name, ids in sources.items() for i in ids if i not in merged}
    where = "; ".join(f"{name}: {', '.join(map(str, ids)) or 'none'}" for name, ids in sources.items())
    message = f"rollouts end at {named(merged)} ({where})"
    if left_out:
        return Finding(
            "stop ids",
            "warning",
            f"{message}; not at {named(left_out)}, which {', '.join(sorted(set(left_out.values())))} names",
            "put the id into the eos_token_id of a model's generation_config.json, or the model writes on behind its end",
            values,
        )
    if len(merged) > 1 and not are_merged:
        return Finding(
            "stop ids",
            "warning",
            f"{message}; the loss takes them for different events",
            "set loss.merge_stop_ids to true, or a student that ends with another id than the teacher unlearns ending",
            values,
        )
    return Finding("stop ids", "ok", message + ("; one event in the loss" if len(merged) > 1 else ""), values=values)


def load_tokenizers(settings: ModelConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Both tokenizers; the same one twice where the teacher is the student's base."""
    code = settings.trust_remote_code
    files = {"student": settings.student_gguf_file, "teacher": settings.teacher_gguf_file}
    student = load_tokenizer(settings.student, "model.student", gguf_file=files["student"], trust_remote_code=code)
    if settings.is_teacher_base:
        return student, student
    return student, load_tokenizer(
        settings.teacher, "model.teacher", gguf_file=files["teacher"], trust_remote_code=code
    )


def have_other_widths(settings: ModelConfig) -> bool:
    """Whether the models' configs name vocabularies of different size; False where a config cannot be read."""
    try:
        widths = {
            AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
            .get_text_config()
            .vocab_size
            for source in (settings.student, settings.teacher)
        }
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return len(widths) > 1
