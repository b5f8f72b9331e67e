"""Arguments from words: each of its own type, none unknown; the presets as the paper has them."""

import pytest
import yaml

from hf_fff.training import FinetuningArguments, finetuning_arguments, parse_settings, preset, read_settings

PAPER = {
    "crammed-finetune": {
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "learning_rate": 4e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.0,
        "dropout": True,
    },
    "crammed-pretrain": {
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-12,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "dropout": False,
        "mlm_probability": 0.25,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_presets(tmp_path, name):
    args = finetuning_arguments(preset(name), evaluates=False, output_dir=str(tmp_path), use_cpu=True)
    assert {field: getattr(args, field) for field in PAPER[name]} == PAPER[name]
    usual = FinetuningArguments(output_dir=str(tmp_path), use_cpu=True).to_dict()
    changed = {field for field, value in args.to_dict().items() if value != usual[field]}
    assert changed <= {*PAPER[name], "save_strategy", "save_total_limit", "logging_steps"}
    assert args.get_warmup_steps(1000) == (100 if name == "crammed-finetune" else 0)


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("learning_rate=3e-4", 3e-4),
        ("num_train_epochs=2", 2.0),
        ("max_steps=10", 10),
        ("bf16=false", False),
        ("dropout=no", False),
        ("tf32=none", None),
        ("routing_gradient=0", 0.0),
        ("lr_scheduler_type=linear", "linear"),
        ("report_to=none", "none"),
        ('report_to=["tensorboard"]', ["tensorboard"]),
        ('lr_scheduler_kwargs={"num_cycles": 2}', {"num_cycles": 2}),
        ("run_name=a=b", "a=b"),
        ("packed_rows=int8", "int8"),
        ("packed_rows=none", None),
        ("train_sampling_strategy=sequential", "sequential"),
    ],
)
def test_each_has_its_type(pair, value):
    (found,) = parse_settings([pair]).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("pair", "told"),
    [
        ("learning_rat=1", "there is no argument 'learning_rat' (did you mean learning_rate"),
        ("warmup_ratio=0.1", "there is no argument 'warmup_ratio'"),
        ("xyzzy=1", "see transformers.TrainingArguments"),
        ("learning_rate", "'learning_rate' is not of the form name=value"),
        ("learning_rate=fast", "learning_rate='fast' is not allowed (allowed: a number)"),
        ("learning_rate=nan", "learning_rate='nan' is not allowed"),
        ("max_steps=1.5", "max_steps='1.5' is not allowed (allowed: a whole number)"),
        ("bf16=perhaps", "bf16='perhaps' is not allowed (allowed: true or false)"),
        ("eval_strategy=sometimes", "(allowed: no, steps, epoch"),
        ("train_sampling_strategy=wild", "random, sequential"),
        ("lr_scheduler_kwargs={", "is no JSON"),
        ("output_dir=x", "output_dir is set by OUT"),
        ("metric_for_best_model=f1", "metric_for_best_model is set by --best"),
        ("__class__=x", "there is no argument"),
    ],
)
def test_words_that_mean_nothing(pair, told):
    with pytest.raises(ValueError) as error:
        parse_settings([pair])
    assert told in str(error.value)


def test_a_yaml_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 1e-4\nbf16: false\nmax_steps: 7\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    assert isinstance(yaml.safe_load(path.read_text())["learning_rate"], str)  # which is a trap of YAML
    wanted = {"learning_rate": 1e-4, "bf16": False, "max_steps": 7, "lr_scheduler_kwargs": {"num_cycles": 2}}
    assert read_settings(path) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n", "must hold a mapping"),
        ("{", "is no YAML file"),
        ("bf17: true\n", "did you mean"),
        ("max_steps: [1]\n", "max_steps=[1]"),
    ],
)
def test_no_yaml_file_of_arguments(tmp_path, text, told):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_settings(path)
    assert told in str(error.value)


def test_when_to_evaluate_and_save(tmp_path):
    def made(settings, **options):
        args = finetuning_arguments(settings, output_dir=str(tmp_path), use_cpu=True, **options)
        names = (
            "eval_strategy",
            "save_strategy",
            "eval_steps",
            "save_steps",
            "load_best_model_at_end",
            "greater_is_better",
        )
        return [getattr(args, name) for name in names]

    assert made({}, evaluates=False)[:2] == ["no", "epoch"]
    assert made({}, evaluates=True)[:2] == ["epoch", "epoch"]
    assert made({"max_steps": 9, "save_steps": 3}, evaluates=True)[:4] == ["steps", "steps", 3, 3]
    assert made({"max_steps": 9, "eval_steps": 4}, evaluates=True, best="f1") == ["steps", "steps", 4, 4, True, True]
    assert made({}, evaluates=True, best="mse", patience=2)[-1] is False
    for options, told in (({"best": "f1"}, "--best"), ({"patience": 2}, "--patience")):
        with pytest.raises(ValueError, match=f"{told} needs something to evaluate on"):
            made({}, evaluates=False, **options)
    with pytest.raises(ValueError, match="eval_strategy='steps' needs something"):
        made({"eval_strategy": "steps"}, evaluates=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [("routing_gradient", -1.0), ("mlm_probability", 0.0), ("fff_learning_rate", 0.0), ("learning_rate", -1.0)],
)
def test_values_out_of_range(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, **{field: value})


def test_no_such_preset():
    with pytest.raises(ValueError, match="preset='crammed' is not known \\(allowed: crammed-finetune"):
        preset("crammed")
