"""Steps of TRL's DistillationTrainer on models in memory. Names and signatures were read in the wheel of TRL 1.16.0.

Its settings beside ours: reverse KL (beta 1) at temperature 1, drawn with our sampler's settings; gradient checkpointing off,
which is on by default there and slower; weights as they are, without mixed precision. Lengths are forced by an end-of-sequence id
that the output head does not have. It draws with transformers' `generate`, and projects hidden states chunk by chunk.

`train` is one long call, so it runs in a thread that waits before each step until it is asked for.
"""

import copy
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from bench.baselines.peers import NotInstalled, imported
from bench.floor import StepSetting
from bench.steps.clock import MemoryClock
from bench.steps.record import StepRecord
from bench.steps.runs import PAD_ID, Pair, make_run
from esr_distill.prompts import PromptSet
from esr_distill.training_run import TrainingRun

TIMED_METHODS = ("_prepare_inputs", "_get_last_hidden_state", "compute_loss")
MOST_STEPS = 1_000_000  # of `train`; it is stopped when no more are asked for
WHOLE_LOSS = "compute_loss"


class TrlSteps:
    """Steps of one `train` call.

    Raises:
        NotInstalled: TRL cannot be imported, or its trainer lacks a method whose time is taken.
    """

    def __init__(self, pair: Pair, setting: StepSetting) -> None:
        config_class = imported("TRL", "trl", "DistillationConfig")
        trainer_class = imported("TRL", "trl", "DistillationTrainer")
        missing = [name for name in TIMED_METHODS if not hasattr(trainer_class, name)]
        if missing:
            raise NotInstalled(f"TRL: its DistillationTrainer must have {', '.join(missing)}, as that of 1.16.0 has")
        run = make_run(pair, setting)
        self.student, self.folder = pair.student, tempfile.TemporaryDirectory()
        self.was_training = pair.student.training
        self.special_ids = SpecialIds.taken_from(pair.student)
        self.callback, self.trainer, self.thread = StepByStep(run.device), None, None
        try:
            self.trainer = timed_trainer(trainer_class, self.callback)(
                model=pair.student,
                teacher_model=pair.teacher,
                args=config_class(**trainer_settings(run, self.folder.name)),
                train_dataset=prompt_dataset(run.prompts),
                processing_class=id_tokenizer(pair),
                callbacks=[self.callback],
                optimizers=(pair.optimizer, pair.scheduler),
            )
            self.trainer.remove_callback(PrinterCallback)
        except BaseException:
            self.release()
            raise

    def step(self) -> StepRecord:
        if self.thread is None:
            self.thread = threading.Thread(target=self.callback.guarded, args=(self.trainer.train,), daemon=True)
            self.thread.start()
        return self.callback.next_step()

    def release(self) -> None:
        if self.thread is not None and self.thread.is_alive():
            self.callback.wanted.put(False)
            self.thread.join()
        self.thread = self.trainer = None
        self.student.train(self.was_training)
        self.special_ids.give_back(self.student)
        self.folder.cleanup()


