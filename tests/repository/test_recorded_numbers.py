"""Do the numbers in the documents come from committed result files?  pytest tests/repository/test_recorded_numbers.py"""

import json
import re
from pathlib import Path

import pytest

from bench import record_demo, report
from bench.precision import logprob_precision
from bench.reports import logit_precision_report
from bench.reports.result_files import kind_of, read_machines

ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted((ROOT / "bench" / "results").glob("*/demo-*.json"))


def test_both_tasks_are_recorded():
    assert {path.stem for path in RECORDED} >= {"demo-rewrite", "demo-pointer"}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_row_of_the_readme_table_is_in_a_result_file(path):
    rows = [
        line for line in record_demo.markdown_table(json.loads(path.read_text())).splitlines() if line.startswith("|")
    ]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) >= 6
    assert all(row in readme for row in rows)


def test_the_tables_of_the_numerics_are_those_of_the_result_files():
    tables = {}
    for experiment, script in (
        ("logit_precision", logit_precision_report),
        ("logprob_precision", logprob_precision),
    ):
        results = json.loads((ROOT / "bench" / "results" / "amd-epyc" / f"{experiment}.json").read_text())
        tables |= script.tables(results)
    document = (ROOT / "docs" / "numerics.md").read_text()
    recorded = re.findall(r"<!-- ([\w-]+) -->\n(.*?)\n<!-- end \1 -->", document, re.DOTALL)
    assert len(tables) == 8
    assert dict(recorded) == tables


def test_the_benchmark_page_is_what_the_result_files_give():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    machines = read_machines(ROOT / "bench" / "results")
    blocks = report.page_blocks(machines, "../bench/results")
    assert set(report.recorded_blocks(page)) == set(blocks), "every block has a generator, every generator a block"
    assert set(re.findall(r"<!-- (?!end )(.+) -->", page)) == {*blocks, "machines"}
    assert report.differing_blocks(page, blocks) == []
    assert report.brought_up_to_date(page, blocks) == page
    assert report.stale_files(ROOT / "bench" / "results", machines) == []


def test_the_benchmark_page_names_every_result_file_that_it_may():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    names = [path.name for path in (ROOT / "bench" / "results").glob("*/*.json") if kind_of(path.name)]
    assert {"sampler_cpu.json", "rollouts-rewrite-student.json"} <= set(names)
    assert all(f"#### `{name}`" in page for name in names)
    rows = json.loads((ROOT / "bench/results/amd-epyc/sampler_cpu.json").read_text())["rows"]
    for row in rows:
        assert f"| {row['implementation']} | {row['median_ms']:.1f} |" in page


def test_a_block_is_replaced_whole_and_a_missing_one_is_an_error():
    text = "a\n<!-- demo-x -->\nold\nold\n<!-- end demo-x -->\nb\n"
    assert record_demo.replace_block(text, "demo-x", "new") == "a\n<!-- demo-x -->\nnew\n<!-- end demo-x -->\nb\n"
    with pytest.raises(ValueError, match="the document must hold <!-- demo-y -->"):
        record_demo.replace_block(text, "demo-y", "new")
