"""Do all sources give the same prompts, and is what is missing or wrong named with its place?

pytest tests/distill/test_prompt_sources.py

What needs pyarrow or datasets is skipped where they are not installed; the calls into datasets are also tested on a stand-in.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from esr_distill.config import DataConfig
from esr_distill.input_error import InputError
from esr_distill.prompts.prompt_sources import PromptRecord, read_prompts

MESSAGES = [{"role": "system", "content": "7"}, {"role": "user", "content": "8="}]
ROWS = [
    {"question": "1+2=", "answer": "3", "id": 11, "hint": "add"},
    {"question": "4=", "answer": "4", "id": 12, "hint": "look"},
    {"question": "5=", "answer": None, "id": 13, "hint": "look"},
]
RECORDS = [
    PromptRecord("1+2=", "3", {"id": 11}, "add"),
    PromptRecord("4=", "4", {"id": 12}, "look"),
    PromptRecord("5=", None, {"id": 13}, "look"),
]
COLUMNS = {"prompt_column": "question", "privileged_column": "hint"}


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict]) -> str:
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


@pytest.fixture(params=WRITERS)
def kind(request) -> str:
    return request.param


def read(path: str, **options) -> list[PromptRecord]:
    return read_prompts(DataConfig(path, **options))


# Files


def test_columns(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"prompts.{kind}", ROWS)
    assert read(path, **COLUMNS) == RECORDS
    assert [record.columns for record in read(path, prompt_column="question")] == [
        {"id": row["id"], "hint": row["hint"]} for row in ROWS
    ]
    kept = read(path, prompt_column="question", keep_columns=["hint"])
    assert [(record.prompt, record.answer, record.columns) for record in kept] == [
        (row["question"], row["answer"], {"hint": row["hint"]}) for row in ROWS
    ]
    assert [record.columns for record in read(path, prompt_column="question", keep_columns=[])] == [{}, {}, {}]


def test_an_answer_column_may_be_the_prompts(tmp_path):
    assert read(write_jsonl(tmp_path / "p.jsonl", ROWS[:1]), prompt_column="answer", keep_columns=[]) == [
        PromptRecord("3", None, {})
    ]


def test_messages_without_the_empty_fields_of_a_table(tmp_path, kind):
    """A table has every field in every message; a template must not see those that a message does not have."""
    rows = [{"prompt": [MESSAGES[0] | {"name": "a"}, MESSAGES[1] | {"name": None}]}]
    expected = PromptRecord([{"role": "system", "content": "7", "name": "a"}, MESSAGES[1]])
    assert read(WRITERS[kind](tmp_path / f"prompts.{kind}", rows)) == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"must have a column 'prompt' \(data\.prompt_column\), got 'question', 'answer', 'id', 'hint'"),
        (
            {"prompt_column": "question", "privileged_column": "solution"},
            r"must have a column 'solution' \(data\.privileged_column\), got 'question'",
        ),
        (
            {"prompt_column": "question", "keep_columns": ["id", "level"]},
            r"must have a column 'level' \(data\.keep_columns\), got 'question'",
        ),
    ],
)
def test_missing_columns(tmp_path, kind, options, message):
    path = WRITERS[kind](tmp_path / f"prompts.{kind}", ROWS)
    with pytest.raises(InputError, match=rf"data\.prompts: .*prompts\.{kind}.* " + message):
        read(path, **options)


def test_wrong_values_are_named_with_their_place(tmp_path, kind):
    place = {"jsonl": "line", "parquet": "row"}[kind]
    rows = [*ROWS, {"question": "", "answer": None, "id": 14, "hint": "x"}]
    path = WRITERS[kind](tmp_path / f"prompts.{kind}", rows)
    with pytest.raises(InputError, match=rf"{kind}, {place} 4, 'question' must be a text or .* not empty, got ''"):
        read(path, prompt_column="question")
    with pytest.raises(InputError, match=rf"{kind}, {place} 1, 'id' must be a text or a list .* not empty, got 11"):
        read(path, prompt_column="id")
    rows = [*ROWS[:2], ROWS[2] | {"hint": None}]
    path = WRITERS[kind](tmp_path / f"prompts.{kind}", rows)
    with pytest.raises(InputError, match=rf"{kind}, {place} 3, 'hint' must be a text that is not empty, got None"):
        read(path, **COLUMNS)


def test_an_empty_file(tmp_path, kind):
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "prompts.parquet")
    else:
        (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(
        InputError, match=rf"data\.prompts must hold at least one prompt, got '.*{kind}', which is empty"
    ):
        read(str(tmp_path / f"prompts.{kind}"))
    with pytest.raises(InputError, match=r"data\.prompts must hold at least one prompt"):
        read(str(tmp_path / f"prompts.{kind}"), stream_prompts=2)


def test_several_files_in_the_order_of_their_names(tmp_path, kind):
    for name, row in zip("bac", ROWS, strict=True):
        WRITERS[kind](tmp_path / f"{name}.{kind}", [row])
    expected = [RECORDS[1], RECORDS[0], RECORDS[2]]
    assert read(f"{tmp_path}/*.{kind}", **COLUMNS) == expected
    assert read(f"{tmp_path}/[ab].{kind}", **COLUMNS) == expected[:2]
    if kind == "parquet":
        assert read(str(tmp_path), **COLUMNS) == expected
    with pytest.raises(InputError, match=r"data\.prompts must be a pattern that files match, got .*, which has none"):
        read(f"{tmp_path}/d*.{kind}")


def test_a_damaged_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "p.parquet").write_text('{"prompt": "1="}\n')
    with pytest.raises(InputError, match=r"data\.prompts must be a readable parquet file, got '.*p\.parquet' \(.+\)"):
        read(str(tmp_path / "p.parquet"))
    with pytest.raises(InputError, match=r"data\.prompts must be a readable parquet file, got '.*no\.parquet'"):
        read(str(tmp_path / "no.parquet"))


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("nowhere.jsonl", {}, r"data\.prompts must be a JSONL file, got 'nowhere\.jsonl', which does not exist"),
        (
            "nowhere",
            {},
            r"data\.prompts must be a file, a folder or a data set .*, got 'nowhere', which does not exist",
        ),
        ("./a/b", {}, r"data\.prompts must be a file, a folder or a data set .*, got '\./a/b', which does not exist"),
        (".", {}, r"data\.prompts must be a folder saved by datasets or with parquet files, got '\.', which has none"),
        (
            "p.jsonl",
            {"split": "test"},
            r"data\.split must be unset unless data\.prompts is a data set of .*, got 'test'",
        ),
        ("p.jsonl", {"dataset_config": "main"}, r"data\.dataset_config must be unset unless .* of the hub, got 'main'"),
    ],
)
def test_what_names_nothing(tmp_path, monkeypatch, path, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        read(path, **options)


@pytest.mark.parametrize(
    ("package", "path", "message"),
    [
        (
            "pyarrow",
            "p.parquet",
            r"must be a JSONL file where pyarrow is not .*, got 'p\.parquet'; pip install pyarrow",
        ),
        ("datasets", "owner/sums", r"must be a JSONL or parquet file where datasets is not .*; pip install datasets"),
        ("datasets", "hf://sums", r"must be a JSONL or parquet file where .*, got 'hf://sums'; pip install datasets"),
    ],
)
def test_a_package_that_is_missing(monkeypatch, package, path, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"data\.prompts " + message):
        read(path)


# A stand-in for datasets


class Rows(list):
    """What the loop needs of a Dataset."""

    def __init__(self, rows: list[dict], knows_columns: bool = True) -> None:
        super().__init__(rows)
        self.column_names = list(rows[0]) if knows_columns else None

    def with_format(self, format: None) -> "Rows":
        return self

    def select_columns(self, names: list[str]) -> "Rows":
        return Rows([{name: row[name] for name in names} for row in self])


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """Records the arguments of load_dataset, and answers with `hub.answer` or raises it."""

    class DatasetsError(Exception):
        pass

    hub = SimpleNamespace(calls=[], answer=Rows(ROWS), DatasetsError=DatasetsError)

    def load_dataset(*arguments, **options):
        hub.calls.append((arguments, options))
        if isinstance(hub.answer, Exception):
            raise hub.answer
        return hub.answer

    module = SimpleNamespace(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return hub


@pytest.mark.parametrize(
    ("path", "name", "revision"),
    [
        ("owner/sums", "owner/sums", None),
        ("hf://owner/sums", "owner/sums", None),
        ("hf://datasets/owner/sums@v1.0", "owner/sums", "v1.0"),
        ("hf://sums", "sums", None),
        ("owner/sums-2.5", "owner/sums-2.5", None),
    ],
)
def test_names_of_the_hub(hub, path, name, revision):
    assert read(path, **COLUMNS) == RECORDS
    assert hub.calls == [((name, None), {"split": "train", "revision": revision, "streaming": False})]


def test_split_configuration_and_stream(hub):
    source = read("owner/sums", split="test", dataset_config="main", stream_prompts=2, **COLUMNS)
    assert hub.calls == [(("owner/sums", "main"), {"split": "test", "revision": None, "streaming": True})]
    assert list(source.records()) == RECORDS == list(source.records())
    hub.answer = Rows(ROWS, knows_columns=False)
    assert list(read("owner/sums", stream_prompts=2, **COLUMNS).records()) == RECORDS


def test_a_data_set_that_cannot_be_had(hub):
    for error in (
        hub.DatasetsError("no such thing\nlong story"),
        ConnectionError("offline"),
        ValueError("Unknown split"),
    ):
        hub.answer, first_line = error, str(error).splitlines()[0]
        message = (
            r"data\.prompts must be a file, a folder or a data set that can be reached "
            rf"\(data\.dataset_config None, data\.split 'test'\), got 'owner/sums' \({first_line}\)$"
        )
        with pytest.raises(InputError, match=message):
            read("owner/sums", split="test")
    with pytest.raises(InputError, match=r"data\.prompts must be hf://NAME or hf://NAME@REVISION, got 'hf://a/b/c/d'"):
        read("hf://a/b/c/d")


def test_rows_of_a_data_set_are_named(hub):
    hub.answer = Rows([*ROWS, ROWS[0] | {"question": None}])
    with pytest.raises(InputError, match=r"data\.prompts: owner/sums, row 4, 'question' must be a text .*, got None"):
        read("owner/sums", **COLUMNS)
    with pytest.raises(InputError, match=r"data\.prompts: owner/sums must have a column 'prompt' .*, got 'question'"):
        read("owner/sums")


# datasets itself


def test_a_folder_saved_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([2])}).save_to_disk(tmp_path / "splits")
    assert read(str(tmp_path / "one"), **COLUMNS) == RECORDS
    assert read(str(tmp_path / "splits"), **COLUMNS) == RECORDS
    assert read(str(tmp_path / "splits"), split="test", **COLUMNS) == RECORDS[2:]
    with pytest.raises(InputError, match=r"data\.split must be one of \['train', 'test'\] for .*, got 'dev'"):
        read(str(tmp_path / "splits"), split="dev")
    with pytest.raises(InputError, match=r"data\.split must be unset for .*, which has no splits, got 'train'"):
        read(str(tmp_path / "one"), split="train")
    with pytest.raises(InputError, match=r"data\.dataset_config must be unset unless .* of the hub, got 'main'"):
        read(str(tmp_path / "one"), dataset_config="main")
    source = read(str(tmp_path / "one"), stream_prompts=2, **COLUMNS)
    assert list(source.records()) == RECORDS == list(source.records())
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(InputError, match=r"data\.prompts must be a folder saved by datasets, got "):
        read(str(tmp_path / "one"), **COLUMNS)


@pytest.mark.parametrize("stream_prompts", [None, 2])
def test_load_dataset_of_datasets_itself(tmp_path, monkeypatch, stream_prompts):
    """datasets takes a folder for the data set of that name, so that nothing is downloaded."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "owner" / "sums").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "sums" / "test.jsonl", [row | {"messages": MESSAGES} for row in ROWS])
    options = {"split": "test", "stream_prompts": stream_prompts, "keep_columns": ["id"], "privileged_column": "hint"}
    found = read("hf://owner/sums", prompt_column="messages", **options)
    records = found if stream_prompts is None else list(found.records())
    assert records == [PromptRecord(MESSAGES, row.answer, row.columns, row.privileged_context) for row in RECORDS]
    with pytest.raises(
        InputError, match=r"data set that can be reached .*data\.split 'dev'\), got 'hf://owner/sums' \(.+"
    ):
        read("hf://owner/sums", split="dev")
    with pytest.raises(InputError, match=r"data set that can be reached .*, got 'nobody/nothing' \(.+"):
        read("nobody/nothing")
