"""Distillation of tasks: is the loss what is said, is the head trained, does it go on where it stopped, what is reported?"""

import copy
import warnings

import pytest
import torch
from task_rows import bare, encode, rows_of
from test_distillation import Interrupt, oracle, rows, weights
from test_objectives import HEAD
from tiny import HEADS, same, tiny_bert, tiny_model
from transformers import TrainerCallback

from hf_fff import DistillationTrainer, convert_ffn_to_fff
from hf_fff.tasks import evaluate, get_task
from hf_fff.training import TaskMix, arguments_for, distil_task
from hf_fff.training.objectives import OBJECTIVES

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def dense(task, **options):
    head, labels = HEAD[task]
    model = tiny_bert(HEADS[head], **{**labels, **options})
    if task == "tokens":
        model.config.id2label = dict(enumerate(["O", "B-x", "I-x", "B-y", "I-y"]))
        model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    return model


def pair(task, **options):
    teacher = dense(task, **options)
    return convert_ffn_to_fff(teacher, "2x3"), copy.deepcopy(teacher)


def arguments(folder, task="classification", **options):
    usual = {"max_steps": 30, "per_device_train_batch_size": 16, "logging_steps": 5, "save_strategy": "no"}
    usual |= {"learning_rate": 1e-3, "fff_learning_rate": 3e-3, "disable_tqdm": True, "use_cpu": True}
    return arguments_for(task, output_dir=str(folder), **{**usual, **options})


def make(folder, task, tokenizer, models=None, train=None, **options):
    args = arguments(folder, task, **options)
    student, teacher = models or pair(task)
    return DistillationTrainer(
        student,
        args,
        teacher=teacher,
        task=task,
        train_dataset=train or mixed(task, tokenizer, args.max_steps * 16),
        eval_dataset=encode(task, rows_of(task, 13), tokenizer),
        data_collator=get_task(task).collator(tokenizer),
    )


def mixed(task, tokenizer, length):
    transfer = None if task == "mlm" else bare(task, 20, tokenizer)
    return TaskMix(task, encode(task, rows_of(task, 10), tokenizer), tokenizer, length, transfer=transfer)


@pytest.mark.parametrize("task", OBJECTIVES)
def test_learns(tmp_path, task, tokenizer):
    t = make(tmp_path, task, tokenizer, **({"label_weight": 0.1} if task == "regression" else {}))
    head = {n: p.clone() for n, p in t.student.named_parameters() if n.startswith(("classifier", "qa_outputs", "cls"))}
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    distance = "squared_error" if task == "regression" else "kl"
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    assert after[f"eval_{distance}"] < before[f"eval_{distance}"] and after["eval_hidden"] < before["eval_hidden"]
    assert ("eval_agreement" in after) == (task != "regression") and after["eval_label_loss"] > 0
    assert head and all(not torch.equal(p, head[n]) for n, p in t.student.named_parameters() if n in head)
    factor = 1 if task == "regression" else 4
    logs = [row for row in t.state.log_history if "loss" in row]
    assert len(logs) == 6
    for row in logs:
        parts = row["hidden"] + 2 * factor * row[distance] + t.args.label_weight * row["label_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)


def alone(model, row, names=("input_ids", "token_type_ids")):
    with torch.no_grad():
        return model(**{name: torch.tensor([row[name]]) for name in names})


def test_the_loss_is_what_is_said(tmp_path, tokenizer):
    """A classifier's, all weights above 0; in float64 and row by row."""
    student, teacher = pair("classification")
    weight = {"hidden_weight": 0.7, "embedding_weight": 3.0, "logits_weight": 1.5, "label_weight": 0.25}
    train = mixed("classification", tokenizer, 64)
    t = make(tmp_path, "classification", tokenizer, (student, teacher), train, temperature=3.0, **weight)
    metrics = t.evaluate()
    data = t.eval_dataset
    tensors = [
        {k: torch.tensor(v) for k, v in row.items() if k in ("input_ids", "token_type_ids", "attention_mask")}
        for row in (*data, *train)
    ]
    hidden, cosine = oracle(student, teacher, tensors[: len(data)], tensors[len(data) :])
    ours, theirs = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    kl = agree = loss = 0.0
    for row in data:
        h, w = (alone(model, row).logits[0] for model in (ours, theirs))
        p, q = (w / 3).softmax(0), (h / 3).softmax(0)
        kl += float((p * (p / q).log()).sum()) / len(data)
        agree += int(h.argmax() == w.argmax()) / len(data)
        loss -= float(h.softmax(0)[row["labels"]].log()) / len(data)
    expected = {"hidden": hidden, "cosine": cosine, "kl": kl, "agreement": agree, "label_loss": loss}
    expected["loss"] = 0.7 * hidden + 3 * (1 - cosine) + 1.5 * 9 * kl + 0.25 * loss
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name


def test_rows_without_labels_weigh_nothing_in_their_loss(tmp_path, tokenizer):
    weight = {"hidden_weight": 0.0, "logits_weight": 0.0, "label_weight": 1.0}
    t = make(tmp_path, "classification", tokenizer, **weight)
    t._measure_scales()
    items = [t.train_dataset[i] for i in range(12)]
    known = [item for item in items if item["labels"] != -100]
    assert 0 < len(known) < len(items)
    batch, part = t.data_collator(items), t.data_collator(known)
    t.student.eval()
    losses = [t.compute_loss(t.student, b).item() for b in (batch, part)]
    logits = torch.cat([alone(t.student, item).logits for item in known])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([item["labels"] for item in known]))
    assert losses == pytest.approx([float(expected)] * 2, rel=1e-4)
    none = t.data_collator([item for item in items if item["labels"] == -100])
    assert t.compute_loss(t.student, none).item() == 0


