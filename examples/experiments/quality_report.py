"""Writes docs/results/quality.md from the JSON lines that lie beside it.

python examples/experiments/quality_report.py
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from hf_fff import FFFConfig

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results" / "quality.md"
INNER = 1536  # neurons of MiniLM's FFN

HEAD = """# Quality: what converted MiniLMs keep

Made by `python examples/experiments/quality_report.py` from the JSON lines in `examples/experiments/`, a line a run; the scripts that
print them, and how to run them, are beside. all-MiniLM-L6-v2, all six FFNs (384/1536) replaced; mean ± standard deviation over
seeds where there is more than one. *Recovered* is what is kept of what the FFNs give: (x - none) / (dense - none).
"""

GENERAL = """
## Fidelity of the embeddings, without any task

Calibration (each layer fitted in turn on {tokens:,} tokens, {calibration_steps} steps of 4096), then general distillation: {steps} steps of
{batch_size} texts ({words}), all but the pooler trained, bf16. Rates were chosen on held-out training text (table below),
and nothing else was. *Cosine* is the mean over texts of the cosine of the mean-pooled embedding to the original's, *neighbours* the mean
share of a text's ten nearest neighbours in the original's space, among all texts of the set, that are found again; sets of
2420 single sentences and 1224 passages of up to 90 words, from documents that no training text is from.

| | neurons used | seeds | calibrated: cosine, sentences | distilled: cosine, sentences | recovered | 5 % quantile | neighbours | cosine, passages | neighbours, passages | seconds |
|---|---|---|---|---|---|---|---|---|---|---|
"""

GENERAL_TAIL = """
Seconds are those of calibration + distillation on one {device} shared by {processes} such runs; torch {torch}.

What this says:

- At equal neurons the tree keeps more of the original than the MLP, and both more than nothing does. By the share of neighbours, which is what
  a search index sees, the distance is smaller than by cosine.
- *No FFN at all* is a hard rival: after distillation it keeps a cosine of {none:.3f}.
- Neither is near 1. For search, embed everything with the converted model; do not mix its embeddings with the original's.
- None of the runs has converged: the loss falls to the last step, and 8x8 ends with a cosine of {train:.3f} on its training batches against
  {held:.3f} on texts of the same documents that were held out, so more text and more steps both help.
"""

RATES = """
## Rates

500 steps from the calibrated model, seed 0. Loss on held-out texts of the training set, by which the rates of the table above were chosen.

| | learning rate | of what replaces the FFNs | loss |
|---|---|---|---|
"""

STEP = """
## What a training step takes

Teacher's forward, student's forward and backward, AdamW, bf16 autocast, {rows} x {tokens} tokens, one {device}, torch {torch}, variants by turns, medians, in
milliseconds:

| {names} |
|{lines}|
| {values} |

With the Triton kernels a step of a tree costs {ratio:.2f}x a step of the dense model; level by level in PyTorch it costs {slow:.1f}x.
At this size most of a step is launching kernels, whatever stands in the place of the FFN.
"""

MODELS = """
## How fast the models are

`hf-fff bench model`, PyTorch {torch}, float32, {threads} threads of an {cpu}, {isa}; random ids, models by turns, medians. Microseconds a token, and how
many times as fast as the original. With random weights, since they do not change the time much.

| | {names} |
|---|{lines}|
"""

MISSING = """
## What is not measured yet

