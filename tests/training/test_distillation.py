"""Distillation: does it learn, is the loss what is said, what does it leave alone, and does it go on where it stopped?"""

import copy
import math
import os
import subprocess
import sys
import warnings
from ast import literal_eval
from pathlib import Path

import pytest
import torch
from task_rows import WORDS
from tiny import HEADS, same, tiny_bert, tiny_inputs
from transformers import TrainerCallback

from hf_fff import FFF, DistillationArguments, DistillationTrainer, convert_ffn_to_fff, optimize
from hf_fff.ops import ROWS
from hf_fff.training import TokenisedTexts, distil_texts
from hf_fff.training.data import Cropping

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def rows(count=96, tokens=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (count, tokens), generator=g)
    lengths = torch.randint(4, tokens + 1, (count,), generator=g)
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    return [{"input_ids": i * m, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


def pair(config="2x3", head="Model", **options):
    teacher = tiny_bert(HEADS[head], **options)
    return convert_ffn_to_fff(teacher, config), copy.deepcopy(teacher)


def arguments(folder, **options):
    usual = {"max_steps": 30, "per_device_train_batch_size": 16, "logging_steps": 5, "save_strategy": "no"}
    usual |= {"learning_rate": 1e-3, "fff_learning_rate": 3e-3, "disable_tqdm": True, "use_cpu": True}
    return DistillationArguments(output_dir=str(folder), **{**usual, **options})


def trainer(folder, student, teacher, data=None, **options):
    return DistillationTrainer(
        student,
        arguments(folder, **options),
        teacher=teacher,
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(41, seed=1),
    )


def texts(count=100):
    g = torch.Generator().manual_seed(0)
    return [" ".join(WORDS[i] for i in torch.randint(0, 100, (3 + n % 9,), generator=g)) for n in range(count)]


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("config", ["2x3", "mlp:8", "none", "2x3+mlp:4", {1: "2x3"}], ids=str)
def test_learns(tmp_path, config):
    t = trainer(tmp_path, *pair(config))
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"] and after["eval_hidden"] < before["eval_hidden"]
    assert before["eval_cosine"] < after["eval_cosine"] < 1
    logs = [row for row in t.state.log_history if "loss" in row]
    assert len(logs) == 6 and logs[-1]["loss"] < logs[0]["loss"]
    for row in logs:
        assert math.isclose(row["loss"], 0.5 * row["hidden"] + 10 * (1 - row["cosine"]), rel_tol=1e-4)


def oracle(student, teacher, batches, scale_rows):
    """hidden and cosine of all batches' rows as one, in float64 and row by row, without padding."""
    student, teacher = (copy.deepcopy(m).double().eval() for m in (student.base_model, teacher.base_model))

    def states(model, row):
        row = {k: v[row["attention_mask"].bool()].unsqueeze(0) for k, v in row.items()}
        with torch.no_grad():
            return [h[0] for h in model(**row, output_hidden_states=True).hidden_states[1:]]

    want = [states(teacher, row) for row in scale_rows]
    spread = [torch.cat(column).std(0, correction=0) for column in zip(*want, strict=True)]
    spread = [s.clamp_min(0.01 * float(s.sort().values[(len(s) - 1) // 2])) for s in spread]
    errors, cosines = [[] for _ in spread], []
    for row in batches:
        have, want = states(student, row), states(teacher, row)
        for total, h, w, s in zip(errors, have, want, spread, strict=True):
            total.append((h - w).div(s).square().mean(1))
        a, b = have[-1].mean(0), want[-1].mean(0)
        cosines.append(float(a @ b / a.norm() / b.norm()))
    hidden = sum(float(torch.cat(total).mean()) for total in errors) / len(errors)
    return hidden, sum(cosines) / len(cosines)


def test_the_loss_is_what_is_said(tmp_path):
    student, teacher = pair({0: "2x3", 2: "mlp:8"}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = rows()
    t = trainer(tmp_path, student, teacher, data, hidden_weight=0.7, embedding_weight=3.0)
    metrics = t.evaluate()
    hidden, cosine = oracle(student, teacher, rows(41, seed=1), data)
    assert metrics["eval_hidden"] == pytest.approx(hidden, rel=1e-4)
    assert metrics["eval_cosine"] == pytest.approx(cosine, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.7 * hidden + 3 * (1 - cosine), rel=1e-4)
    batch = {k: torch.stack([row[k] for row in data[:5]]) for k in data[0]}
    hidden, cosine = oracle(student, teacher, data[:5], data)
    loss = t.compute_loss(student.base_model, batch | {"labels": torch.zeros(5)})
    assert loss.item() == pytest.approx(0.7 * hidden + 3 * (1 - cosine), rel=1e-4)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    student, teacher = pair()
    one, other = (trainer(tmp_path, student, teacher, per_device_eval_batch_size=size).evaluate() for size in (7, 41))
    for name in ("eval_loss", "eval_cosine", "eval_hidden"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_accumulated_batches_weigh_as_one_step(tmp_path):
    logs = []
    for size, accumulated in ((16, 1), (8, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        data = [rows(tokens=6)[0]] * 32  # all alike, so that the parts weigh alike
        t = trainer(tmp_path, *pair(), data, **options, logging_steps=1)
        t.train()
        logs.append([row["loss"] for row in t.state.log_history if "loss" in row])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_groups_of_parameters(tmp_path):
    student, teacher = pair({0: "2x3", 1: "mlp:8", 2: "none"}, "ForSequenceClassification")
    names = {id(p): n for n, p in student.base_model.named_parameters()}
    for decay, count in ((0.0, 2), (0.1, 4)):
        t = trainer(tmp_path, student, teacher, weight_decay=decay)
        groups = t.create_optimizer().param_groups
        assert len(groups) == count and [g["lr"] for g in groups] == [1e-3] * (count // 2) + [3e-3] * (count // 2)
        assert {g["weight_decay"] for g in groups} == {0.0, decay}
        fff = {names[id(p)] for g in groups if g["lr"] == 3e-3 for p in g["params"]}
        want = [f"encoder.layer.{i}.intermediate.{n}" for i in (0, 1) for n in ("weight_in", "bias_in", "weight_out")]
        assert fff == {*want, *(f"encoder.layer.{i}.output.dense.bias" for i in range(3))}
        assert sum(len(g["params"]) for g in groups) == len(names)


@pytest.mark.parametrize("task", [False, True])
def test_units_are_of_trees_and_with_a_task_of_mlps(tmp_path, task):
    student, teacher = pair({0: "2x3", 1: "mlp:8", 2: "2x2+mlp:4"}, "ForSequenceClassification" if task else "Model")
    options = {"logits_weight": 1.0, "embedding_weight": 0.0} if task else {}
    t = DistillationTrainer(
        student,
        arguments(tmp_path, fff_learning_rate=None, **options),
        teacher=teacher,
        task="classification" if task else None,
        train_dataset=rows(),
    )
    t._measure_units()
    t.create_optimizer()
    names = {p: n.removeprefix("bert.") for n, p in student.named_parameters()}
    ffn = "encoder.layer.{}.intermediate{}.weight_{}"
    trees, mlps = [(0, ""), (2, ".trees")], [(1, ""), (2, ".mlp")]
    want = trees + mlps if task else trees
    assert {names[p] for p in t._units} == {ffn.format(*place, end) for place in want for end in ("in", "out")}
    rates = {names[p]: g["lr"] for g in t.optimizer.param_groups for p in g["params"]}
    assert [rates[ffn.format(*place, "in")] for place in trees] == pytest.approx([0.75e-3] * 2)
    assert [rates[ffn.format(*place, "in")] for place in mlps] == pytest.approx([2.5e-3 if task else 6e-3] * 2)
    assert t._described()["mlp_units"] is (None if task else False)


def test_steps_are_in_units_of_inputs_and_outputs(tmp_path):
    """Adam's first step is the learning rate in every direction: divided by an input's standard deviation, times an output's."""
    student, teacher = pair({0: "2x3", 1: "2x2", 2: "none"})
    with torch.no_grad():
        student.encoder.layer[0].attention.output.LayerNorm.weight[5] = 30.0  # a dimension far larger than the others
    layers = [student.encoder.layer[i].intermediate for i in (0, 1)]
    seen = [([], []) for _ in layers]
    for layer, (inputs, outputs) in zip(layers, seen, strict=True):
        layer.register_forward_pre_hook(lambda _, x, found=inputs: found.append(x[0].detach()))
        layer.register_forward_hook(lambda _, x, y, found=outputs: found.append(y.detach()))
    data = rows(32, tokens=8)
    with torch.no_grad():
        student.eval()(**{k: torch.stack([row[k] for row in data]) for k in data[0]})
    seen = [[list(found) for found in both] for both in seen]
    spreads = [[torch.cat(found).flatten(0, -2).std(0, correction=0) for found in both] for both in seen]
    before = [(layer.weight_in.clone(), layer.weight_out.clone()) for layer in layers]
    t = trainer(tmp_path, student, teacher, data, max_steps=1, warmup_steps=0, max_grad_norm=0.0)
    t.train()
    for layer, (x, y), (w_in, w_out) in zip(layers, spreads, before, strict=True):
        for now, was, unit in ((layer.weight_in, w_in, 1 / x), (layer.weight_out, w_out, y)):
            step = (now.detach() - was).abs().max(0).values
            torch.testing.assert_close(step, 3e-3 * unit, rtol=2e-3, atol=1e-6)
        assert x.max() > 20 * x.median() or layer is not layers[0]


def test_a_layer_that_gives_nothing_learns_to(tmp_path):
    student, teacher = pair()
    layer = student.encoder.layer[0].intermediate
    with torch.no_grad():
        layer.weight_out.zero_()
    trainer(tmp_path, student, teacher, max_steps=1, warmup_steps=0).train()
    assert layer.weight_out.abs().max() > 1e-4


@pytest.mark.full
def test_compiled_steps_are_the_same(tmp_path):
    losses = []
    for compiled in (False, True):
        t = trainer(tmp_path, *pair(), max_steps=3, logging_steps=1, torch_compile=compiled)
        t.train()
        losses.append([row["loss"] for row in t.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_recorded_steps_are_for_gpus(tmp_path):
    t = trainer(tmp_path, *pair(), max_steps=1, cuda_graphs=True)
    with pytest.warns(UserWarning, match="cuda_graphs=True is for GPUs: on cpu steps run as usual"):
        t.train()


def test_what_is_left_alone(tmp_path):
    student, teacher = pair("2x3", "ForSequenceClassification", num_labels=3)
    student.bert.embeddings.LayerNorm.bias.requires_grad_(False)
    before, dense = weights(student), weights(teacher)
    rates = [m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)]
    assert any(rates)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen["rates"] = {m.p for m in student.bert.modules() if isinstance(m, torch.nn.Dropout)}
            seen["frozen"] = {n for n, p in student.named_parameters() if not p.requires_grad}

    t = trainer(tmp_path, student, teacher, max_steps=3)
    t.add_callback(Look())
    t.train()
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert seen == {"rates": {0.0}, "frozen": {"bert.embeddings.LayerNorm.bias", *pooler}}
    assert same(weights(teacher), dense)
    moved = {n for n, v in weights(student).items() if not torch.equal(v, before[n])}
    assert set(before) - moved == {"bert.embeddings.LayerNorm.bias", *pooler, "classifier.weight", "classifier.bias"}
    assert [m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)] == rates
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["bert.embeddings.LayerNorm.bias"]
    t.save_model(tmp_path / "saved")
    saved = type(student).from_pretrained(tmp_path / "saved")
    assert same(weights(saved), weights(student))


def test_models_that_do_not_fit(tmp_path):
    teacher = tiny_bert()
    student = convert_ffn_to_fff(teacher, "2x3")
    with pytest.raises(ValueError, match="share parameters.*copy.deepcopy"):
        trainer(tmp_path, student, teacher)
    for field, value in (("hidden_size", 64), ("num_hidden_layers", 2), ("vocab_size", 121)):
        has = getattr(student.config, field)
        with pytest.raises(ValueError, match=f"{field} differs: {has} in the student, {value} in the teacher"):
            trainer(tmp_path, student, tiny_bert(**{field: value}))


def test_data_that_is_too_little(tmp_path, tokenizer):
    student, teacher = pair()
    with pytest.raises(ValueError, match="train_dataset is empty"):
        trainer(tmp_path, student, teacher, [])
    with pytest.raises(ValueError, match="train_dataset has 15 rows, fewer than one batch, which has 16"):
        trainer(tmp_path, student, teacher, rows(15))
    for few, message in (([" "], "no text"), (texts(16), "has 15 rows, fewer than one batch, which has 16")):
        with pytest.raises(ValueError, match=message):
            distil_texts(student, teacher, few, tokenizer, arguments(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_weight", -1),
        ("embedding_weight", float("nan")),
        ("learning_rate", 0),
        ("fff_learning_rate", -1.0),
        ("crop", -0.1),
        ("crop", 1.5),
        ("crop", float("nan")),
    ],
)
def test_arguments_out_of_range(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        arguments(tmp_path, **{field: value})
    with pytest.raises(ValueError, match="all 0"):
        arguments(tmp_path, hidden_weight=0, embedding_weight=0)
    with pytest.raises(ValueError, match=r"crop=0\.5 is for distillation without a task"):
        arguments(tmp_path, crop=0.5, logits_weight=1)
    with pytest.raises(ValueError, match="cuda_graphs=True needs gradient_accumulation_steps=1 and one process, not"):
        arguments(tmp_path, cuda_graphs=True, gradient_accumulation_steps=2)


@pytest.mark.parametrize("logging_steps", [1, 3, 1000])
def test_stops_where_the_loss_is_not_finite(tmp_path, logging_steps):
    student, teacher = pair()

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    student.encoder.layer[1].output.dense.bias.fill_(float("inf"))

    options = {"logging_steps": logging_steps, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    t = trainer(tmp_path, student, teacher, **options)
    t.add_callback(Break())
    with pytest.raises(FloatingPointError, match="not finite at step 5: layer 1 is the first whose hidden state"):
        t.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    student, teacher = pair()

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                student.encoder.layer[1].output.dense.bias.fill_(float("inf"))

    t = trainer(tmp_path, student, teacher, save_strategy="steps", save_steps=1)
    t.add_callback(Break())
    with pytest.raises(FloatingPointError, match="after step 1 the weights encoder.layer.1.output.dense.bias"):
        t.train()
    assert not list(tmp_path.glob("checkpoint-*"))


class Interrupt(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [4, 8])  # in the first epoch, which has 6 steps, and in the second
@pytest.mark.parametrize("kind", ["rows", "texts", "cropped"])
def test_resumed_as_if_not_interrupted(tmp_path, tokenizer, stop, kind):
    options = {"max_steps": 14, "save_strategy": "steps", "save_steps": stop, "crop": 0.5 * (kind == "cropped")}

    def run(resume=None, interrupt=False):
        student, teacher = pair()
        data = rows() if kind == "rows" else TokenisedTexts(texts(96), tokenizer, 16)
        t = DistillationTrainer(
            student,
            arguments(tmp_path, **options),
            teacher=teacher,
            train_dataset=data,
            processing_class=tokenizer,
        )
        if interrupt:
            t.add_callback(Interrupt())
            with pytest.raises(KeyboardInterrupt):
                t.train()
        else:
            t.train(resume_from_checkpoint=resume)
        return weights(student)

    stopped = run(interrupt=True)
    resumed = run(resume=str(tmp_path / f"checkpoint-{stop}"))
    whole = run()
    assert same(resumed, whole) and not same(stopped, whole)


def test_another_crop_is_another_training(tmp_path, tokenizer):
    def trained(crop, resume=None):
        t = DistillationTrainer(
            (given := pair())[0],
            arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, crop=crop),
            teacher=given[1],
            train_dataset=TokenisedTexts(texts(96), tokenizer, 16),
            processing_class=tokenizer,
        )
        t.train(resume_from_checkpoint=resume)
        return weights(given[0])

    cropped, whole = trained(1.0), trained(0.0)
    assert not same(cropped, whole)
    with pytest.raises(ValueError, match=r"crop is 0\.0 there, 0\.5 now"):
        trained(0.5, resume=str(tmp_path / "checkpoint-2"))


def test_cropped_batches(tokenizer):
    """Runs of a row's tokens between its first and its last one, as long in all rows of a batch, other ones each time."""
    data = [{"input_ids": [101, *range(n), 102], "attention_mask": [1] * (n + 2)} for n in (30, 25, 38, 2)]
    collate, seen = Cropping(lambda rows: rows, 1.0), set()
    torch.manual_seed(0)
    for _ in range(300):
        batch = collate(data)
        lengths = [len(row["input_ids"]) for row in batch]
        assert 10 <= max(lengths) <= 40 and lengths == [min(n, max(lengths)) for n in (32, 27, 40, 4)]
        for row, whole in zip(batch, data, strict=True):
            ids = row["input_ids"]
            assert ids[0] == 101 and ids[-1] == 102 and row["attention_mask"] == [1] * len(ids)
            assert ids[1:-1] == list(range(ids[1], ids[1] + len(ids) - 2)) and ids[-2] in whole["input_ids"]
        seen.add((max(lengths), batch[2]["input_ids"][1]))
    assert {length for length, _ in seen} == set(range(10, 41))  # of all lengths
    assert len({start for _, start in seen}) > 25  # of 31 places to begin
    assert data[0]["input_ids"] == [101, *range(30), 102]  # rows stay as they are
    changed = [Cropping(lambda rows: rows, 0.25)(data) != data for _ in range(1000)]
    assert 180 < sum(changed) < 300


def test_texts_are_cut_and_not_padded(tokenizer):
    written = texts(2000)
    data = TokenisedTexts(written, tokenizer, 10)
    assert len(data) == 2000 and {len(data[i]["input_ids"]) for i in range(2000)} == set(range(5, 11))
    for i in (0, 1, 1023, 1024, 1999):
        assert data[i] == dict(tokenizer(written[i], truncation=True, max_length=10))


def test_from_texts(tmp_path, tokenizer):
    teacher = tiny_bert(HEADS["ForSequenceClassification"])
    student, dense = convert_ffn_to_fff(teacher, "2x3"), weights(teacher)
    done = distil_texts(student, teacher, texts(), tokenizer, arguments(tmp_path), held_out=0.1, max_length=500)
    report = done.distillation_report
    assert done is student and not student.training and same(weights(teacher), dense)
    assert (report.rows, report.held_out, report.steps) == (90, 10, 30)
    assert report.cosine_before < report.cosine < 1 and not report.undone
    assert "forward" not in vars(student.bert)
    with torch.no_grad():
        student(**tiny_inputs(student))


def test_a_training_that_makes_it_worse_is_undone(tmp_path, tokenizer):
    teacher = tiny_bert()
    student = convert_ffn_to_fff(teacher, "mlp:64")  # as good as the teacher
    before = weights(student)
    with pytest.warns(
        UserWarning, match=r"2 steps made the cosine on held-out rows worse \(1\.0000 before, .* are undone"
    ):
        distil_texts(student, teacher, texts(), tokenizer, arguments(tmp_path, max_steps=2, learning_rate=1.0))
    report = student.distillation_report
    assert report.undone and report.cosine == report.cosine_before and same(weights(student), before)


def test_a_tied_head_stays_tied(tmp_path, tokenizer):
    teacher = tiny_bert(HEADS["ForMaskedLM"])
    student, dense = convert_ffn_to_fff(teacher, "2x3"), weights(teacher)
    distil_texts(student, teacher, texts(), tokenizer, arguments(tmp_path, max_steps=2))
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert same(weights(teacher), dense)
    assert not torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)


TWO_PROCESSES = """
import sys
sys.path[:0] = [{folder!r}, {tests!r}]
from test_distillation import *
t = trainer({out!r}, *pair("2x3", "ForSequenceClassification"), max_steps=4)
before = t.evaluate()
t.train()
after = t.evaluate()
total = sum(float(p.detach().double().abs().sum()) for p in t.student.parameters())
text = repr((t.args.world_size, total, before["eval_loss"], after["eval_loss"]))
open({out!r} + f"/{{t.args.process_index}}", "w").write(text)
torch.distributed.destroy_process_group()
os._exit(0)  # torch's threads abort about one process in ten where the interpreter takes itself down
"""


@pytest.mark.full
def test_two_processes_train_one_model(tmp_path):
    """An evaluation comes first, after which accelerate would leave each process to itself."""
    here = Path(__file__).parent
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES.format(folder=str(here), tests=str(here.parent), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first, second = (literal_eval((tmp_path / name).read_text()) for name in "01")
    assert first == second and first[0] == 2 and first[3] < first[2]
    alone = trainer(tmp_path, *pair("2x3", "ForSequenceClassification")).evaluate()
    assert alone["eval_loss"] == pytest.approx(first[2])


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16(tmp_path):
    student, teacher = pair()
    t = trainer(tmp_path, student, teacher, use_cpu=False, bf16=True)
    before = t.evaluate()
    t.train()
    assert t.evaluate()["eval_cosine"] > before["eval_cosine"]


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["2x3", "mlp:8", "none"])
@pytest.mark.parametrize("bf16", [False, True])
def test_recorded_steps_are_the_same(tmp_path, tokenizer, config, bf16):
    """On rows of many lengths, with the last batch of an epoch smaller than the others."""
    logs = []
    for graphs in (False, True):
        student, teacher = pair(config)
        t = DistillationTrainer(
            student,
            arguments(tmp_path, use_cpu=False, bf16=bf16, max_steps=40, logging_steps=1, cuda_graphs=graphs),
            teacher=teacher,
            train_dataset=TokenisedTexts(texts(90), tokenizer, 16),
            processing_class=tokenizer,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "training steps are not recorded")
            t.train()
        logs.append([row for row in t.state.log_history if "cosine" in row])
    names = ("loss", "hidden", "cosine", "grad_norm", *(n for n in logs[0][0] if n.startswith("visit_entropy")))
    if bf16:  # ties go either way in trees, and after some steps single ones differ
        logs = [[{name: sum(row[name] for row in log) / len(log) for name in ("step", *names)}] for log in logs]
    for plain, recorded in zip(*logs, strict=True):
        for name in names:
            assert plain[name] == pytest.approx(recorded[name], rel=0.1 if bf16 else 1e-3), (plain["step"], name)


def test_in_bfloat16(tmp_path):
    t = trainer(tmp_path, *pair(), bf16=True)
    before = t.evaluate()
    t.train()
    assert t.evaluate()["eval_cosine"] > before["eval_cosine"]


@pytest.mark.parametrize("rows", ROWS)
def test_trained_for_packed_rows(tmp_path, rows):
    """All of the training and its evaluations see rounded rows; the student is as it was afterwards, but for its weights."""
    student, teacher = pair("4x4")
    t = trainer(tmp_path, student, teacher, packed_rows=rows, max_steps=60)
    layers = [m for m in student.modules() if isinstance(m, FFF)]
    seen = []
    handle = layers[0].register_forward_hook(lambda layer, *_: seen.append((layer.training, layer.rows)))
    before = t.evaluate()
    packed = trainer(tmp_path, optimize(student, rows), teacher).evaluate()
    for name in ("eval_loss", "eval_cosine", "eval_hidden"):
        assert before[name] == pytest.approx(packed[name], rel=1e-3)
    t.train()
    assert {rows} == {found for learning, found in seen if learning} and all(m.rows is None for m in layers)
    handle.remove()
    after = t.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    packed = trainer(tmp_path, optimize(student, rows), teacher).evaluate()
    assert after["eval_cosine"] == pytest.approx(packed["eval_cosine"], rel=1e-3)


def test_packed_rows_are_of_trees(tmp_path):
    with pytest.raises(ValueError, match="rows='int8' is of trees, and there are none in this FastBertModel"):
        trainer(tmp_path, *pair("mlp:8"), packed_rows="int8")
    with pytest.raises(ValueError, match=r"packed_rows='int4' is not known \(allowed: int8, bf16, None\)"):
        arguments(tmp_path, packed_rows="int4")