@pytest.mark.parametrize("task", OBJECTIVES)
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, task, tokenizer):
    models = pair(task)
    one, other = (
        make(tmp_path, task, tokenizer, models, per_device_eval_batch_size=size).evaluate() for size in (3, 13)
    )
    names = ("loss", "hidden", "cosine", "label_loss")
    names += ("squared_error",) if task == "regression" else ("kl", "agreement")
    for name in (f"eval_{name}" for name in names):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_evaluation_without_labels(tmp_path, tokenizer):
    t = make(tmp_path, "classification", tokenizer)
    metrics = t.evaluate(bare("classification", 5, tokenizer))
    assert "eval_label_loss" not in metrics and metrics["eval_kl"] > 0 and 0 <= metrics["eval_agreement"] <= 1


def test_without_weights_on_logits_it_is_general(tmp_path, tokenizer):
    """The head stays as it is, and the task changes nothing."""
    trained = []
    for task in (None, "classification"):
        student, teacher = pair("classification")
        head = weights(student.classifier)
        args = arguments(tmp_path, max_steps=3, logits_weight=0, label_weight=0)
        t = DistillationTrainer(student, args, teacher=teacher, task=task, train_dataset=rows())
        t.train()
        assert t.model is student.base_model and same(weights(student.classifier), head)
        trained.append(weights(student))
    assert same(*trained)


def test_what_is_left_alone(tmp_path, tokenizer):
    student, teacher = pair("classification", hidden_dropout_prob=0.3)
    before = weights(teacher)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append({m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)})
            assert all(p.requires_grad for p in student.parameters())

    t = make(tmp_path, "classification", tokenizer, (student, teacher), max_steps=2)
    t.add_callback(Look())
    t.train()
    assert seen == [{0.0}] * 2 and same(weights(teacher), before)  # the head's own dropout, too
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.3, 0.1}
    t.save_model(tmp_path / "saved")
    assert same(weights(type(student).from_pretrained(tmp_path / "saved")), weights(student))


