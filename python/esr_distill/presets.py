"""Published methods as combinations of the independent switches: `esr-distill train --preset popd`.

A preset is a set of defaults; every option of the file and the flags wins over it, and takes with it what only the preset's
value had use for (`preset_options`). Each follows its paper in horizon, kept tokens, weights and normaliser; what differs is
named here. Full rollouts are cut at 3584 tokens, as in the experiments of arXiv 2605.27028.

`esr`, `full` and their controls up to `scatter` average over the tokens of a rollout and then over rollouts (sequence_mean), as
the code of arXiv 2605.27028 does; its equation is a sum over tokens (loss.normalizer sum).

    esr                 the first 100 tokens are drawn and train (arXiv 2605.27028)
    full                full rollouts, all tokens train
    full-loss-masked    full rollouts, the first 100 tokens train
    middle-window       full rollouts, the 100 tokens in the middle train: a control of equal length
    last-window         the same with the last 100
    random-window       the same with 100 in a row, drawn uniformly
    scatter             the same with 100 drawn one by one
    tip                 full rollouts, the half of a batch's tokens with the highest soft-or of student entropy and divergence
                        (arXiv 2604.14084)
    popd                the horizon grows in stairs (arXiv 2605.31490, POPD), a sum over the tokens up to it; the stairs, 100
                        tokens each 10 steps, are ours. The paper takes a policy gradient of the sampled token, this preset
                        the divergence
    topd                a quarter of a full rollout is drawn (the same paper, TOPD with rho = 0.25), the rest as in popd
    iw-opd              full rollouts, tokens weighted by how little the models have parted before them (arXiv 2606.22600,
                        gamma = 0.5). The paper weights a policy gradient of the sampled token, this preset the divergence
    entropy-aware       full rollouts, reverse KL, and forward KL where the teacher's entropy is above 0.8 nats (arXiv
                        2603.07079). The paper takes a policy gradient of the sampled token for the first and the top-k for
                        the second
"""

from collections.abc import Mapping

from esr_distill.config.horizon import FIELDS

PREFIX = 100
FULL_LENGTH = 3584


def _window(start: str) -> dict[str, object]:
    rules = [{"kind": "window", "tokens": PREFIX, "start": start}]
    return {"rollout.horizon": FULL_LENGTH, "selection.rules": rules}


PRESETS: dict[str, dict[str, object]] = {
    "esr": {"rollout.horizon": PREFIX, "loss.normalizer": "sequence_mean"},
    "full": {"rollout.horizon": FULL_LENGTH, "loss.normalizer": "sequence_mean"},
    "full-loss-masked": {"rollout.horizon": FULL_LENGTH, "loss.prefix_tokens": PREFIX},
    "middle-window": _window("middle"),
    "last-window": _window("last"),
    "random-window": _window("random"),
    "scatter": {"rollout.horizon": FULL_LENGTH, "selection.rules": [{"kind": "scatter", "tokens": PREFIX}]},
    "tip": {
        "rollout.horizon": FULL_LENGTH,
        "selection.rules": [{"kind": "top", "score": "tip", "share": 0.5, "scope": "batch"}],
        "loss.normalizer": "token_mean",
    },
    "popd": {
        "rollout.horizon": FULL_LENGTH,
        "horizon.kind": "stairs",
        "horizon.start": PREFIX,
        "horizon.increment": PREFIX,
        "horizon.every": 10,
        "loss.normalizer": "sum",
    },
    "topd": {
        "rollout.horizon": FULL_LENGTH,
        "horizon.kind": "fraction",
        "horizon.fraction": 0.25,
        "loss.normalizer": "sum",
    },
    "iw-opd": {
        "rollout.horizon": FULL_LENGTH,
        "selection.weights": [{"kind": "prefix_ratio", "rate": 0.5}],
        "loss.normalizer": "token_mean",
    },
    "entropy-aware": {
        "rollout.horizon": FULL_LENGTH,
        "loss.gated_divergence": "forward_kl",
        "loss.gate_coefficient": 1.0,
        "loss.gate_entropy": 0.8,
        "loss.normalizer": "token_mean",
    },
}


def preset_options(preset: str, given: Mapping[str, object]) -> dict[str, object]:
    """What the preset sets beside the options that are given, by our names: not these themselves, nor the fields of a horizon
    kind or of a gate that the given value has no use for, nor a prefix that a given horizon cuts anyway."""
    options = PRESETS[preset]
    unused = set(given)
    if "horizon.kind" in given:
        unused |= {f"horizon.{name}" for name in set().union(*FIELDS.values()) - FIELDS[given["horizon.kind"]]}
    if "loss.gated_divergence" in given and given["loss.gated_divergence"] is None:
        unused |= {"loss.gate_coefficient", "loss.gate_entropy"}
    if given.get("rollout.horizon", FULL_LENGTH) < options.get("loss.prefix_tokens", 0):
        unused.add("loss.prefix_tokens")
    return {name: value for name, value in options.items() if name not in unused}
