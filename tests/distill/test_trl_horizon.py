"""Do TRL's trainers stop the rollouts of each step where the schedule says?  pytest tests/distill/test_trl_horizon.py

The trainers of TRL itself where it is installed (1.16.0), and in any case a trainer of ours that draws as they do.
"""

import importlib
import itertools
import runpy
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from tiny_models import BOS, EOS, PAD, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from esr_distill import trl_horizon
from esr_distill.config import HorizonScheduleConfig
from esr_distill.input_error import InputError
from esr_distill.trl_horizon import HorizonCallback

LARGEST, STEPS = 12, 6
# By hand: the horizons of steps 0, 1, 2, ... with at most 12 tokens in 6 steps.
TABLES = {
    "fixed": (HorizonScheduleConfig(), [12, 12, 12, 12, 12, 12]),
    # 1 + floor(11 s / 6)
    "linear": (HorizonScheduleConfig("linear", start=1), [1, 2, 4, 6, 8, 10]),
    # min(12, 3 + 5 floor(s / 2))
    "stairs": (HorizonScheduleConfig("stairs", start=3, increment=5, every=2), [3, 3, 8, 8, 12, 12]),
    # ceil(3.72)
    "fraction": (HorizonScheduleConfig("fraction", fraction=0.31), [4, 4, 4, 4, 4, 4]),
}
STAIRS, STAIRS_BY_STEP = TABLES["stairs"]
ARGUMENTS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
TRL_ARGUMENTS = ARGUMENTS | {"bf16": False, "gradient_checkpointing": False}


class StandIn(Trainer):
    """What the callback uses of TRL's trainers, and in transformers' own order of steps, callbacks and logs: rollouts for all
    parts of a step are drawn by `generation_config` when its first part is prepared. `vllm_generation` draws if there is one."""

    def __init__(self, model, args, prompts, generation_config, vllm_generation=None, **others):
        super().__init__(model, args, train_dataset=prompts, eval_dataset=prompts[:3], **others)
        self.generation_config, self.vllm_generation = generation_config, vllm_generation
        self.use_vllm = vllm_generation is not None
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._step = 0

    def draw(self, prompts_B_P):
        if self.use_vllm:
            return torch.cat([prompts_B_P, self.vllm_generation.generate(len(prompts_B_P))], dim=1)
        with torch.no_grad():
            return self.model.generate(prompts_B_P, generation_config=self.generation_config)

    def _prepare_inputs(self, inputs):
        prompts_B_P = inputs["input_ids"]
        if not self.model.training:
            return {"completion_mask": torch.ones_like(self.draw(prompts_B_P)[:, prompts_B_P.shape[1] :])}
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.drawn_B_T = self.draw(prompts_B_P)
        completion_B_K = self.drawn_B_T[:, prompts_B_P.shape[1] :]
        self._metrics["train"]["completions/max_length"].append(float(completion_B_K.shape[1]))
        self._step += 1
        return {"ids": self.drawn_B_T, "completion_mask": torch.ones_like(completion_B_K)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "ids" not in inputs:
            return torch.zeros(())
        return model(inputs["ids"]).logits.square().mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def log(self, logs, start_time=None):
        logs.update({name: sum(values) / len(values) for name, values in self._metrics["train"].items()})
        super().log(logs, start_time)
        self._metrics["train"].clear()


def with_lengths(trainer_class):
    """The trainer, keeping (step, is it training, lengths) of every batch on which it takes a loss."""

    class WithLengths(trainer_class):
        def compute_loss(self, model, inputs, *arguments, **others):
            mask_B_T = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"] != -100
            self.seen = getattr(self, "seen", [])
            self.seen.append((self.state.global_step, self.model.training, mask_B_T.sum(1).tolist()))
            return super().compute_loss(model, inputs, *arguments, **others)

    return WithLengths


def stand_in(folder, vllm_generation=None, callbacks=None, **arguments):
    prompts = [{"input_ids": [BOS, 3 + i % 10, 4]} for i in range(36)]
    drawing = GenerationConfig(
        max_new_tokens=LARGEST, do_sample=True, suppress_tokens=[EOS, PAD], pad_token_id=PAD, eos_token_id=EOS
    )
    args = TrainingArguments(output_dir=str(folder), **(ARGUMENTS | arguments))
    return with_lengths(StandIn)(make_model(0), args, prompts, drawing, vllm_generation, callbacks=callbacks)


def distillation(folder, **arguments):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    settings = TRL_ARGUMENTS | {"max_completion_length": LARGEST} | arguments
    prompts = datasets.Dataset.from_list([{"prompt": f"{i}+{i * i}="} for i in range(36)])
    trainer = with_lengths(trl.DistillationTrainer)(
        model=make_model(0),
        teacher_model=make_model(1),
        args=trl.DistillationConfig(output_dir=str(folder), **settings),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(3)),
        processing_class=make_tokenizer(),
    )
    trainer.generation_config.suppress_tokens = [EOS, PAD]
    return trainer


