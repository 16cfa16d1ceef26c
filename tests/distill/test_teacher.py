"""Is the teacher without a model of its own exactly the base model, and an offloaded one the model itself?

pytest tests/distill/test_teacher.py
"""

import pytest
import torch
from tiny_models import BOS, make_model, make_prompt_batch, make_rollouts
from transformers import Gemma2Config

from esr_distill.config.lora import LoraSettings
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.models.adapters import adapter_weights, add_adapter
from esr_distill.models.teacher import AdapterFreeTeacher, OffloadedTeacher, on_device
from esr_distill.models.train_mode import enable_gradient_checkpointing
from esr_distill.prompt_prefill import PromptPrefill
from esr_kernels import Impl, linear_divergence

PROMPTS = [[BOS, 5, 13, 7, 15], [BOS], [BOS, 8, 9]]
ROLLOUTS = make_rollouts(PROMPTS, [[4, 6], [10, 11, 12, 2], [3]])


def with_adapter(model):
    pytest.importorskip("peft", reason="peft is optional")
    add_adapter(model, LoraSettings(use_peft=True, lora_r=4, lora_dropout=0.5), 0)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_weights(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model


def places(model) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


# The student without its adapter


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"attention_dropout": 0.5}, {"config_class": Gemma2Config, "final_logit_softcapping": 1.5}]
)
def test_the_teacher_is_exactly_the_base_model(options, is_training):
    student = with_adapter(make_model(0, **options)).train(is_training)
    teacher = AdapterFreeTeacher(student)
    base = make_model(0, **options)
    with torch.no_grad():
        expected = last_hidden_states(base, ROLLOUTS)
        assert (last_hidden_states(student, ROLLOUTS) - expected).abs().max() > 0.1
    hidden_B_T_E = last_hidden_states(teacher, ROLLOUTS)
    assert torch.equal(hidden_B_T_E, expected) and not hidden_B_T_E.requires_grad
    assert torch.equal(output_head(teacher).logits(hidden_B_T_E), output_head(base).logits(expected))
    assert student.training is is_training
    assert all(module.training is is_training for module in student.modules())


def test_the_prompts_may_be_read_ahead():
    """In train mode, layers that are computed again in backward would take no cache."""
    student = with_adapter(make_model(0)).train()
    enable_gradient_checkpointing(student)
    teacher, base = AdapterFreeTeacher(student), make_model(0)
    prompts = make_prompt_batch(PROMPTS)
    ours = last_hidden_states(teacher, ROLLOUTS, PromptPrefill.start(teacher, prompts, None))
    theirs = last_hidden_states(base, ROLLOUTS, PromptPrefill.start(base, prompts, None))
    assert torch.equal(ours, theirs)


def test_both_models_share_one_copy_of_the_weights():
    student = with_adapter(make_model(0))
    teacher = AdapterFreeTeacher(student)
    assert places(teacher) == places(student)
    base = sum(parameter.numel() for parameter in make_model(0).parameters())
    adapter = sum(tensor.numel() for tensor in adapter_weights(student).values())
    assert sum(parameter.numel() for parameter in teacher.parameters()) == base + adapter
    assert output_head(teacher).weight.data_ptr() == output_head(student).weight.data_ptr()
    assert teacher.config is student.config and teacher.generation_config is student.generation_config
    assert teacher.get_input_embeddings() is student.get_input_embeddings()


def test_scoring_between_forward_and_backward_changes_no_gradient():
    """With dropout and with layers that are computed again in backward, as in a training step."""
    gradients = []
    for scores in (False, True):
        student = with_adapter(make_model(0)).train()
        enable_gradient_checkpointing(student)
        torch.manual_seed(5)
        hidden_B_T_D = last_hidden_states(student, ROLLOUTS)
        if scores:
            last_hidden_states(AdapterFreeTeacher(student), ROLLOUTS)
        hidden_B_T_D.square().sum().backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert len(gradients[0]) == 28
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# A teacher in the CPU's memory; the device is the CPU too, which shows where copies are made but not what they cost


