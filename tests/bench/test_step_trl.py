"""Steps of TRL's DistillationTrainer, on a stand-in that calls and is called in its order.

python -m pytest tests/bench/test_step_trl.py
"""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

TRL = "TRL DistillationTrainer"


@pytest.fixture(scope="module")
def pair(bench):
    return bench("steps.runs").make_pair("tiny<-tiny-teacher", "cpu", "float32")


@pytest.fixture(scope="module")
def demo_pair(bench):
    """Trained models, which do end their rollouts where they may."""
    return bench("steps.runs").make_pair(bench("bench_esr_speedup").ON_CPU.pairs[0], "cpu", "float32")


@pytest.fixture(scope="module")
def setting_of(bench):
    return bench("floor").StepSetting


# Names of the arguments of DistillationConfig that the adapter sets, as TRL 1.16.0 has them.
@dataclasses.dataclass
class StandInConfig:
    output_dir: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_steps: int
    max_completion_length: int
    temperature: float
    generation_kwargs: dict
    top_p: float
    top_k: int
    min_p: float | None
    beta: float
    max_grad_norm: float
    gradient_checkpointing: bool
    bf16: bool
    use_cpu: bool
    dataloader_pin_memory: bool
    seed: int
    save_strategy: str
    logging_strategy: str
    report_to: str
    disable_tqdm: bool


class StandInTrainer:
    """What the adapter uses of DistillationTrainer: the order of its calls and callbacks in one step."""

    made: list = []
    steps_before_an_end = 10**9

    def __init__(self, model, teacher_model, args, train_dataset, processing_class, callbacks, optimizers):
        self.model, self.teacher_model, self.args, self.dataset = model, teacher_model, args, train_dataset
        self.tokenizer, (self.callback,), (self.optimizer, self.scheduler) = processing_class, callbacks, optimizers
        self.first_end = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = processing_class.eos_token_id
        StandInTrainer.made.append(self)

    def remove_callback(self, callback):
        self.removed = callback

    def _prepare_inputs(self, texts):
        ids_B_P = torch.tensor(self.tokenizer([text["prompt"] for text in texts])["input_ids"])
        completion_B_K = torch.ones(len(texts), self.args.max_completion_length, dtype=torch.long)
        return {"ids": torch.cat([ids_B_P, completion_B_K], dim=1), "completion_mask": completion_B_K}

    def _get_last_hidden_state(self, unwrapped_model, ids_B_T):
        return unwrapped_model.base_model(ids_B_T).last_hidden_state

    def compute_loss(self, model, inputs):
        return sum(
            self._get_last_hidden_state(one, inputs["ids"]).square().mean() for one in (model, self.teacher_model)
        )

    def train(self):
        self.model.train()
        state, control = SimpleNamespace(global_step=0), SimpleNamespace(should_training_stop=False)
        while not control.should_training_stop and state.global_step < self.steps_before_an_end:
            self.callback.on_step_begin(self.args, state, control)
            inputs = self._prepare_inputs(self.dataset[: self.args.per_device_train_batch_size])
            self.compute_loss(self.model, inputs).backward()
            self.callback.on_pre_optimizer_step(self.args, state, control)
            self.optimizer.step()
            self.optimizer.zero_grad()
            state.global_step += 1
            control = self.callback.on_step_end(self.args, state, control)


@pytest.fixture
def stand_in(monkeypatch):
    trl = SimpleNamespace(DistillationConfig=StandInConfig, DistillationTrainer=StandInTrainer)
    monkeypatch.setitem(sys.modules, "trl", trl)
    monkeypatch.setattr(StandInTrainer, "made", [])
    return trl


def test_trl_steps_one_at_a_time(bench, stand_in, demo_pair, setting_of):
    student, adapter = demo_pair.student, bench("steps.trl")
    before, generation_config = student.get_input_embeddings().weight.clone(), student.generation_config
    steps = adapter.TrlSteps(demo_pair, setting_of(3, 5, 4))
    (trainer,) = StandInTrainer.made
    assert trainer.first_end is None and trainer.tokenizer.eos_token_id == 19  # an id that no head has
    assert trainer.tokenizer.pad_token_id == 0
    run = bench("steps.runs").make_run(demo_pair, setting_of(3, 5, 4))
    assert trainer.tokenizer([text["prompt"] for text in trainer.dataset])["input_ids"] == run.prompts.token_ids
    assert trainer.optimizer is demo_pair.optimizer and not trainer.args.gradient_checkpointing
    assert (trainer.args.beta, trainer.args.temperature, trainer.args.top_p) == (1.0, 1.0, 0.95)
    assert trainer.args.generation_kwargs == {"temperature": 0.7} and trainer.args.max_completion_length == 4

    records = [steps.step(), steps.step()]
    assert not torch.equal(student.get_input_embeddings().weight, before) and student.training
    assert not steps.callback.done.qsize()  # no step that was not asked for
    for record in records:
        assert (record.response_tokens, record.longest_rollout) == (12, 4) and record.loss > 0
        assert (
            sorted(record.stage_s)
            == ["backward", "divergence", "optimizer", "rollout", "student_forward", "teacher_forward"]
            and min(record.stage_s.values()) > 0
        )
        assert record.stage_peak_bytes is None
    thread = steps.thread
    steps.release()
    assert not thread.is_alive() and not student.training
    assert student.generation_config is generation_config and generation_config.eos_token_id == 2


def test_what_trl_raises_is_raised_where_the_step_was_asked_for(bench, stand_in, pair, setting_of, monkeypatch):
    adapter = bench("steps.trl")
    monkeypatch.setattr(StandInTrainer, "compute_loss", lambda *_: (_ for _ in ()).throw(MemoryError("of TRL")))
    steps = adapter.TrlSteps(pair, setting_of(2, 5, 4))
    with pytest.raises(MemoryError, match="of TRL"):
        steps.step()
    steps.release()


def test_a_train_that_ends_by_itself_is_an_error(bench, stand_in, pair, setting_of, monkeypatch):
    monkeypatch.setattr(StandInTrainer, "steps_before_an_end", 1)
    steps = bench("steps.trl").TrlSteps(pair, setting_of(2, 5, 4))
    steps.step()
    with pytest.raises(RuntimeError, match="TRL: train must go on until it is stopped, but it ended"):
        steps.step()
    steps.release()


def test_rows_of_trl(bench, stand_in, pair, setting_of, monkeypatch):
    measurement, stopwatch = bench("steps.measurement"), bench("timing").Stopwatch(torch.device("cpu"))

    def row():
        rows = measurement.SettingRows(pair, setting_of(2, 5, 4), [TRL], {}, stopwatch)
        list(measurement.take_turns([rows], [TRL], 2, 60.0))
        return rows.rows[TRL]

    timed = row()
    assert (timed["status"], timed["repetitions"]) == ("timed", 2) and len(
        StandInTrainer.made
    ) == 2  # anew in each round
    monkeypatch.delattr(StandInTrainer, "_prepare_inputs")
    missing = row()
    assert missing["status"] == "not installed"
    assert missing["message"] == "TRL: its DistillationTrainer must have _prepare_inputs, as that of 1.16.0 has"
    monkeypatch.setitem(sys.modules, "trl", None)
    assert row()["status"] == "not installed" and row()["message"].startswith("TRL: ")
