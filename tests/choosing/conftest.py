"""A laboratory for the search: everything real but the training, the clock and what is found out about quality."""

from types import SimpleNamespace

import pytest
from task_rows import rows_of
from tiny import HEADS, tiny_bert

from hf_fff.bench.model import Timing
from hf_fff.choosing import HeldOut, Plan, Quality, choose, prepare, search
from hf_fff.surgery.folder import ModelFolder, convert_folder
from hf_fff.training import arguments_for


@pytest.fixture
def source(tmp_path, tokenizer):
    """A tiny classifier of three layers, in a folder."""
    folder = tmp_path / "dense"
    tiny_bert(HEADS["ForSequenceClassification"], num_labels=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelFolder.find(str(folder))


def kind_of(model):
    """One kind, where all layers have it; else all of them, in the layers' order."""
    layers = [c.shorthand for _, c in sorted(getattr(model.config, "fff_layers", {}).items())]
    return "dense" if not layers else layers[0] if len(set(layers)) == 1 else "/".join(layers)


@pytest.fixture
def lab(source, tmp_path, monkeypatch):
    """``lab.run(keep, ...)`` runs a search in which a kind takes ``lab.time[kind]`` of the dense model's time and keeps
    ``lab.share[kind]``; what was trained, with how many steps, is in ``lab.trained``, and the
    folders from which it went on in ``lab.started``."""
    lab = SimpleNamespace(
        time={"none": 0.5, "mlp:4": 0.6, "2x2": 0.7, "2x3": 0.8, "8x4": 1.1},
        share={"none": 0.6, "mlp:4": 0.8, "2x2": 0.9, "2x3": 0.99},
        costs={},  # by kind, of each layer that alone has it
        source=source,
        trained=[],
        started=[],
        timed=[],
        kind_of=kind_of,
        fail_at=None,  # a kind, and whether that was before or after its model was written
        output=tmp_path / "out",
        work=tmp_path / "out.work",
    )

    def time_models(models, workloads, **_):
        kinds = {name: kind_of(model) for name, model in models.items()}
        lab.timed.append(list(kinds.values()))
        return [Timing(w.name, 10, {name: lab.time.get(kind, 1.0) for name, kind in kinds.items()}) for w in workloads]

    def distil_folder(folder, output, config, data, args, *, calibration, overwrite, start=None, **_):
        kind = kind_of(real(folder.load_dense(), config))
        assert start is None or (start / "model.safetensors").is_file()
        lab.started.append(start and start.name)
        lab.trained.append((kind, args.max_steps, calibration.steps, calibration.budget))
        if lab.fail_at != (kind, "before"):
            convert_folder(folder, output, config, overwrite=overwrite)
        if lab.fail_at in ((kind, "before"), (kind, "after")):
            raise RuntimeError("the power is gone")

    def measure(self, model, dense):
        return Quality(0.8 * lab.share.get(kind_of(model), 1.0), ())

    def convert(dense, config, *, calibration=None, seed=0):
        return real(dense, config, seed=seed)

    def distance(self, model, dense):
        (index, config), *_ = model.config.fff_layers.items()
        return lab.costs.get(config.shorthand, {}).get(index, 0.0)

    real = search.convert_ffn_to_fff
    monkeypatch.setattr(search, "time_models", time_models)
    monkeypatch.setattr(search, "distil_folder", distil_folder)
    monkeypatch.setattr(search, "convert_ffn_to_fff", convert)
    monkeypatch.setattr(HeldOut, "measure", measure)
    monkeypatch.setattr(HeldOut, "distance", distance)
    monkeypatch.setattr(search, "busy", lambda: None)

    def run(keep, candidates="none,mlp:4,2x2,2x3,8x4", rows=60, resume=True, **plan):
        if "budget" not in plan:
            plan = {"steps": 7, **plan}
        asked = Plan(keep=keep, candidates=tuple(candidates.split(",")), **plan)

        def arguments(folder, steps):
            return arguments_for("classification", output_dir=str(folder), max_steps=steps, use_cpu=True)

        data = prepare("classification", rows_of("classification", rows))
        return choose(lab.source, lab.output, data, asked, arguments, resume=resume)

    lab.run = run
    return lab
