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
2420 single sentences and 1224 passages of up to 90 words, from documents that no training text is from. *Units*: whether what replaced
the FFNs took its steps in units of its inputs and outputs, as the package now does; without, Adam's steps are of one size in all
dimensions. The same learning rates, 4e-4, otherwise; what replaced the FFNs has that of the column.

| | units, rate | neurons used | seeds | calibrated: cosine, sentences | distilled: cosine, sentences | recovered | 5 % quantile | neighbours | cosine, passages | neighbours, passages | held-out loss | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

GENERAL_TAIL = """
Seconds are those of calibration + distillation on one {device} shared by 4 or 5 such runs; torch {torch}.

What this says:

- At equal neurons trees keep more of the original than MLPs, and both more than nothing does. By the share of neighbours, which is what
  a search index sees, the distance is smaller than by cosine.
- At equal *time* in PyTorch in float32 the MLPs are ahead: see the table of speeds below.
- *No FFN at all* is a hard rival: after distillation it keeps a cosine of {none:.3f}.
- Without the units 1x11 is not even as good as no FFN, and one of two runs fell apart (norms of the gradients above 100): a few dimensions
  of the hidden states are ten times as large as the others, and steps of one size turn all decisions by those few. With units it is stable.
- None is near 1. For search, embed everything with the converted model; do not mix its embeddings with the original's.
- None of the runs has converged, and they see their texts two and a half times: 32x6 ends with a cosine of 0.960 on its training
  batches against 0.950 on held-out texts of the same documents (without units), so more text and more steps both help.
"""

ABLATION = """
## What the parts give

8x8, with units, 3000 steps, one seed, unseen sentences. *Paths at random*: the finished model, each token sent down any path of each tree.

| | calibrated: cosine | distilled: cosine | neighbours | held-out loss |
|---|---|---|---|---|
"""

RATES = """
## Rates

From the calibrated model, seed 0. Loss on held-out texts of the training set, by which the rates of the table above were chosen. Runs of
different lengths do not compare.

| | steps | units | embeddings | learning rate | of what replaces the FFNs | loss | cosine, held-out texts |
|---|---|---|---|---|---|---|---|
"""

MLM = """
## Masked words

MiniLM with a masked-LM head, trained for {teacher_steps} steps of {teacher_batch_size} texts; students calibrated on its inputs and distilled for
{steps} steps of {batch_size} texts (KL on masked words + hidden states; units; learning rate {learning_rate:g}, trees {trees:g}, MLPs {mlps:g}). 15 % of the words are
masked; passages that no training text is from; one seed. The teacher was trained for a short time, and its loss was still falling.

| | neurons used | calibrated: loss | distilled: loss | recovered | accuracy | agreement with the teacher |
|---|---|---|---|---|---|---|
"""

EQUAL = """
## Quality beside time

Cosine on unseen sentences after general distillation (the better of both ways of taking steps, means over seeds) beside how many times as fast
as the original the model is in PyTorch, float32, on the machine of the table above.

| | 1x16 | 8x128 | cosine | neighbours |
|---|---|---|---|---|
"""

