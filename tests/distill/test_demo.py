"""Does the demo leave its table, picture, page and results, and go on after a stop?  pytest tests/distill/test_demo.py"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import esr_distill.demo.run as demo_run
from esr_distill.command_line import main
from esr_distill.config_file import save_config
from esr_distill.demo.arms import TASK_SETTINGS, arm_config, arms_of
from esr_distill.demo.report import HEADINGS, table_rows
from esr_distill.demo.settings import DemoConfig
from esr_distill.input_error import InputError
from esr_distill.train import TrainResult


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A demo of three steps an arm."""
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--steps", "3", "--problems", "16", "--device", "cpu", "--output_dir", str(folder)]) == 0
    return folder


def test_results_hold_every_model_and_arm(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["models"].keys() == {"teacher", "student"}
    assert results["arms"].keys() == {"full", "esr", "full-loss-masked"}
    assert results["settings"]["steps"] == 3 and results["machine"]["versions"]["torch"]
    for model in [*results["models"].values(), *results["arms"].values()]:
        assert model["count"] == 16 and 0 <= model["accuracy"] <= 1
        assert len(model["right_steps"]) == TASK_SETTINGS["rewrite"].max_terms - 1
        assert len(model["reverse_kl_by_position"]) == len(model["rollouts_by_position"])
        assert model["rollouts_by_position"][0] == 16
    assert max(results["models"]["teacher"]["reverse_kl_by_position"]) == pytest.approx(0.0, abs=1e-5)
    assert results["models"]["student"]["reverse_kl_by_position"][0] > 0.1


def test_arms_differ_only_in_what_is_generated_and_what_trains(finished):
    arms = json.loads((finished / "results.json").read_text())["arms"]
    horizon = TASK_SETTINGS["rewrite"].horizon
    assert arms["esr"]["longest_rollout"] == horizon < arms["full"]["longest_rollout"]
    assert arms["esr"]["trained_tokens"] == arms["esr"]["generated_tokens"]
    assert arms["full-loss-masked"]["generated_tokens"] > arms["full-loss-masked"]["trained_tokens"]
    assert arms["full-loss-masked"]["trained_tokens"] == arms["esr"]["trained_tokens"]
    # The same tokens train, so the same losses come out up to the rounding of wider batches.
    assert arms["full-loss-masked"]["loss"] == pytest.approx(arms["esr"]["loss"], rel=1e-4)
    configs = [arm_config(name, DemoConfig(), Path("runs")) for name in arms_of("rewrite")]
    assert all(
        (config.model, config.data, config.optimizer, config.evaluation) ==
        (configs[0].model, configs[0].data, configs[0].optimizer, configs[0].evaluation)
        for config in configs
    )  # fmt: skip


def test_picture_page_and_table(finished):
    assert (finished / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    rows = table_rows(json.loads((finished / "results.json").read_text()))
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert all(f"<td>{cell}</td>" in page for row in rows for cell in row)
    assert "every carry and borrow is forgotten" in page and "http" not in page


def test_held_out_problems_are_of_the_greatest_length_and_not_trained_on(finished):
    prompts = {json.loads(line)["prompt"] for line in (finished / "problems/training.jsonl").read_text().splitlines()}
    problems = [json.loads(line)["prompt"] for line in (finished / "problems/held_out.jsonl").read_text().splitlines()]
    assert len(problems) == 16 and not prompts & set(problems)
    assert all(problem.count("+") + problem.count("-") == 6 for problem in problems)


def test_a_stopped_demo_goes_on_and_a_finished_one_starts_anew(tmp_path, monkeypatch):
    """The second arm is stopped: the first is not trained again, the second is resumed."""
    calls, stops = [], ["esr"]
    original = demo_run.train

    def recorded(config, console, *, resume):
        name = Path(config.run.output_dir).name
        calls.append((name, resume))
        result = original(config, console, resume=resume)
        if name in stops:
            stops.remove(name)
            return TrainResult(False, result.step, result.checkpoint)
        return result

    monkeypatch.setattr(demo_run, "train", recorded)
    arguments = ["demo", "--steps", "1", "--problems", "4", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(arguments) == 130
    assert not (tmp_path / "results.json").exists()
    assert main(arguments) == 0
    assert calls == [("full", False), ("esr", False), ("full", True), ("esr", True), ("full-loss-masked", False)]
    calls.clear()
    assert main(arguments) == 0
    assert calls == [("full", False), ("esr", False), ("full-loss-masked", False)]


def test_another_run_in_the_folder_of_an_arm_is_refused_and_kept(tmp_path, capsys):
    """`runs` is where `runs/esr`, the default folder of `esr-distill train`, lies."""
    config = arm_config("esr", DemoConfig(), tmp_path)
    run = tmp_path / "esr"
    (run / "checkpoint-000200").mkdir(parents=True)
    save_config(replace(config, data=replace(config.data, prompts="mine.jsonl")), run)
    assert main(["demo", "--steps", "1", "--problems", "4", "--device", "cpu", "--output_dir", str(tmp_path)]) == 2
    assert "output_dir must hold nothing but the demo's own runs under 'esr'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"esr"}
    assert (run / "checkpoint-000200").is_dir()


@pytest.mark.parametrize("field", ["steps", "problems"])
def test_nothing_to_do_is_refused(field):
    with pytest.raises(InputError, match=f"{field} must be >= 1, got 0"):
        DemoConfig(**{field: 0})
