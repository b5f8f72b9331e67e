"""What int8 attention costs a converted embedder inside OpenVINO, by the settings of NNCF and by the products that stay in float32.

    python examples/experiments/openvino_int8.py --model FOLDER --out openvino_int8.jsonl
    python examples/experiments/openvino_int8.py --model FOLDER --out openvino_int8.jsonl --settings default "keep output" --batches 1x16 8x128

Trees have rows of float32 unless told otherwise, so that only what is quantised differs. A line of JSON for each setting and kind of rows: the cosine of the embeddings
to those of the same model in torch float32, and milliseconds a batch, medians of turns that all take in random order, in one process and one pool of threads.
"""

import argparse
import json
import random
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import nncf
import openvino
import torch
from nncf import IgnoredScope, QuantizationPreset
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters as Advanced
from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters as Smooth
from nncf.quantization.advanced_parameters import OverflowFix
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    RangeEstimatorParametersSet,
    StatisticsCollectorParameters,
    StatisticsType,
)
from sentence_transformers import SentenceTransformer

from hf_fff.bench.machine import summary
from hf_fff.exporting import complete, inputs_of, only_model_in
from hf_fff.openvino.embedding import Embedding
from hf_fff.openvino.graph import pack_rows, to_graph
from hf_fff.openvino.model import OpenVINOModel
from hf_fff.openvino.quantise import calibration_batches, has_vnni
from hf_fff.surgery.text import read_texts

DATA = Path(__file__).parents[1] / "data"


def percentile(share):
    """Ranges that leave out a share of the activations at each end."""
    low, high = (
        StatisticsCollectorParameters(StatisticsType.QUANTILE, AggregatorType.MEAN, quantile_outlier_prob=share)
        for _ in range(2)
    )
    return RangeEstimatorParameters(min=low, max=high)


def keeping(*patterns):
    return {"ignored_scope": IgnoredScope(patterns=list(patterns), validate=False)}


def advanced(**settings):
    return {"advanced_parameters": Advanced(**settings)}


LAYER = r".*layer\.(?:{})\..*MatMul.*"  # names of a BERT's products
SETTINGS = {
    "default": {},
    "symmetric": {"preset": QuantizationPreset.PERFORMANCE},
    "whole ranges": advanced(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX),
    "median ranges": advanced(activations_range_estimator_params=RangeEstimatorParametersSet.MEDIAN_MINMAX),
    "percentile 1e-4": advanced(activations_range_estimator_params=percentile(1e-4)),
    "percentile 1e-3": advanced(activations_range_estimator_params=percentile(1e-3)),
    "slow bias correction": {"fast_bias_correction": False},
    "no bias correction": advanced(disable_bias_correction=True),
    "smooth 0.5": advanced(smooth_quant_alphas=Smooth(matmul=0.5)),
    "smooth 0.75": advanced(smooth_quant_alphas=Smooth(matmul=0.75)),
    "no smoothing": advanced(smooth_quant_alphas=Smooth(matmul=-1)),
    "keep output": keeping(r".*attention\.output\.dense.*"),
    "keep query, key": keeping(r".*attention\.self\.(query|key).*"),
    "keep value": keeping(r".*attention\.self\.value.*"),
    "keep query, key, value": keeping(r".*attention\.self\.(query|key|value).*"),
    "keep scores, context": keeping(r".*self/aten::matmul.*", r".*self/.*scaled_dot.*"),
    "keep first": keeping(LAYER.format("0")),
    "keep two": keeping(LAYER.format("0|1")),
    "keep three": keeping(LAYER.format("0|1|2")),
    "keep last": keeping(LAYER.format("5")),
}


def quantised(graph, inputs, name, vnni):
    """A copy of the graph in int8, with settings of that name; weights have 7 bits without VNNI."""
    settings = {**(keeping(name.removeprefix("keep:")) if name.startswith("keep:") else SETTINGS[name])}
    if not vnni:
        settings["advanced_parameters"] = replace(
            settings.get("advanced_parameters", Advanced()), overflow_fix=OverflowFix.ENABLE
        )
    data, kind = nncf.Dataset(inputs), nncf.ModelType.TRANSFORMER
    return nncf.quantize(graph.clone(), data, subset_size=len(inputs), model_type=kind, **settings)


def freed(graph, pattern):
    """A copy of a quantised graph in which products of such names take what their quantisers take."""
    own = graph.clone()
    for node in own.get_ops():
        if node.get_type_name() == "MatMul" and re.search(pattern, node.get_friendly_name()):
            for port in node.inputs():
                source = port.get_source_output().get_node()
                if source.get_type_name() == "FakeQuantize":
                    port.replace_source_output(source.input_value(0))
    own.validate_nodes_and_infer_types()
    return own


