"""MiniLM converted, calibrated and distilled on unlabelled text; how near it is to the original, as one line of JSON.

    python examples/experiments/quality_minilm.py --model DIR --text train.txt --unseen short.txt long.txt --fff 8x8 --steps 3000

Each text file has one paragraph a line; nothing of an unseen one may be in the others. ``--fff dense`` trains a copy of the
original: what a step of that takes.
"""

import argparse
import copy
import json
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from runs import by_layer
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from hf_fff import FFF, Calibration, FastBertModel, FFFConfig, convert_ffn_to_fff, ops, optimize, rounded_rows
from hf_fff.files import atomic_folder
from hf_fff.layers import MLP
from hf_fff.ops import ROWS
from hf_fff.surgery.text import read_texts
from hf_fff.tasks import evaluate, get_task
from hf_fff.training import DistillationArguments, DistillationTrainer, distil_texts
from hf_fff.training.arguments import FastArguments
from hf_fff.training.trainer import own_parameters


def fidelity(dense, fast, tokenizer, unseen):
    """Mean and 5 % quantile of the cosine to the original's embeddings, and the share of its ten nearest neighbours."""
    task, result = get_task("embeddings"), {}
    for name, texts in unseen.items():
        data = task.encode([{"text": text} for text in texts], tokenizer, fast.config)
        scores = evaluate(fast, task, data, tokenizer, teacher=dense, batch_size=64)
        result[name] = {metric: round(value, 4) for metric, value in scores.items()}
    return result


def packed(args, name, dense, fast, tokenizer, unseen):
    """The fidelity with packed rows, of trees, in the runs that are about them: by the packed layers, which are for a CPU, or as those compute."""
    found = {}
    for rows in ROWS if "x" in args.fff and args.run == "rows" else ():
        on_cpu = dense.device.type == "cpu"
        with nullcontext() if on_cpu else rounded_rows(fast, rows):
            model = optimize(fast, rows) if on_cpu else fast
            found[f"{name}_{rows}_rows"] = fidelity(dense, model, tokenizer, unseen)
    return found


def at_random(self, x):
    """What a layer of trees gives where each token goes down any path."""
    c, lead = self.config, x.shape[:-1]
    visited = x.new_zeros(*lead, c.n_trees, c.tree_nodes)
    node = torch.zeros(*lead, c.n_trees, 1, dtype=torch.long, device=x.device)
    for _ in range(c.depth + 1):
        visited.scatter_(-1, node, 1.0)
        node = 2 * node + 1 + torch.randint_like(node, 2)
    return (F.gelu(F.linear(x, self.weight_in, self.bias_in)) * visited.flatten(-2)) @ self.weight_out


@contextmanager
def routing_gradient_of_inputs(alpha):
    """What a layer's input, and so the layers below, are told of decisions; the trees themselves have their own routing gradient."""
    usual = FFF.forward

    def forward(self, x):
        c, weights = self.config, (self.weight_in, self.bias_in, self.weight_out)
        if not (x.requires_grad and self.watch is None and self.rows is None):
            return usual(self, x)
        y = ops.fff(x.detach(), *weights, c.n_trees, c.activation, c.routing_gradient, c.routing_temperature)
        fixed = [w.detach() for w in weights]
        again = ops.fff(x, *fixed, c.n_trees, c.activation, alpha, c.routing_temperature)
        return y + (again - again.detach())

    with mock.patch.object(FFF, "forward", forward):
        yield


@contextmanager
def steps_by_depth(exponent, routing):
    """Steps of a node of a tree at depth ``d`` are ``2 ** (-exponent * d)`` times as long, those that turn its decision ``routing`` times, too. A node
    at a depth sees a share ``2 ** -d`` of the tokens, so that its gradients are noisier, and Adam's steps are of one length."""
    measure = DistillationTrainer._measure_units

    def measured(self):
        measure(self)
        for layer in (m for m in self.model.modules() if isinstance(m, FFF)):
            depth = torch.arange(1, layer.config.tree_nodes + 1, device=layer.bias_in.device).log2().floor()
            times = torch.exp2(-exponent * depth).repeat(layer.config.n_trees)
            self._units[layer.weight_in] = self._units[layer.weight_in] * (routing * times[:, None])
            self._units[layer.weight_out] = self._units[layer.weight_out] * times[:, None]
            self._units[layer.bias_in] = routing * times

    with mock.patch.object(DistillationTrainer, "_measure_units", measured):
        yield


