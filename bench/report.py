"""docs/benchmarks.md from the committed result files: its tables between markers, and the figures beside the files.

python -m bench.report                                     # every machine under bench/results
python -m bench.report --folder bench/results/nvidia-h200  # figures and long tables of this machine alone
python -m bench.report --check                             # writes nothing; which blocks are not what the files give?

Blocks are those of `page_blocks`: a sentence on what has been measured, the targets, the states of the cases, and one for each
machine that has result files. The last stand in the block "machines", where they come and go with the folders. Files of smoke
runs are refused.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from bench.record_demo import RESULTS, ROOT, replace_block
from bench.reports import ops_report
from bench.reports.case_states import state_sentence, state_table
from bench.reports.machine_block import figure_names, machine_block, write_figures
from bench.reports.markdown_tables import markdown
from bench.reports.result_files import Files, NotASource, kind_of, read_machines
from bench.targets import HEADINGS, cells, target_rows
from esr_distill.complete_files import write_text

PAGE = ROOT / "docs" / "benchmarks.md"
MACHINES = "machines"  # the block that holds those of the machines
MACHINE = "machine-"
BLOCK = re.compile(r"<!-- ([\w-]+) -->\n(.*?)\n?<!-- end \1 -->", re.DOTALL)


def page_blocks(machines: dict[str, Files], link: str) -> dict[str, str]:
    """Every generated block of the page by its name; `link` leads from the page to the folder of the machines."""
    by_file = {f"{folder}/{name}": results for folder, files in machines.items() for name, results in files.items()}
    return {
        "state": state_sentence(machines),
        "targets": markdown(HEADINGS, map(cells, target_rows(by_file)), "l" * len(HEADINGS)),
        "cases": state_table(machines),
        **{f"{MACHINE}{folder}": machine_block(folder, files, link) for folder, files in machines.items()},
    }


def brought_up_to_date(text: str, blocks: dict[str, str]) -> str:
    """The page with these blocks; those of machines that have no files any more go.

    Raises:
        ValueError: the page lacks a marker.
    """
    of_machines = {name: block for name, block in blocks.items() if name.startswith(MACHINE)}
    inside = [f"<!-- {name} -->\n{block}\n<!-- end {name} -->" for name, block in of_machines.items()]
    text = replace_block(text, MACHINES, "\n\n".join(inside))
    for name, block in blocks.items():
        if name not in of_machines:
            text = replace_block(text, name, block)
    return text


def recorded_blocks(text: str) -> dict[str, str]:
    """The blocks that stand in a page, those of machines by themselves."""
    found = dict(BLOCK.findall(text))
    return found | dict(BLOCK.findall(found.pop(MACHINES, "")))


def differing_blocks(text: str, blocks: dict[str, str]) -> list[str]:
    """Names of blocks that are not what the files give: changed, missing, or without files."""
    recorded = recorded_blocks(text)
    names = [*blocks, *(name for name in recorded if name not in blocks)]
    return [name for name in names if recorded.get(name) != blocks.get(name)]


def stale_files(results_folder: Path, machines: dict[str, Files]) -> list[Path]:
    """Files beside the results that the page links to and that are missing, or are not what the results give."""
    stale = []
    for folder, files in machines.items():
        for name, results in files.items():
            path = results_folder / folder / name
            stale += [
                path.with_name(figure) for figure in figure_names(name, results) if not path.with_name(figure).exists()
            ]
            if kind_of(name) == "ops":
                table = path.with_suffix(".md")
                if not table.exists() or table.read_text(encoding="utf-8") != ops_report.markdown(results):
                    stale.append(table)
    return stale


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="figures of this machine alone, e.g. bench/results/nvidia-h200")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    options = parser.parse_args(argv)
    if options.folder is not None and options.folder.resolve().parent != RESULTS.resolve():
        parser.error(f"--folder must be a folder of {RESULTS}, got {options.folder}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parsed(argv)
    try:
        machines = read_machines(RESULTS)
    except NotASource as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    chosen = machines
    if options.folder is not None:
        name = options.folder.resolve().name
        if name not in machines:
            print(f"error: --folder must hold result files, got {options.folder}", file=sys.stderr)
            return 1
        chosen = {name: machines[name]}
    text = PAGE.read_text(encoding="utf-8")
    blocks = page_blocks(machines, Path(os.path.relpath(RESULTS, PAGE.parent)).as_posix())
    if options.check:
        differing = differing_blocks(text, blocks)
        if not differing and brought_up_to_date(text, blocks) != text:
            differing = [MACHINES]  # in another order
        wrong = [f"{PAGE.name}: block {block} is not what the result files give" for block in differing]
        wrong += [f"{path} is missing or is not what its result file gives" for path in stale_files(RESULTS, chosen)]
        print(*(wrong or [f"{PAGE.name} is what the result files give"]), sep="\n")
        return 1 if wrong else 0
    for folder, files in chosen.items():
        for path in write_figures(RESULTS / folder, files):
            print(f"{path} written")
    write_text(PAGE, brought_up_to_date(text, blocks))
    print(f"{PAGE} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
