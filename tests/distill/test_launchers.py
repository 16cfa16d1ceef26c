"""Does the command run under torchrun on two nodes and under accelerate, and is what it cannot do refused?"""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import make_folder, small_config

from esr_distill.config import ModelConfig, OptimizerConfig, RolloutConfig, SelectionConfig, SelectionRule, WeightRule
from esr_distill.config.devices import DevicesConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.config_file import save_config
from esr_distill.devices import Devices
from esr_distill.devices.check_devices import check_devices, check_same
from esr_distill.devices.launcher import join_processes
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"
COMMAND = ["-m", "esr_distill.command_line", "train", "--config"]
CPU = torch.device("cpu")


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    make_folder(folder)
    return folder


def config_file(folder: Path, name: str) -> Path:
    save_config(small_config(folder, name, steps=2), folder)
    return (folder / "config.yaml").rename(folder / f"{name}.yaml")


def finish(processes: list[subprocess.Popen]) -> str:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-6000:]
    return "\n".join(outputs)


def start(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def check_output(folder: Path, name: str, output: str) -> None:
    """One process wrote and printed."""
    assert output.count("2 processes, devices.shard none") == 1
    assert output.count("finished 2 steps") == 1
    assert [record["step"] for record in read_metrics(folder / name / "metrics.jsonl", "step")] == [1, 2]
    assert (folder / name / "checkpoint-000002" / "model.safetensors").is_file()


def test_two_nodes_of_torchrun(folder):
    """Two agents that find each other by address and port, as on two machines."""
    options, port = str(config_file(folder, "nodes")), free_port()

    def node(rank: int) -> subprocess.Popen:
        nodes = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        address = ["--master_addr", "127.0.0.1", "--master_port", port]
        return start(["-m", "torch.distributed.run", *nodes, *address, *COMMAND, options])

    check_output(folder, "nodes", finish([node(0), node(1)]))


def test_the_launch_files_of_accelerate(folder):
    pytest.importorskip("accelerate")
    options = str(config_file(folder, "accelerate"))
    file = [
        "--config_file",
        str(LAUNCH / "one_machine.yaml"),
        "--num_processes",
        "2",
        "--main_process_port",
        free_port(),
    ]
    output = finish([start(["-m", "accelerate.commands.launch", *file, *COMMAND, options])])
    check_output(folder, "accelerate", output)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_launch_files_leave_everything_but_starting_to_the_run(path):
    settings = yaml.safe_load(path.read_text())
    assert settings["distributed_type"] == "MULTI_GPU" and settings["mixed_precision"] == "no"


TWO = Devices(CPU, 0, 2)


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        (
            {"rollout": RolloutConfig(batch_size=6), "optimizer": OptimizerConfig(accumulation_steps=2)},
            TWO,
            r"rollout\.batch_size must be a multiple of .*accumulation_steps = 2 .*processes = 2, got 6",
        ),
        (
            {
                "rollout": RolloutConfig(batch_size=8, overlap_teacher=True),
                "optimizer": OptimizerConfig(accumulation_steps=2),
            },
            Devices(CPU),
            "rollout.overlap_teacher must be false with optimizer.accumulation_steps = 2",
        ),
        (
            {"devices": DevicesConfig("both")},
            Devices(CPU),
            "devices.shard must be none in a run of one process, got 'both'",
        ),
        (
            {
                "devices": DevicesConfig("student"),
                "model": ModelConfig("student", "self", lora=LoraSettings(use_peft=True)),
            },
            TWO,
            "devices.shard must be none with model.lora.use_peft, got 'student'",
        ),
        (
            {"devices": DevicesConfig("both"), "model": ModelConfig("student", "teacher", teacher_offload=True)},
            TWO,
            "devices.shard must be none or student with model.teacher_offload",
        ),
        (
            {"devices": DevicesConfig("both"), "model": ModelConfig("student", "teacher", trust_remote_code=True)},
            TWO,
            "devices.shard must be none or student with model.trust_remote_code.*got 'both'",
        ),
        (
            {"devices": DevicesConfig("student")},
            Devices(torch.device("cuda", 0), 0, 2),
            "rollout.cuda_graphs must be false with devices.shard",
        ),
    ],
)
def test_what_parts_and_processes_cannot_do_is_refused(tmp_path, changes, devices, message):
    with pytest.raises(InputError, match=message):
        check_devices(small_config(tmp_path, "unused", **changes), devices)


def test_what_they_can_do_is_not(tmp_path):
    rules = [
        SelectionRule("top", score="divergence", share=0.5),
        SelectionRule("finished"),
        SelectionRule("prefix", tokens=4),
    ]
    config = small_config(
        tmp_path,
        "unused",
        selection=SelectionConfig(rules, weights=[WeightRule("decay", rate=0.1)]),
        optimizer=OptimizerConfig(accumulation_steps=2),
        devices=DevicesConfig("both"),
    )
    check_devices(config, TWO)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE = 4 in the environment must come with RANK.*got no RANK and no LOCAL_RANK"),
        ({"ACCELERATE_USE_FSDP": "true"}, "must leave this to devices.shard, got ACCELERATE_USE_FSDP=true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO is not supported"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision must be no.*model.autocast.*got 'bf16'"),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "must be 1, since optimizer.accumulation_steps decides, got 4",
        ),
    ],
)
def test_a_launcher_that_says_otherwise_is_refused(tmp_path, environment, message):
    with pytest.raises(InputError, match=message):
        join_processes(small_config(tmp_path, "unused"), environment)


def test_without_a_launcher_there_is_one_process(tmp_path):
    devices = join_processes(small_config(tmp_path, "unused"), {})
    assert devices == Devices(CPU, 0, 1) and devices.is_main
    assert (devices.sum(3.5), devices.any(True), devices.any(False)) == (3.5, True, False)
    assert devices.gathered("a") == ["a"] and devices.from_main("a") == "a"


class Answers(Devices):
    """Two processes of which the other one answers with what `change` makes of ours."""

    def gathered(self, value):
        return [value, self.change(*value)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config, sums, read: (config | {"loss": {}}, sums, read),
            "same options, got others for loss in process 1",
        ),
        (lambda config, sums, read: (config, [(name, s + 1) for name, s in sums], read), "same student, .* process 1"),
        (lambda config, sums, read: (config, sums, read | {"data.prompts": "c"}), "same data.prompts, .* process 1"),
    ],
)
def test_processes_that_would_train_different_runs_are_refused(tmp_path, change, message):
    devices = Answers(CPU, 0, 2)
    object.__setattr__(devices, "change", change)
    config = replace(small_config(tmp_path, "unused"))
    with pytest.raises(InputError, match=message):
        check_same(config, torch.nn.Linear(2, 3), {"evaluation.prompts": "a", "data.prompts": "b"}, devices)
