"""Which cases have been measured on which GPU, and which of their candidates could not be."""

from bench.reports.markdown_tables import markdown
from bench.reports.result_files import Files, device_name, has_gpu, kind_of
from bench.reports.row_keys import is_ours

# By the kind of file that holds them; those of the ops by the field "case" of their rows.
OPS_CASES = (
    *("K1", "K2", "K3", "L1", "L2", "L3", "L4", "L5", "L6", "L7"),
    *("B1", "B2", "B3", "B4", "C1", "C2", "C3", "C4"),
)
OTHER_CASES = {"D1": "rollouts", "D2": "rollouts", "E1": "esr_speedup"}
CASES = (*OPS_CASES, *OTHER_CASES)
NOT_YET = "not measured yet"
IN_WORDS = {
    "ops": "the ops",
    "rollouts": "rollouts",
    "sampler_cpu": "the sampler",
    "esr_speedup": "whole training steps",
    "scaling": "how training steps scale",
}


def rows_of_case(case: str, files: Files) -> list[dict]:
    """From all files of a machine. D2 is what rollouts say about waits of the host."""
    kind = OTHER_CASES.get(case, "ops")
    rows = [row for name, results in files.items() if kind_of(name) == kind for row in results["rows"]]
    if case == "D2":
        return [row for row in rows if row.get("host_syncs") is not None]
    return rows if case in OTHER_CASES else [row for row in rows if row["case"] == case]


def state_of(rows: list[dict]) -> str:
    """ "ours: 5 timed, 1 refused; others: 3 timed; not installed: TRL, Liger", or that nothing was measured."""
    if not rows:
        return NOT_YET
    parts = []
    for name, some in (
        ("ours", [row for row in rows if is_ours(row)]),
        ("others", [r for r in rows if not is_ours(r)]),
    ):
        counts = {
            status: sum(row["status"] == status for row in some) for status in sorted({r["status"] for r in some})
        }
        told = [f"{count} {status}" for status, count in counts.items() if status != "not installed"]
        parts += [f"{name}: {', '.join(told)}"] if told else []
    absent = dict.fromkeys(
        row["implementation"].split()[0].rstrip(",") for row in rows if row["status"] == "not installed"
    )
    return "; ".join([*parts, *([f"not installed: {', '.join(absent)}"] if absent else [])])


def state_sentence(machines: dict[str, Files]) -> str:
    """What has been measured where, and which cases have not been on any GPU."""
    parts = []
    for files in machines.values():
        kinds = dict.fromkeys(IN_WORDS[kind_of(name)] for name in files)
        parts.append(f"on {device_name(files)}: {', '.join(kinds)}")
    gpus = [files for files in machines.values() if has_gpu(files)]
    missing = [case for case in CASES if not any(rows_of_case(case, files) for files in gpus)]
    measured = f"Measured {'; '.join(parts)}." if parts else "Nothing has been measured."
    if not missing:
        return measured
    not_yet = f"Not yet on a GPU: {', '.join(missing)}." if gpus else "**No GPU figure has been measured yet.**"
    return f"{measured} {not_yet}"


def state_table(machines: dict[str, Files]) -> str:
    """Every case, with a column for each GPU that has result files."""
    gpus = {name: files for name, files in machines.items() if has_gpu(files)}
    headings = ["case", *(gpus or ["on a GPU"])]
    lines = [[case, *([state_of(rows_of_case(case, files)) for files in gpus.values()] or [NOT_YET])] for case in CASES]
    return markdown(headings, lines, "l" * len(headings))