def gkd(folder):
    return chat_trainer("GKD", output_dir=str(folder), max_new_tokens=LARGEST)


def gold(folder):
    return chat_trainer("GOLD", output_dir=str(folder), max_completion_length=LARGEST)


def chat_trainer(name, **arguments):
    pytest.importorskip("trl")
    module = importlib.import_module(f"trl.experimental.{name.lower()}")
    trainer_class, config_class = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    trainer = with_lengths(trainer_class)(
        model=make_model(0, vocab_size=len(tokenizer)),
        teacher_model=make_model(1, vocab_size=len(tokenizer)),
        args=config_class(lmbda=1.0, max_length=64, **TRL_ARGUMENTS, **arguments),
        train_dataset=datasets.Dataset.from_list([{"messages": chat}] * 36),
        processing_class=tokenizer,
    )
    trainer.generation_config.suppress_tokens = [EOS, PAD]
    return trainer


def byte_tokenizer():
    """A byte is an id, as GOLD wants it of tokenizers."""
    pieces = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def in_training(trainer):
    """Per step the lengths of all its rollouts."""
    lengths = defaultdict(list)
    for step, is_training, of_batch in trainer.seen:
        if is_training:
            lengths[step] += of_batch
    return dict(lengths)


def all_of(horizons, rollouts, first=0):
    return {first + step: [horizon] * rollouts for step, horizon in enumerate(horizons)}


def logged(trainer, name):
    return [record[name] for record in trainer.state.log_history if name in record]


MAIN = [stand_in, distillation]


@pytest.mark.parametrize(
    ("make", "table"), [*itertools.product(MAIN, TABLES), (gkd, "linear"), (gold, "linear"), (gold, "stairs")]
)
def test_rollouts_stop_at_the_horizon_of_their_step(make, table, tmp_path):
    schedule, expected = TABLES[table]
    trainer = make(tmp_path)
    trainer.add_callback(HorizonCallback(trainer, schedule))
    trainer.train()
    assert in_training(trainer) == all_of(expected, rollouts=6)  # two parts of three rollouts
    assert logged(trainer, "horizon") == expected
    assert trainer.generation_config.max_new_tokens == LARGEST


@pytest.mark.parametrize("make", MAIN)
def test_without_accumulation_and_with_the_mean_of_two_steps_in_a_log(make, tmp_path):
    trainer = make(tmp_path, gradient_accumulation_steps=1, logging_steps=2)
    trainer.add_callback(HorizonCallback(trainer, TABLES["linear"][0]))
    trainer.train()
    assert in_training(trainer) == all_of([1, 2, 4, 6, 8, 10], rollouts=3)
    assert logged(trainer, "horizon")[:3] == [1.5, 5.0, 9.0]


@pytest.mark.parametrize("make", MAIN)
def test_a_resumed_run_has_the_horizons_of_one_that_was_not_stopped(make, tmp_path):
    first = make(tmp_path, save_strategy="steps", save_steps=3)
    first.add_callback(HorizonCallback(first, STAIRS))
    first.train()
    second = make(tmp_path, save_strategy="steps", save_steps=3)
    second.add_callback(HorizonCallback(second, STAIRS))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert in_training(second) == all_of(STAIRS_BY_STEP[3:], rollouts=6, first=3)
    assert logged(second, "horizon") == STAIRS_BY_STEP  # those before the checkpoint are in its state


