"""Are the public names and their parameters those of docs/design.md? Changing one changes both, and the changelog."""

import dataclasses
import enum
import inspect
from types import SimpleNamespace

import esr_kernels

# A function or method: its parameters, "*" before the keyword-only ones. A result: its fields. An enum: its members.
PUBLIC_NAMES = {
    "token_divergence": "student_logits_N_V, teacher_logits_N_V, divergence, *, loss_temperature, token_ids_N, stop_ids, "
    "vocab_size, impl",
    "linear_divergence": "student_hidden_N_D, student_head, teacher_hidden_N_E, teacher_head, divergence, *, "
    "loss_temperature, token_ids_N, stop_ids, vocab_size, logits, workspace_bytes, impl",
    "topk_divergence": "student_hidden_N_D, student_head, teacher_ids_N_K, teacher_logprobs_N_K, divergence, *, "
    "tail_bucket, renormalize, loss_temperature, logits, workspace_bytes, impl",
    "select_topk_ids": "hidden_N_D, head, num_ids, *, united_with_N_K, workspace_bytes",
    "prefix_logprobs": "logits_B_T_V, token_ids_B_T, starts_B, horizon, *, lengths_B, temperature, impl",
    "linear_prefix_logprobs": "hidden_B_T_D, head, token_ids_B_T, starts_B, horizon, *, lengths_B, temperature, logits, "
    "workspace_bytes, impl",
    "gather_logprobs": "hidden_N_D, head, token_ids_N_K, *, temperature, logits, workspace_bytes, impl",
    "reverse_kl_estimate": "student_logprobs, teacher_logprobs, *, estimator",
    "sampled_reverse_kl_loss": "student_logprobs, teacher_logprobs, *, estimator",
    "sampled_forward_kl_loss": "student_logprobs, teacher_logprobs, *, estimator",
    "reverse_kl_policy_gradient_loss": "student_logprobs, teacher_logprobs, *, cost, behaviour_logprobs, baseline, "
    "clip_range, max_ratio",
    "sample_tokens": "logits_B_V, state, *, impl",
    "is_native_sampler_built": "device",
    "SamplerState.create": "batch_size, horizon, *, eos_ids, sampling_temperature, top_k, top_p, min_p, seed, "
    "request_ids, pad_id, device",
    "DivergenceOutput": "divergence_N, student_entropy_N, teacher_entropy_N, student_logprob_N, teacher_logprob_N, "
    "top1_agreement_N",
    "PrefixLogprobs": "logprobs_B_K, entropy_B_K, mask_B_K, is_top1_B_K",
    "OutputHead": "weight, bias, logit_scale, softcap",
    "Impl": "FUSED, REFERENCE",
    "LogitStorage": "AUTO, FLOAT32, TILE_RELATIVE_FP16",
    "Divergence": "",
    "ForwardKL": "",
    "ReverseKL": "",
    "TotalVariation": "",
    "GeneralizedJSD": "beta",
    "SkewForwardKL": "lam",
    "SkewReverseKL": "lam",
    "AlphaDivergence": "alpha",
}
SAMPLER_STATE_TENSORS = {
    "token_ids_B_K",
    "logprobs_B_K",
    "sampling_logprobs_B_K",
    "lengths_B",
    "finished_B",
    "next_ids_B",
    "active",
}
DEFAULTS = {
    "token_divergence": {"divergence": esr_kernels.ReverseKL(), "loss_temperature": 1.0},
    "linear_divergence": {"divergence": esr_kernels.ReverseKL(), "logits": esr_kernels.LogitStorage.AUTO},
    "topk_divergence": {"divergence": esr_kernels.ForwardKL(), "tail_bucket": True, "renormalize": True},
}


def described(value: object) -> str:
    """The public shape of a function, a result type or an enum, in the notation of PUBLIC_NAMES."""
    if isinstance(value, enum.EnumMeta):
        return ", ".join(member.name for member in value)
    if hasattr(value, "_fields"):
        return ", ".join(value._fields)
    if dataclasses.is_dataclass(value):
        return ", ".join(field.name for field in dataclasses.fields(value))
    words = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        words.append(
            {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        )
    return ", ".join(words)


def deviations(module: object, pinned: dict[str, str]) -> list[str]:
    """Where `module` departs from `pinned`: names missing from or added to `__all__`, and other parameters."""
    expected = {name for name in pinned if "." not in name}
    public = set(module.__all__) - {"__version__"}
    found = [f"{name} is pinned and not in __all__" for name in sorted(expected - public)]
    found += [f"{name} is in __all__ and not pinned" for name in sorted(public - expected)]
    for name, shape in pinned.items():
        value = module
        for part in name.split("."):
            value = getattr(value, part, None)
        # SamplerState is pinned by its constructor and by the tensors below, not by every field.
        if value is not None and name != "SamplerState" and described(value) != shape:
            found.append(f"{name}: pinned ({shape}), is ({described(value)})")
    return found


def test_public_names_are_those_of_the_contract():
    found = deviations(esr_kernels, PUBLIC_NAMES | {"SamplerState": ""})
    assert not found, "\n".join(found)


def test_defaults_are_those_of_the_contract():
    for name, defaults in DEFAULTS.items():
        parameters = inspect.signature(getattr(esr_kernels, name)).parameters
        assert {key: parameters[key].default for key in defaults} == defaults, name


def test_every_op_chooses_fused_unless_told():
    for name in [name for name, shape in PUBLIC_NAMES.items() if shape.endswith("impl")]:
        parameters = inspect.signature(getattr(esr_kernels, name)).parameters
        assert parameters["impl"].default is esr_kernels.Impl.FUSED, name


def test_sampler_state_holds_the_tensors_of_the_contract():
    fields = {field.name for field in dataclasses.fields(esr_kernels.SamplerState)}
    assert SAMPLER_STATE_TENSORS - fields == set()


def test_divergences_are_frozen_and_public():
    for name, value in vars(esr_kernels).items():
        if isinstance(value, type) and issubclass(value, esr_kernels.Divergence):
            assert name in esr_kernels.__all__ and value.__dataclass_params__.frozen, name


def test_deviations_are_found():
    def loss(logits_N_V, *, temperature=1.0): ...

    module = SimpleNamespace(__all__=["loss", "extra", "Kind"], loss=loss, extra=1, Kind=enum.Enum("Kind", "A B"))
    pinned = {"loss": "logits_N_V, *, loss_temperature", "gone": "x", "Kind": "A, B"}
    assert deviations(module, pinned) == [
        "gone is pinned and not in __all__",
        "extra is in __all__ and not pinned",
        "loss: pinned (logits_N_V, *, loss_temperature), is (logits_N_V, *, temperature)",
    ]


def test_shapes_are_described_in_full():
    def every_kind(a, b=1, *rest, c, **more): ...

    assert described(every_kind) == "a, b, *rest, c, **more"
