"""Does each preset draw and train what its paper's rule says?  pytest tests/distill/test_presets.py"""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import EOS, make_model, make_rollouts

from esr_distill.config import HorizonScheduleConfig, TrainConfig
from esr_distill.config_file import load_saved_config, parse_train_options, save_config
from esr_distill.distill_loss import make_divergence, normalize_divergence
from esr_distill.horizon_schedule import HorizonSchedule
from esr_distill.input_error import InputError
from esr_distill.prefix_positions import PrefixPositions, select_prefix_positions
from esr_distill.presets import PRESETS
from esr_distill.score_positions import score_positions
from esr_distill.token_selection import TokenSelection
from esr_kernels import DivergenceOutput, Impl

REQUIRED = ["--model.student", "s", "--model.teacher", "t", "--data.prompts", "p.jsonl"]
LENGTHS = [257, 40]  # the second rollout ends by itself
ROLLOUTS = make_rollouts([[1, 8], [1]], [[5] * LENGTHS[0], [6] * (LENGTHS[1] - 1) + [EOS]])
REQUESTS = torch.tensor([0, 1])
NUM_TOKENS = sum(LENGTHS)


@functools.cache
def config_of(preset: str, *more: str) -> TrainConfig:
    return parse_train_options([*REQUIRED, "--preset", preset, *more])


def selected(config: TrainConfig, divergence: DivergenceOutput):
    """Positions and their weights."""
    selection = TokenSelection.of(ROLLOUTS, config.selection, REQUESTS, config.run.seed)
    positions = select_prefix_positions(ROLLOUTS, config.trained_tokens, selection.candidates_B_K)
    index_N = torch.where(positions.row_N == 0, positions.slot_N, LENGTHS[0] + positions.slot_N)
    return positions, selection.weights_N(positions, DivergenceOutput(*(values[index_N] for values in divergence)))


def scores(seed: int = 0) -> DivergenceOutput:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(6, NUM_TOKENS, generator=generator)
    return DivergenceOutput(draw[0], 3 * draw[1], 3 * draw[2], -4 * draw[3], -4 * draw[4], draw[5].round())


# Slots of the first rollout and of the second that train.
MASKS = {
    "esr": (range(100), range(40)),
    "full": (range(257), range(40)),
    "full-loss-masked": (range(100), range(40)),
    "middle-window": (range(78, 178), range(40)),  # (257 - 100) / 2 rounded down
    "last-window": (range(157, 257), range(40)),
    "popd": (range(257), range(40)),
    "topd": (range(257), range(40)),
    "entropy-aware": (range(257), range(40)),
    "iw-opd": (range(257), range(40)),
}


@pytest.mark.parametrize("preset", MASKS)
def test_masks_by_hand(preset):
    positions, weights_N = selected(config_of(preset), scores())
    kept_N = weights_N > 0
    for row, slots in enumerate(MASKS[preset]):
        assert positions.slot_N[kept_N & (positions.row_N == row)].tolist() == list(slots)
    if preset != "iw-opd":
        assert (weights_N == 1).all()


@pytest.mark.parametrize("preset", ["random-window", "scatter"])
def test_random_controls_train_as_many_tokens_as_the_prefix(preset):
    positions, weights_N = selected(config_of(preset), scores())
    first = positions.slot_N[positions.row_N == 0]
    assert len(first) == 100 and len(set(first.tolist())) == 100 and (weights_N == 1).all()
    assert ((first[1:] - first[:-1]) == 1).all() == (preset == "random-window")
    assert positions.slot_N[positions.row_N == 1].tolist() == list(range(40))


def test_tip_keeps_the_half_of_the_batch_with_the_highest_soft_or():
    divergence = scores()
    positions, weights_N = selected(config_of("tip"), divergence)

    def scaled(values: list[float]) -> list[float]:
        return [(value - min(values)) / (max(values) - min(values)) for value in values]

    d, h = scaled(divergence.divergence_N.tolist()), scaled(divergence.student_entropy_N.tolist())
    soft_or = [h[i] + d[i] - h[i] * d[i] for i in range(NUM_TOKENS)]
    best = sorted(range(NUM_TOKENS), key=lambda i: -soft_or[i])[: math.ceil(NUM_TOKENS / 2)]
    assert sorted(best) == (weights_N > 0).nonzero().squeeze(1).tolist()
    # mean over the kept tokens
    loss = normalize_divergence(divergence.divergence_N, weights_N, positions.row_N, 2, "token_mean")
    assert config_of("tip").loss.normalizer == "token_mean"
    assert loss.item() == pytest.approx(sum(divergence.divergence_N.tolist()[i] for i in best) / len(best))