@pytest.mark.parametrize("make", MAIN)
def test_steps_are_those_of_the_run_where_epochs_are_short(make, tmp_path):
    trainer = make(
        tmp_path, max_steps=-1, num_train_epochs=3, per_device_train_batch_size=9
    )  # 36 prompts: two steps an epoch
    schedule, expected = TABLES["linear"]
    trainer.add_callback(HorizonCallback(trainer, schedule))
    trainer.train()
    assert in_training(trainer) == all_of(expected, rollouts=18)
    assert trainer.state.epoch == 3


@pytest.mark.parametrize("make", MAIN)
def test_evaluation_has_the_full_length(make, tmp_path):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True, max_steps=2)
    trainer.add_callback(HorizonCallback(trainer, STAIRS))
    trainer.train()
    evaluated = [lengths for _, is_training, lengths in trainer.seen if not is_training]
    assert evaluated == [[12, 12, 12]] * 3
    assert in_training(trainer) == all_of([3, 3], rollouts=6)


class Server:
    """A vLLM that draws as many tokens as it is asked for, or more."""

    def __init__(self, max_completion_length=LARGEST, too_many=0):
        self.max_completion_length, self.too_many = max_completion_length, too_many

    def generate(self, rollouts):
        return torch.full((rollouts, self.max_completion_length + self.too_many), 7)


def test_vllm_is_asked_for_the_horizon(tmp_path):
    server = Server()
    trainer = stand_in(tmp_path, server)
    trainer.add_callback(HorizonCallback(trainer, STAIRS))
    trainer.train()
    assert in_training(trainer) == all_of(STAIRS_BY_STEP, rollouts=6)
    assert server.max_completion_length == LARGEST


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_trl_asks_vllm_for_the_horizon(mode, tmp_path, monkeypatch):
    """All of TRL's code but vLLM itself: its client, or its engine, which draw as many tokens as they are asked for."""
    pytest.importorskip("trl")
    from trl.generation import vllm_generation
    from trl.trainer import distillation_trainer

    asked = []

    class Client:
        def generate(self, prompts, max_tokens, **_):
            asked.append(max_tokens)
            drawn = [[7] * max_tokens for _ in prompts]
            return {"prompt_ids": prompts, "completion_ids": drawn, "logprobs": None}

    class Engine:
        def generate(self, prompts, sampling_params, use_tqdm):
            asked.append(sampling_params.max_tokens)
            drawn = SimpleNamespace(token_ids=[7] * sampling_params.max_tokens, logprobs=None)
            return [SimpleNamespace(prompt_token_ids=row["prompt_token_ids"], outputs=[drawn]) for row in prompts]

    class WithoutVllm(vllm_generation.VLLMGeneration):
        def _init_vllm(self):
            self.vllm_client, self.llm = Client(), Engine()

        def sync_weights(self):
            pass

    monkeypatch.setattr(distillation_trainer, "is_vllm_available", lambda: True)
    monkeypatch.setattr(distillation_trainer, "VLLMGeneration", WithoutVllm)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    trainer = distillation(tmp_path, use_vllm=True, vllm_mode=mode)
    trainer.add_callback(HorizonCallback(trainer, STAIRS))
    trainer.train()
    assert asked == STAIRS_BY_STEP
    assert in_training(trainer) == all_of(STAIRS_BY_STEP, rollouts=6)
    assert trainer.vllm_generation.max_completion_length == LARGEST


def test_longer_rollouts_are_an_error(tmp_path):
    trainer = stand_in(tmp_path, Server(too_many=2))
    trainer.add_callback(HorizonCallback(trainer, HorizonScheduleConfig("stairs", start=3, increment=5, every=1)))
    with pytest.raises(RuntimeError, match=r"TRL: rollouts must have at most 3 tokens in step 0, got 5"):
        trainer.train()


