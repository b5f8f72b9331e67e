"""Routing metrics against fff_usage and against walked paths; and that counting waits for no device."""

import oracle
import pytest
import torch
from resuming import Plain
from test_distillation import pair
from test_distillation import trainer as distillation
from tiny import HEADS, tiny_bert, tiny_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments, masking_utils

from hf_fff import convert_ffn_to_fff, fff_usage
from hf_fff.models.usage import Watch
from hf_fff.training import RoutingMetrics

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")
LAYERS = {0: "3x2", 2: "1x4"}


def classifier(config=LAYERS):
    head = HEADS["ForSequenceClassification"]
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return convert_ffn_to_fff(tiny_bert(head, **dropout), config)


def rows(count=24, seed=0):
    """With padding."""
    model = classifier("none")
    batch = tiny_inputs(model, rows=count, seed=seed)
    batch["attention_mask"] = (torch.arange(9) < (3 + torch.arange(count) % 7).unsqueeze(1)).long()
    return [{**{k: v[i] for k, v in batch.items()}, "labels": i % 2} for i in range(count)]


def train(folder, model, data=None, callbacks=(), **options):
    usual = {"max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 3, "save_strategy": "no"}
    usual |= {"learning_rate": 1e-30, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), **{**usual, **options})
    data = rows() if data is None else data
    t = Plain(model, args, train_dataset=data, eval_dataset=rows(20, seed=1), callbacks=[RoutingMetrics(), *callbacks])
    t.train()
    return t


def stacked(data):
    return {k: torch.stack([torch.as_tensor(row[k]) for row in data]) for k in data[0] if k != "labels"}


def test_several_gpus_in_one_process(tmp_path):
    """Our trainers take one of them; a bare Trainer would go on by DataParallel, whose replicas nobody can count."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    with pytest.warns(UserWarning, match="does not count under DataParallel"):
        RoutingMetrics().on_train_begin(args, None, None, model=classifier())
    assert Plain(classifier(), args, train_dataset=rows()).args.n_gpu == 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_counts_are_those_of_the_rows(tmp_path, accumulated):
    """Three steps see all rows once, with or without accumulation; nothing moves."""
    model, data = classifier(), rows()
    size = 8 // accumulated
    t = train(tmp_path, model, data, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    usage = fff_usage(model, [stacked(data)])
    logs = [row for row in t.state.log_history if "loss" in row]
    assert len(logs) == 2 and set(usage) == set(LAYERS)
    for row in logs:
        told = {name for name in row if name.startswith(("dead", "visit"))}
        assert told == {f"{name}_{i}" for name in ("dead_nodes", "visit_entropy") for i in LAYERS}
        for i, found in usage.items():
            assert row[f"dead_nodes_{i}"] == pytest.approx(found["dead"])
            assert row[f"visit_entropy_{i}"] == pytest.approx(found["entropy"])
    assert not any(name.startswith("eval") for row in t.state.log_history for name in row)


class Move(TrainerCallback):
    """Moves the trees after each step, and keeps the weights of each evaluation."""

    def __init__(self, model):
        self.model, self.kept = model, []

    def on_step_end(self, args, state, control, **_):
        generator = torch.Generator().manual_seed(state.global_step)
        with torch.no_grad():
            for i in LAYERS:
                bias = self.model.bert.encoder.layer[i].intermediate.bias_in
                bias += 0.2 * torch.randn(bias.shape, generator=generator)

    def on_evaluate(self, args, state, control, **_):
        self.kept.append({name: value.clone() for name, value in self.model.state_dict().items()})


def walked(state, batch):
    """Paths of the visible tokens in each layer, one token at a time."""
    model = classifier().eval()
    model.load_state_dict(state)
    inputs = {}
    for i in LAYERS:
        ffn = model.bert.encoder.layer[i].intermediate
        ffn.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]}))
    with torch.no_grad():
        model(**batch)
    found = {}
    for i, x in inputs.items():
        ffn, tokens = model.bert.encoder.layer[i].intermediate, x[batch["attention_mask"].bool()]
        found[i] = oracle.fff(tokens, ffn.weight_in, ffn.bias_in, ffn.weight_out, ffn.n_trees)[1]
    return found


@pytest.mark.parametrize("size", [20, 8])  # more rows in a batch than are compared, and fewer
def test_agreeing_paths(tmp_path, size):
    model = classifier()
    move = Move(model)
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": size}
    t = train(tmp_path, model, callbacks=[move], **options)
    logs = [row for row in t.state.log_history if "eval_loss" in row]
    assert len(logs) == len(move.kept) == 3 and not any("agreeing" in name for name in logs[0])
    paths = [walked(state, stacked(rows(20, seed=1)[: min(16, size)])) for state in move.kept]
    for row, before, now in zip(logs[1:], paths[:-1], paths[1:], strict=True):
        for i in LAYERS:
            want = (before[i][..., -1] == now[i][..., -1]).mean()
            assert 0 < want < 1 and row[f"eval_agreeing_paths_{i}"] == pytest.approx(want)


def test_several_evaluation_sets(tmp_path):
    """Each is compared with itself."""
    sets = {"one": rows(20, seed=1), "other": rows(20, seed=2)}
    args = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-30,
    }
    args |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    t = Plain(
        classifier(), TrainingArguments(**args), train_dataset=rows(), eval_dataset=sets, callbacks=[RoutingMetrics()]
    )
    t.train()
    told = [{k: v for k, v in row.items() if "agreeing" in k} for row in t.state.log_history if row["step"] == 2]
    assert [found for found in told if found] == [
        {f"eval_{name}_agreeing_paths_{i}": 1.0 for i in LAYERS} for name in sets
    ]


def test_they_are_metrics_as_others(tmp_path):
    """What reports logs sees them, and so does who asks for an evaluation's metrics."""
    seen = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

        def on_evaluate(self, args, state, control, metrics=None, **_):
            seen.append(dict(metrics))

    t = train(tmp_path, classifier(), callbacks=[Report()], eval_strategy="steps", eval_steps=3)
    assert sum("dead_nodes_0" in logs for logs in seen) == 2
    assert sum("eval_agreeing_paths_2" in logs for logs in seen) == 2  # logged, and given
    assert all(m.watch is None for m in t.model.modules() if hasattr(m, "watch"))
    assert not t.model.bert._forward_pre_hooks and not t.model.bert._forward_hooks