def test_stops_where_the_logits_are_not_finite(tmp_path, tokenizer):
    t = make(tmp_path, "classification", tokenizer, logging_steps=3, max_steps=8)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    t.student.classifier.bias.fill_(float("inf"))

    t.add_callback(Break())
    with pytest.raises(FloatingPointError, match="not finite at step 5: the logits are not finite"):
        t.train()


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_resumed_as_if_not_interrupted(tmp_path, task, tokenizer):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4}

    def run(resume=None, interrupt=False):
        t = make(tmp_path, task, tokenizer, **options)
        if interrupt:
            t.add_callback(Interrupt())
            with pytest.raises(KeyboardInterrupt):
                t.train()
        else:
            t.train(resume_from_checkpoint=resume)
        return weights(t.student)

    stopped = run(interrupt=True)
    resumed = run(resume=str(tmp_path / "checkpoint-4"))
    whole = run()
    assert same(resumed, whole) and not same(stopped, whole)


@pytest.mark.parametrize("task", ["classification", "regression", "mlm"])
def test_distil_task(tmp_path, task, tokenizer):
    teacher = dense(task)
    student, before = convert_ffn_to_fff(teacher, "2x3"), weights(teacher)
    train, test = encode(task, rows_of(task, 20), tokenizer), encode(task, rows_of(task, 9), tokenizer)
    kind = get_task(task)
    scores = [evaluate(model, kind, test, tokenizer)[kind.main_metric] for model in (student, teacher)]
    transfer = None if task == "mlm" else bare(task, 20, tokenizer)
    args = arguments(tmp_path, task)
    done = distil_task(student, teacher, task, train, tokenizer, args, held_out=test, transfer=transfer)
    report = done.distillation_report
    assert done is student and not student.training and same(weights(teacher), before)
    assert (report.rows, report.held_out, report.steps, report.task) == (20, 9, 30, task)
    assert report.metric == kind.main_metric and [report.score_before, report.score_teacher] == pytest.approx(scores)
    assert report.score == pytest.approx(evaluate(student, kind, test, tokenizer)[kind.main_metric])
    assert report.cosine_before < report.cosine < 1
    assert "forward" not in vars(student)
    if task == "mlm":
        assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


@pytest.mark.parametrize("family", ["bert", "mobilebert"])  # the latter's head does not call its output embeddings
def test_masked_words_alone_are_looked_at(tmp_path, tokenizer, family):
    """The same loss as with logits everywhere, of fewer logits."""
    teacher = tiny_model(family, "ForMaskedLM")
    t = make(tmp_path, "mlm", tokenizer, (convert_ffn_to_fff(teacher, "2x3"), copy.deepcopy(teacher)))
    t._measure_scales()
    batch = t.data_collator([t.train_dataset[i] for i in range(16)])
    shapes = []
    t.student.get_output_embeddings().register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape)))
    some, out = t._compare(t.model, batch)
    assert not t.student.get_output_embeddings()._forward_pre_hooks
    assert out.logits.shape[1] < batch["labels"].shape[1] // 2
    t.train_dataset.masked_share = None
    everywhere, out = t._compare(t.model, batch)
    assert out.logits.shape[1] == batch["labels"].shape[1]
    assert torch.allclose(some, everywhere, rtol=1e-5, atol=1e-6) and everywhere[:, -5].sum() > 0
    if family == "bert":
        assert [shape[1] < batch["labels"].shape[1] for shape in shapes] == [True, False]
    with torch.no_grad():
        t.train_dataset.masked_share = 0.15
        assert t._compare(t.model, batch)[1].logits.shape[1] == batch["labels"].shape[1]  # an evaluation may mask more


@pytest.mark.gpu
@pytest.mark.parametrize("task", ["classification", "mlm", "qa"])
def test_recorded_steps_are_the_same(tmp_path, task, tokenizer):
    logs = []
    for graphs in (False, True):
        t = make(tmp_path, task, tokenizer, use_cpu=False, max_steps=40, logging_steps=1, cuda_graphs=graphs)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "training steps are not recorded")
            t.train()
        logs.append([row for row in t.state.log_history if "cosine" in row])
    for plain, recorded in zip(*logs, strict=True):
        for name in ("loss", "hidden", "cosine", "kl", "label_loss", "grad_norm"):
            assert plain[name] == pytest.approx(recorded[name], rel=1e-3), (plain["step"], name)


