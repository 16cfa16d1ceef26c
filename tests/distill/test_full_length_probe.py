"""Does the probe measure what lies behind the horizon, and leave the run alone?

pytest tests/distill/test_full_length_probe.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train import interrupt_after, losses, record_rollouts, tiny_config
from tiny_models import make_model, make_tokenizer
from transformers import PreTrainedModel

from esr_distill.checkpoint import find_checkpoints
from esr_distill.config import DataConfig, EvaluationConfig, LossConfig, MonitoringConfig, RolloutConfig, TrainConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.monitoring.full_length_probe import FIRST_REQUEST, FullLengthProbe, choose_prompts, describe_probe
from esr_distill.prompts import PromptRecord, PromptStream, tokenize_prompts
from esr_distill.prompts.prompt_encoder import PromptEncoder
from esr_distill.rollout import RolloutBatch
from esr_distill.train import train
from esr_distill.training_run import prepare_run

CPU = torch.device("cpu")
PROBE = MonitoringConfig(probe_every=2, probe_prompts=5, probe_tokens=40, probe_seed=3)


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def probed_config(folder: Path, name: str = "probed", probe: MonitoringConfig = PROBE, **groups) -> TrainConfig:
    return replace(tiny_config(folder, name, **groups), monitoring=probe)


def probes(config: TrainConfig) -> list[dict]:
    return read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "probe")


def weights(config: TrainConfig) -> dict:
    (path,) = find_checkpoints(Path(config.run.output_dir))[-1].glob("*.safetensors")
    return load_file(path)


def assert_same_run(one: TrainConfig, other: TrainConfig) -> None:
    assert len(losses(one)) > 1 and losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["inprocess", "hf_generate"])
def test_a_run_with_a_probe_has_the_losses_and_weights_of_one_without(tmp_path, console, backend):
    rollout = RolloutConfig(horizon=5, batch_size=4, sampling_temperature=1.0, top_p=1.0, backend=backend)
    plain, probed = tiny_config(tmp_path, "plain", rollout=rollout), probed_config(tmp_path, rollout=rollout)
    train(plain, console)
    torch.manual_seed(99)  # whatever state torch's generator has
    train(probed, console)
    assert_same_run(plain, probed)
    assert [record["step"] for record in probes(probed)] == [0, 2, 4, 6]


def test_the_dropout_of_an_adapter_draws_the_same_masks_with_a_probe(tmp_path, console):
    pytest.importorskip("peft", reason="peft is optional")
    lora = LoraSettings(use_peft=True, lora_r=4, lora_dropout=0.5)

    def with_dropout(config: TrainConfig) -> TrainConfig:
        return replace(config, model=replace(config.model, lora=lora))

    plain = with_dropout(tiny_config(tmp_path, "plain", steps=4))
    probed = with_dropout(probed_config(tmp_path, steps=4, probe=replace(PROBE, probe_every=1)))
    train(plain, console)
    train(probed, console)
    assert_same_run(plain, probed)


def test_a_run_with_a_probe_resumes_to_the_bit_and_probes_the_same(tmp_path, console, monkeypatch):
    whole, halted = probed_config(tmp_path, "whole"), probed_config(tmp_path, "halted")
    train(whole, console)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert train(halted, console).step == 3
    train(halted, console, resume=True)
    assert_same_run(whole, halted)
    timeless = [[{**r, "seconds": 0, "train_seconds": 0} for r in probes(config)] for config in (whole, halted)]
    assert timeless[0] == timeless[1]
    assert [record["step"] for record in timeless[0]] == [0, 2, 4, 6]


def test_the_time_of_a_probe_is_no_training_time(tmp_path, console):
    config = probed_config(tmp_path, steps=2)
    train(config, console)
    steps = read_metrics(Path(config.run.output_dir) / "metrics.jsonl", "step")
    total = sum(record["seconds"] for record in steps)
    first, last = probes(config)
    assert first["train_seconds"] == 0.0 and last["train_seconds"] == pytest.approx(total)
    assert last["seconds"] > 0


def ranks_by_teacher(student: PreTrainedModel, teacher: PreTrainedModel, rollouts: RolloutBatch, row: int) -> list:
    """At each response token of a row, the teacher's ranks of this token and of the student's likeliest one."""
    ids_1_T = rollouts.token_ids_B_T[row, rollouts.attention_mask_B_T[row].bool()][None]
    length = int(rollouts.response_lengths_B[row])
    with torch.no_grad():
        p_T_V, q_T_V = (model(ids_1_T).logits[0, -length - 1 : -1].tolist() for model in (student, teacher))
    return [
        [1 + sum(other > q[i] for other in q) for i in (drawn, max(range(len(p)), key=p.__getitem__))]
        for drawn, p, q in zip(ids_1_T[0, -length:].tolist(), p_T_V, q_T_V, strict=True)
    ]


def reverse_kl(student: PreTrainedModel, teacher: PreTrainedModel, rollouts: RolloutBatch, row: int) -> torch.Tensor:
    """KL(student || teacher) at each response token of a row, from whole logits of the row without its padding."""
    is_token_T = rollouts.attention_mask_B_T[row].bool()
    ids_1_T = rollouts.token_ids_B_T[row, is_token_T][None]
    length = int(rollouts.response_lengths_B[row])
    with torch.no_grad():
        p, q = (model(ids_1_T).logits[0, -length - 1 : -1].double().log_softmax(-1) for model in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)


def test_the_numbers_are_those_of_the_answers(tmp_path, console, monkeypatch):
    """At step 0 the student is the saved one, so every number can be had from the answers that it gave."""
    config = probed_config(tmp_path, steps=1, loss=LossConfig(prefix_tokens=3))
    seen: list[RolloutBatch] = []
    record_rollouts(monkeypatch, seen)
    train(config, console)
    record, batches = probes(config)[0], seen[:2]
    assert [batch.batch_size for batch in batches] == [4, 1]  # five prompts, four at a time

    student, teacher = make_model(0), make_model(1)
    kl = [reverse_kl(student, teacher, batch, row) for batch in batches for row in range(batch.batch_size)]
    lengths = [len(kl_K) for kl_K in kl]
    stopped = torch.cat([batch.stopped_by_eos_B for batch in batches])
    assert max(lengths) > 5  # longer than the horizon of 5
    assert record["prompts"] == 5 and record["max_tokens"] == 40
    assert record["mean_length"] == pytest.approx(sum(lengths) / 5)
    assert record["finished"] == pytest.approx(stopped.double().mean().item())
    assert record["scored_tokens"] == sum(lengths)
    assert record["divergence"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    before, behind = (torch.cat([kl_K[part] for kl_K in kl]) for part in (slice(0, 3), slice(3, None)))
    assert record["trained_tokens"] == 3 and record["tokens_behind"] == len(behind)
    assert record["divergence_before"] == pytest.approx(before.mean().item(), rel=1e-4)
    assert record["divergence_behind"] == pytest.approx(behind.mean().item(), rel=1e-4)
    middle = torch.cat([kl_K[10:25] for kl_K in kl])
    assert record["divergence_by_position"]["10-24"] == pytest.approx(middle.mean().item(), rel=1e-4)
    assert record["tokens_by_position"]["10-24"] == len(middle)
    pairs = [r for b in batches for row in range(b.batch_size) for r in ranks_by_teacher(student, teacher, b, row)]
    for name, ranks in zip(
        ("teacher_rank_of_drawn", "teacher_rank_of_student_top"), zip(*pairs, strict=True), strict=True
    ):
        assert record[name] == {
            "mean": pytest.approx(sum(ranks) / len(ranks)),
            "first": pytest.approx(sum(rank == 1 for rank in ranks) / len(ranks)),
            "in_first_5": pytest.approx(sum(rank <= 5 for rank in ranks) / len(ranks)),
        }
    assert record["teacher_rank_of_student_top"]["first"] == pytest.approx(record["top1_agreement"])
    json.dumps(record, allow_nan=False)


def test_evaluation_and_probe_draw_no_id_that_training_leaves_out(tmp_path, console, monkeypatch):
    """A head with three surplus ids, which it likes best."""
    problems = EvaluationConfig(str(tmp_path / "prompts.jsonl"), scorer="last_number", max_tokens=12, limit=3)
    config = probed_config(tmp_path, steps=1, loss=LossConfig(vocab_size=19), evaluation=problems)
    student = make_model(4, vocab_size=22)
    with torch.no_grad():
        student.lm_head.weight[19:] = 3 * student.lm_head.weight[5:8]
    student.save_pretrained(tmp_path / "student")
    seen: list[RolloutBatch] = []
    record_rollouts(monkeypatch, seen)
    train(config, console)
    # before and after the step an evaluation, and a probe in two batches
    assert [rollouts.batch_size for rollouts in seen] == [3, 4, 1, 4, 3, 4, 1]
    assert max(int(rollouts.token_ids_B_T.max()) for rollouts in seen) < 19


@pytest.mark.parametrize("is_merged", [True, False])
def test_ranks_are_of_the_events_of_the_divergence(tmp_path, console, is_merged):
    """Eleven of nineteen ids end a response, and a head has ids that are cut: the student's likeliest event is the teacher's as
    often as the divergence says."""
    probe = replace(PROBE, probe_prompts=15)
    config = probed_config(tmp_path, probe=probe, loss=LossConfig(merge_stop_ids=is_merged, vocab_size=19))
    for factor, name in ((3, "student"), (1, "teacher")):
        model = make_model(4, vocab_size=22)
        with torch.no_grad():
            model.lm_head.weight[19:] = 3 * model.lm_head.weight[5:8]
            model.lm_head.weight[3:9] *= factor
        model.generation_config.eos_token_id = [2, *range(9, 19)]
        model.save_pretrained(tmp_path / name)
    record = FullLengthProbe.prepare(run := prepare_run(config, console)).measure(run, 5)
    top = record["teacher_rank_of_student_top"]
    assert top["first"] == pytest.approx(record["top1_agreement"]) and 0.1 < top["first"] < 0.9
    assert record["teacher_rank_of_drawn"]["mean"] <= (19 - 10 if is_merged else 19)


def test_every_probe_asks_the_same_and_draws_from_streams_that_training_does_not_use(tmp_path, console):
    run = prepare_run(probed_config(tmp_path), console)
    probe = FullLengthProbe.prepare(run)
    first, second = probe.measure(run, 5), probe.measure(run, 5)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    ids = torch.cat([batch.request_ids_B for batch in probe._batches()]).tolist()
    assert ids == [2**62 + i for i in range(5)] and FIRST_REQUEST == 2**62
    other = replace(probe, settings=replace(PROBE, probe_seed=4)).measure(run, 5)
    assert other["divergence"] != first["divergence"]


def test_accuracy_where_answers_are_known(tmp_path, console):
    """A student that always writes "7" and stops, on four prompts: right, wrong, no answer, an answer without a number."""
    config = tiny_config(tmp_path, steps=1, evaluation=EvaluationConfig(scorer="last_number"))
    run = prepare_run(replace(config, monitoring=replace(PROBE, probe_prompts=4)), console)
    records = [PromptRecord("1+6=", "7"), PromptRecord("1+1=", "2"), PromptRecord("2="), PromptRecord("3=", "none")]
    run.prompts = tokenize_prompts(records, run.tokenizer, run.config.data, pad_id=0, device=CPU)
    seven = run.tokenizer("7", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        for parameter in run.student.parameters():
            parameter.zero_()
        run.student.get_input_embeddings().weight[:, 0] = 1.0
        run.student.get_input_embeddings().weight[seven, 0] = -1.0
        run.student.base_model.norm.weight[0] = 1.0
        head = run.student.get_output_embeddings().weight
        head[seven, 0], head[2, 0] = 20.0, -20.0  # after "7" the sign turns, and the end is likeliest
    record = FullLengthProbe.prepare(run).measure(run, 5)
    assert (record["answers_known"], record["accuracy"]) == (2, 0.5)
    assert record["standard_error"] == pytest.approx(0.5)
    assert (record["mean_length"], record["finished"], record["repetitive"]) == (2.0, 1.0, 0.0)
    assert record["divergence_behind"] is None and record["tokens_behind"] == 0
    assert describe_probe(record, 8) == (
        "step 8, full-length probe: 4 prompts, mean length 2.0 tokens, finished 100 %, repetitive 0 %, "
        f"divergence {record['divergence']:.4f} in the first 5 tokens, accuracy 50.0 % of 2"
    )


def test_a_student_that_got_stuck_is_repetitive(tmp_path, console):
    run = prepare_run(probed_config(tmp_path), console)
    with torch.no_grad():
        run.student.get_output_embeddings().weight.zero_()  # every id equally likely, but greedy takes the lowest
    run.rollout_request = replace(run.rollout_request, sampler=RolloutConfig(sampling_temperature=0).sampler)
    record = FullLengthProbe.prepare(run).measure(run, 5)
    assert (record["repetitive"], record["finished"], record["mean_length"]) == (1.0, 0.0, 40.0)


def test_the_teacher_reads_its_own_prompts(tmp_path, console):
    """Privileged text in the teacher's prompt: the divergence is that of responses behind two different prompts."""
    config = probed_config(tmp_path)
    run = prepare_run(config, console)
    data = replace(config.data, privileged_column="hint", privileged_template="{privileged_context}{prompt}")
    records = [PromptRecord(f"{i}+{i}=", privileged_context="9" * i) for i in range(1, 6)]
    run.prompts = tokenize_prompts(
        records, run.tokenizer, data, pad_id=0, device=CPU, teacher_tokenizer=make_tokenizer()
    )
    run.student = run.teacher  # without the hint they would agree everywhere
    probe = FullLengthProbe.prepare(run)
    record = probe.measure(run, 5)
    assert record["divergence"] > 0.01
    blind = replace(probe, prompts=replace(probe.prompts, teacher_token_ids=None)).measure(run, 5)
    assert abs(blind["divergence"]) < 1e-6