def offloaded(**options):
    model = make_model(1, **options).requires_grad_(False)
    return OffloadedTeacher(model, torch.device("cpu")), make_model(1, **options)


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_teacher_scores_as_the_model_does(tied):
    teacher, model = offloaded(tie_word_embeddings=tied)
    at_rest = places(teacher)
    ours = last_hidden_states(teacher, ROLLOUTS)
    with torch.no_grad():
        theirs = last_hidden_states(model, ROLLOUTS)
    assert torch.equal(ours, theirs) and not ours.requires_grad
    assert torch.equal(output_head(teacher).logits(ours), output_head(model).logits(theirs))
    assert places(teacher) == at_rest


def test_only_a_copy_of_the_body_is_on_the_device_while_it_scores():
    teacher, _ = offloaded()
    at_rest, seen = places(teacher), []
    teacher.model.model.layers[1].register_forward_hook(lambda *_: seen.append(places(teacher)))
    last_hidden_states(teacher, ROLLOUTS)
    head = teacher.model.lm_head.weight.untyped_storage().data_ptr()
    assert seen[0] & at_rest == {head}
    assert len(seen[0]) == len(at_rest)


def test_the_head_is_a_copy_that_outlives_scoring():
    """It is what backward of the divergence reads after the body has left."""
    teacher, model = offloaded()
    student = make_model(0)
    hidden_N_D = last_hidden_states(student, ROLLOUTS).flatten(0, 1)
    head = output_head(teacher)
    assert head.weight.untyped_storage().data_ptr() not in places(teacher)
    output = linear_divergence(
        hidden_N_D,
        output_head(student),
        last_hidden_states(teacher, ROLLOUTS).flatten(0, 1),
        head,
        impl=Impl.REFERENCE,
    )
    output.divergence_N.sum().backward()
    with torch.no_grad():
        teacher_hidden_N_E = last_hidden_states(model, ROLLOUTS).flatten(0, 1)
    other = make_model(0)
    linear_divergence(
        last_hidden_states(other, ROLLOUTS).flatten(0, 1),
        output_head(other),
        teacher_hidden_N_E,
        output_head(model.requires_grad_(False)),
        impl=Impl.REFERENCE,
    ).divergence_N.sum().backward()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter.grad, other.get_parameter(name).grad)


def test_weights_come_back_after_an_error():
    teacher, _ = offloaded()
    at_rest = places(teacher)
    with pytest.raises(ValueError, match="input_ids"):
        teacher.base_model(input_ids=None)
    assert places(teacher) == at_rest
    with pytest.raises(KeyError), on_device(teacher.parameters(), torch.device("cpu")):
        assert places(teacher).isdisjoint(at_rest)
        raise KeyError
    assert places(teacher) == at_rest


@pytest.mark.gpu
def test_an_offloaded_teacher_on_a_gpu():
    """Not run on a GPU yet."""
    device = torch.device("cuda")
    on_gpu = make_model(1).to(device).requires_grad_(False)
    before = torch.cuda.memory_allocated()
    teacher = OffloadedTeacher(make_model(1).requires_grad_(False), device)
    assert all(p.device.type == "cpu" and p.data.is_pinned() for p in teacher.parameters())
    inputs = {"input_ids": ROLLOUTS.token_ids_B_T.to(device), "use_cache": False}
    hidden_B_T_E = teacher.base_model(**inputs).last_hidden_state
    assert torch.equal(hidden_B_T_E, on_gpu.base_model(**inputs).last_hidden_state)
    assert output_head(teacher).weight.device.type == "cuda"
    assert all(parameter.device.type == "cpu" for parameter in teacher.parameters())
    del hidden_B_T_E
    weights = sum(parameter.nbytes for parameter in teacher.parameters())
    assert torch.cuda.memory_allocated() - before < weights / 4