@contextmanager
def own_rates_fall(power):
    """The rates of what replaced the FFNs rise and fall as others do, to this power: above 1 they fall faster."""
    create = DistillationTrainer.create_scheduler

    def created(self, *args, **kwargs):
        scheduler = create(self, *args, **kwargs)
        own = {p for m in self.model.modules() if isinstance(m, (FFF, MLP)) for p in m.parameters()}
        for place, group in enumerate(self.optimizer.param_groups):
            if own.issuperset(group["params"]):
                usual = scheduler.lr_lambdas[place]
                scheduler.lr_lambdas[place] = lambda step, usual=usual: usual(step) ** power
        return scheduler

    with mock.patch.object(DistillationTrainer, "create_scheduler", created):
        yield


@contextmanager
def curve():
    """What is logged in a training meanwhile: step, cosine on its own batches, and on held-out texts where it is looked at."""
    told, log = [], DistillationTrainer.log

    def listen(self, logs, *args):
        log(self, logs, *args)
        found = {name: round(logs[name], 4) for name in ("cosine", "eval_cosine", "eval_loss") if name in logs}
        if found and self.state.global_step:
            told.append({"step": self.state.global_step, **found})

    with mock.patch.object(DistillationTrainer, "log", listen):
        yield told


def config_of(kind, args):
    return FFFConfig.from_shorthand(kind, **({"routing_gradient": args.routing_gradient} if "x" in kind else {}))


