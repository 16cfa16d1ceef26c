"""What docs/benchmarks.md says about one machine, and the figures beside its result files."""

from pathlib import Path

from bench.reports import ops_report, ops_tables, rollout_report, roofline, scaling_report, speedup_report
from bench.reports.case_states import OPS_CASES
from bench.reports.result_files import Files, kind_of, machine_line
from bench.reports.sampler_report import cpu_table

SWEEPS = ("tiles", "slices")
SAMPLER_CAPTION = "The sampler. Ours makes both log-probs in the same time."


def machine_block(folder: str, files: Files, link: str) -> str:
    """A line of device, versions, files and commits; then a section for each file. `link` leads from the page to the folder."""
    parts = [f"### {folder}", machine_line(files)]
    for name, results in files.items():
        parts += SECTIONS[kind_of(name)](name, results, f"{link}/{folder}")
    return "\n\n".join(parts)


def figure_names(name: str, results: dict) -> list[str]:
    """Figures that are drawn from a result file and shown in its section."""
    stem = Path(name).stem
    if kind_of(name) == "scaling":
        return [f"{stem}.png"]
    if kind_of(name) == "esr_speedup":
        is_timed = any(row["status"] == "timed" for row in results["rows"])
        return [f"{stem}-horizon.png", f"{stem}-stages.png"] if is_timed else []
    if kind_of(name) != "ops":
        return []
    found = [f"{stem}-roofline.png"] if any(roofline.points(results)) else []
    return found + ([f"{stem}-accuracy.png"] if ops_report.accuracy_rows(results) else [])


def shown(name: str, results: dict, link: str) -> list[str]:
    return [f"![{figure}]({link}/{figure})" for figure in figure_names(name, results)]


def ops_section(name: str, results: dict, link: str) -> list[str]:
    ceilings = results["ceilings"]
    sustained = ceilings.get("sustained_bfloat16_tflop_per_s")
    facts = [
        f"copy {ceilings['copy_gb_per_s']:,.0f} GB/s (read plus written)",
        f"square bfloat16 product {ceilings['square_bfloat16_tflop_per_s']:,.0f} TFLOP/s",
        *([f"after ten seconds of nothing else {sustained:,.0f}"] if sustained else []),
    ]
    longer = f"every figure of every row: [{Path(name).stem}.md]({link}/{Path(name).stem}.md)"
    parts = [f"#### `{name}`", f"Ceilings: {', '.join(facts)}; {longer}. {ops_tables.LEGEND}"]
    if not results["is_finished"]:
        parts.append("**The run was not finished: later cases are missing.**")
    parts += [f"**{group['case']}: a group failed**: {group['message']}" for group in results["failed_groups"]]
    for case, table in ops_tables.tables(results, OPS_CASES).items():
        parts += [f"{case}:", table]
    sweeps = [case for case in SWEEPS if any(row["case"] == case for row in results["rows"])]
    if sweeps:
        parts.append(f"The sweeps {' and '.join(sweeps)} are in {Path(name).stem}.md.")
    return parts + shown(name, results, link)


def rollout_section(name: str, results: dict, link: str) -> list[str]:
    return [f"#### `{name}`", rollout_report.caption(results), rollout_report.rollout_table(results)]


def sampler_section(name: str, results: dict, link: str) -> list[str]:
    return [f"#### `{name}`", SAMPLER_CAPTION, cpu_table(results)]


def speedup_section(name: str, results: dict, link: str) -> list[str]:
    """Whole training steps (E1)."""
    return [f"#### `{name}`", *speedup_report.tables(results).values(), *shown(name, results, link)]


def scaling_section(name: str, results: dict, link: str) -> list[str]:
    tables = scaling_report.tables(results).values()
    return [f"#### `{name}`", f"{scaling_report.caption(results)}.", *tables, *shown(name, results, link)]


SECTIONS = {
    "ops": ops_section,
    "rollouts": rollout_section,
    "sampler_cpu": sampler_section,
    "esr_speedup": speedup_section,
    "scaling": scaling_section,
}


def write_figures(folder: Path, files: Files) -> list[Path]:
    """All figures of a machine, beside its result files, with the long tables of the ops."""
    written = []
    for name, results in files.items():
        path = folder / name
        match kind_of(name):
            case "ops":
                written += ops_report.write_all(results, path)
            case "esr_speedup":
                written += speedup_report.write_figures(results, folder)
            case "scaling":
                written.append(path.with_suffix(".png"))
                scaling_report.write_figure(results, written[-1])
    return written