Masked-LM loss, question answering, MNLI and entities after task distillation; general distillation of 1x11, 32x6 and the MLPs beside
them; ablations of the routing gradient, of the stages and of the inputs' format; the frontier at equal time. The scripts are there
(`quality_minilm.py`, `tasks_minilm.py`), and so is the [queue](../../examples/experiments/README.md).
"""


def rows_of(name: str) -> list[dict]:
    path = HERE / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def spread(values: list[float], digits: int = 3) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def neurons(fff: str) -> str:
    used = FFFConfig.from_shorthand(fff).active_nodes
    return f"{used} ({100 * used / INNER:.1f} %)"


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["fff"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (FFFConfig.from_shorthand(item[0]).active_nodes, item[0])))


def general(rows: list[dict]) -> str:
    groups = grouped([row for row in rows if row["run"] == "general"])
    none = mean(row["distilled"]["unseen_short"]["cosine"] for row in groups["none"])
    first = groups["8x8"][0]
    text = GENERAL.format(
        tokens=first["calibration_tokens"], words="half of the words in single sentences", **{k: first[k] for k in ("calibration_steps", "steps", "batch_size")}
    )  # fmt: skip
    for fff, group in groups.items():
        short, long = ([row["distilled"][f"unseen_{name}"] for row in group] for name in ("short", "long"))
        cosine = [row["cosine"] for row in short]
        cells = [
            fff,
            neurons(fff),
            str(len(group)),
            spread([row["calibrated"]["unseen_short"]["cosine"] for row in group]),
            spread(cosine),
            f"{100 * (mean(cosine) - none) / (1 - none):.0f} %" if fff != "none" else "0 %",
            spread([row["cosine_p5"] for row in short]),
            spread([row["neighbours"] for row in short]),
            spread([row["cosine"] for row in long]),
            spread([row["neighbours"] for row in long]),
            f"{mean(row['calibration_seconds'] for row in group):.0f} + "
            f"{mean(row['distillation_seconds'] for row in group):.0f}",
        ]
        text += f"| {' | '.join(cells)} |\n"
    trees = groups["8x8"]
    return text + GENERAL_TAIL.format(
        device=first["device"],
        torch=first["torch"],
        processes=first["processes_a_gpu"],
        none=none,
        train=mean(row["train_cosine"] for row in trees if "train_cosine" in row),
        held=mean(row["eval_cosine"] for row in trees),
    )


def calibrated(rows: list[dict]) -> str:
    text = "\n## Calibration alone\n\nBoth sets of the table above; *unexplained* is the mean over layers of the weighted variance that a layer's fit leaves.\n\n"
    text += "| | neurons used | seeds | unexplained | cosine, sentences | neighbours | cosine, passages |\n|---|---|---|---|---|---|---|\n"
    for fff, group in grouped([row for row in rows if row["run"] == "calibration"]).items():
        cells = [fff, neurons(fff), str(len(group)), spread([mean(row["unexplained"].values()) for row in group])]
        cells += [
            spread([row["calibrated"]["unseen_short"][name] for row in group]) for name in ("cosine", "neighbours")
        ]
        cells += [spread([row["calibrated"]["unseen_long"]["cosine"] for row in group])]
        text += f"| {' | '.join(cells)} |\n"
    return text


def rates(rows: list[dict]) -> str:
    text = RATES
    for fff, group in grouped([row for row in rows if row["run"] == "rates"]).items():
        for row in sorted(group, key=lambda row: row["eval_loss"]):
            text += f"| {fff} | {row['learning_rate']:g} | {row['fff_learning_rate']:g} | {row['eval_loss']:.3f} |\n"
    return text


def step(row: dict) -> str:
    times = row["milliseconds"]
    return STEP.format(
        **{k: row[k] for k in ("rows", "tokens", "device", "torch")},
        names=" | ".join(times),
        lines="|".join(["---"] * len(times)),
        values=" | ".join(f"{t:.1f}" for t in times.values()),
        ratio=times["8x8"] / times["dense"],
        slow=times["8x8, PyTorch kernels"] / times["dense"],
    )


def models(found: dict) -> str:
    timings = found["rows"]
    text = MODELS.format(
        **{k: found[k] for k in ("torch", "threads", "cpu", "isa")},
        names=" | ".join(t["workload"] for t in timings),
        lines="|".join(["---"] * len(timings)),
    )
    for name in timings[0]["microseconds"]:
        cells = [f"{t['microseconds'][name]:.1f}, {1 / t['ratios'][name]:.2f}x" for t in timings]
        text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    rows = rows_of("quality_minilm.jsonl")
    page = HEAD + general(rows) + calibrated(rows) + rates(rows) + step(rows_of("step_time.jsonl")[-1])
    page += models(rows_of("model_time.jsonl")[-1]) + MISSING
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
