"""Is anything slower than in the last committed result of the same machine and file name?

python -m bench.regressions bench/results/nvidia-h200/ops.json                     # against the last commit
python -m bench.regressions bench/results/nvidia-h200/ops.json --against HEAD~3 --fail-above 1.1

Rows are matched by case, setting and implementation. A row is marked slower where its new 10th percentile is above the old
90th, faster where its new 90th is below the old 10th (least and most, where a file has no percentiles). The exit status is 0;
with --fail-above it is 1 where a row of ours takes more than so many times its old median, or is not timed any more; it is 2
where the two results cannot be compared.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.record_demo import RESULTS, ROOT
from bench.reports.markdown_tables import markdown
from bench.reports.row_keys import Spread, is_ours, setting_of, spread_of
from esr_distill.complete_files import read_json

SLOWER, FASTER = "slower", "faster"
HEADINGS = ("case", "setting", "implementation", "old ms", "new ms", "ratio", "")


class NotComparable(ValueError):
    """Two results that say nothing about each other."""


class Change(NamedTuple):
    """A row that both results have. Times are None where it was not timed."""

    old: dict
    new: dict

    @property
    def spreads(self) -> tuple[Spread | None, Spread | None]:
        return spread_of(self.old), spread_of(self.new)

    @property
    def ratio(self) -> float | None:
        old, new = self.spreads
        return None if old is None or new is None else new.median / old.median

    @property
    def mark(self) -> str:
        """Whether the medians differ beyond the spread of both, or what became of the row."""
        old, new = self.spreads
        if old is None or new is None:
            statuses = self.old["status"], self.new["status"]
            return "" if statuses[0] == statuses[1] else f"{statuses[0]}, now {statuses[1]}"
        if new.low > old.high:
            return SLOWER
        return FASTER if new.high < old.low else ""

    def fails(self, limit: float) -> bool:
        """Whether a row of ours takes more than `limit` times its old median, or has no time any more."""
        old, new = self.spreads
        return is_ours(self.new) and old is not None and (new is None or new.median > limit * old.median)


class Comparison(NamedTuple):
    changes: list[Change]
    appeared: list[dict]
    vanished: list[dict]


def committed_text(path: str, reference: str, repository: Path) -> str | None:
    """A file as it stands in a commit; None where the commit does not have it.

    Raises:
        NotComparable: there is no such commit.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)

    if git("rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}").returncode:
        raise NotComparable(f"--against must be a commit of {repository.name}, got {reference}")
    shown = git("show", f"{reference}:{path}")
    return None if shown.returncode else shown.stdout


def committed_result(folder: str, name: str, reference: str = "HEAD", repository: Path = ROOT) -> dict | None:
    """The committed result of a machine's folder under bench/results."""
    text = committed_text(f"{RESULTS.relative_to(ROOT).as_posix()}/{folder}/{name}", reference, repository)
    return None if text is None else json.loads(text)


def check_comparable(old: dict, new: dict) -> None:
    """
    Raises:
        NotComparable: one is of a smoke run, or they are of different devices.
    """
    for age, results in (("old", old), ("new", new)):
        if results.get("is_smoke") is not False:
            raise NotComparable(f"the {age} result must not be of a smoke run: its times mean nothing")
    devices = [results["machine"]["gpu"] or results["machine"]["processor"] for results in (old, new)]
    if devices[0] != devices[1]:
        raise NotComparable(f"both results must be of one device, got {devices[0]} and {devices[1]}")


def by_key(rows: list[dict]) -> dict[tuple, dict]:
    """
    Raises:
        NotComparable: two rows have the same case, setting and implementation.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        key = (*setting_of(row), row["implementation"])
        if key in found:
            raise NotComparable(f"rows must differ in setting or implementation, got two of {described(row)}")
        found[key] = row
    return found


def compared(old: dict, new: dict) -> Comparison:
    """
    Raises:
        NotComparable: they say nothing about each other.
    """
    check_comparable(old, new)
    before, after = by_key(old["rows"]), by_key(new["rows"])
    return Comparison(
        [Change(before[key], row) for key, row in after.items() if key in before],
        [row for key, row in after.items() if key not in before],
        [row for key, row in before.items() if key not in after],
    )


def setting_text(row: dict) -> str:
    parts = []
    for name, value in setting_of(row):
        if name in ("case", "upstream") or value is None:
            continue
        parts.append(value if isinstance(value, str) else f"{name} {value}")
    return ", ".join(parts)


def described(row: dict) -> str:
    return ", ".join(filter(None, [row.get("case", ""), setting_text(row), row["implementation"]]))


def provenance(results: dict) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    driver = f"driver {machine['driver']}, " if machine.get("driver") else ""
    return f"commit {machine['commit']}, {driver}{machine['torch_threads']} threads, {versions}"


def lines_of(comparison: Comparison, old: dict, new: dict) -> list[str]:
    """What changed, as text: where from, the table, rows that came and went, and how much the others changed."""
    rows = []
    for change in comparison.changes:
        times = ["" if spread is None else f"{spread.median:.4g}" for spread in change.spreads]
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        row = change.new
        rows.append((row.get("case", ""), setting_text(row), row["implementation"], *times, ratio, change.mark))
    lines = [f"old: {provenance(old)}", f"new: {provenance(new)}", ""]
    lines += markdown(HEADINGS, rows, "lllrrrl").splitlines()
    lines += [f"appeared: {described(row)}" for row in comparison.appeared]
    lines += [f"vanished: {described(row)}" for row in comparison.vanished]
    for whose, wanted in (("ours", True), ("others", False)):
        ratios = [change.ratio for change in comparison.changes if change.ratio and is_ours(change.new) is wanted]
        if ratios:
            lines.append(f"{whose}: {len(ratios)} timed in both, median ratio {median(ratios):.3f}")
    return lines


def regression_lines(new_results: dict, folder: Path, name: str, repository: Path = ROOT) -> list[str]:
    """What a benchmark tells at its end: the new results against those committed for this folder and file name.

    Empty where none are committed, and then a sentence on standard error says so.

    Raises:
        NotComparable: one is of a smoke run, or they are of different devices.
    """
    old = committed_result(folder.name, name, repository=repository)
    if old is None:
        print(nothing_committed(folder.name, name, "HEAD"), file=sys.stderr)
        return []
    return lines_of(compared(old, new_results), old, new_results)


def nothing_committed(folder: str, name: str, reference: str) -> str:
    return f"nothing to compare with: {reference} has no result {folder}/{name}"


def limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a ratio >= 1, got {text}")
    return value


def main(argv: list[str] | None = None, repository: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="a new result file in a folder named after its machine")
    parser.add_argument("--against", default="HEAD", help="commit that holds the old one (default: HEAD)")
    parser.add_argument(
        "--fail-above", type=limit, help="exit status 1 where a row of ours takes more times its old median"
    )
    options = parser.parse_args(argv)
    folder, name = options.result.resolve().parent.name, options.result.name
    try:
        new = read_json(options.result)
        old = committed_result(folder, name, options.against, repository)
        if old is None:
            print(nothing_committed(folder, name, options.against))
            return 0
        comparison = compared(old, new)
    except (NotComparable, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*lines_of(comparison, old, new), sep="\n")
    failing = [change for change in comparison.changes if options.fail_above and change.fails(options.fail_above)]
    for change in failing:
        ratio = change.mark if change.ratio is None else f"{change.ratio:.3f} times its old median"
        print(f"error: {described(change.new)}: {ratio}", file=sys.stderr)
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
