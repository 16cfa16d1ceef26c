"""Does the command run under torchrun on two nodes and under accelerate, and is what it cannot do refused?"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from small_runs import make_folder, small_config
from two_networks import ADDRESSES, CABLE, NotAllowed, two_networks

from esr_distill.config import ModelConfig, OptimizerConfig, RolloutConfig, SelectionConfig, SelectionRule, WeightRule
from esr_distill.config.devices import DevicesConfig
from esr_distill.config.lora import LoraSettings
from esr_distill.config_file import save_config
from esr_distill.devices import Devices
from esr_distill.devices.check_devices import check_devices, check_same
from esr_distill.devices.launcher import join_processes
from esr_distill.input_error import InputError
from esr_distill.metrics import read_metrics
from esr_distill.train import train

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


@pytest.fixture(scope="module")
def losses_alone(folder) -> list[float]:
    """Of one process with the same options."""
    config = small_config(folder, "alone", steps=2)
    train(config, Console(quiet=True))
    return losses_of(folder / "alone")


def losses_of(run_folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_folder / "metrics.jsonl", "step")]


def start(arguments: list[str], inside: Sequence[str] = (), **more: str) -> subprocess.Popen:
    """Python with these arguments, run by the command `inside`, with `more` in the environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*inside, sys.executable, *arguments], env=environment, **pipes)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each said; all must end well. When one is overdue all are ended, so that the others' words are shown too."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=120)[0])
        except subprocess.TimeoutExpired:
            for each in processes:
                each.terminate()
            outputs.append(process.communicate(timeout=60)[0])
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-6000:]
    return outputs


def check_run(folder: Path, name: str, outputs: list[str], losses_alone: list[float]) -> None:
    """One process wrote and printed, that of the first node, and the run is that of one process."""
    assert outputs[0].count("2 processes, devices.shard none") == 1
    assert outputs[0].count("finished 2 steps") == 1
    assert all("steps" not in output for output in outputs[1:])
    assert losses_of(folder / name) == pytest.approx(losses_alone, rel=1e-5)
    assert (folder / name / "checkpoint-000002" / "model.safetensors").is_file()


def torchrun_node(rank: int, address: str, port: str, options: str) -> list[str]:
    """The command of docs/devices.md for several machines, with one process on each."""
    nodes = ["--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
    place = ["--master_addr", address, "--master_port", port]
    return ["-m", "torch.distributed.run", *nodes, *place, *COMMAND, options]


def check_nodes(outputs: list[str], address: str) -> None:
    """Each agent was a node of one process, and met the other one at the first one's address."""
    for rank, output in enumerate(outputs):
        assert re.search(rf"master_addr={address}\s", output)
        found = [re.search(rf" {name}=(\S+)", output)[1] for name in ("group_rank", "group_world_size", "global_ranks")]
        assert found == [str(rank), "2", f"[{rank}]"]


@pytest.fixture
def other_loopback() -> str:
    """An address of this machine that is no launcher's default."""
    address = "127.0.0.2"
    with socket.socket() as server:
        try:
            server.bind((address, 0))
        except OSError:  # a Mac has 127.0.0.1 alone
            pytest.skip(f"this machine has no {address}")
    return address


def test_two_nodes_of_torchrun(folder, losses_alone, other_loopback):
    """Two agents that find each other by address and port. The first listens at one address, the second comes from another."""
    options, port = str(config_file(folder, "nodes")), free_port()
    commands = [torchrun_node(rank, other_loopback, port, options) for rank in (0, 1)]
    outputs = finish([start(command, LOGLEVEL="INFO") for command in commands])
    check_nodes(outputs, other_loopback)
    check_run(folder, "nodes", outputs, losses_alone)


def test_two_nodes_in_networks_of_their_own(folder, losses_alone):
    """The second node can be reached at the address of its cable alone, as a second machine can."""
    options = str(config_file(folder, "networks"))
    commands = [torchrun_node(rank, ADDRESSES[0], "29500", options) for rank in (0, 1)]
    try:
        with two_networks() as networks:
            nodes = zip(commands, networks, strict=True)
            # else a worker tells the address of the machine's own name, which may be 127.0.0.1
            told = {"LOGLEVEL": "INFO", "GLOO_SOCKET_IFNAME": CABLE}
            outputs = finish([start(command, inside, **told) for command, inside in nodes])
    except NotAllowed as why:
        pytest.skip(f"no networks can be made here: {why}")
    check_nodes(outputs, ADDRESSES[0])
    check_run(folder, "networks", outputs, losses_alone)


def accelerate_launch(file: str, processes: int, *more: str) -> list[str]:
    arguments = ["--config_file", str(LAUNCH / file), "--num_processes", str(processes), *more]
    return ["-m", "accelerate.commands.accelerate_cli", "launch", *arguments, *COMMAND]


def test_the_launch_file_of_one_machine(folder, losses_alone):
    pytest.importorskip("accelerate")
    command = accelerate_launch("one_machine.yaml", 2, "--main_process_port", free_port())
    outputs = finish([start([*command, str(config_file(folder, "one_machine"))])])
    check_run(folder, "one_machine", outputs, losses_alone)


def test_the_launch_file_of_two_machines(folder, losses_alone, other_loopback):
    """The command at the head of the file, on each machine; num_processes counts those of both."""
    pytest.importorskip("accelerate")
    options, place = str(config_file(folder, "two_machines")), ["--main_process_ip", other_loopback]
    place += ["--main_process_port", free_port()]
    commands = [accelerate_launch("two_machines.yaml", 2, "--machine_rank", rank, *place) for rank in ("0", "1")]
    outputs = finish([start([*command, options], LOGLEVEL="INFO") for command in commands])
    check_nodes(outputs, other_loopback)
    check_run(folder, "two_machines", outputs, losses_alone)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_launch_files_leave_everything_but_starting_to_the_run(path):
    settings = yaml.safe_load(path.read_text())
    assert settings["distributed_type"] == "MULTI_GPU" and settings["mixed_precision"] == "no"
    assert settings["use_cpu"] is False and settings["gpu_ids"] == "all"


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
