"""Reading rows, and batches of them."""

import json
import sys

import pytest
import torch

from hf_fff.tasks import get_task, read_rows
from hf_fff.tasks.data import Encoded, Ragged

ROWS = [{"text": 'a "quoted" one', "label": "1"}, {"text": "  über alles, so ", "label": "0"}]
FILES = {
    "a.tsv": 'text\tlabel\na "quoted" one\t1\n\n  über alles, so \t0\n',
    "a.csv": 'text,label\r\n"a ""quoted"" one",1\r\n"  über alles, so ",0\r\n',
    "a.jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS),
    "a.json": json.dumps(ROWS, indent=1),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_files(tmp_path, name, mark):
    (tmp_path / name).write_text(mark + FILES[name], encoding="utf-8", newline="")
    assert read_rows(tmp_path / name) == ROWS == read_rows(str(tmp_path / name))


def test_tabs_are_not_quoted(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"open\t1\nnext"\t0\n')
    assert read_rows(tmp_path / "a.tsv") == [{"text": '"open', "label": "1"}, {"text": 'next"', "label": "0"}]


def test_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_rows(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two"}]


WRONG = {
    "kind": ("a.doc", "x", "neither a file of a known kind (.tsv, .csv, .jsonl, .json, .txt, .parquet)"),
    "fields": ("a.tsv", "text\tlabel\nx\t1\ny\n", "line 3: 1 fields, but the first line names 2"),
    "no rows": ("a.tsv", "text\tlabel\n", "has no rows"),
    "empty": ("a.csv", "", "has no rows"),
    "no json": ("a.jsonl", '{"text": "x"}\n{"text"\n', "is no .jsonl file in UTF-8"),
    "no object": ("a.jsonl", '{"text": "x"}\n[1]\n', "row 2: a row is an object, not list"),
    "no list": ("a.json", '{"data": []}', "must hold a list of objects, not dict"),
    "no text": ("a.tsv", b"text\tlabel\n\xff\xfe\t1\n", "is no .tsv file in UTF-8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_wrong(tmp_path, name):
    file, content, message = WRONG[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as told:
        read_rows(tmp_path / file)
    assert message in str(told.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "a.tsv")


def test_the_hub(monkeypatch):
    class Rows(list):
        features = {}  # noqa: RUF012

    class Datasets:
        def load_dataset(self, *args, **options):
            self.asked = args, options
            return Rows([{"text": "x"}])

    datasets = Datasets()
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    for name, want in {
        "glue:sst2:validation": (("glue", "sst2"), {"split": "validation"}),
        "a/b:train": (("a/b", None), {"split": "train"}),
        "a/b:test[10%]": (("a/b", None), {"split": "test[10%]"}),
    }.items():
        assert read_rows(name) == [{"text": "x"}] and datasets.asked == want
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install hf-fff\\[train\\]"):
        read_rows("a/b:train")


def test_ragged_and_items():
    lists = [[5, 6, 7], [], [2**31 - 1], [-100, 4]]
    ragged = Ragged(lists)
    assert [ragged[i] for i in range(4)] == lists == list(ragged) and len(ragged) == 4
    assert ragged[-1] == [-100, 4] and ragged.lengths == [3, 0, 1, 2]
    with pytest.raises(IndexError):
        ragged[4]
    data = Encoded({"input_ids": ragged, "labels": [3, 1, 0, 2]}, [{}] * 4, labelled=True)
    assert data[3] == {"input_ids": [-100, 4], "labels": 2} and len(data) == 4 and data.lengths == [3, 0, 1, 2]
    assert data.row_of == [0, 1, 2, 3] and not Ragged([]).lengths


class Tokenizer:
    pad_token_id, pad_token_type_id, mask_token_id, all_special_ids = 9, 3, 4, [9, 4, 1]


def test_batches_are_padded_on_the_right():
    items = [
        {
            "input_ids": [5, 6],
            "attention_mask": [1, 1],
            "token_type_ids": [0, 1],
            "labels": [0, 1],
            "start_positions": 1,
        },
        {"input_ids": [7], "attention_mask": [1], "token_type_ids": [0], "labels": [2], "start_positions": 0},
    ]
    batch = get_task("tokens").collator(Tokenizer())(items)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "input_ids": [[5, 6], [7, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[0, 1], [0, 3]],
        "labels": [[0, 1], [2, -100]],
        "start_positions": [1, 0],
    }
    assert all(v.dtype == torch.int64 for v in batch.values())
    numbers = get_task("regression").collator(Tokenizer())([{"input_ids": [1], "labels": 0.5}])
    assert numbers["labels"].dtype == torch.float32 and numbers["labels"].tolist() == [0.5]
