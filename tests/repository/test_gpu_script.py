"""Does `make gpu` run the steps that are asked for, and go on after one that fails?

pytest tests/repository/test_gpu_script.py
"""

import os
import subprocess

import pytest
from source_tree import ROOT

# A stand-in for the machine's Python: says that it has a GPU, notes what it is asked to run, and ends as told.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in *get_device_name*) echo "some-gpu 90";; esac
if [[ $1 == - ]]; then cat >/dev/null; else echo "$*" >>"$NOTES"; fi
[[ "$*" == *bench_esr_speedup* ]] && exit "$ESR_STATUS"
exit 0
"""


@pytest.fixture
def script(tmp_path):
    """Run it with some steps; what the interpreter was asked for, line by line, and the finished process."""
    interpreter, notes = tmp_path / "python", tmp_path / "notes"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)

    def run(steps: str, esr_status: int = 0):
        environment = os.environ | {"PYTHON": str(interpreter), "NOTES": str(notes), "ESR_STATUS": str(esr_status)}
        environment |= {"OUT": str(tmp_path / "out"), "STEPS": steps, "COMMIT": "abc123", "WHEELS": ""}
        done = subprocess.run([ROOT / ".ci" / "gpu"], env=environment, capture_output=True, text=True)
        return notes.read_text().splitlines() if notes.exists() else [], done

    return run


def asked_for(lines: list[str]) -> list[str]:
    known = {
        "pytest -q -m gpu": "tests",
        "bench_ops.py": "ops",
        "bench_esr_speedup": "esr",
        "bench_rollouts": "rollouts",
    }
    known |= {"demo --device cuda": "demo", "build_ext": "build"}
    return [name for line in lines for part, name in known.items() if part in line]


@pytest.mark.parametrize("steps", ["tests ops esr rollouts demo", "esr demo", "ops"])
def test_the_steps_asked_for_are_run_in_their_order(script, steps):
    lines, done = script(steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked_for(lines) == steps.split()
    for line in lines:
        if "bench_" in line:
            assert line.endswith("--commit abc123") and "out" in line


def test_an_unknown_step_is_an_error(script):
    lines, done = script("ops benches")
    assert lines == [] and done.returncode == 1
    assert "STEPS must name some of build, tests, sanitizer, ops, esr, rollouts, demo, got benches" in done.stderr


def test_a_benchmark_that_fails_fails_the_whole_and_the_next_still_runs(script):
    lines, done = script("esr rollouts", esr_status=2)
    assert asked_for(lines) == ["esr", "rollouts"] and done.returncode == 1
    assert "esr ended with exit status 2" in done.stderr


def test_a_benchmark_that_is_out_of_time_is_no_failure(script):
    lines, done = script("esr rollouts", esr_status=124)
    assert asked_for(lines) == ["esr", "rollouts"] and done.returncode == 0
    assert "esr was stopped after" in done.stdout