@pytest.mark.parametrize("config", ["mlp:8", "none"])
def test_nothing_without_trees(tmp_path, config):
    t = train(tmp_path, classifier(config), eval_strategy="steps", eval_steps=3)
    assert not any(name.startswith(("dead", "visit", "eval_agree")) for row in t.state.log_history for name in row)


def test_a_training_that_breaks_off_leaves_the_model_alone(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise ArithmeticError

    model = classifier()
    with pytest.raises(ArithmeticError):
        train(tmp_path, model, callbacks=[Break()])
    assert all(m.watch is None for m in model.modules() if hasattr(m, "watch"))


def test_a_distillation_logs_them(tmp_path):
    t = distillation(tmp_path, *pair(), eval_strategy="steps", eval_steps=15)
    t.train()
    logs = t.state.log_history
    assert sum({"loss", "dead_nodes_0", "visit_entropy_2"} <= set(row) for row in logs) == 6
    assert [0 < row["eval_agreeing_paths_1"] <= 1 for row in logs if "eval_agreeing_paths_1" in row] == [True]


def test_outputs_and_gradients_are_as_without():
    model, batch = classifier(), stacked(rows(8))
    found = []
    for watched in (False, True):
        watch = Watch(model) if watched else None
        model.zero_grad()
        out = model(**batch, labels=torch.arange(8) % 2)
        out.loss.backward()
        found.append([out.logits.detach(), *(p.grad.clone() for p in model.parameters())])
        if watch:
            watch.stop()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_counting_waits_for_no_device():
    """No operation among those of a watched step, but not of a bare one, gives its result to the host or has a shape that the
    host must learn."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func.name().removeprefix("aten::").split(".")[0])
            return func(*args, **(kwargs or {}))

    model, batch = classifier(), stacked(rows(8))
    sets = []
    for watched in (False, True):
        watch = Watch(model) if watched else None
        with Names() as names:
            names.seen = set()
            model(**batch, labels=torch.arange(8) % 2).loss.backward()
        sets.append(names.seen)
        if watch:
            watch.stop()
    added = sets[1] - sets[0]
    assert "scatter_add_" in added
    assert not added & {
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "unique",
        "_unique2",
        "masked_select",
        "is_nonzero",
        "equal",
    }


@pytest.mark.full
def test_compiled(tmp_path):
    logs = []
    for compiled in (False, True):
        t = train(
            tmp_path, classifier(), torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None
        )
        logs.append([{k: v for k, v in r.items() if k.startswith(("dead", "visit"))} for r in t.state.log_history])
    assert logs[0] == logs[1] and any(logs[0])


@pytest.mark.gpu
def test_on_a_gpu_no_step_waits(tmp_path, monkeypatch):
    """Of ours: transformers' own look whether an attention mask hides anything waits in every forward pass."""
    monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *args, **kwargs: False)

    class Strict(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("error" if state.global_step == 1 else "default")

        def on_substep_end(self, args, state, control, **_):
            torch.cuda.set_sync_debug_mode("default")

        on_pre_optimizer_step = on_substep_end

    t = train(tmp_path, classifier().cuda(), callbacks=[Strict()], use_cpu=False, logging_nan_inf_filter=False)
    assert any("dead_nodes_0" in row for row in t.state.log_history)
