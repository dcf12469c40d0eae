"""Every row of local files is checked before anything is loaded: a mistake has its file and line."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from hira import HiraError
from hira.training.finetune.data_files import check_files, files_of
from hira.training.finetune.rows import Columns

TEXT, CLASSES = Columns("text"), Columns("text", "label")
GOOD = '{"text": "a"}\n'
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def check(path, content: str | bytes, columns: Columns = TEXT) -> int:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return check_files(files_of(str(path), None), columns)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a", "more": 1}, TEXT),
        ({"prompt": "a", "completion": "b"}, TEXT),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, TEXT),
        ({"messages": CHAT}, TEXT),
        ({"conversations": [{"from": "human", "value": "a"}]}, TEXT),
        ({"input_ids": [1, 2]}, TEXT),
        ({"text": "a", "label": "b"}, CLASSES),
        ({"text": "a", "label": 3}, CLASSES),
    ],
)
def test_the_forms_that_trl_knows(tmp_path, row, columns):
    assert check(tmp_path / "rows.jsonl", json.dumps(row) + "\n\n" + json.dumps(row), columns) == 2
    assert check(tmp_path / "rows.json", json.dumps([row, row, row], indent=1), columns) == 3


@pytest.mark.parametrize(
    ("name", "content", "columns", "place", "named"),
    [
        ("a.jsonl", GOOD * 2 + '{"text": "b"\n', TEXT, ":3: ", "not JSON"),
        ("a.jsonl", GOOD + "[1]\n", TEXT, ":2: ", "list"),
        ("a.jsonl", GOOD + "\n" + '{"txt": "b"}', TEXT, ":3: ", "txt"),
        ("a.jsonl", GOOD + '{"text": 3}', TEXT, ":2: ", "int"),
        ("a.jsonl", GOOD + '{"text": null}', TEXT, ":2: ", "empty"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', TEXT, ":2: ", "UTF-8"),
        ("a.jsonl", '{"prompt": "a", "completion": 3}', TEXT, ":1: ", "completion"),
        ("a.jsonl", '{"prompt": "a", "completion": [{"role": "user"}]}', TEXT, ":1: ", "both"),
        ("a.jsonl", '{"messages": [{"content": "a"}]}', TEXT, ":1: ", "messages"),
        ("a.jsonl", '{"messages": []}', TEXT, ":1: ", "messages"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', CLASSES, ":1: ", "float"),
        ("a.jsonl", GOOD, CLASSES, ":1: ", "label"),
        ("a.jsonl", "", TEXT, "", "no rows"),
        ("a.json", '[{"text": "a"},\n {"text": "b"},\n {"text"}]', TEXT, ":3: ", "not JSON"),
        ("a.json", '[{"text": "a"}, {"text": 3}]', TEXT, ":row 2: ", "int"),
        ("a.csv", 'text,label\n"a\nb",1\nc\n', CLASSES, ":4: ", "header"),
        ("a.csv", "text,label\na,1\n,2\n", CLASSES, ":3: ", "empty"),
        ("a.csv", "txt\na\n", TEXT, ":2: ", "txt"),
        ("a.csv", "text\n", TEXT, "", "no rows"),
        ("a.txt", b"a\n\xff\n", TEXT, ":2: ", "UTF-8"),
        ("a.parquet", "PAR1", TEXT, "", "Parquet"),
    ],
)
def test_a_mistake_has_its_line(tmp_path, name, content, columns, place, named):
    with pytest.raises(HiraError) as refused:
        check(tmp_path / name, content, columns)
    assert f"{tmp_path / name}{place}" in str(refused.value) and named in str(refused.value)


def test_other_formats(tmp_path):
    assert check(tmp_path / "a.csv", 'text,label\n"a\nb",1\n\nc,2\n', CLASSES) == 2
    assert check(tmp_path / "a.csv", "\ufefftext\n" + "a" * 200_000 + "\n") == 1
    assert check(tmp_path / "a.txt", "a\nb\n") == 2
    rows = Dataset.from_dict({"text": ["a", "b"]})
    rows.to_parquet(tmp_path / "a.parquet")
    files = files_of(str(tmp_path / "a.parquet"), None)
    assert check_files(files, TEXT) == 2
    with pytest.raises(HiraError, match=r"a\.parquet.*label"):
        check_files(files, CLASSES)


def test_which_files_are_meant(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(GOOD)
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert files_of(str(tmp_path), None) == ("json", both)
    assert files_of("json", str(tmp_path / "*.jsonl")) == ("json", both)
    assert files_of("json", {"train": str(both[0]), "test": [str(both[1])]}) == ("json", both)
    assert files_of("owner/name", None) is None
    assert files_of("json", "https://example.org/a.jsonl") is None


@pytest.mark.parametrize(
    ("path", "data_files", "named"),
    [
        ("none.jsonl", None, "none.jsonl"),
        ("json", "none.jsonl", "none.jsonl"),
        ("json", "none*.jsonl", "none"),
        ("json", None, "data_files"),
        (__file__, None, ".jsonl"),
    ],
)
def test_files_that_are_not_there(path, data_files, named):
    with pytest.raises(HiraError) as refused:
        files_of(path, data_files)
    assert named in str(refused.value)
