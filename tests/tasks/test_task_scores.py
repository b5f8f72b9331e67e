"""Evaluation against an oracle that goes row by row, in float64 and without padding."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from tiny import HEADS, tiny_bert
from torch.nn import functional as F
from transformers import BertTokenizer

from hf_fff import convert_ffn_to_fff
from hf_fff.tasks import evaluate, get_task

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")

WORDS = [f"word{i}" for i in range(100)]
NAMES = ("O", "B-x", "I-x", "B-y", "I-y")
HEAD = {
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    "mlm": "ForMaskedLM",
    "similarity": "Model",
    "embeddings": "Model",
}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##a", "##b"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def make(task, seed=0, **fields):
    if task == "regression":
        fields["num_labels"] = 1
    elif task in ("classification", "tokens"):
        names = NAMES if task == "tokens" else ("a", "b", "c")
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return tiny_bert(HEADS[HEAD[task]], seed=seed, **fields)


def some_words(g, longest):
    count = 1 + int(torch.randint(0, longest, (1,), generator=g))
    return [WORDS[i] for i in torch.randint(0, 100, (count,), generator=g)]


def rows_of(task, count=45):
    g = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        words = some_words(g, 12)
        if task in ("classification", "mlm", "embeddings"):
            rows.append({"text": " ".join(words), "label": number % 3})
        elif task == "tokens":
            tags = [NAMES[i] for i in torch.randint(0, 5, (len(words),), generator=g)]
            rows.append({"tokens": [w + "ab" * (i % 3 == 0) for i, w in enumerate(words)], "tags": tags})
        elif task == "qa":
            words = some_words(g, 50)
            first = number % len(words)
            answers = [" ".join(words[first : first + 3]), words[0]]
            start = len(" ".join([*words[:first], ""]))
            answers = [{"text": text, "answer_start": at} for text, at in zip(answers, (start, 0), strict=True)]
            rows.append({"question": "word1 word2", "context": " ".join(words), "answers": answers})
        else:
            rows.append({"sentence1": " ".join(words), "sentence2": " ".join(some_words(g, 12)), "score": number % 7})
    return rows


LENGTH = {"qa": 32}


def encoded(task, model, tokenizer, rows=None):
    rows = rows_of(task) if rows is None else rows
    return get_task(task).encode(rows, tokenizer, model.config, max_length=LENGTH.get(task, 128))


def run(model, item):
    model = copy.deepcopy(model).double().eval()
    inputs = {k: torch.tensor([v]) for k, v in item.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_classification(tokenizer, size):
    model = make("classification")
    rows = rows_of("classification")
    told = evaluate(
        model, get_task("classification"), encoded("classification", model, tokenizer), tokenizer, batch_size=size
    )
    best = [int(run(model, tokenizer(r["text"])).logits.argmax()) for r in rows]
    assert told["accuracy"] == pytest.approx(np.mean([b == r["label"] for b, r in zip(best, rows, strict=True)]))
    assert set(told) == {"accuracy", "f1", "mcc"}


def test_regression(tokenizer):
    model, teacher = make("regression"), make("regression", 1)
    rows = rows_of("regression")
    data = encoded("regression", model, tokenizer)
    told = evaluate(model, get_task("regression"), data, tokenizer, teacher=teacher, batch_size=8)
    a, b = ([float(run(m, tokenizer(r["sentence1"], r["sentence2"])).logits) for r in rows] for m in (model, teacher))
    scores = [r["score"] for r in rows]
    assert told["spearman"] == pytest.approx(scipy.stats.spearmanr(a, scores)[0], abs=1e-6)
    assert told["pearson"] == pytest.approx(np.corrcoef(a, scores)[0, 1], abs=1e-5)
    assert told["mse"] == pytest.approx(np.mean((np.array(a) - scores) ** 2), rel=1e-5)
    assert told["agreement"] == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-6)
    assert told["teacher_mse"] == pytest.approx(np.mean((np.array(a) - b) ** 2), rel=1e-5)


def test_tokens(tokenizer):
    model = make("tokens")
    rows = rows_of("tokens")
    rows[3] = {"tokens": ["word1", "\u200d", "word2"], "tags": ["O", "B-x", "B-y"]}  # one that makes no token
    told = evaluate(model, get_task("tokens"), encoded("tokens", model, tokenizer, rows), tokenizer, batch_size=8)
    right = words = 0
    for r in rows:
        batch = tokenizer(r["tokens"], is_split_into_words=True)
        best = run(model, batch).logits[0].argmax(-1).tolist()
        of = batch.word_ids()
        for word, tag in enumerate(r["tags"]):
            have = NAMES[best[of.index(word)]] if word in of else "O"
            right, words = right + (have == tag), words + 1
    assert told["accuracy"] == pytest.approx(right / words) and 0.05 < told["accuracy"] < 0.6
    assert set(told) == {"f1", "precision", "recall", "accuracy"} and 0 < told["f1"] < 0.5


def test_tokens_without_labels_are_compared_where_words_start(tokenizer):
    model, teacher = make("tokens"), make("tokens", 1)
    rows = [{"tokens": r["tokens"]} for r in rows_of("tokens")]
    labelled = evaluate(model, get_task("tokens"), encoded("tokens", model, tokenizer), tokenizer, teacher=teacher)
    bare = evaluate(model, get_task("tokens"), encoded("tokens", model, tokenizer, rows), tokenizer, teacher=teacher)
    assert bare == {name: labelled[name] for name in ("agreement", "kl")}


def test_questions(tokenizer):
    """The answer is the best span of the context over all windows, not of the question, and not backwards."""
    model = make("qa")
    rows = rows_of("qa")
    data = encoded("qa", model, tokenizer, rows)
    assert len(data) > len(rows)
    told = evaluate(model, get_task("qa"), data, tokenizer, batch_size=8)
    f1 = exact = 0.0
    for number, r in enumerate(rows):
        best = None
        for i in (i for i, row in enumerate(data.row_of) if row == number):
            out, item = run(model, data[i]), data[i]
            first = item["token_type_ids"].index(1)
            last = len(item["input_ids"]) - 2
            for s in range(first, last + 1):
                for e in range(s, min(last, s + 29) + 1):
                    value = float(out.start_logits[0, s] + out.end_logits[0, e])
                    if best is None or value > best[0]:
                        best = (value, tokenizer.decode(item["input_ids"][s : e + 1]).split())
        wanted = [a["text"].split() for a in r["answers"]]
        exact += best[1] in wanted

        def share(a, b):
            common = sum(min(a.count(w), b.count(w)) for w in {*a})
            return 2 * common / (len(a) + len(b))

        f1 += max(share(best[1], w) for w in wanted)
    assert told == {"f1": pytest.approx(f1 / len(rows)), "exact_match": pytest.approx(exact / len(rows))} and f1 > 1


def test_masked_tokens(tokenizer):
    model = make("mlm")
    data = encoded("mlm", model, tokenizer)
    told = evaluate(model, get_task("mlm"), data, tokenizer, batch_size=8)
    losses, hits = [], []
    for i in range(len(data)):
        logits, labels = run(model, data[i]).logits[0], data[i]["labels"]
        for j in (j for j, label in enumerate(labels) if label != -100):
            losses.append(float(logits[j].logsumexp(0) - logits[j, labels[j]]))
            hits.append(int(logits[j].argmax()) == labels[j])
    assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert told["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert told["accuracy"] == pytest.approx(np.mean(hits))


def embedding(model, text, tokenizer):
    return run(model, tokenizer(text)).last_hidden_state[0].mean(0)


def test_similarity(tokenizer):
    model, teacher = make("similarity"), make("similarity", 1)
    rows = rows_of("similarity")
    task, data = get_task("similarity"), encoded("similarity", model, tokenizer)
    told = evaluate(model, task, data, tokenizer, teacher=teacher, batch_size=8)
    pairs = [[embedding(model, r[name], tokenizer) for name in ("sentence1", "sentence2")] for r in rows]
    cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in pairs]
    scores = [r["score"] for r in rows]
    assert told["spearman"] == pytest.approx(scipy.stats.spearmanr(cosines, scores)[0], abs=1e-3)
    assert told["pearson"] == pytest.approx(np.corrcoef(cosines, scores)[0, 1], abs=1e-5)
    texts = list(dict.fromkeys(r[name] for r in rows for name in ("sentence1", "sentence2")))
    both = [[embedding(m, t, tokenizer) for t in texts] for m in (model, teacher)]
    cosines = [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(*both, strict=True)]
    assert told["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert told["cosine_p5"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-6)
    assert 0 < told["neighbours"] < 1


@pytest.mark.parametrize("task", ["classification", "tokens", "qa", "mlm"])
def test_agreement_with_a_teacher(tokenizer, task):
    model, teacher = make(task), make(task, 1)
    data = encoded(task, model, tokenizer)
    told = evaluate(model, get_task(task), data, tokenizer, teacher=teacher, batch_size=8)
    agree, kl = [], []
    for i in range(len(data)):
        rows = []
        for m in (model, teacher):
            out = run(m, data[i])
            if task == "qa":
                rows.append(torch.stack([out.start_logits[0], out.end_logits[0]]))
            elif task == "classification":
                rows.append(out.logits)
            else:
                rows.append(out.logits[0][torch.tensor(data[i]["labels"]) != -100])
        for have, want in zip(*rows, strict=True):
            p, q = want.softmax(0), have.softmax(0)
            agree.append(int(have.argmax()) == int(want.argmax()))
            kl.append(float((p * (p.log() - q.log())).sum()))
    assert told["agreement"] == pytest.approx(np.mean(agree)) and told["agreement"] < 1
    assert told["kl"] == pytest.approx(np.mean(kl), rel=1e-4)


@pytest.mark.parametrize("task", HEAD)
def test_a_model_agrees_with_itself(tokenizer, task):
    model = make(task)
    data = encoded(task, model, tokenizer)
    told = evaluate(model, get_task(task), data, tokenizer, teacher=copy.deepcopy(model))
    assert told == pytest.approx(evaluate(model, get_task(task), data, tokenizer, teacher=model))
    want = {"classification": 1, "tokens": 1, "qa": 1, "mlm": 1, "regression": 1}
    if task in want:
        assert told["agreement"] == pytest.approx(1)
        assert told["teacher_mse" if task == "regression" else "kl"] == pytest.approx(0, abs=1e-6)
    else:
        assert told["cosine"] == pytest.approx(1) and told["neighbours"] == 1 and told["cosine_p5"] == pytest.approx(1)
    assert task == "embeddings" or get_task(task).main_metric in told


def test_a_converted_model_in_bfloat16(tokenizer):
    teacher = make("classification")
    model = copy.deepcopy(convert_ffn_to_fff(teacher, "2x3")).bfloat16()
    told = evaluate(
        model, get_task("classification"), encoded("classification", model, tokenizer), tokenizer, teacher=teacher
    )
    assert set(told) == {"accuracy", "f1", "mcc", "agreement", "kl"} and told["kl"] > 0


def test_models_are_left_as_they_were(tokenizer):
    model, teacher = make("mlm").train(), make("mlm", 1).train()
    model.bert.encoder.eval()
    data = encoded("mlm", model, tokenizer)
    first, second = (evaluate(model, get_task("mlm"), data, tokenizer, teacher=teacher) for _ in range(2))
    assert first == second  # no dropout
    assert model.training and teacher.training and not model.bert.encoder.layer[0].training


def wider(task):
    return make(task, hidden_size=48)


@pytest.mark.parametrize(
    ("task", "teacher", "message"),
    [
        (
            "classification",
            lambda: make("classification", vocab_size=130),
            "vocab_size differs: 120 in the model, 130 in",
        ),
        ("embeddings", lambda: wider("embeddings"), "hidden_size differs: 32 in the model, 48 in the teacher"),
        (
            "classification",
            lambda: tiny_bert(HEADS["ForSequenceClassification"], num_labels=4),
            "num_labels differs: 3",
        ),
        (
            "classification",
            lambda: renamed("classification", "c b a"),
            "the labels differ: \\['a', 'b', 'c'\\] in the model",
        ),
        ("classification", lambda: make("embeddings"), "BertModel has no head for classification"),
    ],
)
def test_teachers_that_do_not_fit(tokenizer, task, teacher, message):
    model = make(task)
    with pytest.raises(ValueError, match=message):
        evaluate(model, get_task(task), encoded(task, model, tokenizer), tokenizer, teacher=teacher())


def renamed(task, names):
    model = make(task)
    model.config.id2label = dict(enumerate(names.split()))
    return model


def test_teachers_that_fit(tokenizer):
    model = make("classification")
    data = encoded("classification", model, tokenizer)
    for teacher in (wider("classification"), renamed("classification", "LABEL_0 LABEL_1 LABEL_2")):
        assert "kl" in evaluate(model, get_task("classification"), data, tokenizer, teacher=teacher)


def test_nothing_to_measure(tokenizer):
    model = make("classification")
    bare = [{"text": "word1"}]
    for task, kind in (("embeddings", make("embeddings")), ("classification", model)):
        with pytest.raises(ValueError, match=f"nothing to measure: {task} on rows without labels needs a teacher"):
            evaluate(kind, get_task(task), encoded(task, kind, tokenizer, bare), tokenizer)
    told = evaluate(
        model, get_task("classification"), encoded("classification", model, tokenizer, bare), tokenizer, teacher=model
    )
    assert set(told) == {"agreement", "kl"}
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        evaluate(
            model, get_task("classification"), encoded("classification", model, tokenizer), tokenizer, batch_size=0
        )


@pytest.mark.parametrize("task", HEAD)
def test_what_is_not_finite(tokenizer, task):
    model = make(task)
    with torch.no_grad():
        model.base_model.embeddings.position_embeddings.weight[15] = float("nan")  # that one row alone reaches
    columns = [
        name for name in ("text", "tokens", "sentence1", "sentence2", "question", "context") if name in rows_of(task)[0]
    ]
    rows = [dict.fromkeys(columns, ["word1"] * 5 if task == "tokens" else f"word{n} word2 word3") for n in range(45)]
    rows[30][columns[-1]] = ["word1"] * 20 if task == "tokens" else "word9 " * 20
    data = encoded(task, model, tokenizer, rows)
    with pytest.raises(FloatingPointError, match="an output for row 31 is not finite"):
        evaluate(model, get_task(task), data, tokenizer, teacher=make(task, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("task", HEAD)
def test_on_a_gpu(tokenizer, task):
    model, teacher = make(task), make(task, 1)
    data = encoded(task, model, tokenizer)
    want = evaluate(model, get_task(task), data, tokenizer, teacher=teacher)
    assert evaluate(model.cuda(), get_task(task), data, tokenizer, teacher=teacher) == pytest.approx(want, abs=0.05)
