"""Does the comparison with a committed result find what is slower, and refuse what cannot be compared?

python -m pytest tests/bench/test_regressions.py
"""

import json
import subprocess
from pathlib import Path

import pytest

FOLDER = Path("bench/results/some-gpu")


def results(*rows: dict, gpu: str | None = "Some GPU", is_smoke: bool = False, commit: str = "abc") -> dict:
    machine = {
        "gpu": gpu,
        "processor": "p",
        "torch_threads": 3,
        "commit": commit,
        "versions": {"torch": "2.11", "triton": None},
    }
    return {"is_smoke": is_smoke, "machine": machine, "rows": list(rows)}


def row(implementation: str, median: float | None, *, spread: float = 0.1, case: str = "K1", **fields) -> dict:
    start = {"case": case, "divergence": "forward_kl", "N": 7, "implementation": implementation}
    start["is_ours"] = implementation.startswith("ours")
    if median is None:
        return start | {"status": "refused", "message": "wrong"} | fields
    return (
        start | {"status": "timed", "median_ms": median, "p10_ms": median - spread, "p90_ms": median + spread} | fields
    )


OLD = results(
    row("ours", 1.0),
    row("ours", 2.0, N=9),
    row("compile", 3.0),
    row("ours, gone", 1.0),
    row("ours, refused now", 1.0),
)
NEW = results(
    row("ours", 1.3, chunk_rows=5),  # what a plan chose is not the setting
    row("ours", 2.15, N=9),
    row("compile", 2.4),
    row("ours, new", 5.0),
    row("ours, refused now", None),
    commit="def",
)


@pytest.fixture
def repository(tmp_path):
    """A git repository with OLD in a commit, and a function that commits more."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    def commit(content: dict, name: str = "ops.json") -> None:
        (tmp_path / FOLDER).mkdir(parents=True, exist_ok=True)
        (tmp_path / FOLDER / name).write_text(json.dumps(content))
        git("add", ".")
        git("commit", "--quiet", "--message", name)

    git("init", "--quiet")
    commit(OLD)
    return tmp_path, commit


@pytest.fixture
def command(bench, repository, capsys):
    """Exit status, output and errors of the command on a new result that is not committed."""

    def run(new: dict, *options: str, name: str = "ops.json") -> tuple[int, str, str]:
        path = repository[0] / FOLDER / name
        path.write_text(json.dumps(new))
        status = bench("regressions").main([str(path), *options], repository[0])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def cells(output: str) -> dict[str, list[str]]:
    """The last four cells of each line of the table, by implementation and setting."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    return {f"{line[2]}, {line[1]}": line[3:] for line in lines[2:]}


def test_rows_are_matched_and_marked_beyond_the_spread(command):
    status, output, _ = command(NEW)
    assert status == 0
    assert cells(output) == {
        "ours, forward_kl, N 7": ["1", "1.3", "1.300", "slower"],  # 1.2 above 1.1
        "ours, forward_kl, N 9": ["2", "2.15", "1.075", ""],  # 2.05 within 2.1
        "compile, forward_kl, N 7": ["3", "2.4", "0.800", "faster"],
        "ours, refused now, forward_kl, N 7": ["1", "", "", "timed, now refused"],
    }
    assert "appeared: K1, forward_kl, N 7, ours, new" in output
    assert "vanished: K1, forward_kl, N 7, ours, gone" in output
    assert "old: commit abc, 3 threads, torch 2.11" in output and "new: commit def" in output
    assert "ours: 2 timed in both, median ratio 1.188" in output  # (1.3 + 1.075) / 2
    assert "others: 1 timed in both, median ratio 0.800" in output


def test_a_limit_makes_the_exit_status(command):
    status, _, errors = command(NEW, "--fail-above", "1.1")
    assert status == 1
    assert errors.splitlines() == [
        "error: K1, forward_kl, N 7, ours: 1.300 times its old median",
        "error: K1, forward_kl, N 7, ours, refused now: timed, now refused",
    ]
    slower_peer = results(*OLD["rows"][:2], row("compile", 9.0))
    assert command(slower_peer, "--fail-above", "1.1")[0] == 0
    assert command(results(row("ours", 1.3)), "--fail-above", "1.31")[0] == 0


def test_another_commit_is_asked_for(command, repository):
    _, commit = repository
    commit(NEW)
    assert "| ours | 1.3 | 1.3 | 1.000 |" in command(NEW)[1]
    assert "| ours | 1 | 1.3 | 1.300 | slower |" in command(NEW, "--against", "HEAD~1")[1]
    status, _, errors = command(NEW, "--against", "nowhere")
    assert status == 2 and "--against must be a commit" in errors and "got nowhere" in errors


def test_other_devices_and_smoke_runs_are_refused(command, repository):
    status, output, errors = command(results(row("ours", 1.0), gpu="Other GPU"))
    assert (status, output) == (2, "")
    assert "both results must be of one device, got Some GPU and Other GPU" in errors
    status, _, errors = command(results(row("ours", 1.0), is_smoke=True))
    assert status == 2 and "the new result must not be of a smoke run" in errors
    repository[1](results(row("ours", 1.0), is_smoke=True))
    assert "the old result must not be of a smoke run" in command(NEW)[2]


def test_two_rows_of_one_setting_are_refused(command):
    status, _, errors = command(results(row("ours", 1.0), row("ours", 2.0)))
    assert status == 2 and "got two of K1, forward_kl, N 7, ours" in errors


def test_a_result_that_is_new_is_no_regression(command):
    status, output, _ = command(NEW, "--fail-above", "1.1", name="ops-K1.json")
    assert status == 0 and output == "nothing to compare with: HEAD has no result some-gpu/ops-K1.json\n"


def test_lines_for_the_end_of_a_benchmark(bench, repository, capsys):
    regressions = bench("regressions")
    lines = regressions.regression_lines(NEW, Path("anywhere/some-gpu"), "ops.json", repository[0])
    assert any("| ours | 1 | 1.3 | 1.300 | slower |" in line for line in lines)
    assert capsys.readouterr().err == ""
    assert regressions.regression_lines(NEW, Path("anywhere/other-gpu"), "ops.json", repository[0]) == []
    assert capsys.readouterr().err == "nothing to compare with: HEAD has no result other-gpu/ops.json\n"
    with pytest.raises(regressions.NotComparable, match="smoke run"):
        regressions.regression_lines(results(is_smoke=True), Path("some-gpu"), "ops.json", repository[0])


def test_rollouts_are_compared_by_least_and_most(bench):
    regressions = bench("regressions")

    def rollouts(median, least, most):
        times = {"status": "timed", "median_s": median, "least_s": least, "most_s": most}
        return results({"model": "m", "batch_size": 4, "threads": 1, "implementation": "ours"} | times, gpu=None)

    ((change,), appeared, vanished) = regressions.compared(rollouts(1.0, 0.9, 1.2), rollouts(1.5, 1.3, 1.6))
    assert (change.mark, change.ratio, appeared, vanished) == ("slower", 1.5, [], [])
    (change,) = regressions.compared(rollouts(1.0, 0.9, 1.4), rollouts(1.5, 1.3, 1.6)).changes
    assert change.mark == ""


@pytest.mark.parametrize("limit", ["0.9", "inf", "much"])
def test_a_wrong_limit(bench, capsys, limit):
    with pytest.raises(SystemExit):
        bench("regressions").main(["x.json", "--fail-above", limit])
    assert f"must be a ratio >= 1, got {limit}" in capsys.readouterr().err
