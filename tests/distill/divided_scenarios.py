"""Scenarios of `process_scenarios.py` in which processes divide the work of an evaluation or a probe."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from small_runs import small_config
from vllm_stub import VllmStub

import esr_distill.monitoring.full_length_probe as probe_module
from esr_distill.config import DevicesConfig, EvaluationConfig, MonitoringConfig, RolloutConfig
from esr_distill.devices import Devices
from esr_distill.input_error import InputError
from esr_distill.monitoring.full_length_probe import FullLengthProbe
from esr_distill.rollout.rollout_batch import RolloutBatch
from esr_distill.train import train
from esr_distill.training_run import prepare_run

QUIET = Console(quiet=True)


class Recorded:
    """A backend that notes the requests it was given."""

    def __init__(self, backend) -> None:
        self.backend, self.request_ids = backend, []

    def generate(self, model, prompts, request) -> RolloutBatch:
        self.request_ids += prompts.request_ids_B.tolist()
        return self.backend.generate(model, prompts, request)

    def release(self) -> None:
        self.backend.release()


def divided(folder: Path, devices: Devices) -> dict:
    """What an evaluation of five problems and probes of five, three and one prompts came to, what this process drew for them,
    and how often its teacher read something for each probe."""
    found = {}
    for shard in ("none", "both") if devices.world_size > 1 else ("none",):
        config = small_config(
            folder,
            "unused",
            devices=DevicesConfig(shard),
            evaluation=EvaluationConfig(
                str(folder / "problems.jsonl"),
                max_tokens=6,
                samples_per_problem=3,
                sampling_temperature=1.0,
                batch_size=4,
            ),
            monitoring=MonitoringConfig(probe_every=1, probe_prompts=5, probe_tokens=20),
        )
        run = prepare_run(config, QUIET, devices=devices)
        evaluation = replace(run.evaluation, rollouts=Recorded(run.evaluation.rollouts))
        calls: list[int] = []
        run.teacher.base_model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        result = {"probes": {}}
        with run.whole_student() as student:
            result["replies"] = evaluation.replies(student, devices=devices)
            result["requests"] = list(evaluation.rollouts.request_ids)
            result["accuracy"] = evaluation.accuracy(student, devices=devices).record()
            for count in (5, 3, 1):
                probe = FullLengthProbe.prepare(run)
                probe = replace(probe, prompts=probe.prompts.first(count), rollouts=Recorded(probe.rollouts))
                calls.clear()
                record = probe.measure(run.with_whole_student(student), 5)
                result["probes"][count] = record, probe.rollouts.request_ids, len(calls)
        found[shard] = result
    return found


def served(folder: Path, devices: Devices) -> dict:
    """Two steps, evaluated and probed, whose rollouts one server draws for all processes; then the server refuses."""
    stub = VllmStub() if devices.is_main else None
    url = devices.from_main(stub.url if devices.is_main else None)
    name = f"served-{devices.world_size}"
    config = small_config(
        folder,
        name,
        2,
        rollout=RolloutConfig(
            horizon=9,
            batch_size=8,
            sampling_temperature=1.0,
            top_p=1.0,
            backend="vllm",
            vllm_url=url,
            vllm_weights_folder=str(folder / f"weights-{name}"),
        ),
        evaluation=EvaluationConfig(str(folder / "problems.jsonl"), every=2, max_tokens=6),
        monitoring=MonitoringConfig(probe_every=2, probe_prompts=3, probe_tokens=12),
    )
    train(config, QUIET)
    found = {}
    if devices.is_main:
        drawn = sorted((prompt, ids) for prompt, ids in stub.drawn)
        found = {"drawn": drawn, "loaded": len(stub.loaded)}
        stub.refuse["/v1/completions"] = 503, {"error": "busy"}
    try:
        train(replace(config, run=replace(config.run, output_dir=str(folder / f"{name}-refused"))), QUIET)
    except InputError as error:
        found["error"] = str(error)
    if devices.is_main:
        stub.stop()
    return found


def fails(folder: Path, devices: Devices) -> dict:
    """The last process meets an error in its share of the probe after step 1."""
    if devices.rank == devices.world_size - 1:
        calls, original = [], probe_module.decode_replies

        def failing(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise FloatingPointError("only here")
            return original(*arguments)

        probe_module.decode_replies = failing
    probed = MonitoringConfig(probe_every=1, probe_prompts=3, probe_tokens=12)
    train(small_config(folder, "fails", monitoring=probed), QUIET)
    return {}
