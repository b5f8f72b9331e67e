"""The rows that a task is distilled on: their shares, that they come again, and what they are made of."""

from collections import Counter

import pytest
from task_rows import bare, encode, rows_of

from hf_fff.training import TaskMix
from hf_fff.training.data import calibration_batches
from hf_fff.training.objectives import OBJECTIVES

NONE = -100


def nothing_known(task, item):
    for name in OBJECTIVES[task].labels:
        values = item[name] if isinstance(item[name], list) else [item[name]]
        assert len(values) in (1, len(item["input_ids"]))
        assert all(v == NONE or v != v for v in values), (name, values)
    return True


@pytest.mark.parametrize("task", [t for t in OBJECTIVES if t != "mlm"])
def test_shares(task, tokenizer):
    labelled, transfer = encode(task, rows_of(task, 10), tokenizer), bare(task, 20, tokenizer)
    mix = TaskMix(task, labelled, tokenizer, 120, transfer=transfer)
    assert len(mix) == 120 and mix.lengths == [len(mix[i]["input_ids"]) for i in range(120)]
    own, other = [row["input_ids"] for row in labelled], [row["input_ids"] for row in transfer]
    kinds = Counter()
    whole, strange = Counter(), Counter()
    for item in mix:
        assert set(item) == set(labelled[0])
        if item["input_ids"] in other:
            kinds["transfer"] += nothing_known(task, item)
            strange[other.index(item["input_ids"])] += 1
        elif item in list(labelled):
            kinds["labelled"] += 1
            whole[own.index(item["input_ids"])] += 1
        else:
            kinds["replaced"] += nothing_known(task, item)
    assert kinds["transfer"] == 60 and kinds["labelled"] == 30 and kinds["replaced"] == 30
    assert set(whole.values()) == {3} and set(strange.values()) == {3} and len(whole) == 10 and len(strange) == 20


def test_without_transfer_rows(tokenizer):
    labelled = encode("classification", rows_of("classification", 10), tokenizer)
    mix = TaskMix("classification", labelled, tokenizer, 40)
    known = [item["labels"] != NONE for item in mix]
    assert sum(known) == 20 and Counter(map(str, (item for item in mix if item["labels"] != NONE))) == Counter(
        {str(row): 2 for row in labelled}
    )


def test_replaced_tokens(tokenizer):
    """About 15 % of the words, none of the special tokens, by words as often as they occur in the labelled rows."""
    rows = [
        {"sentence": "word1 word1 word1 word2", "label": 0},
        {"sentence": "word1 word1 word1 word1 word1", "label": 1},
    ]
    labelled = encode("classification", rows, tokenizer)
    mix = TaskMix("classification", labelled, tokenizer, 8000)
    changed = drawn = words = 0
    for item in (item for item in mix if item["labels"] == NONE):
        source = next(row for row in labelled if len(row["input_ids"]) == len(item["input_ids"]))
        assert item["token_type_ids"] == source["token_type_ids"]
        for now, before in zip(item["input_ids"], source["input_ids"], strict=True):
            special = before in tokenizer.all_special_ids
            assert now == before if special else now not in tokenizer.all_special_ids
            words += not special
            changed += now != before
            drawn += before != now and now == tokenizer.convert_tokens_to_ids("word2")
    # word1 (8 of 9) becomes word2 with 0.15 / 9, word2 (1 of 9) becomes word1 with 0.15 * 8 / 9
    assert changed / words == pytest.approx(2 * 0.15 * 8 / 81, rel=0.15)
    assert drawn / words == pytest.approx(0.15 * 8 / 81, rel=0.2)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_rows_depend_on_seed_and_number_alone(task, tokenizer):
    labelled = encode(task, rows_of(task, 10), tokenizer)
    more = {} if task == "mlm" else {"transfer": bare(task, 20, tokenizer)}
    mix, again = (TaskMix(task, labelled, tokenizer, n, seed=5, **more) for n in (48, 80))
    forwards, backwards = [mix[i] for i in range(48)], [again[i] for i in reversed(range(48))][::-1]
    assert str(forwards) == str(backwards)  # as text: NaN is not NaN
    assert str(mix[-1]) == str(mix[47])
    other = TaskMix(task, labelled, tokenizer, 48, seed=6, **more)
    assert str(list(forwards)) != str([other[i] for i in range(48)])


def test_fresh_masks(tokenizer):
    labelled = encode("mlm", rows_of("mlm", 6), tokenizer)
    mix = TaskMix("mlm", labelled, tokenizer, 60)
    texts, masked = Counter(), set()
    for item in mix:
        ids = [i if label == NONE else label for i, label in zip(item["input_ids"], item["labels"], strict=True)]
        texts[tokenizer.decode(ids, skip_special_tokens=True)] += 1
        places = [n for n, label in enumerate(item["labels"]) if label != NONE]
        assert len(places) == max(1, round(0.15 * (len(ids) - 2)))
        assert all(item["input_ids"][n] == tokenizer.mask_token_id for n in places)
        assert 0 not in places and len(ids) - 1 not in places
        masked.add((tuple(ids), *places))
    assert texts == {row["text"]: 10 for row in rows_of("mlm", 6)}
    assert len(masked) > 20  # other ones each time


def test_used_wrongly(tokenizer):
    labelled, transfer = (
        encode("classification", rows_of("classification", 4), tokenizer),
        bare("classification", 4, tokenizer),
    )
    with pytest.raises(ValueError, match="has no labels"):
        TaskMix("classification", transfer, tokenizer, 8)
    with pytest.raises(ValueError, match="length=0"):
        TaskMix("classification", labelled, tokenizer, 0)
    with pytest.raises(ValueError, match="'embeddings' has no logits"):
        TaskMix("embeddings", labelled, tokenizer, 8)
    text = encode("mlm", rows_of("mlm", 4), tokenizer)
    with pytest.raises(ValueError, match="all rows are alike"):
        TaskMix("mlm", text, tokenizer, 8, transfer=text)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_inputs_to_calibrate_on(task, tokenizer):
    labelled = encode(task, rows_of(task, 12), tokenizer)
    transfer = None if task == "mlm" else bare(task, 30, tokenizer)
    batches = calibration_batches(task, labelled, transfer, tokenizer, 10**6)
    found = [
        tuple(row[mask.bool()].tolist())
        for b in batches
        for row, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    every = [*labelled, *(transfer or [])]
    assert sorted(found) == sorted(tuple(item["input_ids"]) for item in every)
    assert all(set(b) == {"input_ids", "token_type_ids", "attention_mask"} for b in batches)
    if task == "classification":
        assert any(b["token_type_ids"].any() for b in batches)
    few = calibration_batches(task, labelled, transfer, tokenizer, 30)
    assert 30 <= sum(int(b["attention_mask"].sum()) for b in few) < 30 + 48
    if transfer is not None:  # both have their part
        first = {tuple(item["input_ids"]) for item in labelled}
        kinds = {
            tuple(row[m.bool()].tolist()) in first
            for b in few
            for row, m in zip(b["input_ids"], b["attention_mask"], strict=True)
        }
        assert kinds == {True, False}
