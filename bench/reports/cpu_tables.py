"""The tables of docs/benchmarks.md that were measured on a CPU, from their result files.

python -m bench.reports.cpu_tables              # writes them into the page
"""

import json
import sys

from bench.record_demo import RESULTS, ROOT, replace_block
from bench.reports.logit_precision_report import markdown

FOLDER = RESULTS / "amd-epyc"
PAGE = ROOT / "docs" / "benchmarks.md"


def sampler_table(results: dict) -> str:
    """Median and percentiles of every implementation, and how many times ours it takes."""
    ours = {(row["dtype"], row["sampler"]): row["median_ms"] for row in results["rows"] if row["is_ours"]}
    rows = [
        (
            row["dtype"],
            row["sampler"],
            row["implementation"],
            f"{row['median_ms']:.1f}",
            f"{row['p10_ms']:.1f} to {row['p90_ms']:.1f}",
            f"{row['median_ms'] / ours[row['dtype'], row['sampler']]:.1f}",
        )
        for row in results["rows"]
    ]
    return markdown(("dtype", "sampler", "implementation", "median ms", "p10 to p90", "x ours"), rows)


def rollout_table(results: dict) -> str:
    """Tokens per second of every way to draw, against `generate` with as many threads."""
    generate = {row["threads"]: row["tokens_per_s"] for row in results["rows"] if row["implementation"] == "generate"}
    rows = [
        (
            str(row["threads"]),
            row["implementation"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ms_per_step']:.2f}",
            f"{row['tokens_per_s'] / generate[row['threads']]:.2f}",
        )
        for row in results["rows"]
    ]
    return markdown(("threads", "implementation", "tokens/s", "ms a step", "x generate"), rows)


def tables() -> dict[str, str]:
    """By the names of their blocks in the page."""
    read = {
        name: json.loads((FOLDER / name).read_text()) for name in ("sampler_cpu.json", "rollouts-rewrite-student.json")
    }
    return {
        "sampler-cpu": sampler_table(read["sampler_cpu.json"]),
        "rollouts-cpu": rollout_table(read["rollouts-rewrite-student.json"]),
    }


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables().items():
        text = replace_block(text, name, table)
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
