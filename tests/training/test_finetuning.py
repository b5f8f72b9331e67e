"""Finetuning: does it learn, at which rates, what is masked, what does an evaluation give, and what of a loss that is not finite?"""

import copy
import warnings

import pytest
import torch
from task_rows import encode, learnable, rows_of
from test_objectives import HEAD
from tiny import HEADS, tiny_bert

from hf_fff import FinetuningArguments, FinetuningTrainer, convert_ffn_to_fff
from hf_fff.layers import FFF
from hf_fff.tasks import evaluate, get_task
from hf_fff.tasks.data import IGNORED
from hf_fff.training import MaskingCollator, StreamedPieces, TextPieces, set_routing_gradient
from hf_fff.training.base import _take_steps_in
from hf_fff.training.lengths import pad_to_multiple

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def dense(task, **options):
    head, labels = HEAD[task]
    labels = {"num_labels": 3} if task == "tokens" else labels  # as rows_of has
    model = tiny_bert(HEADS[head], **{**labels, **options})
    if task == "tokens":
        names = ["O", "B-x", "I-x"]
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    return model


def arguments(folder, **options):
    usual = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 2, "save_strategy": "no"}
    usual |= {"learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True, "seed": 0}
    return FinetuningArguments(output_dir=str(folder), **{**usual, **options})


def make(folder, task, tokenizer, model, rows=None, **options):
    rows = rows_of(task, 40) if rows is None else rows
    train = TextPieces([r["text"] for r in rows], tokenizer, 48) if task == "mlm" else encode(task, rows, tokenizer)
    return FinetuningTrainer(
        model,
        arguments(folder, **options),
        task=task,
        train_dataset=train,
        eval_dataset=encode(task, rows_of(task, 13, seed=1), tokenizer),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("fff", [None, "2x3"])
@pytest.mark.parametrize("task", HEAD)
def test_evaluation(tmp_path, tokenizer, task, fff):
    """As ``hf_fff.tasks.evaluate`` has it; the loss is that of the head over all rows, whatever the batches."""
    model = dense(task) if fff is None else convert_ffn_to_fff(dense(task), fff)
    t = make(tmp_path, task, tokenizer, model, per_device_eval_batch_size=4)
    found = t.evaluate()
    want = evaluate(model, get_task(task), t.eval_dataset, tokenizer, batch_size=32)
    for name, value in want.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-6, abs=1e-5), name
    batch = get_task(task).collator(tokenizer)([t.eval_dataset[i] for i in range(13)])
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(model.eval()(**batch).loss), rel=1e-4)
    assert "eval_runtime" in found and t.state.log_history[-1]["eval_loss"] == found["eval_loss"]


@pytest.mark.parametrize("kind", ["tree", "mlp", "both", "bias", "none"])
def test_each_group_has_its_rate(tmp_path, tokenizer, kind):
    model = convert_ffn_to_fff(
        dense("classification"), {"tree": "2x3", "mlp": "mlp:5", "both": "2x3+mlp:5"}.get(kind, "none")
    )
    options = {"fff_learning_rate": 5e-3} if kind == "bias" else {}
    t = make(tmp_path, "classification", tokenizer, model, weight_decay=0.1, **options)
    t.create_optimizer()
    rates = {p: (g["lr"], g["weight_decay"]) for g in t.optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    assert set(rates) == set(named.values())
    own = {n for n in named if ".intermediate." in n or (n.endswith("output.dense.bias") and "attention" not in n)}
    assert own
    wanted = {"tree": 7.5e-4, "mlp": 2.5e-3, "both": 2.5e-3, "bias": 5e-3, "none": 7.5e-4}[kind]
    for name, p in named.items():
        rate = wanted if name in own else 1e-3
        if kind in ("mlp", "both") and name in own and (name.endswith("output.dense.bias") or ".trees." in name):
            rate = 7.5e-4
        decay = 0.0 if "bias" in name or "LayerNorm" in name else 0.1
        assert rates[p] == (rate, decay), name


def test_steps_are_in_units():
    """By place, and not by parameter: whoever shards puts others there."""
    p, other = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [other]}, {"params": [p]}], lr=1.0)
    _take_steps_in({p: torch.tensor([0.5, 2.0])}, optimizer)
    new = torch.nn.Parameter(torch.ones(2, 2))  # a shard of the rows
    optimizer.param_groups[1]["params"] = [new]
    new.grad, other.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    assert torch.equal(new, torch.tensor([[0.5, -1.0], [0.5, -1.0]])) and torch.equal(other, torch.zeros(2))


