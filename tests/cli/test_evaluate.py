"""``hf-fff eval``: it tells what the library measures, and wrong use is told before anything is computed."""

import hashlib
import json

import pytest
import torch
from command import run as command
from command import unwrapped
from tiny import HEADS, tiny_bert
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

from hf_fff import convert_ffn_to_fff, fff_usage
from hf_fff.cli.evaluate import _recovered
from hf_fff.tasks import evaluate, get_task, read_rows
from hf_fff.tasks.evaluate import batches

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")

WORDS = [f"word{i}" for i in range(100)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def run(*args):
    return command("eval", *args)


def save(folder, model, words=WORDS):
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate([*SPECIAL, *words])}).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, dense and converted, of several heads; and rows."""
    root = tmp_path_factory.mktemp("eval")
    for name, head in (("cls", "ForSequenceClassification"), ("mlm", "ForMaskedLM"), ("emb", "Model")):
        dense = tiny_bert(HEADS[head], **({"num_labels": 3} if name == "cls" else {}))
        save(root / name, dense)
        for kind in ("2x3", "none"):
            save(root / f"{name}-{kind}", convert_ffn_to_fff(dense, kind))
    save(root / "other-words", tiny_bert(HEADS["ForSequenceClassification"], num_labels=3), WORDS[::-1])
    save(root / "wide", tiny_bert(HEADS["Model"], hidden_size=48))
    inner = root / "sentences" / "0_Transformer"  # as older sentence-transformers have it
    save(inner, tiny_bert(HEADS["Model"]))
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (root / "sentences" / "modules.json").write_text(json.dumps(modules))
    g = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(0, 100, (3 + n % 9,), generator=g)) for n in range(40)]
    lines = [f"{text}\t{texts[-n]}\t{n % 3}\t{n % 5}" for n, text in enumerate(texts)]
    (root / "rows.tsv").write_text("\n".join(["text\tother\tlabel\tnumber", *lines]) + "\n")
    (root / "more.csv").write_text("text,other,label,number\nword1,word2,2,1\n")
    pairs = [f"{text}\t{texts[-n]}\t{n % 5}" for n, text in enumerate(texts)]
    (root / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *pairs]) + "\n")
    (root / "paragraphs.txt").write_text("\n".join(texts))
    return root


def told(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_it_tells_what_the_library_measures(folder):
    rows = read_rows(folder / "rows.tsv") + read_rows(folder / "more.csv")
    options = ("--data", folder / "rows.tsv", "--data", folder / "more.csv", "--teacher", folder / "cls")
    result = told(folder / "cls-2x3", "--task", "classification", *options, "--none", folder / "cls-none")
    model, dense, none = (
        AutoModelForSequenceClassification.from_pretrained(folder / name) for name in ("cls-2x3", "cls", "cls-none")
    )
    tokenizer, task = AutoTokenizer.from_pretrained(folder / "cls"), get_task("classification")
    data = task.encode(rows, tokenizer, dense.config)
    want = {
        role: {
            "source": str(folder / name),
            "weights": hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest(),
            "fff": kind,
            "metrics": evaluate(m, task, data, tokenizer, teacher=dense),
        }
        for role, name, kind, m in (
            ("model", "cls-2x3", "2x3", model),
            ("teacher", "cls", "dense", dense),
            ("none", "cls-none", "none", none),
        )
    }
    of_rows = hashlib.sha256("\n".join(map(repr, rows)).encode()).hexdigest()
    sources = [str(folder / name) for name in ("rows.tsv", "more.csv")]
    x, top, bottom = (want[role]["metrics"]["accuracy"] for role in want)
    share = (x - bottom) / (top - bottom) if top > bottom else None
    usage = fff_usage(model, [batch for _, batch in batches(data, task.collator(tokenizer), 32)])
    assert result == {
        "task": "classification",
        "data": {"sources": sources, "sha256": of_rows, "max_length": 128},
        "rows": 41,
        "items": 41,
        **want,
        "recovered": {"metric": "accuracy", "share": share},
        "usage": {str(i): values for i, values in usage.items()},
    }
    assert list(result["usage"]) == ["0", "1", "2"] and result["teacher"]["metrics"]["agreement"] == 1


def test_without_a_teacher(folder):
    result = told(folder / "cls", "--task", "classification", "--data", folder / "rows.tsv")
    assert set(result["model"]["metrics"]) == {"accuracy", "f1", "mcc"}
    assert result["usage"] == {} and result["recovered"] is None and "teacher" not in result


def test_the_table(folder):
    options = ("--data", folder / "rows.tsv", "--teacher", folder / "cls", "--none", folder / "cls-none")
    result = run(folder / "cls-2x3", "--task", "classification", *options)
    assert result.exit_code == 0, result.output
    for word in (
        "accuracy",
        "agreement",
        "kl",
        "model",
        "teacher",
        "none",
        "recovered of the gap in accuracy",
        "entropy",
    ):
        assert word in unwrapped(result.stdout)
    assert max(map(len, result.stdout.splitlines())) <= 80
    table = run(folder / "cls", "--task", "classification", "--data", folder / "rows.tsv").stdout
    assert "recovered" not in table and "entropy" not in table


def test_options(folder):
    use = (folder / "cls", "--task", "classification", "--data", folder / "rows.tsv")
    plain = told(*use)
    assert told(*use, "--batch-size", 3, "--device", "cpu")["model"]["metrics"] == pytest.approx(
        plain["model"]["metrics"]
    )
    assert told(*use, "--limit", 7)["rows"] == 7
    tokenizer, task = AutoTokenizer.from_pretrained(folder / "cls"), get_task("classification")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "cls")
    rows = [
        {"sentence1": r["text"], "sentence2": r["other"], "label": r["label"]} for r in read_rows(folder / "rows.tsv")
    ]
    want = evaluate(model, task, task.encode(rows, tokenizer, model.config, max_length=9), tokenizer)
    pairs = told(*use, "--text-columns", "text,other", "--label-column", "label", "--max-length", 9)
    assert pairs["model"]["metrics"] == want


def test_masked_lm_by_its_loss(folder):
    use = ("--task", "mlm", "--data", folder / "paragraphs.txt")
    # Of random models any may be the better one.
    teacher, none = sorted(
        (folder / "mlm", folder / "mlm-none"), key=lambda model: told(model, *use)["model"]["metrics"]["loss"]
    )
    options = (*use[2:], "--teacher", teacher, "--none", none)
    result = told(folder / "mlm-2x3", "--task", "mlm", *options)
    loss = {role: result[role]["metrics"]["loss"] for role in ("model", "teacher", "none")}
    assert result["recovered"] == {
        "metric": "loss",
        "share": pytest.approx((loss["none"] - loss["model"]) / (loss["none"] - loss["teacher"])),
    }
    other = told(folder / "mlm-2x3", "--task", "mlm", *options, "--seed", 1)
    assert other["model"]["metrics"]["loss"] != loss["model"]
    assert told(teacher, "--task", "mlm", *options)["recovered"]["share"] == 1
    assert told(none, "--task", "mlm", *options)["recovered"]["share"] == 0


def test_embeddings(folder):
    options = ("--teacher", folder / "sentences", "--none", folder / "emb-none")
    result = told(folder / "emb-2x3", "--task", "embeddings", "--data", folder / "paragraphs.txt", *options)
    metrics = {role: result[role]["metrics"] for role in ("model", "teacher", "none")}
    assert set(metrics["model"]) == {"cosine", "cosine_p5", "neighbours"}
    assert metrics["teacher"] == {name: pytest.approx(1) for name in metrics["model"]}
    x, none = metrics["model"]["cosine"], metrics["none"]["cosine"]
    assert result["recovered"] == {"metric": "cosine", "share": pytest.approx((x - none) / (1 - none))}
    similar = told(folder / "emb", "--task", "similarity", "--data", folder / "pairs.tsv")
    assert set(similar["model"]["metrics"]) == {"spearman", "pearson"} and similar["items"] == 40


def test_unlabelled_rows_are_compared_with_the_teacher(folder):
    options = ("--data", folder / "paragraphs.txt", "--teacher", folder / "cls", "--none", folder / "cls-none")
    result = told(folder / "cls-2x3", "--task", "classification", *options)
    assert set(result["model"]["metrics"]) == {"agreement", "kl"} and result["recovered"]["metric"] == "agreement"
    same = told(folder / "cls", "--task", "classification", *options[:4], "--none", folder / "cls")
    assert same["recovered"] == {"metric": "agreement", "share": None}
    shown = run(folder / "cls", "--task", "classification", *options[:4], "--none", folder / "cls")
    assert "not defined, for none is no worse than the teacher" in unwrapped(shown.stdout)


@pytest.mark.parametrize(
    ("task", "metric", "x", "teacher", "none", "share"),
    [
        ("classification", "accuracy", 0.8, 0.9, 0.7, 0.5),
        ("classification", "accuracy", 0.6, 0.9, 0.7, -0.5),
        ("classification", "accuracy", 0.8, 0.7, 0.7, None),
        ("classification", "accuracy", 0.8, 0.6, 0.7, None),
        ("mlm", "loss", 2.0, 1.0, 3.0, 0.5),
        ("mlm", "loss", 2.0, 3.0, 3.0, None),
        ("mlm", "loss", 2.0, 3.0, 1.0, None),
        ("classification", "agreement", 0.8, 1.0, 0.6, 0.5),
    ],
)
def test_no_share_where_there_is_no_gap(task, metric, x, teacher, none, share):
    """Whichever way the metric counts: where none is no worse than the teacher, nothing can be recovered."""
    scores = {"model": {metric: x}, "teacher": {metric: teacher}, "none": {metric: none}}
    told = _recovered(scores, get_task(task))
    assert told == {"metric": metric, "share": None if share is None else pytest.approx(share)}


WRONG_USE = {
    "task": (["cls", "--task", "sorting"], "--task", "task='sorting' is not known (allowed: classification, "),
    "none alone": (["cls", "--none", "cls-none"], "--none", "told against a --teacher, which is missing"),
    "no teacher": (["emb", "--task", "embeddings"], "--task", "measured against a --teacher"),
    "seed": (["cls", "--seed", "-1"], "--seed", "-1 must be at least 0"),
    "length": (["cls", "--max-length", "3"], "--max-length", "4"),
    "length for qa": (["cls", "--task", "qa", "--max-length", "31"], "--max-length", "31 must be at least 32 for qa"),
    "batch": (["cls", "--batch-size", "0"], "--batch-size", "1"),
    "limit": (["cls", "--limit", "0"], "--limit", "1"),
    "no file": (["cls", "--data", "nowhere.tsv"], "--data", "there is no file nowhere.tsv"),
    "kind of file": (["cls", "--data", "cls/config.yaml"], "--data", "neither a file of a known kind"),
    "device": (["cls", "--device", "tpu"], "--device", "cuda"),
}


@pytest.mark.parametrize("name", WRONG_USE)
def test_used_wrongly(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    options, option, message = WRONG_USE[name]
    result = run("--task", "classification", "--data", "rows.tsv", *options)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert option in unwrapped(result.stderr) and message in unwrapped(result.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(folder):
    result = run(folder / "cls", "--task", "classification", "--data", folder / "rows.tsv", "--device", "cuda")
    assert result.exit_code == 2 and "this machine has no GPU that torch can use" in unwrapped(result.stderr)


WRONG_MODELS = {
    "none there": (
        ["nowhere"],
        "there is no folder nowhere, and no model of that name could be had from the Hub: HF_HUB_OFFLINE",
    ),
    "no head": (["emb"], "emb: BertModel has no head for classification"),
    "no head, teacher": (["cls", "--teacher", "mlm"], "mlm: BertForMaskedLM has no head for classification"),
    "tokenizer": (["cls-2x3", "--teacher", "other-words"], "have different tokenizers"),
    "hidden size": (
        ["emb", "--task", "embeddings", "--teacher", "wide"],
        "hidden_size differs: 32 in the model, 48 in the te",
    ),
    "none's size": (
        ["emb", "--task", "embeddings", "--teacher", "emb", "--none", "wide"],
        "32 in the model, 48 in the none",
    ),
    "column": (
        ["cls", "--text-columns", "body"],
        "there is no column 'body'; the columns are ['text', 'other', 'label'",
    ),
    "labels": (
        ["cls", "--label-column", "number"],
        "row 4: number='3' is no label (allowed: 0 to 2, or LABEL_0, LABEL_1",
    ),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_models_and_rows_that_do_not_fit(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    options, message = WRONG_MODELS[name]
    result = run("--task", "classification", "--data", "rows.tsv", *options)
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert message in unwrapped(result.stderr)