@dataclass(frozen=True)
class SpecialIds:
    """What a model says about its special ids. TRL ends rollouts at them too, and writes its tokenizer's into the model."""

    generation_config: GenerationConfig
    in_config: dict[str, int | list[int] | None]

    @classmethod
    def taken_from(cls, model: PreTrainedModel) -> "SpecialIds":
        """Until they are given back, the model names no end of a sequence."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = cls(model.generation_config, {name: getattr(model.config, name, None) for name in names})
        model.generation_config = copy.deepcopy(model.generation_config)
        model.generation_config.eos_token_id = None
        return kept

    def give_back(self, model: PreTrainedModel) -> None:
        model.generation_config = self.generation_config
        for name, value in self.in_config.items():
            setattr(model.config, name, value)


class StepByStep(TrainerCallback):
    """Lets `train` do one step when it is asked for, and takes the time of its stages."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wanted: queue.Queue[bool] = queue.Queue()
        self.done: queue.Queue[StepRecord | BaseException] = queue.Queue()
        self.clock, self.loss, self.lengths_B = MemoryClock(device), None, None
        self.start = self.before_optimizer = 0.0

    def guarded(self, train: Callable[[], object]) -> None:
        """`train` in its thread; what it raises is raised where the step was asked for."""
        try:
            train()
            self.done.put(RuntimeError("TRL: train must go on until it is stopped, but it ended"))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            self.done.put(error)

    def next_step(self) -> StepRecord:
        self.wanted.put(True)
        result = self.done.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 0:
            self.wanted.get()  # later ones are waited for at the end of the step before
        self.clock, self.start = MemoryClock(self.device), time.perf_counter()
        return control

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.before_optimizer = self.now()
        self.clock.end_peak("backward")
        self.clock.begin_peak()
        return control

    def on_step_end(self, args, state, control, **_):
        end, seconds = self.now(), self.clock.seconds
        self.clock.end_peak("optimizer")
        forwards = seconds["student_forward"] + seconds["teacher_forward"]
        whole_loss = seconds.pop(WHOLE_LOSS)
        stage_s = seconds | {
            "divergence": whole_loss - forwards,
            "backward": self.before_optimizer - self.start - seconds["rollout"] - whole_loss,
            "optimizer": end - self.before_optimizer,
        }
        peaks = self.clock.peak_bytes
        if peaks:
            peaks["divergence"] = peaks.pop(WHOLE_LOSS)  # what was allocated after its forwards
        self.done.put(
            StepRecord(self.loss.item(), stage_s, peaks or None, int(self.lengths_B.sum()), int(self.lengths_B.max()))
        )
        control.should_training_stop = not self.wanted.get()
        return control

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def timed_trainer(trainer_class: type, callback: StepByStep) -> type:
    """The trainer with a clock around what makes its stages. Backward and gradient norm are what is left of a step."""

    class TimedTrainer(trainer_class):
        def _prepare_inputs(self, generation_batch):
            with callback.clock("rollout"):
                inputs = super()._prepare_inputs(generation_batch)
            callback.lengths_B = inputs["completion_mask"].sum(-1)
            return inputs

        def _get_last_hidden_state(self, unwrapped_model, *args, **kwargs):
            stage = "student_forward" if unwrapped_model is self.model else "teacher_forward"
            with callback.clock(stage):
                return super()._get_last_hidden_state(unwrapped_model, *args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            with callback.clock(WHOLE_LOSS):
                loss = super().compute_loss(*args, **kwargs)
            callback.loss = loss.detach()
            callback.clock.begin_peak()  # of backward
            return loss

    return TimedTrainer


def trainer_settings(run: TrainingRun, folder: str) -> dict:
    """Arguments of DistillationConfig."""
    sampler, is_cpu = run.rollout_request.sampler, run.device.type == "cpu"
    return {
        "output_dir": folder,
        "per_device_train_batch_size": run.config.rollout.batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": MOST_STEPS,
        "max_completion_length": run.rollout_request.horizon,
        "temperature": run.config.loss.loss_temperature,  # of the loss, and of sampling but for the next line
        "generation_kwargs": {"temperature": sampler.sampling_temperature},
        "top_p": sampler.top_p,
        "top_k": sampler.top_k,
        "min_p": sampler.min_p or None,
        "beta": 1.0,
        "max_grad_norm": run.config.optimizer.max_grad_norm,
        "gradient_checkpointing": False,  # the pair's own stays on where it has it
        "bf16": False,
        "use_cpu": is_cpu,
        "dataloader_pin_memory": not is_cpu,
        "seed": run.config.run.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def prompt_dataset(prompts: PromptSet) -> list[dict]:
    """Prompts as texts that `id_tokenizer` turns into these ids again."""
    return [{"prompt": " ".join(map(id_text, ids))} for ids in prompts.token_ids]


def id_text(token_id: int) -> str:
    # A letter in front: the text of a special token is looked for inside of words, and no id but 0 begins with "t0".
    return f"t{token_id}"


def id_tokenizer(pair: Pair) -> PreTrainedTokenizerFast:
    """Texts are ids with spaces between; the end of a sequence is an id that no output head has, so nothing ends early."""
    vocab_size = pair.student.get_output_embeddings().weight.shape[0]
    end = id_text(vocab_size)
    vocabulary = {id_text(i): i for i in range(vocab_size + 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=id_text(PAD_ID),
        eos_token=end,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
