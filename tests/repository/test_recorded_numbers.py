"""Do the numbers in the README come from committed result files?  pytest tests/repository/test_recorded_numbers.py"""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDED = sorted((ROOT / "bench" / "results").glob("*/demo-*.json"))


@pytest.fixture(scope="module")
def record_demo():
    spec = importlib.util.spec_from_file_location("record_demo", ROOT / "bench" / "record_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_tasks_are_recorded():
    assert {path.stem for path in RECORDED} >= {"demo-rewrite", "demo-pointer"}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_row_of_the_readme_table_is_in_a_result_file(path, record_demo):
    rows = [
        line for line in record_demo.markdown_table(json.loads(path.read_text())).splitlines() if line.startswith("|")
    ]
    readme = (ROOT / "README.md").read_text()
    assert len(rows) >= 6
    assert all(row in readme for row in rows)


def test_a_block_is_replaced_whole_and_a_missing_one_is_an_error(record_demo):
    text = "a\n<!-- demo-x -->\nold\nold\n<!-- end demo-x -->\nb\n"
    assert record_demo.replace_block(text, "demo-x", "new") == "a\n<!-- demo-x -->\nnew\n<!-- end demo-x -->\nb\n"
    with pytest.raises(ValueError, match="README.md must hold <!-- demo-y -->"):
        record_demo.replace_block(text, "demo-y", "new")