@pytest.mark.parametrize("kind", ["2x3", "mlp:5"])
def test_without_units(tmp_path, tokenizer, kind):
    """Steps are Adam's own, at one rate for all: the first is about the rate in every weight. In units it is not."""
    moved = {}
    for units in (True, False):
        model = convert_ffn_to_fff(dense("classification"), kind, init="random", seed=0)
        neurons = [m for m in model.modules() if type(m).__name__ in ("FFF", "MLP")]
        before = [m.weight_out.detach().clone() for m in neurons]
        t = make(
            tmp_path, "classification", tokenizer, model, fff_units=units, max_steps=1, lr_scheduler_type="constant"
        )
        t.train()
        moved[units] = torch.cat(
            [(m.weight_out.detach() - b).abs().flatten() for m, b in zip(neurons, before, strict=True)]
        )
    reached = moved[False] > 0.5e-3
    assert reached.any() and moved[False].max() < 1.01e-3  # a node that no token visited stays where it is
    assert moved[True].max() < 0.9 * moved[False].max() or moved[True].max() > 1.1 * moved[False].max()


def test_the_routing_gradient_is_switched(tmp_path, tokenizer):
    model = convert_ffn_to_fff(dense("classification"), {0: "2x3", 1: "mlp:4", 2: "1x2+mlp:4"})
    t = make(tmp_path, "classification", tokenizer, model, routing_gradient=0)
    trees = [m for m in t.model.modules() if isinstance(m, FFF)]
    assert [m.config.routing_gradient for m in trees] == [0.0, 0.0]
    assert {i: c.shorthand for i, c in model.config.fff_layers.items()} == {0: "2x3", 1: "mlp:4", 2: "1x2+mlp:4"}
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert [m.config.routing_gradient for m in loaded.modules() if isinstance(m, FFF)] == [0.0, 0.0]
    x = torch.randn(9, 32)
    gradients = []
    for alpha in (0.0, 3.0):
        set_routing_gradient(model, alpha)
        model.zero_grad()
        trees[0](x).square().sum().backward()
        gradients.append(trees[0].weight_in.grad.clone())
    assert not torch.allclose(*gradients)
    plain = dense("classification")
    before = plain.config.to_dict()
    set_routing_gradient(plain, 0.0)
    assert plain.config.to_dict() == before


@pytest.mark.parametrize("dropout", [True, False])
def test_dropout(tmp_path, tokenizer, dropout):
    seen = []
    model = dense("classification")
    t = make(tmp_path, "classification", tokenizer, model, dropout=dropout, max_steps=1)
    model.bert.embeddings.dropout.register_forward_pre_hook(lambda m, _: seen.append((m.training, m.p)))
    t.train()
    trained = [p for training, p in seen if training]
    assert trained == [0.1 if dropout else 0.0]
    assert model.bert.embeddings.dropout.p == 0.1


@pytest.mark.parametrize("broken", [0, 2, "head"])
def test_a_loss_that_is_not_finite(tmp_path, tokenizer, broken):
    model = convert_ffn_to_fff(dense("classification"), "2x3")
    t = make(
        tmp_path, "classification", tokenizer, model, max_steps=8, logging_steps=4, save_strategy="steps", save_steps=2
    )

    def spoil(module, inputs, output):
        if t.state.global_step == 4 and module.training:
            return output * float("nan")

    layers = model.bert.encoder.layer
    (model.classifier if broken == "head" else layers[broken].output).register_forward_hook(spoil)
    place = (
        "the loss of the head alone is" if broken == "head" else f"layer {broken} is the first whose hidden state is"
    )
    with pytest.raises(FloatingPointError, match=f"not finite at step 5: {place} not finite"):
        t.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, tokenizer):
    model = dense("classification")
    t = make(tmp_path, "classification", tokenizer, model)
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="weights classifier.weight are not finite"):
        t._save_checkpoint(model, None)