def test_prompts_of_a_stream_are_out_of_its_first_window():
    records = [PromptRecord(f"{i}=") for i in range(20)]

    class Source:
        def records(self):
            return iter(records)

    encoder = PromptEncoder(make_tokenizer(), DataConfig("p", chat_template=False), pad_id=0, device=CPU)
    stream = PromptStream(Source(), encoder, window=6, limit=50, limit_source="", long_prompts="error")
    chosen = choose_prompts(stream, replace(PROBE, probe_prompts=6))
    window = tokenize_prompts(records[:6], make_tokenizer(), encoder.data, pad_id=0, device=CPU)
    assert sorted(chosen.token_ids) == sorted(window.token_ids)
    with pytest.raises(InputError, match=r"monitoring\.probe_prompts must be at most 6, data\.stream_prompts, got 7"):
        choose_prompts(stream, replace(PROBE, probe_prompts=7))


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"probe_prompts": 21}, r"monitoring\.probe_prompts must be at most 20, the number of prompts, got 21"),
        (
            {"probe_tokens": 125},
            r"monitoring\.probe_tokens must leave room for the probe's prompts, of at most 3 tokens",
        ),
        ({"probe_tokens": 4}, r"probe_tokens must be >= rollout\.horizon = 5 with monitoring\.probe_every, got 4"),
        ({"probe_every": 0}, r"monitoring\.probe_every must be >= 1 or unset, got 0"),
        ({"probe_prompts": 0}, r"monitoring\.probe_prompts must be >= 1, got 0"),
        ({"probe_seed": -1}, r"monitoring\.probe_seed must be in \[0, 2\*\*64\), got -1"),
    ],
)
def test_a_probe_that_cannot_be(tmp_path, console, probe, message):
    with pytest.raises(InputError, match=message):
        train(probed_config(tmp_path, probe=replace(PROBE, **probe)), console)
    assert not (tmp_path / "probed").exists()
