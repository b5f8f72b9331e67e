"""What rows become: ids, labels, windows, masks; and which rows, columns and models are refused."""

from itertools import pairwise

import pytest
import torch
from tiny import HEADS, tiny_bert, tiny_config
from transformers import AutoModel, BertTokenizer

from hf_fff import convert_ffn_to_fff
from hf_fff.tasks import TASKS, Columns, get_task
from hf_fff.tasks.kinds import class_of

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")

WORDS = [f"word{i}" for i in range(100)]
CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##a", "##b"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def texts(count, length=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(0, 100, (length,), generator=g)) for _ in range(count)]


def labelled(*names):
    return tiny_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


BIO = ("O", "B-x", "I-x", "B-y", "I-y")


def test_the_tasks():
    assert list(TASKS) == ["classification", "regression", "tokens", "qa", "mlm", "similarity", "embeddings"]
    assert all(get_task(name).name == name for name in TASKS)
    assert get_task("embeddings").auto_class is get_task("similarity").auto_class is AutoModel
    main = ["accuracy", "spearman", "f1", "f1", "accuracy", "spearman", "cosine"]
    assert [task.main_metric for task in TASKS.values()] == main
    assert [name for name, task in TASKS.items() if task.gap_metric != task.main_metric] == ["mlm"]
    with pytest.raises(ValueError, match="task='sorting' is not known \\(allowed: classification, regression, "):
        get_task("sorting")


@pytest.mark.parametrize(
    ("names", "value", "number"),
    [
        (["1", "2", "10"], 1, 0),
        (["1", "2", "10"], "10", 2),
        (["1", "2", "10"], 10.0, 2),
        (["1", "2", "10"], 0, None),
        (["1", "2", "10"], "none", None),
        (["1", "2", "10"], 1.5, None),
        (["-1", "1"], "none", None),
        (["-1", "1"], -1, 0),
        (["no", "yes"], 1, 1),
        (["no", "yes"], "1", 1),
        (["no", "yes"], 2, None),
        (["True", "False"], True, 0),
    ],
)
def test_which_class_is_meant(names, value, number):
    """By name first; by number only where names are none."""
    if number is None:
        with pytest.raises(ValueError, match=f"is no label \\(allowed: 0 to {len(names) - 1}, or {names[0]}"):
            class_of(value, "label", labelled(*names))
    else:
        assert class_of(value, "label", labelled(*names)) == number


@pytest.mark.parametrize("name", ["classification", "tokens", "qa"])
def test_which_rows_are_cut(tokenizer, name):
    lengths = [4, 30, 31, 60] if name != "qa" else [4, 60]
    words = [WORDS[:n] for n in lengths]
    rows = {
        "classification": [{"sentence": " ".join(w), "label": 0} for w in words],
        "tokens": [{"tokens": w, "tags": ["O"] * len(w)} for w in words],
        "qa": [
            {"question": "word1", "context": " ".join(w), "answers": [{"text": w[0], "answer_start": 0}]} for w in words
        ],
    }[name]
    task = get_task(name)
    data = task.encode(rows, tokenizer, labelled(*BIO), max_length=32)
    assert task.longest(32, tokenizer, labelled(*BIO)) == 32 and task.longest(99, tokenizer, labelled(*BIO)) == 64
    assert task.cut(data, tokenizer, 32) == ([] if name == "qa" else [3, 4])


@pytest.mark.parametrize(
    "names", ["sentence", "text", "premise hypothesis", "question sentence", "question1 question2"]
)
def test_classification(tokenizer, names):
    names = names.split()
    columns = [texts(1500, 3, seed) for seed in range(len(names))]
    rows = [
        dict(zip(names, row, strict=True)) | {"idx": 7, "label": i % 3}
        for i, row in enumerate(zip(*columns, strict=True))
    ]
    data = get_task("classification").encode(rows, tokenizer, labelled("a", "b", "c"))
    assert data.labelled and data.rows == rows and len(data) == 1500
    for i in (0, 1023, 1024, 1499):
        want = tokenizer(*(column[i] for column in columns))
        assert data[i] == {**want, "labels": i % 3} and data.lengths[i] == len(want["input_ids"])


