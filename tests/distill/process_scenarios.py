"""What the tests of several processes run in each process: started by torchrun, or by itself as one process for comparison.

python process_scenarios.py FOLDER SCENARIO...

Every process writes FOLDER/<scenario>-<rank>-of-<processes>.pt.
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from divided_scenarios import divided, fails, served
from rich.console import Console
from small_runs import small_config
from tiny_models import make_model, make_rollouts
from transformers import Gemma2Config, GPT2Config, Qwen2Config

import esr_distill.train as train_module
from esr_distill.config import (
    DevicesConfig,
    EvaluationConfig,
    LoraSettings,
    LossConfig,
    ModelConfig,
    MonitoringConfig,
    OptimizerConfig,
    RolloutConfig,
    SelectionConfig,
    SelectionRule,
    WeightRule,
)
from esr_distill.devices import Devices
from esr_distill.devices.launcher import join_processes, leave_processes
from esr_distill.devices.sharded_loading import load_in_shards
from esr_distill.devices.sharding import WholeCopy, shard_model, whole, whole_head
from esr_distill.hidden_states import last_hidden_states, output_head
from esr_distill.input_error import InputError
from esr_distill.models.train_mode import switch_off_dropout
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.train import train
from esr_distill.train_step import train_step
from esr_distill.training_run import TrainingRun, prepare_run

QUIET = Console(quiet=True)
ALL = SelectionConfig()
HIGHEST = SelectionConfig([SelectionRule("top", score="divergence", tokens=3)])
SURE = SelectionConfig([SelectionRule("threshold", score="teacher_entropy", at_most=1.5)])
ROWS = SelectionConfig([SelectionRule("rows", score="surprise", share=0.3)])
OF_BATCH = SelectionConfig(
    [SelectionRule("prefix", tokens=5), SelectionRule("top", score="tip", tokens=11, scope="batch")]
)
RESCALED = SelectionConfig(HIGHEST.rules, weights=[WeightRule("decay", rate=0.3)], rescale_weights=True)
# name: normaliser, its denominator, selection
LOSSES: dict[str, tuple[str, float | None, SelectionConfig]] = {
    "token_mean": ("token_mean", None, ALL),
    "sequence_mean": ("sequence_mean", None, ALL),
    "sum": ("sum", None, ALL),
    "fixed": ("fixed", 7.5, ALL),
    "token_mean of the highest": ("token_mean", None, HIGHEST),
    "token_mean of the sure": ("token_mean", None, SURE),
    "fixed of the sure": ("fixed", 7.5, SURE),
    "sequence_mean of the highest": ("sequence_mean", None, HIGHEST),
    "token_mean of the best rows": ("token_mean", None, ROWS),
    "sum of the batch's highest": ("sum", None, OF_BATCH),
    "token_mean of rescaled": ("token_mean", None, RESCALED),
}
# Biases; soft caps; a tied head, and matrices that are stored the other way round.
BODIES = {
    "qwen2": (Qwen2Config, {}),
    "gemma2": (Gemma2Config, {"final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gpt2": (GPT2Config, {"tie_word_embeddings": True, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
}


class DrawnInFloat32:
    """The backend for a model in float64, whose weights are those of a float32 one."""

    def __init__(self, backend) -> None:
        self.backend = backend

    def generate(self, model, prompts, request) -> RolloutBatch:
        rollouts = self.backend.generate(model.float(), prompts, request)
        model.double()
        return rollouts


def gradients_of(run: TrainingRun, step: int = 0) -> dict:
    """The step's metrics, and the gradients that the optimizer is given; the weights stay as they are.

    In float64, so that nothing but a wrong divisor can tell one order of summation from another.
    """
    run.rollouts = DrawnInFloat32(run.rollouts)
    run.student.double()
    run.teacher.double()
    seen: list[torch.Tensor] = []
    run.optimizer.step = lambda: seen.extend(p.grad.clone() for p in run.student.parameters())
    return {"record": train_step(run, step), "gradients": seen}


def losses(folder: Path, devices: Devices) -> dict:
    """Gradients of one step for every normaliser, without and with accumulation."""
    found = {}
    for name, (normalizer, denominator, selection) in LOSSES.items():
        counts = (1, 2, 4) if name == "token_mean of the highest" else (1, 2)
        for parts in counts:
            config = small_config(
                folder,
                "unused",
                loss=LossConfig(normalizer=normalizer, denominator=denominator),
                selection=selection,
                optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=1e6, accumulation_steps=parts),
            )
            found[name, parts] = gradients_of(prepare_run(config, QUIET, devices=devices))
    return found


class UnfinishedBehind:
    """A backend whose rollouts from request 4 on are never finished, wherever they are drawn."""

    def __init__(self, backend) -> None:
        self.backend = backend

    def generate(self, model, prompts, request) -> RolloutBatch:
        rollouts = self.backend.generate(model, prompts, request)
        return replace(rollouts, stopped_by_eos_B=prompts.request_ids_B < 4)


def empty(folder: Path, devices: Devices) -> dict:
    """A step in which the second half of the rollouts, and so the second process, has no token to train."""
    config = small_config(
        folder,
        "unused",
        selection=SelectionConfig(rules=[SelectionRule("finished")]),
        loss=LossConfig(normalizer="token_mean"),
    )
    run = prepare_run(config, QUIET, devices=devices)
    run.rollouts = UnfinishedBehind(run.rollouts)
    return gradients_of(run)


def whole_run(folder: Path, devices: Devices) -> dict:
    """A run without interruption, and one that is stopped by a signal to the last process in step 2 and goes on."""
    config = small_config(folder, f"whole-{devices.world_size}")
    train(config, QUIET)
    if devices.world_size == 1:
        return {}
    halted = small_config(folder, "halted")
    original = train_module.train_step

    def signalled(run, step, *rest):
        if step == 1 and devices.rank == devices.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, step, *rest)

    train_module.train_step = signalled
    first = train(halted, QUIET)
    train_module.train_step = original
    stopped_with = [folder.name for folder in sorted(Path(halted.run.output_dir).glob("checkpoint-*"))]
    second = train(halted, QUIET, resume=True)
    return {"first": first, "stopped_with": stopped_with, "second": second}


def adapter(folder: Path, devices: Devices) -> dict:
    """An adapter with dropout: a whole run, and one that is made of two; and the masks that each process drew."""
    lora = LoraSettings(use_peft=True, lora_r=2, lora_alpha=4, lora_dropout=0.5)
    model = ModelConfig(str(folder / "student"), "self", device="cpu", lora=lora)
    steady = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_fraction=0.0)
    whole, halted = (
        small_config(folder, f"adapter-{name}-{devices.world_size}", model=model, optimizer=steady)
        for name in ("whole", "halted")
    )
    train(whole, QUIET)
    state = torch.get_rng_state()
    train(replace(halted, run=replace(halted.run, steps=2)), QUIET)
    train(halted, QUIET, resume=True)
    return {"state": state, "resumed_state": torch.get_rng_state()}


def sharded(folder: Path, devices: Devices) -> dict:
    """Runs of three steps with weights in shards: stopped after two, and gone on with."""
    for name, shard, student in (
        ("student", "student", "student"),
        ("both", "both", "tied"),
        ("kept", "student", "tied"),
    ):
        model = ModelConfig(str(folder / student), str(folder / "teacher"), device="cpu")
        is_several = devices.world_size > 1
        config = small_config(
            folder,
            f"sharded-{name}-{devices.world_size}",
            3,
            model=replace(model, gradient_checkpointing=shard == "both"),
            optimizer=OptimizerConfig(
                learning_rate=1e-3, max_grad_norm=0.1, accumulation_steps=2 if name == "student" else 1
            ),
            rollout=RolloutConfig(
                horizon=9, batch_size=8, sampling_temperature=1.0, top_p=1.0, overlap_teacher=shard == "both"
            ),
            devices=DevicesConfig(shard, reshard_after_forward=name != "kept") if is_several else DevicesConfig(),
            evaluation=EvaluationConfig(str(folder / "prompts.jsonl"), every=1, max_tokens=4, limit=6),
            monitoring=MonitoringConfig(probe_every=2, probe_prompts=3, probe_tokens=12, samples_every=1, samples=8),
            loss=LossConfig(normalizer="token_mean"),
        )
        if is_several:
            original = train_module.train_step

            def signalled(run, step, *rest, original=original):
                if step == 1 and devices.is_main:
                    os.kill(os.getpid(), signal.SIGINT)
                return original(run, step, *rest)

            train_module.train_step = signalled
            assert train(config, QUIET).step == 2
            train_module.train_step = original
            train(config, QUIET, resume=True)
        else:
            train(config, QUIET)
    return {}


def sharded_bodies(folder: Path, devices: Devices) -> dict:
    """Gradients in shards of models that are built differently, each process with rollouts of its own, and those of all
    rollouts in the whole model; and whether a whole copy of the shards is that model."""
    found = {}
    prompts, responses = [[3], [4, 5], [6, 7, 8, 9], [11]], [[12, 2], [13, 14, 15], [16], [17, 18, 3, 2]]

    def gradients(model, rows: slice) -> dict:
        rollouts = make_rollouts(prompts[rows], responses[rows])
        logits_B_T_V = whole_head(output_head(model)).logits(last_hidden_states(model, rollouts))
        (logits_B_T_V.log_softmax(-1)[..., 5] * rollouts.attention_mask_B_T).sum().backward()
        return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}

    if devices.world_size == 1:
        return found
    for name, (config_class, fields) in BODIES.items():
        plain, shards = (make_model(0, config_class, **fields) for _ in range(2))
        for model in (plain, shards):
            switch_off_dropout(model)
            model.eval()
        copy = WholeCopy(shards)
        shard_model(shards, devices, "model.student")
        rows = slice(2 * devices.rank, 2 * devices.rank + 2)
        found[name] = {"shards": gradients(shards, rows), "plain": gradients(plain, slice(0, 4))}
        with copy.weights() as model:
            pairs = zip(model.state_dict().items(), plain.state_dict().items(), strict=True)
            found[name]["is_copy"] = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
        found[name]["is_empty"] = all(parameter.numel() == 0 for parameter in model.parameters())
    return found


def sharded_loading(folder: Path, devices: Devices) -> dict:
    """Models that one process reads and all have in shards, and what becomes of its error."""
    found = {}
    if devices.world_size == 1:
        return found

    def read(model):
        assert devices.is_main
        return model

    def fail():
        raise InputError("model.teacher must be there, got none")

    rollouts = make_rollouts([[3], [4, 5]], [[12, 2], [13, 14, 15]])
    for name, (config_class, fields) in BODIES.items():
        plain = make_model(0, config_class, **fields).eval().requires_grad_(False)
        shards = load_in_shards(lambda plain=plain: read(plain), devices, "model.teacher")
        named = list(shards.named_parameters())
        found[name] = {
            "same": all(torch.equal(whole(parameter), plain.get_parameter(name)) for name, parameter in named),
            "names": [name for name, _ in named] == [name for name, _ in plain.named_parameters()],
            "frozen": not any(parameter.requires_grad for _, parameter in named) and not shards.training,
            "is_in_shards": all(len(parameter.to_local()) <= -(-len(parameter) // 2) for _, parameter in named),
            "hidden": [last_hidden_states(model, rollouts) for model in (shards, plain)],
            "head": [whole_head(output_head(model)) for model in (shards, plain)],
        }
    try:
        load_in_shards(fail, devices, "model.teacher")
    except InputError as error:
        found["error"] = str(error)
    return found


def dies(folder: Path, devices: Devices) -> dict:
    """The last process ends without a word in step 2."""
    original = train_module.train_step

    def dying(run, step, *rest):
        if step == 1 and devices.rank == devices.world_size - 1:
            os._exit(9)
        return original(run, step, *rest)

    train_module.train_step = dying
    train(small_config(folder, "dies"), QUIET)
    return {}


SCENARIOS: dict[str, Callable[[Path, Devices], dict]] = {
    scenario.__name__: scenario
    for scenario in (
        losses,
        empty,
        whole_run,
        adapter,
        sharded,
        sharded_bodies,
        sharded_loading,
        divided,
        served,
        dies,
        fails,
    )
}


def run_scenarios(folder: Path, names: list[str]) -> None:
    devices = join_processes(small_config(folder, "unused"))
    for name in names:
        found = SCENARIOS[name](folder, devices)
        torch.save(found, folder / f"{name}-{devices.rank}-of-{devices.world_size}.pt")
        devices.barrier()
    leave_processes(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_scenarios(Path(sys.argv[1]), sys.argv[2:])