def test_used_wrongly(tmp_path, tokenizer):
    student, teacher = pair("classification")

    def trainer(task, student=student, teacher=teacher):
        return DistillationTrainer(student, arguments(tmp_path), teacher=teacher, task=task, train_dataset=rows())

    with pytest.raises(ValueError, match="logits_weight and label_weight need a task"):
        trainer(None)
    with pytest.raises(ValueError, match="'similarity' has no logits"):
        trainer("similarity")
    with pytest.raises(ValueError, match="FastBertForSequenceClassification has no head for tokens"):
        trainer("tokens")
    with pytest.raises(ValueError, match="num_labels differs: 3 in the model, 4 in the teacher"):
        trainer("classification", teacher=dense("classification", num_labels=4))
    data = encode("classification", rows_of("classification", 20), tokenizer)
    unlabelled = bare("classification", 20, tokenizer)
    for train, test, options, message in (
        (unlabelled, data, {}, "'classification' on has no labels"),
        (data, unlabelled, {}, "the held-out data has no labels"),
        (data, data, {"max_steps": -1}, "max_steps=-1 must be at least 1"),
    ):
        args = arguments(tmp_path, **options)
        with pytest.raises(ValueError, match=message):
            distil_task(student, teacher, "classification", train, tokenizer, args, held_out=test)


@pytest.mark.parametrize(("name", "value"), [("logits_weight", -1), ("label_weight", float("nan")), ("temperature", 0)])
def test_arguments_out_of_range(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        arguments(tmp_path, **{name: value})


def test_the_arguments_of_tasks(tmp_path):
    args = arguments_for("qa", output_dir=str(tmp_path))
    assert (args.hidden_weight, args.embedding_weight, args.logits_weight, args.label_weight) == (1, 0, 2, 0.5)
    assert (args.temperature, args.learning_rate, args.fff_learning_rate) == (2, 2e-4, None)
    args = arguments_for("mlm", output_dir=str(tmp_path), temperature=1.0)
    assert (args.logits_weight, args.label_weight, args.learning_rate) == (2, 0, 3e-4)
    assert args.temperature == 1
    general = arguments_for(None, output_dir=str(tmp_path), max_steps=3000)
    assert (general.embedding_weight, general.logits_weight, general.per_device_train_batch_size) == (10, 0, 192)
    for steps, rates in (
        (50, (4e-5, 3e-5, 2.4e-4)),
        (499, (3.992e-4, 2.994e-4, 2.3952e-3)),
        (-1, (4e-4, 3e-4, 2.4e-3)),
    ):
        args = arguments_for(None, output_dir=str(tmp_path), max_steps=steps)
        assert (args.learning_rate, args.rate_of("tree"), args.rate_of("mlp")) == pytest.approx(rates)
    args = arguments_for("qa", output_dir=str(tmp_path), max_steps=50, learning_rate=1.0)
    assert (args.learning_rate, args.rate_of("tree")) == (1.0, 0.75)
    args = arguments_for("qa", output_dir=str(tmp_path), max_steps=50, fff_learning_rate=1e-2)
    assert (args.learning_rate, args.rate_of("tree"), args.rate_of("mlp")) == pytest.approx((2e-5, 1e-2, 1e-2))
    with pytest.raises(ValueError, match="'embeddings' has no logits"):
        arguments_for("embeddings", output_dir=str(tmp_path))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_out_of_memory(tmp_path, tokenizer, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(DistillationTrainer, "compute_loss", fail)
    data = encode("classification", rows_of("classification", 20), tokenizer)
    with pytest.raises(RuntimeError, match="out of memory while training: lower the batch size.*maximal length"):
        distil_task(*pair("classification"), "classification", data, tokenizer, arguments(tmp_path), held_out=data)


def test_a_tensor_that_the_memory_does_not_hold():
    from hf_fff.memory import memory_explained

    with pytest.raises(RuntimeError, match="out of memory while trying: lower it"), memory_explained("trying", "it"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="^other$"), memory_explained("trying", "it"):
        raise RuntimeError("other")
