"""Do files and folders appear whole or not at all?  pytest tests/distill/test_complete_files.py"""

import pytest

from esr_distill.complete_files import complete_file, complete_folder, read_json, write_json, write_text


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), complete_folder(target) as partial:
        (partial / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with complete_folder(target) as partial:
        (partial / "whole").touch()
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


def test_an_older_folder_stays_until_the_new_one_is_complete(tmp_path):
    for name in ("old", "new"):
        with complete_folder(tmp_path / "model") as partial:
            (partial / name).touch()
            if name == "new":
                assert (tmp_path / "model" / "old").exists()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_a_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "made" / "x.json"
    write_json(target, {"a": [1]})
    with pytest.raises(RuntimeError), complete_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert read_json(target) == {"a": [1]}
    assert [path.name for path in target.parent.iterdir()] == ["x.json"]
    write_text(target, "é")
    assert target.read_bytes() == "é".encode()
