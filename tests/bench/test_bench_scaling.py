"""Does the scaling study measure behind its gates, keep what it has, fit the slopes that it says, and draw them?

python -m pytest tests/bench/test_bench_scaling.py
"""

import json

import pytest
import torch

from esr_distill.rollout import InProcessBackend

AXES = ["tokens", "vocabulary", "batch", "horizon"]


@pytest.fixture(scope="module")
def scaling(bench):
    return bench("bench_scaling")


@pytest.fixture(scope="module")
def smoke(scaling, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    assert scaling.main(["--smoke", "--out", str(folder), "--commit", "abc"]) == 0
    return json.loads((folder / "scaling.json").read_text()), folder


def test_every_axis_is_timed_behind_its_gate(smoke):
    results, _ = smoke
    assert results["is_smoke"] and results["is_finished"] and results["machine"]["commit"]
    assert results["axes"] == AXES and list(results["slopes"]) == AXES
    assert [(row["axis"], row["size"]) for row in results["rows"]] == [
        *[("tokens", 3), ("tokens", 5), ("vocabulary", 67), ("vocabulary", 131)],
        *[("batch", 1), ("batch", 3), ("horizon", 3), ("horizon", 5)],
    ]
    for row in results["rows"]:
        assert row["status"] == "timed" and row["low_s"] <= row["median_s"] <= row["high_s"]
        assert row["repetitions"] == 2 and row["dtype"] == "float32"
    by_axis = {axis: [row for row in results["rows"] if row["axis"] == axis] for axis in AXES}
    assert [(row["N"], row["V"], row["D"], row["E"]) for row in by_axis["tokens"]] == [(3, 67, 8, 12), (5, 67, 8, 12)]
    assert [(row["N"], row["V"]) for row in by_axis["vocabulary"]] == [(3, 67), (3, 131)]
    assert [(row["B"], row["K"]) for row in by_axis["batch"]] == [(1, 4), (3, 4)]
    assert [(row["B"], row["K"]) for row in by_axis["horizon"]] == [(2, 3), (2, 5)]
    for row in by_axis["tokens"] + by_axis["vocabulary"]:
        assert set(row["errors"]) == {"divergence", "grad_student_hidden", "grad_student_weight"}
        assert 0 < max(row["errors"].values()) < 1e-4
    for row in by_axis["batch"] + by_axis["horizon"]:
        assert row["rows_equal_to_generate"] == 1 and row["gate_rows"] == row["B"]


def test_floors_by_hand(scaling):
    """Products of 5 rows, 67 ids, hidden sizes 8 and 12: two logits, two gradients; float32 heads read, one gradient written."""
    shape = scaling.Shape(5, 67, 8, 12)
    floor = scaling.divergence_floor(shape, torch.float32, scaling.Rates(1e12, 1000.0, "x", "test"))
    assert floor.flop == 2 * 5 * 67 * (8 + 12 + 8 + 8) and floor.seconds == pytest.approx(floor.flop / 1000)
    by_bytes = scaling.divergence_floor(shape, torch.float32, scaling.Rates(1000.0, 1e12, "x", "test"))
    forward, backward = 4 * (67 + 5) * (8 + 12), 4 * (67 + 5) * 8 + 4 * 5 * 8 + 4 * 67 * 8
    assert by_bytes.seconds == pytest.approx((forward + backward) / 1000)


def test_slopes_of_known_laws(scaling):
    sizes = [32, 64, 128, 256]
    assert scaling.log_slope([(n, 3e-3 * n**1.5) for n in sizes]) == pytest.approx(1.5)
    assert scaling.log_slope([(n, 0.2) for n in sizes]) == pytest.approx(0)
    # Least squares of logarithms (0, 0), (1, 1), (2, 0) and (3, 3), by hand: 4 / 5
    assert scaling.log_slope([(1, 1), (2, 2), (4, 1), (8, 8)]) == pytest.approx(0.8)
    assert scaling.log_slope([]) is None and scaling.log_slope([(4, 1.0)]) is None
    assert scaling.log_slope([(4, 1.0), (4, 2.0)]) is None


def rows_of(axis, sizes, law, status="timed"):
    rows = []
    for size in sizes:
        row = {
            "axis": axis,
            "size": size,
            "status": status,
            "implementation": "it",
            "dtype": "float32",
            "V": 7,
            "N": size,
        }
        times = {"median_s": law(size), "low_s": 0.9 * law(size), "high_s": 1.2 * law(size), "repetitions": 4}
        row |= {"floor_s": 1e-4 * size, "floor_bound": "flop"}
        rows.append(row | times if status == "timed" else row | {"message": "refused: why\nmore"})
    return rows


def test_slopes_leave_out_what_was_not_timed(scaling):
    rows = rows_of("tokens", [2, 4, 8], lambda n: 1e-3 * n**2) + rows_of("batch", [2], float, status="failed")
    rows += rows_of("tokens", [16], float, status="failed")
    found = scaling.slopes(rows)
    assert found["tokens"] == {"points": 3, "measured": pytest.approx(2), "floor": pytest.approx(1)}
    assert found["batch"] == {"points": 0, "measured": None, "floor": None}


def test_a_wrong_op_is_refused(scaling, monkeypatch, tmp_path):
    correct = scaling.reference_run

    def wrong(inputs, upstream_N):
        results = correct(inputs, upstream_N)
        return results | {"grad_student_weight": 1.001 * results["grad_student_weight"]}

    monkeypatch.setattr(scaling, "reference_run", wrong)
    assert scaling.main(["--smoke", "--axes", "tokens", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "refused" and "grad_student_weight: relative error in norm 0.001" in row["message"]
        assert "median_s" not in row


class WrongTokens(InProcessBackend):
    def generate(self, model, prompts, request):
        rollouts = super().generate(model, prompts, request)
        rollouts.token_ids_B_T[0, -1] = (rollouts.token_ids_B_T[0, -1] + 1) % 300
        return rollouts


def test_a_wrong_engine_is_refused(scaling, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "InProcessBackend", WrongTokens)
    assert scaling.main(["--smoke", "--axes", "horizon", "--out", str(tmp_path)]) == 1
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["refused", "refused"] and "log-probs off by" in rows[0]["message"]
    assert (tmp_path / "scaling.png").exists()  # which says that nothing was timed


def test_a_killed_run_keeps_what_it_had(scaling, monkeypatch, tmp_path):
    correct, calls = scaling.divergence_row, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return correct(*arguments, **options)

    monkeypatch.setattr(scaling, "divergence_row", killed)
    with pytest.raises(KeyboardInterrupt):
        scaling.main(["--smoke", "--axes", "tokens", "vocabulary", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert not results["is_finished"] and [row["size"] for row in results["rows"]] == [3, 5]
    assert results["slopes"]["tokens"]["points"] == 2


def test_the_gate_takes_as_many_rows_as_fit(scaling, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "GATE_LOGIT_BYTES", 2 * 8 * 4 * 300)  # two rows of the tiny shape at horizon 4
    assert scaling.main(["--smoke", "--axes", "batch", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["B"], row["gate_rows"]) for row in rows] == [(1, 1), (3, 2)]


def test_tables(bench, scaling):
    report = bench("reports.scaling_report")
    rows = rows_of("tokens", [2, 4, 8192], lambda n: 1e-3 * n) + rows_of("batch", [2], float, status="failed")
    tables = report.tables({"rows": rows, "slopes": scaling.slopes(rows)})
    assert list(tables) == ["scaling-slopes", "scaling-tokens", "scaling-batch"]
    assert tables["scaling-slopes"].splitlines()[2:] == [
        "| divergence against trained tokens | 1.00 | 1.00 | 3 |",
        "| rollouts against batch | none | none | 0 |",
    ]
    caption, empty, _, _, *lines = tables["scaling-tokens"].splitlines()
    assert caption == "Divergence against trained tokens (it, V 7, float32):" and empty == ""
    assert lines[0] == "| 2 | 2 | 1.8 to 2.4 | 0.2 (flop) | 10.0% | 4 |"
    assert lines[2] == "| 8,192 | 8,192 | 7,373 to 9,830 | 819 (flop) | 10.0% | 4 |"
    assert tables["scaling-batch"].splitlines()[-1] == "| 2 | failed: refused: why |  |  |  |  |"


def test_the_figure_shows_points_fit_and_floor(bench, smoke, monkeypatch, tmp_path):
    import matplotlib.figure

    results, folder = smoke
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k)
    )
    report = bench("reports.scaling_report")
    report.write_figure(results, tmp_path / "again.png")
    (figure,) = drawn
    assert len(figure.axes) == 4
    for panel, axis in zip(figure.axes, AXES, strict=True):
        rows = [row for row in results["rows"] if row["axis"] == axis]
        assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
        assert panel.get_xlabel() == report.X_LABELS[axis] and panel.get_ylabel() == "milliseconds"
        lines = {line.get_label(): line for line in panel.lines}
        floor = next(line for label, line in lines.items() if label.startswith("floor, slope "))
        assert list(floor.get_ydata()) == pytest.approx([1e3 * row["floor_s"] for row in rows])
        slope = results["slopes"][axis]["measured"]
        fit = lines[f"fit, slope {slope:.2f}"]
        # Through two points the fit is exact.
        assert list(fit.get_ydata()) == pytest.approx([1e3 * row["median_s"] for row in rows])
        assert {text.get_text() for text in panel.get_legend().get_texts()} >= {fit.get_label(), floor.get_label()}
    assert "no figure here means anything" in figure.get_suptitle()


def test_the_report_command(bench, smoke, capsys):
    report = bench("reports.scaling_report")
    _, folder = smoke
    assert report.main([str(folder / "scaling.json")]) == 0
    text = (folder / "scaling.md").read_text()
    assert "| cost | slope in log-log |" in text and text.count("| size | median ms |") == 4
    assert str(folder / "scaling.md") in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "--out", "bench/results/x"], "--out must not be under bench/results with --smoke"),
        (["--smoke", "--repetitions", "3"], "must be an even number > 0, got 3"),
        (["--smoke", "--threads", "0"], "must be a whole number > 0, got 0"),
        (["--smoke", "--axes", "width"], "invalid choice: 'width'"),
        (["--smoke", "--model", "nothing"], "--model must be among qwen3-0.6b, "),
    ],
)
def test_wrong_options(scaling, capsys, arguments, message):
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert message in capsys.readouterr().err


class CountedSeconds:
    """A stopwatch by which every call takes as long as it is told."""

    def __init__(self, seconds):
        self.left = list(seconds)

    def seconds(self, call):
        call()
        return self.left.pop(0)

    def observed(self, call):
        return {"peak_bytes": None, "host_syncs": None}


@pytest.mark.parametrize(
    ("seconds", "median"),
    [
        ([9.0, 3.0, 2.0], 2.5),  # two at least, however long
        ([9.0, 0.1, 0.3, 0.2, 0.9], 0.25),  # four at most
        ([9.0, 0.5, 0.3, 0.4], 0.4),  # three take the second
    ],
)
def test_slow_points_are_repeated_less(scaling, seconds, median):
    from dataclasses import replace

    sizes, stopwatch, calls = replace(scaling.SMOKE, repetitions=4, point_seconds=1.0), CountedSeconds(seconds), []
    times = scaling.timed_rollouts(lambda: calls.append(1), stopwatch, sizes)
    assert stopwatch.left == [] and len(calls) == len(seconds)
    assert times["median_s"] == pytest.approx(median) and times["first_call_s"] == 9.0
    assert times["repetitions"] == len(seconds) - 1 and times["low_s"] == min(seconds[1:])
