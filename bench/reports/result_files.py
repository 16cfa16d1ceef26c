"""The result files that numbers in a document may come from: one folder per machine under bench/results."""

import re
from pathlib import Path

from bench.record_demo import machine_folder
from esr_distill.complete_files import read_json

# By the kind of table they make. Other files of these folders have documents and tests of their own.
KINDS = {
    "ops": re.compile(r"ops(?!-pytest-benchmark)(-[\w-]+)?\.json"),
    "rollouts": re.compile(r"rollouts(-[\w.-]+)?\.json"),
    "esr_speedup": re.compile(r"esr_speedup\.json"),
    "scaling": re.compile(r"scaling\.json"),
    "sampler_cpu": re.compile(r"sampler_cpu\.json"),
}
Files = dict[str, dict]  # results by file name, of one machine


class NotASource(ValueError):
    """A file that no number may be taken from."""


def kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(name)), None)


def read_source(path: Path) -> dict:
    """The results of a file.

    Raises:
        NotASource: it is of a smoke run, or lies in the folder of another machine.
    """
    results = read_json(path)
    if results.get("is_smoke") is not False:
        raise NotASource(f"{path}: is_smoke must be false in a source of numbers, got {results.get('is_smoke')}")
    folder = machine_folder(results["machine"])
    if path.parent.name != folder:
        raise NotASource(f"{path}: must lie in the folder of its machine, {folder}, got {path.parent.name}")
    return results


def read_machines(results_folder: Path) -> dict[str, Files]:
    """The files of every machine that has any, by its folder's name; GPUs first."""
    machines = {}
    for folder in sorted(path for path in results_folder.iterdir() if path.is_dir()):
        files = {path.name: read_source(path) for path in sorted(folder.glob("*.json")) if kind_of(path.name)}
        if files:
            machines[folder.name] = files
    return dict(sorted(machines.items(), key=lambda item: not has_gpu(item[1])))


def has_gpu(files: Files) -> bool:
    return any(results["machine"]["gpu"] for results in files.values())


def device_name(files: Files) -> str:
    """The GPU, or the processor where there is none, with what else is recorded of it."""
    machine = next(iter(files.values()))["machine"]
    drivers = sorted({results["machine"].get("driver") or "" for results in files.values()} - {""})
    name = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    return name + (f", driver {' and '.join(drivers)}" if drivers else "")


def machine_line(files: Files) -> str:
    """What was measured with what: device, then versions with the files that share them, their commits and threads."""
    by_versions: dict[str, list[str]] = {}
    for name, results in files.items():
        machine = results["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
        facts = [f"commit {machine['commit']}"]
        if machine["gpu"] is None and not any("threads" in row for row in results["rows"]):
            facts.append(f"{machine['torch_threads']} threads")
        named = by_versions.setdefault(f"Python {machine['python']}, {versions}", [])
        named.append(f"`{name}` ({', '.join(facts)})")
    parts = [f"{versions}: {', '.join(names)}" for versions, names in by_versions.items()]
    return f"{device_name(files)}. {'; '.join(parts)}."
