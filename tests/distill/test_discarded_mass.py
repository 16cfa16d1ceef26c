"""Is the probability beyond a cut vocabulary told exactly?  pytest tests/distill/test_discarded_mass.py"""

import math
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import VOCAB_SIZE, make_model

import esr_distill.models.discarded_mass as discarded_mass_module
from esr_distill.config import LossConfig
from esr_distill.models.discarded_mass import discarded_mass
from esr_distill.training_run import prepare_run
from esr_kernels import OutputHead


def test_a_mass_by_hand():
    """Logits log 1, log 2, log 3, log 4 and, in the second row, log 1, log 1, log 1, log 5."""
    logits_2_4 = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 5.0]]).log()
    head = OutputHead(torch.eye(4))
    mass = discarded_mass(logits_2_4, head, 3)
    assert mass.mean == pytest.approx((4 / 10 + 5 / 8) / 2) and mass.largest == pytest.approx(5 / 8)
    assert discarded_mass(logits_2_4, head, 1).largest == pytest.approx(9 / 10)
    # at temperature 1/2 the probabilities are the squares
    assert discarded_mass(logits_2_4[:1], head, 3, temperature=0.5).mean == pytest.approx(16 / 30)


def test_against_float64_with_scale_softcap_and_bias():
    generator = torch.Generator().manual_seed(0)
    hidden_N_D = 3 * torch.randn(37, 5, generator=generator, dtype=torch.float64)
    weight_V_D, bias_V = torch.randn(23, 5, generator=generator).double(), torch.randn(23, generator=generator).double()
    logits_N_V = 2.0 * torch.tanh(0.5 * (hidden_N_D @ weight_V_D.T + bias_V) / 2.0)
    expected_N = logits_N_V.softmax(-1)[:, 17:].sum(-1)
    head = OutputHead(weight_V_D, bias_V, logit_scale=0.5, softcap=2.0)
    mass = discarded_mass(hidden_N_D, head, 17)
    assert mass.mean == pytest.approx(expected_N.mean().item(), rel=1e-12)
    assert mass.largest == pytest.approx(expected_N.max().item(), rel=1e-12)
    in_single = discarded_mass(hidden_N_D.float(), OutputHead(weight_V_D.float(), bias_V.float(), 0.5, 2.0), 17)
    assert in_single.mean == pytest.approx(mass.mean, rel=1e-5)


def test_a_tiny_mass_is_not_lost_beside_one():
    """1 minus the mass kept would be 0 in float32."""
    logits_1_3 = torch.tensor([[0.0, 0.0, -46.0]])
    assert discarded_mass(logits_1_3, OutputHead(torch.eye(3)), 2).mean == pytest.approx(math.exp(-46.0) / 2, rel=1e-5)


def test_nothing_is_cut():
    hidden_N_D = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert discarded_mass(hidden_N_D, OutputHead(torch.eye(4)), 4) == discarded_mass_module.DiscardedMass(0.0, 0.0)


def test_rows_a_few_at_a_time_are_all_counted(monkeypatch):
    hidden_N_D = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    head = OutputHead(torch.randn(9, 6, generator=torch.Generator().manual_seed(1)))
    whole = discarded_mass(hidden_N_D, head, 7)
    monkeypatch.setattr(discarded_mass_module, "LOGITS_AT_A_TIME", 4 * 9 + 5)
    in_parts = discarded_mass(hidden_N_D, head, 7)
    assert (in_parts.mean, in_parts.largest) == pytest.approx((whole.mean, whole.largest), rel=1e-6)


def test_a_row_of_nan_is_not_hidden():
    hidden_N_D = torch.tensor([[0.0, 0.0], [math.nan, 0.0]])
    assert math.isnan(discarded_mass(hidden_N_D, OutputHead(torch.eye(2)), 1).mean)


@pytest.mark.gpu
def test_on_a_gpu():
    """Not run on a GPU yet."""
    hidden_N_D = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    weight_V_D = torch.randn(23, 5, generator=torch.Generator().manual_seed(1))
    expected = discarded_mass(hidden_N_D, OutputHead(weight_V_D), 17)
    mass = discarded_mass(hidden_N_D.cuda(), OutputHead(weight_V_D.cuda()), 17)
    assert (mass.mean, mass.largest) == pytest.approx((expected.mean, expected.largest), rel=1e-4)


def test_a_run_tells_the_mass_of_both_models(tmp_path):
    """After the prompts alone, worked out from whole logits of prompts without padding."""
    config = replace(tiny_config(tmp_path), loss=LossConfig(vocab_size=VOCAB_SIZE, loss_temperature=2.0))
    masses = []
    for width, role in ((VOCAB_SIZE + 3, "student"), (VOCAB_SIZE + 5, "teacher")):
        make_model(width, vocab_size=width).save_pretrained(tmp_path / role)
    text = StringIO()
    run = prepare_run(config, Console(file=text, width=300))
    for width in (VOCAB_SIZE + 3, VOCAB_SIZE + 5):
        model = make_model(width, vocab_size=width)
        with torch.no_grad():
            logits = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in run.prompts.token_ids[:16]])
        masses.append((logits / 2.0).softmax(-1)[:, VOCAB_SIZE:].sum(-1))
    student, teacher = masses
    assert len(student) == 16 and student.mean() > 1e-3
    assert (
        "loss.vocab_size 19: probability of the ids that are cut, after the first 16 prompts: "
        f"student {student.mean():.3g} (at most {student.max():.3g}), teacher {teacher.mean():.3g} (at most {teacher.max():.3g})"
    ) in text.getvalue()


def test_a_run_with_the_whole_vocabulary_tells_nothing(tmp_path):
    text = StringIO()
    prepare_run(tiny_config(tmp_path), Console(file=text, width=300))
    assert "ids that are cut" not in text.getvalue()