def batches_of(shapes, vocabulary):
    made = {}
    for shape in shapes:
        rows, tokens = map(int, shape.split("x"))
        ids = torch.randint(1000, vocabulary, (rows, tokens))
        made[shape] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return made


def milliseconds(models, batches, rounds, clock, seconds=0.2):
    """Medians of a call, by model and batch."""
    found = {}
    for shape, batch in batches.items():
        calls = {}
        for name, model in models.items():
            model(**batch)
            start = clock()
            model(**batch)
            calls[name] = max(1, int(seconds / (clock() - start)))
        times = {name: [] for name in models}
        for _ in range(rounds):
            for name in random.sample(list(models), len(models)):
                for _ in range(calls[name]):
                    start = clock()
                    models[name](**batch)
                    times[name].append(clock() - start)
        for name, of in times.items():
            found.setdefault(name, {})[shape] = 1e3 * statistics.median(of)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a converted sentence-transformers folder")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help=f"of: {', '.join(SETTINGS)}; keep:REGEX")
    parser.add_argument(
        "--free",
        nargs="*",
        default=[],
        help="products of the first setting whose quantisers are taken out again: regular expressions",
    )
    parser.add_argument("--vnni", action=argparse.BooleanOptionalAction, help="as this CPU has it")
    parser.add_argument("--simulated", action="store_true", help="round as int8, compute in float32: no sum overflows")
    parser.add_argument("--free-each", action="store_true", help="each product by itself")
    parser.add_argument("--rows", nargs="+", default=["f32"], help="of the trees, each kind with each setting")
    parser.add_argument(
        "--hint", default="f32", help="what is between int8 products: f32, or bf16 where the CPU has it"
    )
    parser.add_argument("--calibrate", type=Path, default=DATA / "everyday_calibrate.txt")
    parser.add_argument("--compare", type=Path, default=DATA / "everyday_eval.txt")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--most", type=int, default=4000)
    parser.add_argument("--batches", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time", action="store_true", help="of the process, which others do not lengthen: for one thread"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    vnni = has_vnni() if options.vnni is None else options.vnni
    texts, held_out = read_texts(options.calibrate), read_texts(options.compare)[: options.most]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    model = SentenceTransformer(options.model, device="cpu")
    inner, how = only_model_in(model), Embedding.of_modules(model)
    want = torch.from_numpy(model.encode(held_out))
    calibration = calibration_batches(texts, model.tokenizer, how.max_length, options.samples)
    inputs = [{n: t.numpy() for n, t in complete(b, inputs_of(inner)).items()} for b in calibration]
    graph, kind = to_graph(inner)
    properties = {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": options.hint}
    properties |= {"LP_TRANSFORMS_MODE": "NO"} if options.simulated else {}
    clock = time.process_time if options.processor_time else time.perf_counter
    models, lines = {}, {}

    def measure(name, made, rows):
        made = made.clone()
        if rows != "f32":
            pack_rows(made, rows)
        facts = {"precision": "int8", "rows": rows, "outputs": kind, "model_class": type(inner).__name__}
        key = (name, rows)
        models[key] = OpenVINOModel(made, facts, inner.config, model.tokenizer, how, properties)
        vectors = models[key].encode(held_out, convert_to_tensor=True)
        cosine = torch.nn.functional.cosine_similarity(vectors, want)
        line = {"model": Path(options.model).name, "setting": name, "rows": rows, "hint": options.hint}
        line |= {"simulated": options.simulated, "vnni": vnni}
        line |= {"compared": options.compare.stem, "texts": len(held_out), "samples": options.samples}
        line |= {"cosine": float(cosine.mean()), "lowest": float(cosine.min())}
        lines[key] = line
        print(line, flush=True)

    for name in options.settings:
        made = quantised(graph, inputs, name, vnni)
        for rows in options.rows:
            measure(name, made, rows)
        if name == options.settings[0]:
            first = options.rows[0]
            for product in options.free:
                measure(f"free {product}", freed(made, product), first)
            if options.free_each:
                each = [n.get_friendly_name() for n in made.get_ordered_ops() if n.get_type_name() == "MatMul"]
                for product in each:
                    measure(f"free {product}", freed(made, f"{re.escape(product)}$"), first)
                    del models[f"free {product}", first]
    batches = batches_of(options.batches, inner.config.vocab_size)
    for key, times in milliseconds(models, batches, options.rounds, clock).items():
        lines[key] |= {"milliseconds": times, "clock": clock.__name__}
        print(key, times)
    with options.out.open("a") as file:
        for line in lines.values():
            file.write(
                json.dumps({**summary(), **line, "openvino": openvino.get_version(), "nncf": nncf.__version__}) + "\n"
            )


if __name__ == "__main__":
    main()
