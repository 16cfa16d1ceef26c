"""What `check` says of the first rollouts: agreement, a teacher that is steady, mass on ids that no tokenizer has.

pytest tests/distill/test_check_rollouts.py
"""

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import make_model

from esr_distill.checks.check_command import ask_everything
from esr_distill.checks.first_rollouts import (
    agreement_finding,
    determinism_finding,
    draw_first_rollouts,
    vocabulary_finding,
)
from esr_distill.config import LossConfig
from esr_distill.training_run import prepare_run


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def test_agreement_and_divergence_are_those_of_whole_models(tmp_path, console):
    run = prepare_run(tiny_config(tmp_path), console)
    first = draw_first_rollouts(run)
    finding = agreement_finding(run, first)
    kl, is_same = [], []
    for row in range(8):
        length = int(first.rollouts.response_lengths_B[row])
        is_token_T = first.rollouts.attention_mask_B_T[row].bool()
        ids_1_T = first.rollouts.token_ids_B_T[row, is_token_T][None]
        with torch.no_grad():
            p, q = (make_model(seed)(ids_1_T).logits[0, -length - 1 : -1].double().log_softmax(-1) for seed in (0, 1))
        kl.append((p.exp() * (p - q)).sum(-1))
        is_same.append((p.argmax(-1) == q.argmax(-1)).double())
    assert finding.values["divergence"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert finding.values["top1_agreement"] == pytest.approx(torch.cat(is_same).mean().item())
    assert finding.values["tokens"] == sum(map(len, kl)) and finding.values["rollouts"] == 8
    assert finding.level == ("ok" if finding.values["top1_agreement"] >= 0.5 else "warning")


def test_a_student_that_is_its_own_teacher_agrees(tmp_path, console):
    config = tiny_config(tmp_path)
    run = prepare_run(replace(config, model=replace(config.model, teacher=config.model.student)), console)
    finding = agreement_finding(run, draw_first_rollouts(run))
    assert finding.level == "ok" and "is the same at 100 %" in finding.message
    assert sum(finding.values["first_tokens"].values()) <= 8


def test_too_little_agreement_and_what_is_not_finite(tmp_path, console):
    run = prepare_run(tiny_config(tmp_path), console)
    first = draw_first_rollouts(run)
    none = first.divergence._replace(top1_agreement_N=torch.zeros_like(first.divergence.top1_agreement_N))
    finding = agreement_finding(run, replace(first, divergence=none))
    assert finding.level == "warning" and "fine-tune the student" in finding.fix
    infinite = first.divergence._replace(divergence_N=torch.full_like(first.divergence.divergence_N, math.inf))
    assert agreement_finding(run, replace(first, divergence=infinite)).level == "error"


def test_a_teacher_that_answers_differently(tmp_path, console):
    run = prepare_run(tiny_config(tmp_path), console)
    first = draw_first_rollouts(run)
    assert determinism_finding(run, first).level == "ok"
    rounded = first.teacher_N_E * (1 + 1e-6)
    finding = determinism_finding(run, replace(first, teacher_again_N_E=rounded))
    assert finding.level == "warning" and finding.values["kl"] < 1e-4
    expected = (first.teacher_N_E - rounded).abs().max().item()
    assert finding.values["largest_difference"] == pytest.approx(expected) and expected > 0

    noise = torch.nn.Dropout(0.3)
    layer = run.teacher.base_model.layers[0]
    layer.register_forward_hook(lambda _, __, output: noise(output))
    finding = determinism_finding(run, draw_first_rollouts(run))
    assert finding.level == "error" and "dropout or other randomness" in finding.fix
    broken = torch.full_like(first.teacher_N_E, math.nan)
    assert determinism_finding(run, replace(first, teacher_again_N_E=broken)).level == "error"


def test_the_mass_beyond_the_tokenizer_is_that_of_the_logits(tmp_path, console):
    """Student of 22 ids, teacher of 24, tokenizer of 19."""
    config = tiny_config(tmp_path, loss=LossConfig(vocab_size=19))
    models = [make_model(seed, vocab_size=width) for seed, width in ((0, 22), (1, 24))]
    for model, role in zip(models, ("student", "teacher"), strict=True):
        model.save_pretrained(tmp_path / role)
    run = prepare_run(config, console)
    first = draw_first_rollouts(run)
    finding = vocabulary_finding(run, first, 19)
    for model, role in zip(models, ("student", "teacher"), strict=True):
        masses = []
        for row in range(8):
            length = int(first.rollouts.response_lengths_B[row])
            ids_1_T = first.rollouts.token_ids_B_T[row, first.rollouts.attention_mask_B_T[row].bool()][None]
            with torch.no_grad():
                probabilities = model(ids_1_T).logits[0, -length - 1 : -1].double().softmax(-1)
            masses.append(probabilities[:, 19:].sum(-1))
        found = finding.values[f"{role}_mass_beyond"]
        assert found["mean"] == pytest.approx(torch.cat(masses).mean().item(), rel=1e-4)
        assert found["largest"] == pytest.approx(torch.cat(masses).max().item(), rel=1e-4)
    assert finding.values["widths"] == {"student": 22, "teacher": 24} and finding.values["tokenizer_ids"] == 19
    assert finding.level == "warning" and "more than padding should have" in finding.message  # these are random models
    assert vocabulary_finding(run, first, None).level == "error"
    run.teacher = run.student
    unset = vocabulary_finding(run, replace(first, teacher_N_E=first.student_N_D), None)
    assert unset.level == "warning" and unset.fix.startswith("set loss.vocab_size to 19")


def test_padding_without_mass_is_no_matter(tmp_path, console):
    config = tiny_config(tmp_path)
    for seed, role in enumerate(("student", "teacher")):
        model = make_model(seed, vocab_size=22)
        with torch.no_grad():
            model.get_output_embeddings().weight[19:] = 0.0
            model.get_output_embeddings().weight[:19] += 1.0
            model.base_model.norm.weight[:] = 10.0
            model.base_model.norm.weight[0] = 400.0
            for block in model.base_model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
            model.get_input_embeddings().weight[:, 0] = 1.0
        model.save_pretrained(tmp_path / role)
    (finding,) = [finding for finding in ask_everything(config, console).findings if finding.check == "vocabulary"]
    assert (
        finding.level == "ok"
        and max(finding.values[f"{r}_mass_beyond"]["largest"] for r in ("student", "teacher")) < 1e-3
    )