def test_masks(tokenizer):
    """A quarter, no special tokens, never none."""
    rows = [{"input_ids": [2, *range(5, 45), 3], "attention_mask": [1] * 42} for _ in range(50)]
    rows.append({"input_ids": [2, 7, 3], "attention_mask": [1] * 3})
    collate = MaskingCollator(tokenizer, 0.25)
    batch = collate(copy.deepcopy(rows))
    hidden = batch["labels"] != -100
    assert not hidden[:, 0].any() and not hidden[50, 2:].any() and batch["input_ids"].shape == (51, 42)
    assert 0.2 < hidden[:50].float().sum() / (50 * 40) < 0.3
    masked = batch["input_ids"][hidden] == tokenizer.mask_token_id
    assert 0.7 < masked.float().mean() < 0.9
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"])[0], torch.tensor(rows[0]["input_ids"]))
    tiny = [{"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1]}]
    assert all((collate(copy.deepcopy(tiny))["labels"] != -100).sum() == 1 for _ in range(20))
    unknown = [{"input_ids": [2, tokenizer.unk_token_id, 3], "attention_mask": [1, 1, 1]}] * 2
    with pytest.raises(ValueError, match="a batch of 2 texts has no token to be masked: .* unknown to the tokenizer"):
        collate(copy.deepcopy(unknown))
    assert (collate(copy.deepcopy([*tiny, *unknown]))["labels"] != -100).sum() == 1  # with others they may be


def test_the_masks_of_epochs(tmp_path, tokenizer):
    seen = []
    model = dense("mlm")
    t = make(tmp_path, "mlm", tokenizer, model, learnable("mlm", 8), max_steps=-1, num_train_epochs=3)
    model.register_forward_pre_hook(lambda m, _, given: seen.append(given) if m.training else None, with_kwargs=True)
    t.train()
    assert len(seen) == 3
    assert len({tuple(row["labels"].sum(1).tolist()) for row in seen}) == 3


def test_long_texts_go_into_pieces(tokenizer):
    words = [f"word{i}" for i in range(23)]
    texts = [" ".join(words), "", "word1 word2"]
    data = TextPieces(texts, tokenizer, 10)
    assert data.lengths == [10, 10, 9, 4]
    inside = [i for row in (data[n] for n in range(3)) for i in row["input_ids"][1:-1]]
    assert tokenizer.convert_ids_to_tokens(inside) == words
    assert set(data[3]) == {"input_ids", "token_type_ids", "attention_mask"}
    assert [*StreamedPieces(texts, tokenizer, 10)] == [data[n] for n in range(4)]
    with pytest.raises(ValueError, match="no text to train on"):
        TextPieces(["", " "], tokenizer, 10)


def test_used_wrongly(tmp_path, tokenizer):
    model, rows = dense("classification"), encode("classification", rows_of("classification", 8), tokenizer)
    with pytest.raises(ValueError, match="args must be FinetuningArguments"):
        FinetuningTrainer(model, object())
    with pytest.raises(ValueError, match="has no head for mlm"):
        FinetuningTrainer(model, arguments(tmp_path), task="mlm", processing_class=tokenizer)
    with pytest.raises(ValueError, match="give processing_class"):
        FinetuningTrainer(model, arguments(tmp_path), task="classification", train_dataset=rows)
    with pytest.raises(ValueError, match="eval_dataset is empty"):
        FinetuningTrainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=[])


def test_without_a_task(tmp_path, tokenizer):
    """A plain Trainer, but for the rates."""
    rows = encode("classification", rows_of("classification", 20), tokenizer)
    t = FinetuningTrainer(
        convert_ffn_to_fff(dense("classification"), "2x3"),
        arguments(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=get_task("classification").collator(tokenizer),
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    t.train()
    found = t.evaluate()
    assert 0 <= found["eval_right"] <= 1 and found["eval_loss"] > 0


@pytest.mark.parametrize("task", HEAD)
def test_padding_leaves_the_loss_as_it_is(tmp_path, task, tokenizer):
    t = make(tmp_path, task, tokenizer, dense(task), dropout=False, max_steps=1)
    batch = next(iter(t.get_train_dataloader()))
    longer = pad_to_multiple(batch, 64, {"labels": IGNORED})
    assert longer["input_ids"].shape[1] == 64 > batch["input_ids"].shape[1]
    model = t.model.eval()
    losses = [float(t.compute_loss(model, given).detach()) for given in (batch, longer)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    row = {
        name: value[:1, : int(batch["attention_mask"][0].sum())] if value.ndim > 1 else value[:1]
        for name, value in batch.items()
    }
    own = float(model(**row).loss.detach())  # without padding it is the head's
    assert float(t.compute_loss(model, row).detach()) == pytest.approx(own, rel=1e-5)


def test_recorded_steps_are_for_gpus(tmp_path, tokenizer):
    t = make(tmp_path, "classification", tokenizer, dense("classification"), max_steps=1, cuda_graphs=True)
    with pytest.warns(UserWarning, match="cuda_graphs=True is for GPUs: on cpu steps run as usual"):
        t.train()


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.parametrize("task", HEAD)
def test_recorded_steps_are_the_same(tmp_path, task, tokenizer):
    logs = []
    for graphs in (False, True):
        model = convert_ffn_to_fff(dense(task), "2x3", init="random", seed=0)
        options = {"max_steps": 40, "logging_steps": 1, "dropout": False, "use_cpu": False, "cuda_graphs": graphs}
        t = make(tmp_path, task, tokenizer, model, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "steps are not recorded")
            t.train()
        logs.append([row for row in t.state.log_history if "loss" in row])
    assert len(logs[0]) == 40
    for plain, recorded in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "dead_nodes_0"):
            assert plain[name] == pytest.approx(recorded[name], rel=1e-3), (plain["step"], name)
