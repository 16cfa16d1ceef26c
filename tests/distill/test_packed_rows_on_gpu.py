"""Do the real kernels give packed rows the hidden states and gradients of padded ones?

pytest -m gpu tests/distill/test_packed_rows_on_gpu.py. Not run on a GPU yet.
"""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from test_train import tiny_config
from tiny_models import make_model, make_rollouts
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config
from transformers.utils import is_flash_attn_2_available
from varlen_double import attend_in_rows

from esr_distill import packed_attention
from esr_distill.config import OptimizerConfig
from esr_distill.hidden_states import last_hidden_states, pack_rows
from esr_distill.input_error import InputError
from esr_distill.models.train_mode import enable_gradient_checkpointing
from esr_distill.packed_attention import Packing, choose_packing
from esr_distill.packed_rows import HiddenRows
from esr_distill.prefix_positions import gather_rows, select_prefix_positions
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.train_step import train_step
from esr_distill.training_run import prepare_run

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
needs_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is optional")
KERNELS = [Packing.VARLEN, pytest.param(Packing.FLASH, marks=needs_flash)]
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama, heads of 256": (LlamaConfig, {"head_dim": 256}),
    "qwen3": (Qwen3Config, {}),
    "mistral, windows": (MistralConfig, {"sliding_window": 37}),
    "gemma3, windows in one layer": (
        Gemma3TextConfig,
        {"sliding_window": 37, "query_pre_attn_scalar": 64, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


def make_family(family: str):
    """In float32 on the device, with heads of 64 and room for the longest row."""
    config_class, options = FAMILIES[family]
    sizes = {"hidden_size": 128, "head_dim": 64, "max_position_embeddings": 512, "initializer_range": 0.1}
    return make_model(1, config_class, **(sizes | options)).to(DEVICE)


def ragged_rollouts() -> RolloutBatch:
    """Rows of 2 to 361 tokens: shorter and longer than the tiles of the kernels and than the windows."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(1, 1), (200, 161), (3, 128), (64, 64), (5, 1), (130, 7)]
    drawn = [[torch.randint(3, 19, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    rollouts = make_rollouts([prompt for prompt, _ in drawn], [response for _, response in drawn])
    tensors = {name: value.to(DEVICE) for name, value in vars(rollouts).items() if isinstance(value, torch.Tensor)}
    return replace(rollouts, **tensors)


def states_and_gradients(model, rollouts: RolloutBatch) -> dict[str, torch.Tensor]:
    """Hidden states that predict response tokens, and the gradients of a weighted sum of them, in float32."""
    hidden_N_D = gather_rows(last_hidden_states(model, rollouts), select_prefix_positions(rollouts, 100))
    weights_N_D = torch.randn(hidden_N_D.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    model.zero_grad()
    (hidden_N_D.float() * weights_N_D).sum().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden states": hidden_N_D.detach().float()} | gradients


def packed(model, packing: Packing):
    if packing is Packing.FLASH:
        model.set_attn_implementation("flash_attention_2")
    assert pack_rows(model, packing, "model.student") == packing.describe()
    return model


def assert_as_near_as_padded(found: dict, padded: dict, exact: dict) -> None:
    """In 16 bits, packed rows may be no farther from float32 than twice the distance of padded ones."""
    assert found.keys() == exact.keys() and len(found) > 10
    for name, expected in exact.items():
        scale = expected.norm()
        own, theirs = ((tensor - expected).norm() / scale for tensor in (found[name], padded[name]))
        assert own <= 2 * theirs + 1e-3, (name, own.item(), theirs.item())
        assert theirs < 0.2, (name, theirs.item())  # or the comparison says nothing


@pytest.mark.parametrize("left", [-1, 0, 1, 36, 300])
@pytest.mark.parametrize("heads, key_heads, size", [(4, 4, 64), (4, 2, 64), (8, 1, 128), (2, 1, 8), (2, 2, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_means_what_its_double_says(left, heads, key_heads, size, dtype):
    """Window, scale, grouped heads and starts of `varlen_attn`, with its gradients."""
    starts = torch.tensor([0, 1, 130, 131, 300, 301], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(301, h, size, generator=generator).to(DEVICE, dtype) for h in (heads, key_heads, key_heads, heads)
    ]
    *inputs, upstream = tensors
    for tensor in inputs:
        tensor.requires_grad_()
    options = {"scale": 0.3 * size**-0.5, "window_size": (left, 0)} | packed_attention.GROUPED_HEADS
    found = packed_attention.varlen_attn(*inputs, starts, starts, 169, 169, **options)
    found_gradients = torch.autograd.grad(found, inputs, upstream)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = attend_in_rows(*exact, starts, scale=options["scale"], left=left)
    expected_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for ours, theirs in zip((found, *found_gradients), (expected, *expected_gradients), strict=True):
        # A window of the token alone has gradients of 0 for queries and keys, of which rounding is left.
        assert (ours - theirs).norm() < 0.02 * theirs.norm() + 0.003 * upstream.double().norm()


@pytest.mark.parametrize("packing", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_autocast", [False, True])
def test_hidden_states_and_gradients_are_those_of_padded_rows(packing, family, is_autocast):
    rollouts = ragged_rollouts()
    exact = states_and_gradients(make_family(family), rollouts)
    models = [make_family(family).to(torch.float32 if is_autocast else torch.bfloat16) for _ in range(2)]
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=is_autocast):
        padded = states_and_gradients(models[0], rollouts)
        packed(models[1], packing)
        assert isinstance(last_hidden_states(models[1], rollouts), HiddenRows)
        found = states_and_gradients(models[1], rollouts)
    assert_as_near_as_padded(found, padded, exact)


@pytest.mark.parametrize("packing", KERNELS)
def test_layers_that_are_computed_again(packing):
    rollouts, found = ragged_rollouts(), []
    for is_recomputed in (False, True):
        model = packed(make_family("llama").to(torch.bfloat16), packing)
        if is_recomputed:
            enable_gradient_checkpointing(model)
        found.append(states_and_gradients(model.train(), rollouts))
    for name, expected in found[0].items():
        assert (found[1][name] - expected).norm() <= 1e-2 * expected.norm(), name


@pytest.mark.parametrize("packing", KERNELS)
def test_no_linear_layer_sees_padding(packing):
    model, seen = packed(make_family("llama").to(torch.bfloat16), packing), set()
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].shape[:-1].numel()))
    last_hidden_states(model, ragged_rollouts())
    assert seen == {2 + 361 + 131 + 128 + 6 + 137}


def test_what_auto_chooses_here():
    assert choose_packing("auto", "sdpa", DEVICE, is_in_16_bits=True) is Packing.VARLEN
    assert choose_packing("auto", "sdpa", DEVICE, is_in_16_bits=False) is Packing.NONE


def test_float32_is_refused_by_name():
    with pytest.raises(InputError, match=r"model.packing must be none for model.student \(.*got LlamaForCausalLM"):
        pack_rows(make_family("llama"), Packing.VARLEN, "model.student")


@pytest.mark.parametrize("packing", KERNELS)
def test_whole_steps_lose_what_padded_ones_do(tmp_path, packing):
    config = tiny_config(tmp_path, steps=3, optimizer=OptimizerConfig(learning_rate=1e-3))
    attention = "flash_attention_2" if packing is Packing.FLASH else "sdpa"
    device = {"device": DEVICE.type, "autocast": True, "teacher_dtype": "bfloat16", "attn_implementation": attention}
    config = replace(config, model=replace(config.model, **device))
    losses = []
    for is_packed in (False, True):
        run = prepare_run(config, Console(quiet=True))
        layout = packing if is_packed else Packing.NONE
        with run.autocast():
            pack_rows(run.student, layout, "model.student")
        pack_rows(run.teacher, layout, "model.teacher")
        records = [train_step(run, step) for step in range(3)]
        losses.append([record["loss"] for record in records])
        assert all(record["grad_norm"] > 0 for record in records)
    # Later rollouts are drawn by weights that differ in rounding.
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert all(0 < loss < 100 for loss in losses[1])
