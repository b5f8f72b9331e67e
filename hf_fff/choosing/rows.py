"""What a search trains on, and what it is decided on, which no training sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tasks import Columns, get_task
from ..training import TaskRows
from ..training.distil import split_rows

EMBEDDERS = ("similarity", "embeddings")  # general distillation; the other tasks have a head
_HELD_OUT = 0.2

Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Texts, or the rows of a task, to train on; and rows to decide on."""

    task: str
    train: list[str] | TaskRows
    held_out: list[Row]
    columns: Columns


def prepare(
    task: str,
    rows: Sequence[Row],
    *,
    held_out: Sequence[Row] = (),
    transfer: Sequence[Row] = (),
    texts: Sequence[str] = (),
    columns: Columns | None = None,
    seed: int = 0,
) -> Data:
    """Keeps what decides and what is trained on apart.

    Without ``held_out``, 20 % of the rows are held out (2048 at most; of "embeddings", of the texts). What has the same texts as
    a row that is held out is not trained on. Embedders train on ``texts`` and on the texts of the rows, without labels.

    Raises:
        ValueError: an unknown task, nothing to train or to decide on.
    """
    kind, columns, texts = get_task(task), columns or Columns(), [text for text in texts if text.strip()]
    given = (columns.text,) if isinstance(columns.text, str) else columns.text

    def texts_of(row: Row) -> tuple[str, ...]:
        """Empty for a row that has no such columns."""
        known = [*([given] if given else []), *kind.text_columns]
        return tuple(str(row[name]) for name in next((names for names in known if {*names} <= {*row}), ()))

    if task in EMBEDDERS:
        for row in (*rows, *held_out):
            if not texts_of(row):
                raise ValueError(f"none of the columns {list(row)} is known to hold texts: name them")
    if task == "embeddings":  # where a row is no more than its texts
        rows, held_out = ([{"text": text} for row in some for text in texts_of(row)] for some in (rows, held_out))
        given = None
    if task != "similarity":
        rows, texts = [*rows, *({"text": text} for text in texts)], []
    if not held_out:
        if not rows:
            what = "pairs with scores, by which similarity is measured" if task == "similarity" else "rows"
            raise ValueError(f"there are no {what}: give some")
        rows, held_out = split_rows(rows, seed, _HELD_OUT)
    seen = {texts_of(row) for row in held_out} - {()}
    rows, transfer = ([row for row in some if texts_of(row) not in seen] for some in (rows, transfer))
    train: list[str] | TaskRows = TaskRows(task, rows, transfer, columns)
    if task in EMBEDDERS:
        known = {text for row_texts in seen for text in row_texts}
        train = [text for text in (*texts, *(text for row in rows for text in texts_of(row))) if text not in known]
        columns = Columns(label=columns.label) if task == "embeddings" else columns
    if not (train.rows if isinstance(train, TaskRows) else train):
        raise ValueError("there is nothing to train on, but what is held out to decide")
    return Data(task, train, list(held_out), columns)