def test_long_rows_are_cut(tokenizer):
    rows = [{"text": texts(1, 100)[0], "label": 0}]
    for asked, length in ((10, 10), (500, 64)):  # a tiny model has 64 positions
        data = get_task("classification").encode(rows, tokenizer, tiny_config(), max_length=asked)
        assert data.lengths == [length] and data[0]["input_ids"][-1] == SEP


def test_labels_as_numbers_or_names(tokenizer):
    config = labelled("no", "yes", "2")
    rows = [{"text": "word1", "label": value} for value in (1, "1", "yes", "no", True, 2.0, "2")]
    assert get_task("classification").encode(rows, tokenizer, config).columns["labels"] == [1, 1, 1, 0, 1, 2, 2]
    rows = [{"text": "word1", "score": value} for value in ("0.25", 3, -1e-3)]
    assert get_task("regression").encode(rows, tokenizer, config).columns["labels"] == [0.25, 3.0, -1e-3]


def test_columns_that_are_named(tokenizer):
    rows = [{"text": "word1", "other": "word2 word3", "label": 0, "class": 1}]
    columns = Columns(text="other", label="class")
    assert get_task("classification").encode(rows, tokenizer, tiny_config(), columns=columns)[0] == {
        **tokenizer("word2 word3"),
        "labels": 1,
    }
    data = get_task("classification").encode(rows, tokenizer, tiny_config(), columns=Columns(text=("other", "text")))
    assert data[0] == {**tokenizer("word2 word3", "word1"), "labels": 0}


@pytest.mark.parametrize("empty", [{}, {"label": None}, {"label": ""}], ids=str)
def test_rows_without_labels(tokenizer, empty):
    rows = [{"text": text, **empty} for text in texts(3)]
    for name in ("classification", "regression"):
        data = get_task(name).encode(rows, tokenizer, tiny_config())
        assert not data.labelled and set(data[0]) == {"input_ids", "attention_mask", "token_type_ids"}


def row(**values):
    return {"text": "word1", "label": 0, **values}


