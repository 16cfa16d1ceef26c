"""Keep a finished demo: its result file goes to bench/results with a picture drawn from it, its table into the README.

make demo && .venv/bin/python -m bench.record_demo runs/demo
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

from esr_distill.demo.report import HEADINGS, caption, table_rows, write_picture

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def machine_folder(machine: dict) -> str:
    """A folder name for the machine a result was measured on: the GPU's, else the processor's."""
    return re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["processor"]).lower()).strip("-")


def markdown_table(results: dict) -> str:
    """The demo's table with a line that says what, where and with what it was measured."""
    machine = results["machine"]
    rows = [HEADINGS, ("---", *("---:",) * (len(HEADINGS) - 1)), *table_rows(results)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{table}\n\n{caption(results).capitalize()}. {machine['gpu'] or machine['processor']}, "
        f"{machine['torch_threads']} threads, Python {machine['python']}, {versions}, commit {machine['commit']}."
    )


def replace_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between <!-- name --> and <!-- end name --> replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the document must hold <!-- {name} --> and <!-- end {name} -->, got none")
    return pattern.sub(lambda match: match[1] + block + "\n" + match[2], text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished demo, e.g. runs/demo")
    run = parser.parse_args(argv).run
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    name = f"demo-{results['settings']['task']}"
    folder = RESULTS / machine_folder(results["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "results.json", folder / f"{name}.json")
    write_picture(results, folder / f"{name}.png")
    readme = ROOT / "README.md"
    block = f"{markdown_table(results)}\n\n![{name}]({(folder / name).relative_to(ROOT).as_posix()}.png)"
    readme.write_text(replace_block(readme.read_text(encoding="utf-8"), name, block), encoding="utf-8")
    print(f"{folder / name}.json and .png written, README.md brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
