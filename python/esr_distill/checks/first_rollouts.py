"""A few short rollouts of the student, scored by both models: would the teacher have anything to teach, and is it steady?"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esr_distill.checks.finding import Finding
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.metrics import by_position, mean_or_none
from esr_distill.models.discarded_mass import discarded_mass
from esr_distill.monitoring.position_bins import count_by_position
from esr_distill.prefix_positions import PrefixPositions, gather_rows, select_prefix_positions
from esr_distill.prompts import pad_prompts
from esr_distill.rollout import RolloutBatch
from esr_distill.rollout.choose_backend import make_backend
from esr_distill.rollout.eval_mode import eval_mode
from esr_distill.score_positions import score_positions
from esr_distill.teacher_prompts import teacher_hidden_states
from esr_distill.training_run import TrainingRun
from esr_kernels import DivergenceOutput, ReverseKL, linear_divergence

PROMPTS, TOKENS = 8, 32
# Ours, of no study: where models agree on less than this share of tokens they have little in common to start from.
LITTLE_AGREEMENT = 0.5
PADDING_MASS = 1e-3  # of a token, from which on it is worth a word
ROUNDING = 1e-4  # nats between two forwards of one model


@dataclass(frozen=True)
class FirstRollouts:
    """Rollouts of the untrained student, and hidden states at the N positions that predict their tokens.

    Attributes:
        teacher_again_N_E: the teacher's, of a second forward over the same ids.
    """

    rollouts: RolloutBatch
    positions: PrefixPositions
    student_N_D: Tensor
    teacher_N_E: Tensor
    teacher_again_N_E: Tensor
    divergence: DivergenceOutput


@torch.no_grad()
def draw_first_rollouts(run: TrainingRun) -> FirstRollouts:
    """Rollouts of the first prompts, with the options of the run but for their length.

    Raises:
        InputError: the backend cannot draw.
        FloatingPointError: logits that are not finite.
    """
    prompts = run.prompts.first(PROMPTS)
    count = len(prompts.token_ids)
    batch = pad_prompts(prompts, range(count), request_ids=range(count))
    request = replace(run.rollout_request, horizon=min(TOKENS, run.config.rollout.horizon))
    # Compiling a step would take longer than all of the check.
    backend = make_backend(replace(run.config.rollout, compile_step=False))
    with eval_mode(run.student):
        with run.autocast():
            rollouts = backend.generate(run.student, batch, request)
            student_hidden_B_T_D = last_hidden_states(run.student, rollouts)
        backend.release()
        teacher_hidden_B_T_E = teacher_hidden_states(run.teacher, rollouts, batch)
        again_B_T_E = teacher_hidden_states(run.teacher, rollouts, batch)
        positions = select_prefix_positions(rollouts, request.horizon)
        return FirstRollouts(
            rollouts,
            positions,
            gather_rows(student_hidden_B_T_D, positions),
            gather_rows(teacher_hidden_B_T_E, positions),
            gather_rows(again_B_T_E, positions),
            score_positions(run, student_hidden_B_T_D, teacher_hidden_B_T_E, positions),
        )


def agreement_finding(run: TrainingRun, first: FirstRollouts) -> Finding:
    """How far apart the models are where the student begins: top-1 agreement and the divergence that training minimises."""
    divergence, name = first.divergence, run.config.loss.divergence
    agreement, mean = mean_or_none(divergence.top1_agreement_N), mean_or_none(divergence.divergence_N)
    begins = Counter(first.rollouts.response_ids_B_K[:, 0].tolist()).most_common(3)
    words = ", ".join(f"{run.tokenizer.decode([token])!r} {count}x" for token, count in begins)
    values = {
        "rollouts": first.rollouts.batch_size,
        "tokens": first.positions.slot_N.numel(),
        "top1_agreement": agreement,
        "divergence": mean,
        "first_tokens": {run.tokenizer.decode([token]): count for token, count in begins},
        "finished": first.rollouts.stopped_by_eos_B.float().mean().item(),
        "tokens_by_position": count_by_position(first.positions.slot_N),
        **by_position(divergence, first.positions.slot_N),
    }
    message = (
        f"{values['rollouts']} rollouts of at most {first.rollouts.response_ids_B_K.shape[1]} tokens: the likeliest token of "
        f"both models is the same at {100 * agreement:.0f} %, {name} {mean:.3f} nats a token; they begin with {words}"
    )
    if not math.isfinite(mean):
        fix = "look for NaN or infinity in the logits of the models, e.g. in another dtype (model.dtype, model.teacher_dtype)"
        return Finding("agreement", "error", message, fix, values)
    if agreement < LITTLE_AGREEMENT:
        return Finding(
            "agreement",
            "warning",
            f"{message}; below {100 * LITTLE_AGREEMENT:.0f} % (a threshold of ours) there is little to start from",
            "fine-tune the student on answers of the teacher first, take a teacher that is closer to it, or look whether prompts "
            "and templates suit both models",
            values,
        )
    return Finding("agreement", "ok", message, values=values)


def determinism_finding(run: TrainingRun, first: FirstRollouts) -> Finding:
    """Whether two forwards of the teacher over the same ids are equal to the bit."""
    one, two = first.teacher_N_E, first.teacher_again_N_E
    check = "teacher determinism"
    if torch.equal(one, two):
        message = f"two forwards over the same {len(one)} tokens are equal to the bit"
        return Finding(check, "ok", message, values={"is_equal": True, "largest_difference": 0.0, "kl": 0.0})
    head = output_head(run.teacher)
    vocab_size = run.config.loss.vocab_size
    kl_N = linear_divergence(
        one, head, two, head, ReverseKL(), vocab_size=vocab_size, impl=run.divergence_impl
    ).divergence_N
    difference, kl = (one.float() - two.float()).abs().max().item(), kl_N.max().item()
    values = {"is_equal": False, "largest_difference": difference, "kl": kl}
    message = f"two forwards over the same tokens differ by up to {difference:.3g}, at most {kl:.3g} nats (KL) a token"
    if kl <= ROUNDING:  # NaN is not
        return Finding(
            check,
            "warning",
            f"{message}: rounding, by kernels that add up in no fixed order",
            "take another model.attn_implementation where runs must repeat to the bit; training does no harm by it",
            values,
        )
    return Finding(
        check,
        "error",
        f"{message}: more than rounding",
        "look for dropout or other randomness in the teacher, which must answer the same each time",
        values,
    )


def vocabulary_finding(run: TrainingRun, first: FirstRollouts, wanted_vocab_size: int | None) -> Finding:
    """Ids beyond the tokenizer's last one, and what both models think of them. `wanted_vocab_size` is the option as given."""
    check = "vocabulary"
    models = {"student": (run.student, first.student_N_D), "teacher": (run.teacher, first.teacher_N_E)}
    known = max(run.tokenizer.get_vocab().values()) + 1
    widths = {name: model.get_output_embeddings().weight.shape[0] for name, (model, _) in models.items()}
    temperature = run.config.loss.loss_temperature
    masses = {
        name: discarded_mass(hidden, output_head(model), known, temperature=temperature)
        for name, (model, hidden) in models.items()
    }
    values = {"tokenizer_ids": known, "widths": widths, "vocab_size": wanted_vocab_size} | {
        f"{name}_mass_beyond": {"mean": mass.mean, "largest": mass.largest} for name, mass in masses.items()
    }
    if set(widths.values()) == {known}:
        return Finding(check, "ok", f"{known} ids in tokenizer and both models, none to spare", values=values)
    message = f"the tokenizer has {known} ids, " + ", ".join(
        f"the {name} {width} with probability {masses[name].mean:.2g} (at most {masses[name].largest:.2g}) beyond them"
        for name, width in widths.items()
    )
    cut = f"set loss.vocab_size to {known}: both are cut to the ids that the tokenizer has"
    if wanted_vocab_size is None and widths["student"] != widths["teacher"]:
        return Finding(check, "error", f"{message}; the widths differ", cut, values)
    largest = max(mass.largest for mass in masses.values())
    if wanted_vocab_size is None and not largest <= PADDING_MASS:
        return Finding(check, "warning", f"{message}; no rollout should draw such an id", cut, values)
    if wanted_vocab_size is not None and not largest <= PADDING_MASS:
        fix = "look at the embeddings of the model: it was trained with ids that this tokenizer does not have"
        return Finding(check, "warning", f"{message}, which is more than padding should have", fix, values)
    return Finding(check, "ok", message, values=values)
