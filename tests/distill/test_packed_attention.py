"""Which rows are packed, by what, and what is refused?  pytest tests/distill/test_packed_attention.py"""

import pytest
import torch
from tiny_models import BOS, EOS, make_model, make_rollouts
from transformers import Lfm2Config, MambaConfig, StableLmConfig
from varlen_double import VarlenDouble

from esr_distill import packed_attention
from esr_distill.hidden_states import last_hidden_states, pack_rows
from esr_distill.input_error import InputError
from esr_distill.packed_attention import NAME, Packing, choose_packing, packing_of

ROLLOUTS = make_rollouts([[BOS, 5, 13, 7], [BOS], [BOS, 8]], [[4, 6], [EOS], [3, 9, EOS]])


@pytest.fixture
def varlen(monkeypatch) -> VarlenDouble:
    return VarlenDouble().install(monkeypatch)


# What cannot be packed


@pytest.mark.parametrize(
    "config_class, options, reason",
    [
        (
            MambaConfig,
            {"state_size": 4, "conv_kernel": 2, "expand": 2, "time_step_rank": 2},
            "which carries|which has layers of kind",
        ),
        (Lfm2Config, {"layer_types": ["conv", "full_attention"]}, "which has layers of kind conv, got Lfm2ForCausalLM"),
        (StableLmConfig, {}, "that hands no lengths of rows on to its attention, got StableLm"),
    ],
)
def test_models_that_cannot_be_packed(config_class, options, reason, varlen):
    model = make_model(1, config_class, **options)
    before = model.config._attn_implementation
    with pytest.raises(InputError, match=f"model.packing must be none for .*({reason})"):
        pack_rows(model, Packing.VARLEN, "model.teacher")
    assert packing_of(model) is Packing.NONE and model.config._attn_implementation == before
    words = pack_rows(model, Packing.VARLEN, "model.teacher", or_pad=True)
    assert words.startswith("padded (model.packing must be none for ")
    assert isinstance(last_hidden_states(model, ROLLOUTS), torch.Tensor)


def test_a_state_from_token_to_token(varlen):
    """Where a config does not say what its layers are."""
    model = make_model(1)
    model._is_stateful = True
    with pytest.raises(
        InputError, match="none for model.student, which carries a state from token to token, got Llama"
    ):
        pack_rows(model, Packing.VARLEN, "model.student")


def test_an_attention_that_is_neither(varlen):
    model = make_model(1)
    model.set_attn_implementation("eager")
    for packing, needed in ((Packing.VARLEN, "sdpa"), (Packing.FLASH, "flash_attention_2")):
        message = f"none for model.student, whose attention is eager and not {needed}, got LlamaForCausalLM"
        with pytest.raises(InputError, match=message):
            pack_rows(model, packing, "model.student")


@pytest.mark.parametrize(
    "asked, reason",
    [
        ({"softcap": 30.0}, "attention that caps scores, unless it is flash, got Linear"),
        ({"s_aux": torch.zeros(4)}, "attention that has sinks"),
        ({"position_bias": torch.zeros(4)}, "attention that adds a bias to scores"),
        ({"dropout": 0.1}, "attention that drops weights"),
        ({"is_causal": False}, "attention that looks at later tokens"),
    ],
)
def test_what_the_kernel_does_not_have(asked, reason, varlen):
    query = torch.zeros(1, 4, 6, 8)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    options = {"cu_seq_lens_q": starts, "max_length_q": 4}
    assert packed_attention.packed_sdpa(torch.nn.Linear(1, 1), query, query, query, None, **options)[0].shape == (
        1,
        6,
        4,
        8,
    )
    with pytest.raises(InputError, match=f"model.packing must be none for {reason}"):
        packed_attention.packed_sdpa(torch.nn.Linear(1, 1), query, query, query, None, **options, **asked)


def test_a_kernel_that_mixes_rows_is_found(varlen, monkeypatch):
    def mixing(query, key, value, starts, _, *rest, **options):
        whole = torch.tensor([0, query.shape[0]], dtype=torch.int32)
        return varlen(query, key, value, whole, whole, query.shape[0], query.shape[0], **options)

    monkeypatch.setattr(packed_attention, "varlen_attn", mixing)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(
            InputError, match="model.teacher, whose packed rows have hidden states that differ from padded"
        ):
            pack_rows(make_model(1).to(dtype), Packing.VARLEN, "model.teacher")


def test_the_kernels_own_error_names_the_option():
    """The real one, on a CPU."""
    model = make_model(1)
    with pytest.raises(InputError, match="model.packing must be none for model.student .*'CPU' backend.*got Llama"):
        pack_rows(model, Packing.VARLEN, "model.student")
    assert model.config._attn_implementation == "sdpa"


def test_nothing_of_it_is_saved(varlen, tmp_path):
    model = make_model(1)
    pack_rows(model, Packing.VARLEN, "model.student")
    model.save_pretrained(tmp_path)
    assert (
        NAME not in (tmp_path / "config.json").read_text() and "packing" not in (tmp_path / "config.json").read_text()
    )


# The choice


@pytest.mark.parametrize(
    "name, attention, device, is_in_16_bits, expected",
    [
        ("auto", "flash_attention_2", "cuda", True, Packing.FLASH),
        ("auto", "sdpa", "cuda", True, Packing.VARLEN),
        ("auto", "sdpa", "cuda", False, Packing.NONE),
        ("auto", "sdpa", "cpu", True, Packing.NONE),
        ("auto", "eager", "cuda", True, Packing.NONE),
        ("none", "flash_attention_2", "cuda", True, Packing.NONE),
        ("none", "sdpa", "cpu", False, Packing.NONE),
        ("varlen", "sdpa", "cuda", True, Packing.VARLEN),
        ("flash", "flash_attention_2", "cuda", True, Packing.FLASH),
        ("varlen", "sdpa", "cpu", True, r"auto or none on cpu \(varlen needs a CUDA device\), got 'varlen'"),
        ("varlen", "sdpa", "cuda", False, "auto or none unless both models run in bfloat16"),
        ("varlen", "eager", "cuda", True, "auto or none with attention eager, unless it is flash"),
        (
            "varlen",
            "flash_attention_2",
            "cuda",
            True,
            "auto or none with attention flash_attention_2, unless it is flash",
        ),
        ("flash", "sdpa", "cuda", True, "auto, none or varlen with attention sdpa, got 'flash'"),
    ],
)
def test_what_is_chosen(name, attention, device, is_in_16_bits, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    chosen = {"device": torch.device(device), "is_in_16_bits": is_in_16_bits}
    if isinstance(expected, Packing):
        assert choose_packing(name, attention, **chosen) is expected
    else:
        with pytest.raises(InputError, match=f"model.packing must be {expected}"):
            choose_packing(name, attention, **chosen)


def test_an_older_device_is_padded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    device = torch.device("cuda")
    assert choose_packing("auto", "sdpa", device, is_in_16_bits=True) is Packing.NONE
    with pytest.raises(InputError, match=r"auto or none on a device of compute capability 7.5 \(varlen needs 8.0\)"):
        choose_packing("varlen", "sdpa", device, is_in_16_bits=True)