ANSWERED = {
    "question": "word1 word2",
    "context": "word3 word4 word5",
    "answers": [{"text": "word4", "answer_start": 6}],
}
TAGGED = {"tokens": ["word1", "word2"], "tags": ["O", "B-x"]}
WRONG = {
    "no rows": ("classification", [], {}, "there are no rows"),
    "no columns": ("classification", [{"a": "x", "b": 1}], {}, "none of the columns ['a', 'b'] is known to hold texts"),
    "no such text": (
        "classification",
        [row()],
        {"text": ("texts",)},
        "no column 'texts'; the columns are ['text', 'label']",
    ),
    "no such label": ("classification", [row()], {"label": "y"}, "there is no column 'y'"),
    "three texts": (
        "classification",
        [row()],
        {"text": ("a", "b", "c")},
        "wants 1 or 2 text column(s), not 3: a, b, c",
    ),
    "no text": ("classification", [row(), row(text=5)], {}, "row 2: text=5 is no text"),
    "out of range": (
        "classification",
        [row(), row(label="5")],
        {},
        "row 2: label='5' is no label (allowed: 0 to 4, or O, ",
    ),
    "below range": ("classification", [row(label=-1)], {}, "row 1: label=-1 is no label"),
    "no name": ("classification", [row(label="o")], {}, "row 1: label='o' is no label"),
    "half a label": ("classification", [row(label=0.5)], {}, "label=0.5 is no label"),
    "some labels": ("classification", [row(), row(label=None)], {}, "row 2: label=None is no label"),
    "no number": ("regression", [row(label="much")], {}, "row 1: label='much' is no number"),
    "infinite": ("regression", [row(label="inf")], {}, "row 1: label='inf' is no number"),
    "one text": ("similarity", [row()], {"text": "text"}, "similarity wants 2 text column(s), not 1"),
    "no words": ("tokens", [{"tokens": "word1", "tags": []}], {}, "row 1: tokens='word1' is no list of words"),
    "few tags": (
        "tokens",
        [TAGGED, {**TAGGED, "tags": ["O"]}],
        {},
        "row 2: tags must be a list of 2 tags, one a word; found 1",
    ),
    "wrong tag": (
        "tokens",
        [{**TAGGED, "tags": ["O", "B-z"]}],
        {},
        "row 1: tags='B-z' is no label (allowed: 0 to 4, or O, B-x",
    ),
    "no answer": ("qa", [ANSWERED, {**ANSWERED, "answers": []}], {}, "row 2: answers=[] is no list of answers"),
    "wrong answer": (
        "qa",
        [{**ANSWERED, "answers": ["word4"]}],
        {},
        "'word4', which is no object with text and answer_start",
    ),
    "wrong place": (
        "qa",
        [{**ANSWERED, "answers": [{"text": "word4", "answer_start": 5}]}],
        {},
        "row 1: answers has 'word4' at answer_start=5, where ' word' is",
    ),
    "labels for none": ("embeddings", [row()], {"label": "label"}, "embeddings reads no labels"),
    "nothing to mask": ("mlm", [{"text": "unheard of"}], {}, "no token to be masked"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_are_wrong(tokenizer, name):
    task, rows, columns, message = WRONG[name]
    with pytest.raises(ValueError) as told:
        get_task(task).encode(rows, tokenizer, labelled(*BIO), columns=Columns(**columns))
    assert message in str(told.value)


@pytest.mark.parametrize(("task", "length", "least"), [("classification", 3, 4), ("qa", 31, 32), ("mlm", True, 4)])
def test_lengths_that_are_wrong(tokenizer, task, length, least):
    with pytest.raises(ValueError, match=f"max_length={length} must be an integer of at least {least}"):
        get_task(task).encode([ANSWERED], tokenizer, tiny_config(), max_length=length)


def test_tokens(tokenizer):
    rows = [
        {"tokens": ["word1ab", "word2", "word3b"], "tags": ["B-x", "O", 4]},
        {"tokens": ["\u200d", "word5", "word6", "word7"], "tags": ["O", "B-y", "I-y", "O"]},
    ]
    data = get_task("tokens").encode(rows, tokenizer, labelled(*BIO), max_length=7)
    no = -100
    assert data[0]["input_ids"] == [CLS, 6, 105, 106, 7, 8, SEP]  # cut: ##b is gone
    assert data[0]["labels"] == [no, 1, no, no, 0, 4, no]
    assert data[1]["input_ids"] == [CLS, 10, 11, 12, SEP] and data[1]["labels"] == [no, 3, 4, 0, no]
    assert data.known["words"] == [([1, 4, 5], [0, 1, 2]), ([1, 2, 3], [1, 2, 3])]
    bare = get_task("tokens").encode([{"tokens": ["word1"]}], tokenizer, labelled(*BIO))
    assert not bare.labelled and set(bare[0]) == {"input_ids", "attention_mask", "token_type_ids"}


def test_tags_need_names(tokenizer):
    with pytest.raises(ValueError, match="id2label has no tags such as O and B-person"):
        get_task("tokens").encode([{**TAGGED, "tags": [0, 1]}], tokenizer, tiny_config())


def test_a_tag_a_word_needs_a_tokenizer_that_tells_words(tokenizer):
    class Slow:
        is_fast = False

    for task, rows in (("tokens", [TAGGED]), ("qa", [ANSWERED])):
        with pytest.raises(ValueError, match=f"{task} needs a fast tokenizer, which Slow is not"):
            get_task(task).encode(rows, Slow(), labelled(*BIO))


def questions(count=1100):
    """Contexts of 1 to 60 words, some with double spaces, and an answer of 1 to 4 words anywhere."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for number, context in enumerate(texts(count, 60)):
        words = context.split()[: 1 + number % 60]
        first = int(torch.randint(0, len(words), (1,), generator=g))
        gap = "  " if number % 2 else " "
        answer = gap.join(words[first : first + 1 + number % 4])
        start = len(gap.join([*words[:first], ""]))
        rows.append(
            {
                "question": " word0 word1" * (1 + 20 * (number % 7 == 0)),  # some too long
                "context": gap.join(words),
                "answers": {"text": [answer, "of no account"][:1], "answer_start": [start]},
            }
        )
    return rows


def test_questions(tokenizer):
    rows = questions()
    data = get_task("qa").encode(rows, tokenizer, tiny_config(), max_length=40)
    assert max(data.lengths) == 40 and data.row_of == sorted(data.row_of) and set(data.row_of) == set(range(len(rows)))
    found, seen = {}, {}
    for i, number in enumerate(data.row_of):
        item, context, answer = data[i], rows[number]["context"], rows[number]["answers"]["text"][0]
        first, places = data.known["offsets"][i]
        ids, segments = item["input_ids"], item["token_type_ids"]
        assert segments.index(1) == first and sum(segments) == len(places) + 1  # the context and its [SEP]
        assert tokenizer.convert_ids_to_tokens(ids[first:-1]) == [context[a:b] for a, b in places]
        assert ids[0] == CLS and ids[first - 1] == ids[-1] == SEP and first <= 22  # the question got half at most
        seen.setdefault(number, []).append((places[0][0], places[-1][1]))
        start, end = item["start_positions"], item["end_positions"]
        inside = places[0][0] <= rows[number]["answers"]["answer_start"][0] and (
            rows[number]["answers"]["answer_start"][0] + len(answer) <= places[-1][1]
        )
        assert (
            (start, end) == (0, 0)
            if not inside
            else context[places[start - first][0] : places[end - first][1]] == answer
        )
        found[number] = found.get(number, False) or inside
    assert all(found.values())
    for number, windows in seen.items():  # from start to end, each overlapping the next
        assert windows[0][0] == 0 and windows[-1][1] == len(rows[number]["context"])
        assert all(b[0] < a[1] for a, b in pairwise(windows))
    assert max(map(len, seen.values())) > 2


def test_questions_of_two_shapes_and_of_none(tokenizer):
    task = get_task("qa")
    flat = {**ANSWERED, "answers": {"text": ["word4"], "answer_start": [6]}}
    one, other = (task.encode([r], tokenizer, tiny_config()) for r in (ANSWERED, flat))
    assert one[0] == other[0] and (one[0]["start_positions"], one[0]["end_positions"]) == (5, 5)
    bare = task.encode([{k: ANSWERED[k] for k in ("question", "context")}], tokenizer, tiny_config())
    assert not bare.labelled and "start_positions" not in bare[0]


def test_an_answer_within_a_token_takes_the_whole_token(tokenizer):
    rows = [{**ANSWERED, "answers": [{"text": "ord4 wor", "answer_start": 7}]}]
    data = get_task("qa").encode(rows, tokenizer, tiny_config())
    assert (data[0]["start_positions"], data[0]["end_positions"]) == (5, 6)


def test_masks(tokenizer):
    rows = [{"text": text} for length in (1, 3, 7, 10, 40) for text in texts(20, length)]
    task = get_task("mlm")
    data, again, other = (task.encode(rows, tokenizer, tiny_config(), seed=seed) for seed in (3, 3, 4))
    places = []
    for i, r in enumerate(rows):
        ids, labels = data[i]["input_ids"], data[i]["labels"]
        want = tokenizer(r["text"])["input_ids"]
        hidden = [j for j, label in enumerate(labels) if label != -100]
        assert hidden == [j for j, token in enumerate(ids) if token == MASK]
        assert [label if label != -100 else token for token, label in zip(ids, labels, strict=True)] == want
        assert 0 not in hidden and len(want) - 1 not in hidden
        assert len(hidden) == {1: 1, 3: 1, 7: 1, 10: 2, 40: 6}[len(want) - 2]
        places.append(hidden)
    assert all(data[i] == again[i] for i in range(len(rows)))
    assert sum(data[i] != other[i] for i in range(len(rows))) > 70
    counts = torch.bincount(torch.tensor([j for row in places[-20:] for j in row]), minlength=41)
    assert (counts > 0).sum() > 35 and counts.max() < 12  # everywhere alike: 3 each
    assert len({tuple(row) for row in places[-20:]}) == 20
    # the masks of a row do not depend on the rows after it
    assert task.encode(rows[:7], tokenizer, tiny_config(), seed=3)[6] == data[6]


def test_a_tokenizer_without_a_mask(tokenizer):
    class Maskless:
        mask_token_id = None

    with pytest.raises(ValueError, match="Maskless has no mask token"):
        get_task("mlm").encode([row()], Maskless(), tiny_config())
    with pytest.raises(ValueError, match="seed=-1"):
        get_task("mlm").encode([row()], tokenizer, tiny_config(), seed=-1)


def test_distinct_texts(tokenizer):
    rows = [
        {"sentence1": "word1", "sentence2": "word2 word3", "score": "0.5"},
        {"sentence1": "word2  word3", "sentence2": "WORD1", "score": "4"},
        {"sentence1": "word4", "sentence2": "word1", "score": "2"},
    ]
    for name in ("similarity", "embeddings"):
        data = get_task(name).encode(rows, tokenizer, tiny_config())
        assert [data[i] for i in range(len(data))] == [dict(tokenizer(t)) for t in ("word1", "word2 word3", "word4")]
        assert data.row_of == [0, 0, 2] and data.known["items"] == [(0, 1), (1, 0), (2, 0)]
        assert data.labelled == (name == "similarity")
    assert get_task("similarity").encode(rows, tokenizer, tiny_config()).known["targets"] == [0.5, 4.0, 2.0]


FITTING = {
    "classification": ("ForSequenceClassification", {"num_labels": 3}),
    "regression": ("ForSequenceClassification", {"num_labels": 1}),
    "tokens": ("ForTokenClassification", {}),
    "qa": ("ForQuestionAnswering", {}),
    "mlm": ("ForMaskedLM", {}),
    "similarity": ("Model", {}),
    "embeddings": ("ForMaskedLM", {}),
}


@pytest.mark.parametrize("name", FITTING)
def test_models_that_fit(tmp_path, name):
    head, fields = FITTING[name]
    dense = tiny_bert(HEADS[head], **fields)
    for model in (dense, convert_ffn_to_fff(dense, "2x3")):
        get_task(name).check_model(model)
        model.save_pretrained(tmp_path / "model")
        get_task(name).check_model(type(model.config).from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "head", "fields", "message"),
    [
        ("classification", "Model", {}, "BertModel has no head for classification: that needs one of …ForSequence"),
        ("classification", "ForSequenceClassification", {"num_labels": 1}, "the task is regression"),
        ("regression", "ForSequenceClassification", {"num_labels": 2}, "the task is classification"),
        (
            "classification",
            "ForSequenceClassification",
            {"problem_type": "multi_label_classification"},
            "problem_type='multi_label_classification' is not supported",
        ),
        ("tokens", "ForSequenceClassification", {}, "BertForSequenceClassification has no head for tokens"),
        ("qa", "ForTokenClassification", {}, "has no head for qa"),
        ("mlm", "Model", {}, "has no head for mlm"),
        ("mlm", "ForPreTraining", {}, "load it as a …ForMaskedLM"),
    ],
)
def test_models_that_do_not_fit(name, head, fields, message):
    with pytest.raises(ValueError, match=message):
        get_task(name).check_model(tiny_bert(HEADS[head], **fields))


def test_configs_that_do_not_fit():
    with pytest.raises(ValueError, match="a 'bert' model of no known architecture has no head for mlm"):
        get_task("mlm").check_model(tiny_config())
    with pytest.raises(ValueError, match="BertModel has no head for qa"):
        get_task("qa").check_model(tiny_config(architectures=["BertModel"]))
    get_task("mlm").check_model(tiny_config(architectures=["BertForPreTraining"]))  # AutoModelForMaskedLM loads it