EQUAL_TAIL = """
There the small MLPs are the better choice where both were measured: mlp:224 is as fast as 8x8 and keeps more, mlp:72 is nearly as fast as 1x11
and keeps more; 32x6 keeps the most and is the slowest. `hf-fff choose` measures this for a model, its data and a machine.
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

Question answering, MNLI, entities and the other tasks after task distillation; more than one seed of what has one here; the inputs' format;
trainings of more than 3000 steps; the frontier in other engines than PyTorch. The scripts are there
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


def rate(row: dict) -> str:
    return "-" if row["fff"] == "none" else f"{'no' if row.get('plain_steps') else 'yes'}, {row['fff_learning_rate']:g}"


def general(rows: list[dict]) -> str:
    groups = grouped([row for row in rows if row["run"] == "general"])
    none = mean(row["distilled"]["unseen_short"]["cosine"] for row in groups["none"])
    first = groups["8x8"][0]
    text = GENERAL.format(
        tokens=first["calibration_tokens"], words="half of the words in single sentences", **{k: first[k] for k in ("calibration_steps", "steps", "batch_size")}
    )  # fmt: skip
    for fff, every in groups.items():
        for way in sorted({rate(row) for row in every}):
            group = [row for row in every if rate(row) == way]
            short, long = ([row["distilled"][f"unseen_{name}"] for row in group] for name in ("short", "long"))
            cosine = [row["cosine"] for row in short]
            cells = [
                fff,
                way,
                neurons(fff),
                str(len(group)),
                spread([row["calibrated"]["unseen_short"]["cosine"] for row in group]),
                spread(cosine),
                recovered(mean(cosine), none, 1) if fff != "none" else "0 %",
                spread([row["cosine_p5"] for row in short]),
                spread([row["neighbours"] for row in short]),
                spread([row["cosine"] for row in long]),
                spread([row["neighbours"] for row in long]),
                spread([row["eval_loss"] for row in group]),
                f"{mean(row['calibration_seconds'] for row in group):.0f} + "
                f"{mean(row['distillation_seconds'] for row in group):.0f}",
            ]
            text += f"| {' | '.join(cells)} |\n"
    return text + GENERAL_TAIL.format(device=first["device"], torch=first["torch"], none=none)


def recovered(value: float, none: float, dense: float) -> str:
    return f"{100 * (value - none) / (dense - none) + 0.0:.0f} %"


def ablation(rows: list[dict]) -> str:
    whole = next(r for r in rows if (r["run"], r["fff"], r.get("plain_steps")) == ("general", "8x8", False))
    lines = {"all": whole, "without the routing gradient": next(r for r in rows if r["run"] == "ablation")}
    text = ABLATION
    for name, row in lines.items():
        at_the_end = row["distilled"]["unseen_short"]
        cells = [row["calibrated"]["unseen_short"]["cosine"], at_the_end["cosine"], at_the_end["neighbours"]]
        text += f"| {name} | {' | '.join(f'{c:.3f}' for c in cells)} | {row['eval_loss']:.3f} |\n"
    floor = whole["paths_at_random"]["unseen_short"]
    return text + f"| paths at random | | {floor['cosine']:.3f} | {floor['neighbours']:.3f} | |\n"


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
        for row in sorted(group, key=lambda row: (row["steps"], row["eval_loss"])):
            cells = [fff, row["steps"], "no" if row["plain_steps"] else "yes"]
            cells += ["frozen" if row.get("freeze_embeddings") else "trained"]
            cells += [f"{row[name]:g}" for name in ("learning_rate", "fff_learning_rate")]
            cells += [f"{row[name]:.3f}" if name in row else "" for name in ("eval_loss", "eval_cosine")]
            text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def masked_words(rows: list[dict]) -> str:
    groups = grouped([row for row in rows if row["name"] == "mlm" and row["fff"] != "dense"])
    teacher = next(row for row in rows if row["name"] == "mlm" and row["fff"] == "dense")
    first, dense = groups["8x8"][0], teacher["scores"]
    none = mean(row["distilled"]["loss"] for row in groups["none"])
    steps = {name: teacher[name] for name in ("teacher_steps", "teacher_batch_size")}
    rates = {"trees": first["fff_learning_rate"], "mlps": groups["mlp:72"][0]["fff_learning_rate"]}
    text = MLM.format(**steps, **rates, **{name: first[name] for name in ("steps", "batch_size", "learning_rate")})
    for fff, group in groups.items():
        done = [row["distilled"] for row in group]
        cells = [fff, neurons(fff), spread([row["calibrated"]["loss"] for row in group])]
        cells += [spread([row["loss"] for row in done])]
        cells += [recovered(none - mean(row["loss"] for row in done), 0, none - dense["loss"])]
        cells += [spread([row[name] for row in done]) for name in ("accuracy", "agreement")]
        text += f"| {' | '.join(cells)} |\n"
    return text + f"| dense | {INNER} | | {dense['loss']:.3f} | 100 % | {dense['accuracy']:.3f} | |\n"


def equal_time(rows: list[dict], found: dict) -> str:
    groups = grouped([row for row in rows if row["run"] == "general"])
    speeds = {row["workload"]: row["ratios"] for row in found["rows"]}
    text = EQUAL
    for fff, group in sorted(groups.items(), key=lambda item: speeds["8x128"].get(item[0], 9)):
        if fff not in speeds["8x128"]:
            continue
        ways = {rate(row): [r["distilled"]["unseen_short"] for r in group if rate(r) == rate(row)] for row in group}
        best = max(ways.values(), key=lambda scores: mean(score["cosine"] for score in scores))
        cells = [f"{1 / speeds[size][fff]:.2f}x" for size in ("1x16", "8x128")]
        cells += [spread([score[name] for score in best]) for name in ("cosine", "neighbours")]
        text += f"| {fff} | {' | '.join(cells)} |\n"
    return text + EQUAL_TAIL


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
    speeds = rows_of("model_time.jsonl")[-1]
    page = HEAD + general(rows) + ablation(rows) + masked_words(rows_of("tasks_minilm.jsonl")) + calibrated(rows)
    page += models(speeds) + equal_time(rows, speeds) + rates(rows) + step(rows_of("step_time.jsonl")[-1]) + MISSING
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
