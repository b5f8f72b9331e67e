"""The search: what it tries, in which order, what it takes, and that it goes on where it stopped."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from command import listing
from task_rows import rows_of
from tiny import same, tiny_model
from transformers import AutoModelForSequenceClassification

from hf_fff.bench.model import Timing
from hf_fff.choosing import Plan, prepare, search
from hf_fff.surgery.folder import ModelFolder
from hf_fff.training import arguments_for

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


# What 2x2 and 2x3 cost in each layer alone: most is gained in layer 1, then in 2, while either costs most in layer 0, least in 1.
COSTS = {"2x2": {0: 0.9, 1: 0.7, 2: 0.8}, "2x3": {0: 0.8, 1: 0.2, 2: 0.5}}


def kinds(trained):
    return [kind for kind, *_ in trained]


def notes(choice):
    return {r.name: r.note for r in choice.results}


def model_in(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_fastest_that_keeps_enough_is_taken(lab):
    choice = lab.run(0.85, mixed=False)
    assert choice.chosen.name == "2x2" and choice.chosen.share == pytest.approx(0.9) and choice.chosen.relative == 0.7
    # from the fastest on, and no further than needed; all of them timed before
    assert kinds(lab.trained) == ["none", "mlp:4", "2x2"]
    assert lab.timed[0] == ["dense", "none", "mlp:4", "2x2", "2x3", "8x4"]
    assert notes(choice) == {
        "none": "keeps too little",
        "mlp:4": "keeps too little",
        "2x2": "chosen",
        "2x3": "not trained: slower than what is chosen",
        "8x4": "slower than the dense model: skipped",
    }
    assert choice.metric == "accuracy" and choice.rows == 12 and choice.dense["score"] == 0.8
    assert {c.shorthand for c in model_in(lab.output).config.fff_layers.values()} == {"2x2"}
    assert (lab.output / "tokenizer.json").is_file() and not lab.work.exists()


@pytest.fixture
def engine(lab, monkeypatch):
    """An engine in which models only look different: (kinds that were put there)."""
    put = []

    def inside(model, inputs, tokenizer, max_length):
        assert len(inputs) and max_length == 64 and next(model.parameters()).device.type == "cpu"
        put.append(lab.kind_of(model))
        return SimpleNamespace(config=model.config, inside=True)

    monkeypatch.setattr(search.engine, "inside", inside)
    return put


def test_inside_an_engine(lab, engine, monkeypatch):
    """Times are those of the engine, quality is torch's, and for what is chosen the engine's too."""
    fake, measured, trusting = search.time_models, [], search.HeldOut.measure

    def time_models(models, workloads, **options):
        assert all(m.inside for m in models.values())
        return fake(models, workloads, **options)

    def measure(self, model, dense):
        measured.append((lab.kind_of(model), hasattr(model, "inside")))
        return trusting(self, model, dense)

    monkeypatch.setattr(search, "time_models", time_models)
    monkeypatch.setattr(search.HeldOut, "measure", measure)
    choice = lab.run(0.85, mixed=False, engine="openvino")
    assert choice.chosen.name == "2x2" and choice.chosen.in_engine == pytest.approx(0.9)
    assert [m for m in measured if m[1]] == [("2x2", True)] and ("2x2", False) in measured
    assert engine.count("dense") == 1 and [r.in_engine for r in choice.results if r.name != "2x2"] == [None] * 4


def test_what_an_engine_loses_is_told(lab, engine, monkeypatch):
    trusting = search.HeldOut.measure

    def measure(self, model, dense):
        found = trusting(self, model, dense)
        return search.Quality(found.value * 0.9, ()) if hasattr(model, "inside") else found

    monkeypatch.setattr(search.HeldOut, "measure", measure)
    with pytest.warns(
        UserWarning, match=r"2x2 keeps 90.0% in torch, and 81.0% inside openvino in int8, less than the 85.0%"
    ):
        lab.run(0.85, mixed=False, engine="openvino")


def test_another_engine_is_another_search(lab, engine):
    lab.run(0.995, "2x2")
    with pytest.raises(ValueError, match="engine: 'torch' there, 'openvino' now"):
        lab.run(0.995, "2x2", engine="openvino")
    state = lab.work / "search.json"
    told = json.loads(state.read_text())
    del told["options"]["engine"]  # of before there was another
    state.write_text(json.dumps(told))
    lab.trained.clear()
    assert lab.run(0.9, "2x2", mixed=False).chosen.name == "2x2" and lab.trained == []


def test_an_interrupted_measurement_inside_goes_on(lab, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(search._Search, "_measure_inside", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lab.run(0.85, mixed=False, engine="openvino")
    lab.trained.clear()
    assert lab.run(0.85, mixed=False, engine="openvino").chosen.in_engine == pytest.approx(0.9) and lab.trained == []


def test_order_is_by_time_not_as_given(lab):
    lab.time = {"none": 0.9, "2x2": 0.4, "mlp:4": 0.5}
    assert lab.run(0.85, "none,mlp:4,2x2,mlp:4").chosen.name == "2x2"
    assert kinds(lab.trained) == ["2x2"]


def test_all_are_tried_if_asked(lab):
    lab.share["mlp:4"] = 0.95
    choice = lab.run(0.85, every=True, mixed=False)
    assert kinds(lab.trained) == ["none", "mlp:4", "2x2", "2x3"] and choice.chosen.name == "mlp:4"
    # 2x2 is slower than mlp:4 and keeps less
    assert [r.name for r in choice.frontier] == ["none", "mlp:4", "2x3"]
    assert notes(choice)["2x3"] == ""


def test_times_count_as_they_are_after_training(lab, monkeypatch):
    """2x2 turns out slower than the dense model when it is trained."""
    fake = search.time_models

    def time_models(models, workloads, **options):
        if len(models) == 2 and "2x2" in models:
            lab.time["2x2"] = 1.2
        return fake(models, workloads, **options)

    monkeypatch.setattr(search, "time_models", time_models)
    choice = lab.run(0.85, mixed=False)
    assert choice.chosen.name == "2x3" and notes(choice)["2x2"] == "slower than the dense model"


def test_batch_sizes_count_alike(lab, monkeypatch):
    """The geometric mean of 1/2 and 8 is 2, of 1/8 and 2 is 1/2."""
    ratios = {"none": {"1": 0.5, "32": 8.0}, "2x2": {"1": 0.125, "32": 2.0}}

    def time_models(models, workloads, **_):
        return [
            Timing(w.name, 10, {name: 3.0 * ratios.get(name, {}).get(w.name, 1.0) for name in models})
            for w in workloads
        ]

    monkeypatch.setattr(search, "time_models", time_models)
    choice = lab.run(0.85, "none,2x2", mixed=False)
    assert [(r.name, r.relative) for r in choice.results] == [("2x2", pytest.approx(0.5)), ("none", pytest.approx(2.0))]
    assert choice.results[0].microseconds == {"1": pytest.approx(3e5 / 8), "32": pytest.approx(6e5)}
    assert choice.dense["microseconds"] == {"1": pytest.approx(3e5), "32": pytest.approx(3e5)}


def test_nothing_keeps_enough(lab):
    """What was trained stays, for one who asks for less."""
    choice = lab.run(0.995)
    assert choice.chosen is None and choice.best.name == "2x3" and choice.best.share == pytest.approx(0.99)
    assert not lab.output.exists() and choice.work == lab.work
    trained = model_in(lab.work / "models" / "2x3-7").state_dict()
    lab.trained.clear()
    choice = lab.run(0.985, mixed=False)
    assert choice.chosen.name == "2x3" and choice.work is None and lab.trained == [] and not lab.work.exists()
    assert same(model_in(lab.output).state_dict(), trained)


def test_nothing_is_faster(lab):
    choice = lab.run(0.1, "8x4")
    assert choice.chosen is None and choice.best is None and lab.trained == [] and not lab.output.exists()
    assert choice.work is None and not lab.work.exists()  # nothing is in it


def test_what_is_slower_once_trained_is_not_the_best(lab, monkeypatch):
    fake = search.time_models

    def time_models(models, workloads, **options):
        if len(models) == 2 and "2x3" in models:
            lab.time["2x3"] = 1.2
        return fake(models, workloads, **options)

    monkeypatch.setattr(search, "time_models", time_models)
    assert lab.run(0.995, "2x2,2x3").best.name == "2x2"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass in trainings alone, 200 in each; a step takes half of one."""
    seconds = [0.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(search._Search, "_step_seconds", lambda self, model: 0.5)
    monkeypatch.setattr(search, "distil_folder", _taking(search.distil_folder, seconds, 200.0))
    return seconds


def test_a_higher_budget_trains_further(lab, clock):
    """Two candidates, no mixed ones: a half of the 1000 s each, then a half of what the 2000 s leave."""
    lab.run(0.95, "none,2x2", budget=1000.0, mixed=False)
    assert [t[1:] for t in lab.trained] == [(600, None, 125.0), (960, None, 200.0)] and lab.started == [None, None]
    lab.trained.clear(), lab.started.clear()
    assert lab.run(0.95, "none,2x2", budget=1000.0, mixed=False).chosen is None and lab.trained == []
    lab.share["none"] = 0.7
    choice = lab.run(0.95, "none,2x2", budget=2000.0, mixed=False)
    # 1600 s are left, 800 for each, and 85 % of them for steps: a calibration has been
    assert [t[:2] for t in lab.trained] == [("none", 1360), ("2x2", 2380)] and lab.started == ["none-600", "2x2-960"]
    found = {r.name: r for r in choice.results}
    assert found["none"].share == pytest.approx(0.7) and found["none"].steps == 1960
    assert sorted(p.name for p in (lab.work / "models").iterdir()) == ["2x2-3340", "none-1960"]


def test_what_keeps_enough_is_not_trained_further(lab, clock):
    lab.run(0.95, "none,2x2", budget=1000.0, mixed=False)
    lab.trained.clear()
    assert lab.run(0.5, "none,2x2", budget=2000.0, mixed=False).chosen.name == "none" and lab.trained == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_further_training_goes_on(lab, clock, when):
    lab.run(0.95, "2x2", budget=1000.0, mixed=False)
    lab.fail_at = ("2x2", when)
    with pytest.raises(RuntimeError, match="the power is gone"):
        lab.run(0.95, "2x2", budget=2000.0, mixed=False)
    lab.fail_at = None
    asked = lab.trained[-1]
    lab.trained.clear()
    lab.share["2x2"] = 0.96
    choice = lab.run(0.95, "2x2", budget=2000.0, mixed=False)
    assert choice.chosen.name == "2x2" and lab.trained == ([asked] if when == "before" else [])


def test_a_further_training_that_goes_wrong_leaves_what_was(lab, clock, monkeypatch):
    lab.run(0.95, "2x2", budget=1000.0, mixed=False)

    def diverging(*_, **__):
        raise FloatingPointError("the loss is not finite at step 3")

    with monkeypatch.context() as patch:
        patch.setattr(search, "distil_folder", diverging)
        (result,) = lab.run(0.95, "2x2", budget=2000.0, mixed=False).results
    assert result.share == pytest.approx(0.9) and result.steps == 1200 and not result.failed
    assert lab.run(0.9, "2x2", budget=2000.0, mixed=False).chosen.name == "2x2"


def test_candidates_may_be_added_and_left_out(lab):
    lab.run(0.995, "none,2x2")
    lab.trained.clear()
    assert [r.name for r in lab.run(0.995, "none,2x2,2x3,8x4", mixed=False).results] == ["none", "2x2", "2x3", "8x4"]
    assert kinds(lab.trained) == ["2x3"] and ["dense", "2x3", "8x4"] in lab.timed
    choice = lab.run(0.5, "2x2,2x3", mixed=False)  # "none" would be faster
    assert choice.chosen.name == "2x2" and [r.name for r in choice.results] == ["2x2", "2x3"]


def test_a_busy_machine_is_told_once(lab, monkeypatch):
    monkeypatch.setattr(search, "busy", lambda: "the machine is busy")
    with pytest.warns(UserWarning, match="the machine is busy") as told:
        lab.run(0.85, mixed=False)
    assert len(lab.timed) > 2 and len([w for w in told if "busy" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("load", "threads", "told"), [(8.1, 8, False), (12.1, 8, True), (9.1, 2, True), (8.9, 2, False)]
)
def test_how_busy_a_machine_of_eight_cpus_may_be(monkeypatch, load, threads, told):
    monkeypatch.setattr(search.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(search.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(search.torch, "get_num_threads", lambda: threads)
    assert (f"load average is {load}, on 8 CPUs of which {threads}" in (search.busy() or "")) == told


def test_where_no_load_is_known(monkeypatch):
    monkeypatch.delattr(search.os, "getloadavg", raising=False)
    assert search.busy() is None


def test_steps_are_as_given(lab):
    lab.run(0.99, steps=11)
    assert {tuple(t[1:]) for t in lab.trained} == {(11, 11, None)}
    lab.trained.clear()
    lab.output.rename(lab.output.with_name("other"))
    lab.run(0.99, steps=11, calibration_steps=3)
    assert {tuple(t[1:]) for t in lab.trained} == {(11, 3, None)}


def test_a_budget_is_divided(lab, clock):
    """Three candidates and two mixed ones get a fifth each of 1000 s, 60 % of it for steps."""
    choice = lab.run(0.995, "none,mlp:4,2x2", budget=1000.0)
    assert [t[1:] for t in lab.trained] == [(240, None, 50.0)] * 3
    assert {r.steps for r in choice.results} == {240}


def test_a_small_budget_gives_fifty_steps(lab):
    lab.run(0.9, "none,2x2", budget=0.001)
    assert [t[1:] for t in lab.trained] == [(50, None, 1.0)] * 2


def _taking(distil, clock, seconds):
    def slow(*args, **options):
        clock[0] += seconds
        return distil(*args, **options)

    return slow


def test_mixed_takes_the_slower_kind_where_it_is_needed(lab):
    """Layer 1 gains most, then 2. Two of three layers keep enough, one does not."""
    lab.costs = COSTS
    lab.time |= {"2x2/2x3/2x3": 0.77, "2x2/2x3/2x2": 0.73}
    lab.share |= {"2x2/2x3/2x3": 0.98, "2x2/2x3/2x2": 0.95}
    choice = lab.run(0.97)
    assert kinds(lab.trained) == ["none", "mlp:4", "2x2", "2x3", "2x2/2x3/2x3", "2x2/2x3/2x2"]
    assert choice.chosen.name == "2x3 in 1,2, else 2x2"
    assert choice.chosen.layers == {"0": "2x2", "1": "2x3", "2": "2x3"}
    assert notes(choice)["2x3 in 1, else 2x2"] == "keeps too little"
    assert [c.shorthand for c in model_in(lab.output).config.fff_layers.values()] == ["2x2", "2x3", "2x3"]


def test_mixed_goes_on_to_fewer_layers_where_that_is_enough(lab):
    lab.costs = COSTS
    lab.time |= {"2x2/2x3/2x3": 0.77, "2x2/2x3/2x2": 0.73}
    lab.share |= {"2x2/2x3/2x3": 0.98, "2x2/2x3/2x2": 0.975}
    assert lab.run(0.97).chosen.name == "2x3 in 1, else 2x2"


def test_mixed_is_not_trained_where_it_is_no_faster(lab):
    lab.costs = COSTS
    lab.time["2x2/2x3/2x3"] = 0.81
    choice = lab.run(0.97)
    assert choice.chosen.name == "2x3" and kinds(lab.trained)[-1] == "2x3"
    assert notes(choice)["2x3 in 1,2, else 2x2"] == "not trained: slower than what is chosen"


def test_nothing_is_mixed_where_all_layers_share_an_ffn(lab, tokenizer):
    model = tiny_model("albert", "ForSequenceClassification", num_labels=3)
    model.save_pretrained(lab.source.root)
    lab.source = ModelFolder.find(str(lab.source.root))
    assert lab.run(0.97).chosen.name == "2x3" and kinds(lab.trained)[-1] == "2x3"


def test_what_a_kind_costs_in_each_layer(lab, monkeypatch):
    """Of a layer whose FFN gives the same for all tokens, no FFN costs nothing; of one that gives much it costs more than of one that gives
    little. The dense model stays as it is."""
    monkeypatch.undo()
    dense = lab.source.load_dense()
    with torch.no_grad():
        for layer, factor in zip(dense.base_model.encoder.layer, (0.01, 3.0, 0.3), strict=True):
            layer.output.dense.weight.mul_(factor)
    dense.save_pretrained(lab.source.root)
    arguments = partial(arguments_for, "classification", use_cpu=True)
    data = prepare("classification", rows_of("classification", 200))
    plan = Plan(keep=0.9, candidates=("none",), steps=100)
    looked = search._Search(
        lab.source, lab.work, data, plan, lambda folder, _: arguments(output_dir=str(folder)), None, True, print
    )
    before = {name: value.clone() for name, value in looked.dense.state_dict().items()}
    nothing, much, little = looked._distances("none", [[0], [1], [2]])
    assert nothing < 1e-3 < little < much / 2
    assert same(before, looked.dense.state_dict())


def test_no_mixed_where_the_fastest_is_enough(lab):
    assert lab.run(0.5).chosen.name == "none" and kinds(lab.trained) == ["none"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["mlp:4", "2x2/2x3/2x3"])
def test_an_interrupted_search_goes_on(lab, at, when):
    lab.costs = COSTS
    lab.time |= {"2x2/2x3/2x3": 0.77, "2x2/2x3/2x2": 0.73}
    lab.share |= {"2x2/2x3/2x3": 0.98, "2x2/2x3/2x2": 0.95}
    whole = kinds(lab.run(0.97) and lab.trained)
    chosen = listing(lab.output)
    lab.output.rename(lab.output.with_name("whole"))
    lab.trained.clear()
    lab.fail_at = (at, when)
    with pytest.raises(RuntimeError, match="the power is gone"):
        lab.run(0.97)
    assert not lab.output.exists() and kinds(lab.trained) == whole[: whole.index(at) + 1]
    kept = listing(lab.work)
    for options, message in (({"steps": 8}, "steps: 7 there, 8 now"), ({"rows": 61}, "train: ")):
        with pytest.raises(ValueError, match=f"made with other options .*{message}.*--no-resume"):
            lab.run(0.97, **options)
    assert listing(lab.work) == kept
    lab.fail_at = None
    timed = len(lab.timed)
    lab.trained.clear()
    assert lab.run(0.97).chosen.name == "2x3 in 1,2, else 2x2"
    assert [t for t in lab.timed[timed:] if len(t) > 3] == []  # what was timed is not timed again
    assert kinds(lab.trained) == whole[whole.index(at) + (when == "after") :]
    assert listing(lab.output) == chosen and not lab.work.exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_search_that_was_interrupted_while_it_mixed_goes_on_with_that(lab, when):
    """The first mix keeps enough, and the second, which is faster, was being trained."""
    lab.costs = COSTS
    lab.time |= {"2x2/2x3/2x3": 0.77, "2x2/2x3/2x2": 0.73}
    lab.share |= {"2x2/2x3/2x3": 0.98, "2x2/2x3/2x2": 0.975}
    lab.fail_at = ("2x2/2x3/2x2", when)
    with pytest.raises(RuntimeError, match="the power is gone"):
        lab.run(0.97)
    lab.fail_at = None
    lab.trained.clear()
    assert lab.run(0.97).chosen.name == "2x3 in 1, else 2x2"
    assert kinds(lab.trained) == ["2x2/2x3/2x2"] * (when == "before")


def test_outputs_that_are_not_finite_end_no_search(lab, monkeypatch):
    def broken(*_):
        raise FloatingPointError("an output for row 3 is not finite")

    monkeypatch.setattr(search.HeldOut, "distance", broken)
    assert lab.run(0.97).chosen.name == "2x3" and kinds(lab.trained)[-1] == "2x3"


def test_what_is_asked_may_change_when_it_goes_on(lab):
    """The results hold whatever share is asked."""
    lab.fail_at = ("2x2", "before")
    with pytest.raises(RuntimeError):
        lab.run(0.97)
    lab.fail_at = None
    lab.trained.clear()
    assert lab.run(0.75, mixed=False).chosen.name == "mlp:4" and lab.trained == []


def test_a_search_starts_anew_if_asked(lab):
    lab.fail_at = ("2x2", "before")
    with pytest.raises(RuntimeError):
        lab.run(0.97, steps=5)
    lab.fail_at = None
    lab.trained.clear()
    assert lab.run(0.75, resume=False).chosen.name == "mlp:4" and kinds(lab.trained)[0] == "none"


def test_the_work_folder_of_another(lab):
    lab.work.mkdir()
    (lab.work / "thesis.txt").write_text("ten years of work")
    for resume in (True, False):
        with pytest.raises(ValueError, match="is no work folder of a search"):
            lab.run(0.9, resume=resume)
    assert listing(lab.work) == {"thesis.txt": b"ten years of work"}


def test_a_training_that_goes_wrong_ends_no_search(lab, monkeypatch):
    distil = search.distil_folder

    def diverging(source, output, config, *args, **options):
        if config == "mlp:4":
            raise FloatingPointError("the loss is not finite at step 3")
        return distil(source, output, config, *args, **options)

    monkeypatch.setattr(search, "distil_folder", diverging)
    choice = lab.run(0.85, mixed=False)
    assert choice.chosen.name == "2x2" and notes(choice)["mlp:4"] == "the loss is not finite at step 3"


def test_a_dense_model_that_knows_nothing(lab, monkeypatch, tmp_path):
    before = listing(tmp_path)
    monkeypatch.setattr(search.HeldOut, "measure", lambda *_: search.Quality(0.0, ()))
    with pytest.raises(ValueError, match="the dense model's accuracy is 0.0000 .* nothing to keep"):
        lab.run(0.9)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": 0.0},
        {"keep": 1.01},
        {"candidates": ()},
        {"engine": "onnx"},
        {"candidates": ("9",)},
        {"batch_sizes": ()},
        {"batch_sizes": (0,)},
        {"steps": 0},
        {"calibration_steps": 0},
        {"budget": 0.0},
    ],
)
def test_a_wrong_plan(fields):
    with pytest.raises(ValueError, match=next(iter(fields)) if fields != {"candidates": ("9",)} else "fff='9'"):
        Plan(**{"keep": 0.9, "candidates": ("none",), **fields})