def calibrated(args, dense, tokenizer, texts):
    """The model after its layerwise fit, and what that says of itself."""
    place = args.cache and args.cache / "-".join(
        str(getattr(args, name))
        for name in ("fff", "seed", "routing_gradient", "calibration_steps", "calibration_batch", "max_tokens")
    )
    if place:
        place = place.with_name("-".join((place.name, *(path.stem for path in args.text))))
    if place and (place / "report.json").exists():
        fast = FastBertModel.from_pretrained(place, dtype=torch.float32).to(dense.device)
        return fast, json.loads((place / "report.json").read_text())
    plan = Calibration(
        texts,
        tokenizer=tokenizer,
        steps=args.calibration_steps,
        max_tokens=args.max_tokens,
        batch_tokens=args.calibration_batch,
        learning_rate=4e-3,
        seed=args.seed,
        progress=False,
        cuda_graphs=args.graphs,
    )
    kinds = {i: config_of(kind, args) for i, kind in by_layer(args.fff, dense.config.num_hidden_layers).items()}
    fast = convert_ffn_to_fff(dense, kinds, calibration=plan, seed=args.seed)
    done = fast.calibration_report
    report = {"calibration_seconds": round(done.seconds, 1), "calibration_tokens": done.tokens}
    report["unexplained"] = {str(i): round(v, 3) for i, v in done.unexplained.items()}
    if place:
        with atomic_folder(place, overwrite=True) as new:  # another run may make the same, or read it
            fast.save_pretrained(new)
            (new / "report.json").write_text(json.dumps(report))
    return fast, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--unseen", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--run",
        default="general",
        help="the table: general, ablation, calibration, layers, halves, rates, tried, crop, long, or rows, which looks at packed rows, too",
    )
    parser.add_argument("--fff", default="8x8", help="in all layers, or what is in which: 0-2=12x8,3-5=4x8")
    parser.add_argument("--calibration-steps", type=int, default=1000)
    parser.add_argument("--calibration-batch", type=int, default=4096, help="tokens a step")
    parser.add_argument("--max-tokens", type=int, default=600_000, help="of the calibration")
    parser.add_argument("--steps", type=int, default=0, help="of the distillation; 0: calibration alone")
    parser.add_argument("--batch-size", type=int, default=192, help="texts a step")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--fff-learning-rate", type=float)
    parser.add_argument("--hidden-weight", type=float, default=0.5)
    parser.add_argument("--embedding-weight", type=float, default=10.0)
    parser.add_argument("--routing-gradient", type=float, default=3.0)
    parser.add_argument(
        "--input-routing-gradient", type=float, help="of what a layer's input is told, --routing-gradient by default"
    )
    parser.add_argument(
        "--depth-steps", type=float, default=0.0, help="steps at depth d are 2**(-this * d) times as long"
    )
    parser.add_argument(
        "--fff-fall", type=float, default=1.0, help="the rates of what replaced the FFNs fall as others, to this power"
    )
    parser.add_argument(
        "--routing-steps", type=float, default=1.0, help="how many times as long those of decisions are"
    )
    parser.add_argument("--crop", type=float, default=0.0, help="share of the batches that are cropped at random")
    parser.add_argument("--rows", choices=("int8", "bf16"), help="that the distillation trains the trees for")
    parser.add_argument("--freeze-embeddings", action="store_true")
    parser.add_argument(
        "--plain-steps", action="store_true", help="what replaced the FFNs trains in no units of its own"
    )
    parser.add_argument(
        "--mlp-units", action="store_true", help="MLPs train in units of their inputs and outputs, as trees do"
    )
    parser.add_argument("--muon", action="store_true", help="for the matrices of attention")
    parser.add_argument("--compile", action="store_true", help="the training step")
    parser.add_argument("--graphs", action="store_true", help="training steps as CUDA graphs")
    parser.add_argument("--eval-steps", type=int, default=0, help="steps after which held-out text is looked at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder for calibrated models, which are then not made anew")
    args = parser.parse_args()
    if args.mlp_units:
        DistillationArguments.units_of = FastArguments.units_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = [text for path in args.text for text in read_texts(path)]
    unseen = {path.stem: read_texts(path) for path in args.unseen}
    result = {k: v for k, v in vars(args).items() if k not in ("model", "text", "unseen", "cache")}
    result["texts"] = len(texts)
    if args.fff == "dense":
        fast = copy.deepcopy(dense)
    else:
        fast, report = calibrated(args, dense, tokenizer, texts)
        result |= report | {"calibrated": fidelity(dense, fast, tokenizer, unseen)}
        result |= packed(args, "calibrated", dense, fast, tokenizer, unseen)
    if args.steps:
        with tempfile.TemporaryDirectory() as folder:
            training = DistillationArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                fff_learning_rate=args.fff_learning_rate,
                hidden_weight=args.hidden_weight,
                embedding_weight=args.embedding_weight,
                crop=args.crop,
                packed_rows=args.rows,
                save_strategy="no",
                logging_steps=max(250, args.steps // 12),
                eval_strategy="steps" if args.eval_steps else "no",
                eval_steps=args.eval_steps or None,
                disable_tqdm=True,
                dataloader_num_workers=3 if device == "cuda" else 0,
                bf16=device == "cuda",
                torch_compile=args.compile,
                cuda_graphs=args.graphs,
                muon=args.muon,
                seed=args.seed,
            )
            if args.fff != "dense":
                first, *_ = by_layer(args.fff, dense.config.num_hidden_layers).values()
                result["fff_learning_rate"] = training.rate_of(FFFConfig.from_shorthand(first).kind)
            if args.freeze_embeddings:
                own_parameters(fast)
                fast.embeddings.requires_grad_(False)
            with (
                curve() as result["curve"],
                nullcontext()
                if (args.depth_steps, args.routing_steps) == (0.0, 1.0)
                else steps_by_depth(args.depth_steps, args.routing_steps),
                nullcontext()
                if args.input_routing_gradient is None
                else routing_gradient_of_inputs(args.input_routing_gradient),
                nullcontext() if args.fff_fall == 1.0 else own_rates_fall(args.fff_fall),
                mock.patch.object(DistillationTrainer, "_measure_units", lambda self: None)
                if args.plain_steps
                else nullcontext(),
            ):
                distil_texts(fast, dense, texts, tokenizer, training)
        report = fast.distillation_report
        result |= {
            "distillation_seconds": round(report.seconds, 1),
            "eval_loss": round(report.loss, 4),
            "eval_cosine": round(report.cosine, 4),
        }
        result["distilled"] = fidelity(dense, fast, tokenizer, unseen)
        result |= packed(args, "distilled", dense, fast, tokenizer, unseen)
        if "x" in args.fff:
            with mock.patch.object(FFF, "forward", at_random):
                result["paths_at_random"] = fidelity(dense, fast, tokenizer, unseen)
    result["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    result["torch"] = torch.__version__
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
