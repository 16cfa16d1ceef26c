"""Does the backend of transformers' `generate` ask for what was requested, and report what was drawn?

pytest tests/distill/test_hf_generate.py
"""

import pytest
import torch
from test_rollout_backends import RAGGED, assert_same_rollouts, roll_out
from tiny_models import make_model

from esr_distill.rollout import SamplerSettings
from esr_distill.rollout.hf_generate import HFGenerateBackend


def test_generate_is_not_told_by_the_models_own_settings():
    """A repetition penalty or a top-k in the model's folder is no part of the request."""
    model = make_model(2)
    expected = roll_out(model, backend=HFGenerateBackend())
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    assert_same_rollouts(roll_out(model, backend=HFGenerateBackend()), expected)
    assert model.generation_config.repetition_penalty == 5.0
    drawn = roll_out(model, sampler=SamplerSettings(5.0), backend=HFGenerateBackend())
    assert not torch.equal(drawn.token_ids_B_T, expected.token_ids_B_T)


def test_generate_samples_with_log_probs_of_its_distribution_and_a_cut_vocabulary():
    model, sampler = make_model(5), SamplerSettings(sampling_temperature=0.8, top_k=3)
    rollouts = roll_out(model, sampler=sampler, vocab_size=12, backend=HFGenerateBackend(), seed=3)
    assert torch.equal(
        rollouts.token_ids_B_T,
        roll_out(model, sampler=sampler, vocab_size=12, backend=HFGenerateBackend(), seed=3).token_ids_B_T,
    )
    for row, length in enumerate(rollouts.response_lengths_B.tolist()):
        ids = torch.cat([torch.tensor(RAGGED[row]), rollouts.response_ids_B_K[row, :length]])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(RAGGED[row]) - 1 : -1, :12]
        drawn = ids[len(RAGGED[row]) :, None]
        best = (logits / 0.8).topk(3)
        assert (best.indices == drawn).any(-1).all()
        raw = logits.log_softmax(-1).gather(1, drawn)[:, 0]
        sampled = (logits / 0.8).gather(1, drawn)[:, 0] - best.values.logsumexp(-1)
        torch.testing.assert_close(rollouts.logprobs_B_K[row, :length], raw, rtol=0, atol=1e-4)
        torch.testing.assert_close(rollouts.sampling_logprobs_B_K[row, :length], sampled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_generate_that_gives_nan_or_infinity(bad):
    model = make_model(2)
    model.lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, torch.tensor([4]), bad))
    with pytest.raises(FloatingPointError, match="rollout: the logits must be finite"):
        roll_out(model, backend=HFGenerateBackend())
