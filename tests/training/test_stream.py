"""What the package datasets reads: Parquet, and streams of texts."""

import pytest

datasets = pytest.importorskip("datasets")

from hf_fff.tasks import read_rows  # noqa: E402
from hf_fff.training import StreamedPieces, TextStream  # noqa: E402

TEXTS = [f"word{i} word{i + 1}" for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def sources(tmp_path):
    """The same texts in files of each kind; the second .txt has more."""
    table = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(40))})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.tsv").write_text("other\ttext\n" + "".join(f'"{i}\t{t}\n' for i, t in enumerate(TEXTS)))
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "b.txt").write_text("word98 word99\n")
    return tmp_path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_streams(sources, tokenizer, kind):
    stream = TextStream([str(sources / f"a.{kind}")], buffer=1)
    assert list(stream) == TEXTS == list(stream)
    rows = list(StreamedPieces(stream, tokenizer, 16))
    assert [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows] == TEXTS


def test_each_pass_is_in_another_order(sources, tokenizer):
    passes = []
    for seed, epoch in ((0, 0), (0, 1), (0, 0), (1, 0)):
        data = StreamedPieces(TextStream([str(sources / n) for n in ("a.txt", "b.txt")], seed=seed), tokenizer, 16)
        data.set_epoch(epoch)
        passes.append([tuple(row["input_ids"]) for row in data])
    assert passes[0] == passes[2] and len({tuple(p) for p in passes}) == 3
    assert all(sorted(p) == sorted(passes[0]) for p in passes) and len(passes[0]) == 41


@pytest.mark.parametrize(
    ("names", "column", "told"),
    [
        (["a.csv"], "body", "there is no column 'body'; the columns are ['text', 'other']"),
        (["a.csv"], "other", "other=0 is no text"),
        (["a.xml"], None, "neither a file of a known kind (.txt"),
        (["none.txt"], None, "there is no file"),
        (["empty.txt"], None, "has no rows"),
    ],
)
def test_wrong_streams(sources, names, column, told):
    (sources / "empty.txt").write_text("")
    with pytest.raises((ValueError, OSError)) as error:
        TextStream([str(sources / name) for name in names], column)
    assert told in str(error.value)


def test_parquet(sources):
    assert read_rows(sources / "a.parquet") == [{"text": t, "other": i} for i, t in enumerate(TEXTS)]


def test_tags_have_their_names(tmp_path):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-x"])) if hasattr(datasets, "List") else None
    if tags is None:
        tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-x"]))
    rows = {"tokens": [["word1", "word2"]], "tags": [[0, 1]], "label": [1]}
    features = {"tokens": datasets.Sequence(datasets.Value("string")), "tags": tags}
    features["label"] = datasets.ClassLabel(names=["no", "yes"])
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"tokens": ["word1", "word2"], "tags": ["O", "B-x"], "label": 1}]