def test_iw_opd_weighs_a_token_by_how_little_the_models_parted_before_it():
    divergence = scores()
    _, weights_N = selected(config_of("iw-opd"), divergence)
    ratio = (divergence.teacher_logprob_N - divergence.student_logprob_N).abs().tolist()
    expected = []
    for part in (ratio[:257], ratio[257:]):
        expected += [1 + 0.5 * (1 - sum(part[:t]) / sum(part)) for t in range(len(part))]
    assert weights_N.tolist() == pytest.approx(expected, rel=1e-5)


HORIZONS = {
    "esr": [100] * 4,
    "full": [3584] * 4,
    "full-loss-masked": [3584] * 4,
    "popd": [100, 100, 200, 1300],  # steps 0, 9, 10, 125: 100 + 100 floor(s / 10)
    "topd": [896] * 4,  # a quarter
}


@pytest.mark.parametrize("preset", HORIZONS)
def test_horizons_by_hand(preset):
    config = config_of(preset)
    schedule = HorizonSchedule(config.horizon, config.rollout.horizon, config.run.steps)
    assert [schedule.horizon(step) for step in (0, 9, 10, 125)] == HORIZONS[preset]


def test_every_preset_is_a_whole_config_and_is_saved_resolved(tmp_path):
    for preset in PRESETS:
        config = config_of(preset, "--run.output_dir", str(tmp_path))
        save_config(config, tmp_path)
        assert load_saved_config(tmp_path) == config
        assert config.loss.divergence == "reverse_kl" and config.loss.merge_stop_ids