def test_steps_that_begin_within_a_drawn_batch_are_an_error(tmp_path):
    class OutOfStep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer._step += state.global_step == 2

    trainer = stand_in(tmp_path, callbacks=[OutOfStep()])
    trainer.add_callback(HorizonCallback(trainer, STAIRS))
    must_be = r"trainer\._step must be a multiple of gradient_accumulation_steps 2 where step 2 begins, .* got 5"
    with pytest.raises(InputError, match=must_be):
        trainer.train()


def test_the_callback_of_another_trainer_is_an_error(tmp_path):
    one, another = stand_in(tmp_path), stand_in(tmp_path)
    another.add_callback(HorizonCallback(one, STAIRS))
    with pytest.raises(InputError, match="must be added to the trainer that it was made for, got another trainer"):
        another.train()


def test_an_adaptive_schedule_is_refused(tmp_path):
    adaptive = HorizonScheduleConfig("adaptive", start=3, increment=1, agreement=0.8)
    must_be = r"horizon\.kind must be fixed, linear, stairs or fraction in TRL's trainers, .* got 'adaptive'"
    with pytest.raises(InputError, match=must_be):
        HorizonCallback(stand_in(tmp_path), adaptive)


def drawing(max_new_tokens=LARGEST, arguments=None, **others):
    """A trainer as far as it is looked at before training."""
    args = SimpleNamespace(**({"gradient_accumulation_steps": 2, "generation_kwargs": None} | (arguments or {})))
    config = SimpleNamespace(max_new_tokens=max_new_tokens)
    return SimpleNamespace(**({"args": args, "generation_config": config, "_metrics": {}, "use_vllm": False} | others))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            SimpleNamespace(_metrics={}),
            r"trainer must have generation_config and _metrics, as .* got a SimpleNamespace",
        ),
        (SimpleNamespace(generation_config=None), r"trainer must have generation_config and _metrics"),
        (drawing(None), r"max_completion_length must be >= 1: it is the largest horizon, got None"),
        (drawing(0), r"max_completion_length must be >= 1: it is the largest horizon, got 0"),
        (drawing(use_vllm=True), r"vllm_generation\.max_completion_length must be 12, as the trainer's, .* got None"),
        (drawing(use_vllm=True, vllm_generation=Server(9)), r"max_completion_length must be 12, .* got 9"),
        (drawing(tools=[sum]), r"tools must be unset: their replies have no horizon, got \['sum'\]"),
        (
            drawing(arguments={"generation_kwargs": {"max_tokens": 5}}),
            r"generation_kwargs\.max_tokens must be unset.* got 5",
        ),
        (
            drawing(arguments={"generation_kwargs": {"max_new_tokens": 5}}),
            r"generation_kwargs\.max_new_tokens must be unset",
        ),
        (
            drawing(arguments={"steps_per_generation": 4}),
            r"steps_per_generation must be at most gradient_accumulation_steps 2, or rollouts serve several steps, got 4",
        ),
        (drawing(arguments={"num_iterations": 3}), r"num_iterations must be 1, or rollouts serve several steps, got 3"),
    ],
)
def test_trainers_that_would_not_keep_to_the_horizon_are_refused(trainer, message):
    with pytest.raises(InputError, match=message):
        HorizonCallback(trainer, STAIRS)


@pytest.mark.parametrize(
    "arguments", [{}, {"steps_per_generation": None}, {"steps_per_generation": 2, "num_iterations": 1}]
)
def test_trainers_that_draw_for_each_step_are_taken(arguments):
    vllm = {"use_vllm": True, "vllm_generation": Server()}
    assert HorizonCallback(drawing(arguments=arguments, tools=[], **vllm), STAIRS).largest == LARGEST


def test_a_trainer_without_rollouts_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(
        InputError, match=r"trainer must have generation_config and _metrics, as TRL's .* got a Trainer"
    ):
        HorizonCallback(Trainer(make_model(0), args), STAIRS)


def test_trl_is_not_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # an import of it would now fail
    assert "HorizonCallback" in runpy.run_path(trl_horizon.__file__)
