"""The benchmark of the ops under pytest-benchmark: options, one test for each group, times of the device's own events.

pytest-benchmark reads a clock before and after a call. The clock it gets here stands still but for what CUDA events measured
(`bench.timing`), so that its statistics, files and comparisons are of the device's time. Candidates of a group take turns, which
is why a group is one test and has an entry for each candidate.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.ops_run import CASES, OpsOptions, OpsRun, WrongOption, row_name
from bench.regressions import NotComparable, regression_lines
from bench.reports.ops_report import write_report

RUN = pytest.StashKey[OpsRun]()
COLUMNS = ["median", "iqr", "min", "max", "rounds"]  # of pytest-benchmark's own tables


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "benchmark of the ops")
    group.addoption("--smoke", action="store_true", help="tiny shapes on a CPU: does every case run?")
    group.addoption("--cases", help=f"among {','.join(CASES)}; default: all but the sweeps")
    group.addoption("--out", type=Path, help="folder of the results; default: bench/results and the GPU's name")
    group.addoption("--budget-seconds", type=float, help="fewer repetitions when short (default: 240)")
    group.addoption("--commit", help="recorded where there is no git to ask")


def pytest_configure(config: pytest.Config) -> None:
    given = {name: config.getoption(name) for name in ("out", "budget_seconds", "commit")}
    given = {name: value for name, value in given.items() if value is not None}
    if config.getoption("cases") is not None:
        given["cases"] = tuple(config.getoption("cases").split(","))
    try:
        config.stash[RUN] = OpsRun(OpsOptions(is_smoke=config.getoption("smoke"), **given))
    except WrongOption as error:
        raise pytest.UsageError(str(error)) from None
    # pytest-benchmark reads these after us.
    if config.getoption("smoke"):
        config.option.benchmark_quiet = True
    config.option.benchmark_columns = config.option.benchmark_columns or COLUMNS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make_group" in metafunc.fixturenames:
        groups = metafunc.config.stash[RUN].groups
        counts: dict[str, int] = {}
        ids = []
        for case, _ in groups:
            counts[case] = counts.get(case, 0) + 1
            ids.append(f"{case}-{counts[case]}")
        metafunc.parametrize(("case", "make_group"), groups, ids=ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[RUN].begin(len(session.items))


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash[RUN]
    if run.num_measured:
        run.finish()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if not run.num_measured:
        return
    for line in [*run.states(), f"{run.path} written"]:
        terminalreporter.write_line(line)
    try:
        for path in write_report(run.results, run.path):
            terminalreporter.write_line(f"{path} written")
    except ImportError as error:  # matplotlib is not everywhere where a GPU is
        terminalreporter.write_line(
            f"no figure: {error}; python -m bench.reports.ops_report {run.path} draws it elsewhere"
        )
    if not run.options.is_smoke:
        try:
            lines = regression_lines(run.results, run.folder, run.path.name)
        except NotComparable as error:
            lines = [f"no comparison with an earlier result: {error}"]
        for line in lines:
            terminalreporter.write_line(line)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What our own files say about the machine; no name of a host."""
    machine_info.clear()
    machine_info.update(config.stash[RUN].results["machine"])


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict) -> None:
    commit = config.stash[RUN].results["machine"]["commit"]
    commit_info.clear()
    commit_info.update({"id": commit, "dirty": commit is not None and commit.endswith("+changes")})


@pytest.fixture
def run(request: pytest.FixtureRequest) -> OpsRun:
    return request.config.stash[RUN]


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A line to the terminal while the test runs."""
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return write


class RecordedClock:
    """Seconds that passed on the device, sample by sample."""

    __name__ = "device time"  # by which result files call it

    def __init__(self, samples_ms: list[float]) -> None:
        self.samples = iter(samples_ms)
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def next_sample(self) -> None:
        self.seconds += 1e-3 * next(self.samples)


@pytest.fixture
def device_benchmark(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Makes a measured row an entry of pytest-benchmark: a round for each sample, the row as its extra information."""
    session = request.config.pluginmanager.get_plugin("pytest-benchmark")

    def add(row: dict) -> None:
        clock = RecordedClock(row["samples_ms"])
        settings = {name: value for name, value in session.options.items() if name != "timer"}
        entry = BenchmarkFixture(
            request.node,
            add_stats=session.benchmarks.append,
            logger=session.logger,
            warner=request.node.warn,
            disabled=session.disabled,
            timer=DeviceTimer(clock),
            **settings,
        )
        name = row_name(row)
        entry.name, entry.fullname = name, f"{request.node.nodeid.split('[')[0]}::{name}"
        entry.group, entry.param, entry.params = name.rsplit(" [", 1)[0], None, None
        entry.extra_info.update({key: value for key, value in row.items() if key != "samples_ms"})
        entry.pedantic(clock.next_sample, rounds=len(row["samples_ms"]))

    return add


class DeviceTimer:
    """What pytest-benchmark takes as a timer: it calls the target."""

    def __init__(self, target: Callable[[], float]) -> None:
        self.target = target