SEQUENCES = ("esr", "full", "full-loss-masked", "middle-window", "last-window", "random-window", "scatter")
NORMALIZERS = dict.fromkeys(SEQUENCES, "sequence_mean")
NORMALIZERS |= {
    "popd": "sum",
    "topd": "sum",
    "tip": "token_mean",
    "iw-opd": "token_mean",
    "entropy-aware": "token_mean",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_normalisers_by_hand(preset):
    """The paper's code averages over the tokens of a rollout, POPD and TOPD add over them, the others average over the batch."""
    config, divergence = config_of(preset), scores()
    positions, weights_N = selected(config, divergence)
    of_rows: list[list[float]] = [[], []]
    for row, slot, weight in zip(positions.row_N.tolist(), positions.slot_N.tolist(), weights_N.tolist(), strict=True):
        if weight > 0:
            of_rows[row].append(weight * divergence.divergence_N[LENGTHS[0] * row + slot].item())
    expected = {
        "sequence_mean": sum(sum(values) / len(values) for values in of_rows) / 2,
        "sum": sum(map(sum, of_rows)) / 2,
        "token_mean": sum(map(sum, of_rows)) / sum(map(len, of_rows)),
    }
    index_N = LENGTHS[0] * positions.row_N + positions.slot_N
    loss = normalize_divergence(
        divergence.divergence_N[index_N],
        weights_N,
        positions.row_N,
        2,
        config.loss.normalizer,
        config.loss.denominator,
    )
    assert loss.item() == pytest.approx(expected[NORMALIZERS[preset]], rel=1e-5)


STUDENT = [[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]
TEACHER = [[0.5, 0.48, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.7, 0.22, 0.05, 0.03], [0.7, 0.2, 0.06, 0.04]]


def test_entropy_aware_by_hand():
    """Teacher entropies 0.791, 1.386, 0.838 and 0.869 nats: just below the gate, and above it. The head is the identity, so
    hidden states are logits."""
    config = config_of("entropy-aware")
    model = make_model(vocab_size=4, hidden_size=4).requires_grad_(False)
    torch.nn.init.eye_(model.lm_head.weight)
    run = SimpleNamespace(
        config=config,
        student=model,
        teacher=model,
        stop=SimpleNamespace(eos_ids=(3,)),
        divergence=make_divergence(config.loss),
        divergence_impl=Impl.REFERENCE,
    )
    # two rollouts of three tokens and of one, behind a prompt of one token
    positions = PrefixPositions(
        *(torch.tensor(values) for values in ([0, 0, 0, 1], [0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0]))
    )
    hidden = []
    for probabilities in (STUDENT, TEACHER):
        logits_B_T_V = torch.zeros(2, 3, 4)
        logits_B_T_V[positions.row_N, positions.column_N] = torch.tensor(probabilities).log()
        hidden.append(logits_B_T_V)
    divergence = score_positions(run, *hidden, positions)

    def kl(first: list[float], second: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))

    expected = []
    for student, teacher in zip(STUDENT, TEACHER, strict=True):
        is_unsure = -sum(q * math.log(q) for q in teacher) > 0.8
        expected.append(kl(student, teacher) + (kl(teacher, student) if is_unsure else 0))
    assert [-sum(q * math.log(q) for q in teacher) > 0.8 for teacher in TEACHER] == [False, True, True, True]
    assert divergence.divergence_N.tolist() == pytest.approx(expected, rel=1e-4)
    loss = normalize_divergence(divergence.divergence_N, torch.ones(4), positions.row_N, 2, config.loss.normalizer)
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert (config.rollout.horizon, config.loss.prefix_tokens, config.selection.rules) == (3584, None, [])


@pytest.mark.parametrize(
    ("preset", "arguments", "expected"),
    [
        ("popd", ["--horizon.kind", "fixed"], HorizonScheduleConfig()),
        ("topd", ["--horizon.kind", "fixed"], HorizonScheduleConfig()),
        ("popd", ["--horizon.kind", "linear"], HorizonScheduleConfig("linear", start=100)),
        ("popd", ["--horizon.kind", "stairs"], HorizonScheduleConfig("stairs", start=100, increment=100, every=10)),
        ("topd", ["--horizon.kind", "linear", "--horizon.start", "7"], HorizonScheduleConfig("linear", start=7)),
    ],
)
def test_another_horizon_kind_takes_along_what_it_has_no_use_for(preset, arguments, expected):
    config = config_of(preset, *arguments)
    assert config.horizon == expected and config.loss.normalizer == "sum"


def test_a_gate_that_is_switched_off_takes_its_options_along():
    loss = config_of("entropy-aware", "--loss.gated_divergence", "null").loss
    assert (loss.gated_divergence, loss.gate_coefficient, loss.gate_entropy) == (None, None, None)
    loss = config_of("entropy-aware", "--loss.gated_divergence", "total_variation").loss
    assert (loss.gated_divergence, loss.gate_coefficient, loss.gate_entropy) == ("total_variation", 1.0, 0.8)


@pytest.mark.parametrize("option", ["--max_completion_length", "--rollout.horizon"])
def test_a_horizon_below_the_presets_prefix_trains_all_of_it(option):
    assert config_of("full-loss-masked", option, "50").loss.prefix_tokens is None
    assert config_of("full-loss-masked", option, "150").loss.prefix_tokens == 100
    assert config_of("full-loss-masked", option, "50").trained_tokens == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["popd", "--rollout.horizon", "50"],
            r"horizon\.start must be below rollout\.horizon = 50, .*, got 100 \(--preset popd sets horizon\.start: 100\)",
        ),
        (["topd", "--horizon.kind", "linear"], r"horizon\.start must be set for horizon\.kind linear, got None$"),
        (
            ["full-loss-masked", "--horizon.kind", "adaptive", "--horizon.start", "9"]
            + ["--horizon.increment", "1", "--horizon.agreement", "0.5"],
            r"loss\.prefix_tokens must be unset .*, got 100 \(--preset full-loss-masked sets loss\.prefix_tokens: 100\)",
        ),
    ],
)
def test_an_error_about_a_value_of_the_preset_says_so(arguments, message):
    with pytest.raises(InputError, match=message):
        config_of(*arguments)


def test_options_win_over_the_preset_also_with_its_default_and_lists_are_not_mixed(tmp_path):
    assert config_of("full", "--rollout.horizon", "100").rollout.horizon == 100  # the option's default
    rules = config_of("middle-window", "--selection.rules", "[{kind: prefix, tokens: 3}]").selection.rules
    assert [(rule.kind, rule.tokens, rule.start) for rule in rules] == [("prefix", 3, None)]
    file = tmp_path / "run.yaml"
    file.write_text("preset: topd\nhorizon:\n  fraction: 0.1\n")
    config = parse_train_options([*REQUIRED, "--config", str(file)])
    assert (config.horizon.kind, config.horizon.fraction, config.rollout.horizon) == ("fraction", 0.1, 3584)


def test_an_unknown_preset_is_an_error(capsys):
    with pytest.raises(SystemExit):
        config_of("sfe")
    assert "preset" in capsys.readouterr().err
