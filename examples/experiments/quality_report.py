"""Writes docs/results/quality.md from the JSON lines that lie beside it.

python examples/experiments/quality_report.py
"""

import json
import shlex
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from runs import by_layer, spread

from hf_fff import FFFConfig
from hf_fff.training import arguments_for

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results" / "quality.md"
INNER, LAYERS = 1536, 6  # neurons of each of MiniLM's FFNs

HEAD = """# Quality: what converted MiniLMs keep

Made by `python examples/experiments/quality_report.py` from the JSON lines in `examples/experiments/`, a line a run; the scripts that
print them, and how to run them, are beside. all-MiniLM-L6-v2, all six FFNs (384/1536) replaced; mean ± standard deviation over
seeds where there is more than one. *Recovered* is what is kept of what the FFNs give: (x - none) / (dense - none).
"""

GENERAL = """
## Fidelity of the embeddings, without any task

Calibration (each layer fitted in turn; *long*: {steps_long}, on {tokens_long:,} tokens; *short*: {steps_short}, on {tokens_short:,}), then
general distillation: {steps} steps of {batch_size} texts (half of the words in single sentences), all but the pooler trained, bf16. Rates were
chosen on held-out training text (table below), and nothing else was. *Cosine* is the mean over texts of the cosine of the mean-pooled
embedding to the original's, *neighbours* the mean share of a text's ten nearest neighbours in the original's space, among all texts of the
set, that are found again; sets of 2420 single sentences and 1224 passages of up to 90 words, from documents that no training text is from.
*Units*: whether what replaced the FFNs took its steps in units of its inputs and outputs, as in the package trees do, and MLPs where there is a task, and at which rate; without,
Adam's steps are of one size in all dimensions. Of several ways the one with the least loss on held-out training text.
{table}
Seconds are those of calibration + distillation on one {device} shared by 4 or 5 such runs; torch {torch}.
"""

COLUMNS = """
| | calibration | units, rate | neurons used | seeds | calibrated: cosine, sentences | distilled: cosine, sentences | recovered | 5 % quantile | neighbours | cosine, passages | neighbours, passages | held-out loss | seconds |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

OTHER = """
## Other ways to get there

The same steps of distillation.
{table}
A calibration of four times the steps on three times the text leaves trees nearer to the original (8x8: 0.853 → 0.870) and MLPs hardly;
distillation takes most of that back: what binds at the end is distillation, not the fit. MLPs are a little better without the units, trees
with them.
"""

GENERAL_TAIL = """
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

8x8, short calibration, 3000 steps, one seed, unseen sentences. *Paths at random*: the finished model, each token sent down any path of each tree.

| | calibrated: cosine | distilled: cosine | neighbours | held-out loss |
|---|---|---|---|---|
"""

LONG = """
## Longer trainings

Calibrated for 1000 steps of 8192 tokens a layer. *Passes*: how often the training text was seen. *Cropped*: share of the batches whose texts are cropped
at random. *Training batches*: the cosine on those of the last steps, cropped ones among them; where it is near that of held-out text, more text would
not help. *Muon* is for the matrices of attention (`--muon`), all else is Adam's. 8x8 of seed 0 is what the commands [above](#as-anybody-makes-one) made. Trees are trained in units, at 0.75 times the other rate and
half of that with Muon. MLPs, beside trees too (`8x8+mlp:152`), are trained without units, at 3e-3, which suits them better (below).

| | steps x texts | steps of attention, rate | passes | cropped | text | seeds | cosine, sentences | recovered | neighbours | cosine, passages | held-out loss | cosine, held-out text | training batches | minutes | goal |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""

LONG_TAIL = """
![cosine over steps](quality-curves.png)

The picture: cosine on the training batches, means of 666 steps (lines, one a seed), and on held-out texts (dots); seed 0 of 8x8 is not there, since the command tells no curve. Minutes are those of calibration and distillation on one {devices} that was shared by several runs.

- **The longer the distillation, the less the FFNs are needed**: no FFN at all goes from a cosine of {before:.3f} (3000 steps of 192 texts, above) to {none:.3f}, which is between
  what 8x8 had after 3000 steps of 192 and of 384 texts, and 8x8 to {tree:.3f}. The rest of the model learns what the FFNs gave.
- At equal neurons trees stay ahead of MLPs (8x8 of mlp:72 by {ahead}, three seeds each; 32x6 of mlp:224); mlp:224 is ahead of 8x8, and 1x11 hardly of nothing.
- Trees beside an MLP keep what as many neurons in trees alone keep, but for 0.001: 4x8+mlp:36 and 8x8, 8x8+mlp:152 and 32x6. An MLP of 448 keeps more than any of them.
- The goal of 0.951 was set for at most 5.8 % of the neurons: 8x10, with four times the nodes of 8x8 and a fifth more of a token's work, reaches it in both of its runs. 8x8 (4.7 %) and 32x6 miss theirs by {miss}. That of 1x11 is reached in cosine, but no FFN at all reaches it, too: as a share of what the
  FFNs give (goals: 30, 55 and 70 %) all are missed, since *none* is so much nearer than when they were set (0.891).
- In one and the same training 32x6 is ahead of an MLP of 448 neurons for two thirds of the steps, and behind it at the end; 1x11 is no FFN at all from 1300 steps on.
- Held-out text is {held_out} behind the training batches, unseen sentences of other documents are another {unseen}, and the last quarter of the steps gave {last} where that was looked at: text may bind as much as steps now.
"""

TRIED = """
## What was tried with 1000 steps

1000 steps of 384 texts, from the calibrated model (1000 steps of 8192 tokens a layer), seed 0, half of the batches cropped unless said. Loss and cosine on held-out
texts of the training set, by which the ways of the longer trainings were chosen. *Steps by depth*: those of a node at depth d are 2^(-e d) times as long; *decisions*: those of
what goes in; *inputs' routing gradient*: of what the layers below are told, while the trees themselves are trained with 3. MLPs, beside trees too, without units at 3e-3 unless said.

| | steps of attention, rate | rate of what replaces the FFNs | otherwise | loss | cosine, held-out texts | cosine, sentences | neighbours |
|---|---|---|---|---|---|---|---|
"""

TRIED_TAIL = """
- Muon takes 8x8 from 0.797 to 0.775 at the same rate, and with all rates but the trees' twice as high to 0.767; at four times it is no better than Adam. (With another weight of the hidden states
  losses do not compare: the cosine does.)
- 1x11 stays near no FFN at all whatever is done: lower rates, shorter steps of deep nodes or of decisions, no routing gradient, none of it for the layers below: all are as good or
  worse. It is not a rate that loses its fit.
- **Trees beside an MLP** give about what as many neurons in trees alone give: half of the trees of 8x8 and 36 neurons in an MLP 0.002 of cosine less than 8x8, with half of its nodes, and 8x8 beside 152
  what 32x6 gives. A tree of depth 11 beside 60 neurons gives 0.005 more than an MLP of 72; alone it gives 0.002 more than nothing. Four times the nodes of 8x8 (8x10) give 0.003.
- Half of the batches cropped or none: 0.0004 and 0.004 (of neighbours) worse on sentences, 0.002 of cosine better on passages, so a draw; all of them is worse.
"""

MIXED = """
## Different kinds in different layers

The same 1000 steps with Muon, from the calibrated model, seed 0; `0=24x8,1-3=4x8` says what stands in which layer (from 0 on), and a layer that is not named keeps its FFN. Behind them what stands
in all layers and uses about as many neurons. *Without*: the cosine that is left when one FFN alone is replaced by a constant (calibrated, {steps} steps on {texts:,} texts). Microseconds a token are those of
models of these shapes with random weights (`layers_time.py`; {machine}, trees with rows of int8 inside OpenVINO).

| without the FFN of layer | {numbers} |
|---|{lines}|
| cosine, sentences | {worth} |

| | neurons used, mean | calibrated: cosine, sentences | loss | cosine, held-out texts | cosine, sentences | neighbours | {timed} |
|---|---|---|---|---|---|---|{timed_lines}|
"""

MIXED_TAIL = """
- With as many neurons no mix keeps more than the same in all layers, wherever its weight is: 0.930 and 0.930 with trees (4 in the first layers, 14 in the last), 0.920 and 0.920 with MLPs of 72, 0.937 and 0.937 of 224; and they find fewer neighbours.
- Where layers get nothing, it matters which: the cosine is 0.004 to 0.007 higher where layers 4 and 5, which are worth most, have the neurons, than where 0 has (`0-3=none,4-5=24x8` and `0=24x8,1-3=none,4=24x8,5=none`; `0-3=none,4-5=mlp:216` and `0=mlp:432,1-5=none`;
  `0-3=none,5=none` and `1-5=none`). What a fit leaves unexplained does not tell that: of 8x8 it is least in layers 0 and 4 (0.23, 0.40) and most in 3 and 5 (0.64). So `hf-fff choose` goes by what a kind in one layer alone does to the outputs.
- What mixes can save is time, where layers have nothing: `0-3=none,4-5=mlp:216` keeps 0.919 and takes 3 to 19 % less time than mlp:72 (0.920) at three of four sizes in OpenVINO, within noise of no FFN at all, and the same in PyTorch within noise. An MLP of 448 in all layers keeps more than the original's own FFNs in 4 and 5 alone
  (0.952 and 0.948; of neighbours 0.741 and 0.688), in less time in PyTorch and in 4 to 8 % more at three of four sizes in OpenVINO.
"""

HALVES = """- mlp:224 in half of the layers and nothing in the others, on a CPU (200 steps of calibration on 200,000 tokens, 200 steps of 64 texts, one seed): in 3, 4 and 5, where it brings the outputs nearest,
  {gained[0]:.3f} calibrated and {gained[1]:.3f} distilled, in 2, 3 and 5, which are hardest to fit with it, {hardest[0]:.3f} and {hardest[1]:.3f}; of neighbours {gained[2]:.3f} and {hardest[2]:.3f} are found after that.
"""

TASK_JOINT = """
## Trees and an MLP together, in a task

wnut17, F1: students of one teacher, calibrated for 400 steps a layer and distilled for 1200 steps of 32 rows. Three runs are seed 0 twice, by two versions of the code (mlp:72 came out the same, 8x8 1.1 and
4x8+mlp:36 1.7 points apart), and seed 1; two are seeds 0 and 1, one is seed 0. The test set leaves a standard error of above two points. *MLP in units*: as it is trained with a task; without, as without one.

| | MLP in units | runs | calibrated | distilled | held-out rows | agreement with the teacher |
|---|---|---|---|---|---|---|
"""

TASK_JOINT_TAIL = """
All are above no FFN at all; nothing here tells them apart, nor the ways of training an MLP: units stay what a task trains them in.
"""

TASK_RATES = """
## Rates of trees in tasks

8x8 distilled from one teacher (1200 steps of 32 rows, learning rate 2e-4), by the rate of its trees; score on held-out rows of the training set, and on the dev set. *Undone*: the training made the
held-out rows worse than they were after calibration, of which the scores are.

| | rate | held-out | dev |
|---|---|---|---|
"""

COMMAND = """
## As anybody makes one

```sh
{commands}
```

MODEL is a folder of the original in float32; a text file any English text, a sentence or a passage a line: {texts} such lines of novels, reviews, encyclopedia and technical
prose here (`passages.py`). They save no checkpoint on the way. *Minutes* are those of one {device} that other runs shared, loading and calibration included
(`by_command.py`); the folders open with `AutoModel` and with `SentenceTransformer`, after `import hf_fff`.

| | steps | minutes | cosine, sentences | 5 % quantile | neighbours | cosine, passages | neighbours, passages | cosine, held-out text | goal |
|---|---|---|---|---|---|---|---|---|---|
"""

CROP = """
## Cropped texts

The same runs with and without cropping a share of the batches: each text to a run of its tokens that begins at random. *Text*: what there was to train on.

| | device | text | steps x texts | cropped | seeds | held-out loss | cosine, held-out text | training batches | cosine, sentences | cosine, passages |
|---|---|---|---|---|---|---|---|---|---|---|
"""

TASK_INPUTS = """
## What a task's inputs give

MRPC: students of one teacher after calibration alone ({steps} steps of {batch} tokens a layer, {tokens:,} tokens, seed 0, {device}), on pairs as the task has them, or on the
texts of the pairs one by one.

| | calibrated on | accuracy | agreement with the teacher |
|---|---|---|---|
"""

TASK_FROZEN = """
## With attention frozen

The same, calibrated on pairs, and then {steps} steps of {batch} rows of the task's distillation in which nothing is trained but what replaces the FFNs ({device}, {seeds}).

| | calibrated: accuracy | agreement with the teacher | distilled: accuracy | of the teacher's | agreement |
|---|---|---|---|---|---|
"""

TASK_FROZEN_TAIL = """
Half of the trees beside an MLP are level with the MLP and agree with the teacher most often; trees alone are a point of accuracy behind, which is about the standard error that the 1725 rows leave.
"""

RATES = """
## Rates

From the calibrated model, seed 0. Loss on held-out texts of the training set, by which the rates of the table above were chosen. Runs of
different lengths do not compare.

| | steps | units | embeddings | learning rate | of what replaces the FFNs | loss | cosine, held-out texts |
|---|---|---|---|---|---|---|---|
"""

PACKED = """
## Packed rows

Cosine on unseen sentences with the rows that `hf_fff.optimize` or the engine of OpenVINO takes, after a distillation as usual and after one that
rounds them, and the tokens, all the while (`hf-fff distill --rows int8`); {steps} steps of {batch_size} texts from the same calibrated model. *Lost* is what int8 rows
take off. On a GPU the packed layers are computed by their definition.

| | trained for | seeds | float32 rows | int8 | bf16 | lost | neighbours: float32 | int8 |
|---|---|---|---|---|---|---|---|---|
"""

MLM = """
## Masked words

MiniLM with a masked-LM head, all of it trained; students calibrated on its inputs and distilled (KL on masked words + hidden states). 15 % of the words are
masked; passages that no training text is from; mean ± standard deviation over seeds where there is more than one, all of one teacher. *Recovered*: of the
difference in loss between *none* and the teacher, with the standard deviation that the seeds' losses leave; masked words tell designs apart best. The teachers
were trained for a short time, and their losses were still falling.

| | neurons used | seeds | calibrated: loss | distilled: loss | recovered | goal | accuracy | agreement with the teacher |
|---|---|---|---|---|---|---|---|---|
"""

MLM_TAIL = """
Above the MLP of as many neurons, of the first teacher: {ahead}. Calibrated alone trees are far ahead (loss: {calibrated}); after the distillation of the whole model less of that is left, and of a single
deep tree nothing. Half of 8x8's trees and an MLP of 36 neurons keep as much as 8x8, or a little more.
"""

TASKS = """
## {title}

MiniLM finetuned for each (*dense*, {epochs} epochs), and students of it: calibrated on the task's inputs ({tokens} tokens at most) for {calibration_steps} steps a
layer, then distilled for {steps} steps of {batch_size} rows on the labelled rows, copies of them with replaced words and, of some tasks of pairs, pairs of other
data sets without labels; {limit} rows to train on. Scores on rows that were not looked at for any choice, {report_limit} of them; mean ± standard deviation over
seeds where there is more than one, {teachers}. The test set itself leaves a standard error that the seeds do not show: of wnut17, which has 1287 sentences with
few entities, above two points. *Recovered* is (x - none) / (dense - none) of the means, told where dense and none are more than two standard errors of the
seeds apart; *agreement* the share of the positions where the likeliest class is the teacher's. {device}, torch {torch}.

"""

TASKS_ABOVE = """
Where a student is above its teacher, distillation with more inputs gave what finetuning on few rows did not.
"""

TASKS_UNDONE = """
Undone, since the training made the held-out rows worse than they were after calibration: {undone} (seed).
"""

TASKS_TAIL = """
Without any FFN {worst} of the teacher's score is kept at worst ({where}): measure `none` first. By more than two standard errors mlp:72 is ahead of 8x8 on {ahead} of the {of} tasks, behind
on {behind}.
"""

EQUAL = """
## Quality beside time

Cosine on unseen sentences after general distillation (the first table's) beside how many times as fast
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

LOOP = """
## How fast the training loop is

General distillation with its data, its optimizer and all, alone on one {device}, torch {torch}: steps a second, as it is and with steps that are recorded as
CUDA graphs (`--graphs`); loss of the steps that were timed, from the same weights on the same texts.

| | texts a step | as it is | recorded | times as fast | loss as it is | recorded |
|---|---|---|---|---|---|---|
"""

MODELS = """
## How fast the models are

`hf-fff bench model`, PyTorch {torch}, float32, {threads} threads of an {cpu}, {isa}; random ids, models by turns, medians. Microseconds a token, and how
many times as fast as the original. With random weights, since they do not change the time much.

| | {names} |
|---|{lines}|
"""

MISSING = """
## What is missed and what is not measured yet

The goals were: cosines of 0.924, 0.951 and 0.967 with at most 0.8, 5.8 and 17 % of the neurons within 30 minutes of a GPU (30, 55 and 70 % of the distance between no FFN and the original as it was then); 45, 70
and 85 % of masked words' loss, and 10, 15 and 5 points above the MLP; 99.5 to 100 % of SST-2, MRPC and QNLI, and of MNLI, wnut17 and questions 98 % with at most 5.8 % of the neurons, 99 % with 17; with attention frozen no less than the MLP.
Reached are the first cosine (1x11), just so the second (8x10, two seeds), the last by trees beside an MLP (MRPC, one seed) and, with 1500 steps from teachers that were trained for less, questions and MNLI of 8x8 (MNLI: one seed). All else is missed. What binds:

- **No FFN at all**, which gains more by every training than what is compared with it. A share of its distance to the original falls the longer one trains.
- **Text**, in general distillation: from the batches of the end to unseen documents more is lost than the last quarter of the steps gave.
- **What a distillation leaves of the fit.** Calibrated alone trees are as near as MLPs of two (32x6), three (8x8) and five times (1x11) as many neurons. After 8000 steps of the whole model 8x8 is as near as one of 1.9 times
  as many, 32x6 of 1.4 times (masked words: 1.5 and 1.1), and 1x11 hardly nearer than nothing. Other rates, shorter steps, less of the routing gradient changed none of that (above).
- **Rows**, in tasks: trees, with fifty times as many weights as they use, are level with MLPs of as many neurons as they use, or behind. Half of the neurons in an MLP beside half of the trees
  may take some of that back (entities, within what the test set leaves open; calibrated on MRPC's pairs they agree with the teacher more often than either alone).

What we would pull next, in this order: more text than 330,000 passages, which would tell text from steps; four times the steps, of no FFN and of 8x8, to see whether anything is left
between them; the transfer inputs of a task in the tens of thousands of rows, for what trees lack in rows. Not tried at all: routing that is frozen late,
layers converted one after the other while the rest is trained, exact instead of greedy counterfactuals.

Not measured: of trainings of 8000 steps third seeds but of none, 8x8 and mlp:72, and second ones of 1x11, 32x6, mlp:448 and trees beside an MLP; mixes of kinds for as long; transfer inputs for questions, entities, SST-2, QNLI and STS-B; frozen attention on other tasks; int8 rows for
other trees. The scripts are there (`quality_minilm.py`, `masked_words.py`, `tasks_table.py`, `by_command.py`), and so is the
[queue](../../examples/experiments/README.md). Quality beside time: [quality-frontier](quality-frontier.md); there trees were to be
ahead somewhere in each engine, which they are in OpenVINO with AVX2 alone and packed in PyTorch, and not in PyTorch all in float32 or in bfloat16.
"""


def rows_of(name: str) -> list[dict]:
    path = HERE / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def runs() -> list[dict]:
    """Those of quality_minilm.py, and what the command made, as one of them."""
    return rows_of("quality_minilm.jsonl") + [as_a_run(row) for row in rows_of("command.jsonl")]


def as_a_run(row: dict) -> dict:
    words = shlex.split(row["command"])
    options = dict(pairwise(words))
    muon, rate = "--muon" in words, float(options["--learning-rate"])
    own = {"fff_learning_rate": float(options["--fff-learning-rate"])} if "--fff-learning-rate" in words else {}
    made = arguments_for(
        None, output_dir="out", max_steps=row["steps"], learning_rate=rate, muon=muon, use_cpu=True, **own
    )
    return {
        **row,
        "run": "long",
        "batch_size": int(options["--batch-size"]),
        "crop": float(options["--crop"]),
        "muon": muon,
        "learning_rate": rate,
        "fff_learning_rate": made.rate_of(FFFConfig.from_shorthand(row["fff"]).kind),
        "texts": row["rows"] + row["held_out"],
        "calibration_steps": int(options["--calibration-steps"]),
        "calibration_seconds": row["whole_seconds"] - row["seconds"],
        "distillation_seconds": row["seconds"],
        "eval_loss": row["loss"],
        "eval_cosine": row["cosine"],
    }


def optimizer(row: dict) -> str:
    return f"{'Muon' if row.get('muon') else 'Adam'}, {row['learning_rate']:g}"


def used(fff: str) -> float:
    """Neurons that a token uses in a layer, the mean over layers; one that keeps its FFN uses all of them."""
    kinds = by_layer(fff, LAYERS)
    every = [FFFConfig.from_shorthand(kind).active_nodes for kind in kinds.values()]
    return (sum(every) + INNER * (LAYERS - len(kinds))) / LAYERS


def neurons(fff: str) -> str:
    return f"{used(fff):g} ({100 * used(fff) / INNER:.1f} %)"


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["fff"]].append(row)
    return dict(sorted(groups.items(), key=lambda item: (used(item[0]), item[0])))


def calibration(row: dict) -> str:
    return "long" if row.get("calibration_batch", 4096) * row["calibration_steps"] > 10_000_000 else "short"


def way(row: dict) -> tuple[str, str]:
    """How what replaced the FFNs was trained, calibration and distillation."""
    if row["fff"] == "none":
        return "-", "-"
    return calibration(row), f"{in_units(row)}, {row['fff_learning_rate']:g}"


def in_units(row: dict) -> str:
    units = mlp_in_units(row) if row["fff"].startswith("mlp") else not row.get("plain_steps")
    return "yes" if units else "no"


def mlp_in_units(row: dict) -> bool:
    """Of an MLP, alone or beside trees; lines that do not say so are from when all that replaced the FFNs was trained in units."""
    return row.get("mlp_units", not any(row.get(name) for name in ("plain_steps", "mlp_rate", "plain_mlps")))


def ways(rows: list[dict]) -> dict[str, list[list[dict]]]:
    """Of each kind the runs of each way, the way of the least loss on held-out training text first."""
    found = {}
    for fff, every in grouped([row for row in rows if row["run"] == "general"]).items():
        groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
        for row in every:
            groups[way(row)].append(row)
        found[fff] = sorted(groups.values(), key=lambda group: mean(row["eval_loss"] for row in group))
    return found


def line(group: list[dict], none: float) -> str:
    short, long = ([row["distilled"][f"unseen_{name}"] for row in group] for name in ("short", "long"))
    cosine, fff = [row["cosine"] for row in short], group[0]["fff"]
    cells = [
        fff,
        *way(group[0]),
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
    return f"| {' | '.join(cells)} |\n"


def general(rows: list[dict]) -> str:
    found = ways(rows)
    none = mean(row["distilled"]["unseen_short"]["cosine"] for row in found["none"][0])
    main, other = COLUMNS, COLUMNS
    for groups in found.values():
        main += line(groups[0], none)
        other += "".join(line(group, none) for group in groups[1:])
    example = {calibration(group[0]): group[0] for group in found["8x8"]}
    named = {"batch_size": example["long"]["batch_size"], "steps": example["long"]["steps"]}
    for name, row in example.items():
        named[f"tokens_{name}"] = row["calibration_tokens"]
        named[f"steps_{name}"] = f"{row['calibration_steps']} steps of {row.get('calibration_batch', 4096)} tokens"
    device = {name: example["long"][name] for name in ("device", "torch")}
    return GENERAL.format(table=main, **named, **device) + GENERAL_TAIL.format(none=none) + OTHER.format(table=other)


def recovered(value: float, none: float, dense: float) -> str:
    return f"{100 * (value - none) / (dense - none) + 0.0:.0f} %"


def ablation(rows: list[dict]) -> str:
    whole = next(
        r
        for r in rows
        if (r["run"], r["fff"], r.get("plain_steps"), calibration(r)) == ("general", "8x8", False, "short")
    )
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
            cells = [fff, row["steps"], in_units(row)]
            cells += ["frozen" if row.get("freeze_embeddings") else "trained"]
            cells += [f"{row[name]:g}" for name in ("learning_rate", "fff_learning_rate")]
            cells += [f"{row[name]:.3f}" if name in row else "" for name in ("eval_loss", "eval_cosine")]
            text += f"| {' | '.join(map(str, cells))} |\n"
    return text


GOALS = {"1x11": 0.924, "8x8": 0.951, "8x10": 0.951, "32x6": 0.967}  # cosines within 30 minutes of one GPU


def recipe(row: dict) -> tuple:
    rates = row["learning_rate"], row["fff_learning_rate"] if row["fff"] != "none" else 0.0
    how = [row["steps"], row["batch_size"], row.get("crop", 0.0), row.get("texts", 0), bool(row.get("muon"))]
    rates += ("mlp" in row["fff"] and mlp_in_units(row),)
    return row["fff"], *how, *rates


def by_recipe(rows: list[dict], run: str) -> list[list[dict]]:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["run"] == run:
            groups[recipe(row)].append(row)
    return [g for _, g in sorted(groups.items(), key=lambda i: (used(i[0][0]), *i[0]))]


def at_the_end(row: dict) -> float | None:
    """The cosine on the last training batches."""
    return next((told["cosine"] for told in reversed(row.get("curve", [])) if "cosine" in told), None)


def cosines(group: list[dict], texts: str, name: str = "cosine") -> list[float]:
    return [row["distilled"][f"unseen_{texts}"][name] for row in group]


def longer(rows: list[dict]) -> str:
    groups = by_recipe(rows, "long")
    if not groups:
        return ""
    # The rates of what replaces the FFNs differ by kind.
    text, floors = LONG, {recipe(g[0])[1:-2]: mean(cosines(g, "short")) for g in groups if g[0]["fff"] == "none"}
    for group in groups:
        first, cosine = group[0], cosines(group, "short")
        none, goal = floors.get(recipe(first)[1:-2]), GOALS.get(first["fff"])
        ends = [end for end in map(at_the_end, group) if end is not None]
        passes = first["steps"] * first["batch_size"] / first["texts"] if first.get("texts") else None
        minutes = [(row["calibration_seconds"] + row["distillation_seconds"]) / 60 for row in group]
        cells = [
            first["fff"],
            f"{first['steps']} x {first['batch_size']}",
            optimizer(first),
            f"{passes:.1f}" if passes else "",
            f"{100 * first.get('crop', 0.0):.0f} %",
            f"{first['texts']:,} texts" if passes else "",
            str(len(group)),
            spread(cosine),
            recovered(mean(cosine), none, 1) if none is not None else "",
            spread(cosines(group, "short", "neighbours")),
            spread(cosines(group, "long")),
            spread([row["eval_loss"] for row in group]),
            spread([row["eval_cosine"] for row in group]),
            spread(ends) if ends else "",
            spread(minutes, 1),
            f"{goal}, {'reached' if mean(cosine) >= goal else 'missed'}" if goal else "",
        ]
        text += f"| {' | '.join(cells)} |\n"
    devices = " or ".join(sorted({row["device"] for group in groups for row in group}))
    best: dict[str, float] = defaultdict(float)
    for group in groups:
        best[group[0]["fff"]] = max(best[group[0]["fff"]], mean(cosines(group, "short")))
    if not {"none", *GOALS} <= {*best}:
        return text
    before = mean(row["distilled"]["unseen_short"]["cosine"] for row in ways(rows)["none"][0])
    every = [row for group in groups for row in group if row.get("muon")]
    seen = [(end, row["eval_cosine"]) for row in every if (end := at_the_end(row)) is not None]
    gaps = {
        "held_out": [end - held_out for end, held_out in seen],
        "unseen": [row["eval_cosine"] - row["distilled"]["unseen_short"]["cosine"] for row in every],
        "last": [
            row["eval_cosine"] - told["eval_cosine"]
            for row in every
            for told in row.get("curve", [])
            if told["step"] == 0.75 * row["steps"] and "eval_cosine" in told
        ],
    }
    told = {name: f"{min(values):.3f} to {max(values):.3f}" for name, values in gaps.items()}
    miss = " and ".join(f"{GOALS[fff] - best[fff]:.3f}" for fff in ("8x8", "32x6"))
    ahead = f"{best['8x8'] - best['mlp:72']:.4f}"
    return text + LONG_TAIL.format(
        devices=devices, before=before, none=best["none"], tree=best["8x8"], miss=miss, ahead=ahead, **told
    )


# What a run may have that others have not: its usual value, and how another one is told.
USUAL = {
    "routing_gradient": (3.0, "routing gradient {:g}"),
    "input_routing_gradient": (None, "inputs' routing gradient {:g}"),
    "depth_steps": (0.0, "steps by depth, e = {:g}"),
    "routing_steps": (1.0, "decisions {:g} times"),
    "hidden_weight": (0.5, "hidden states' weight {:g}"),
    "crop": (0.5, "cropped {:.0%}"),
    "fff_fall": (1.0, "its rate falls to the power of {:g}"),
}


def draw_curves(rows: list[dict], path: Path) -> None:
    """The cosine over the steps of the long trainings that told it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    colours: dict[str, str] = {}
    for group in by_recipe([row for row in rows if row.get("curve")], "long"):
        for row in group:
            points = {
                name: [(told["step"], told[name]) for told in row["curve"] if name in told]
                for name in ("cosine", "eval_cosine")
            }
            label = None if row["fff"] in colours else row["fff"]  # seeds look alike
            (drawn,) = axes.plot(*zip(*points["cosine"], strict=True), label=label, color=colours.get(row["fff"]))
            colours[row["fff"]] = drawn.get_color()
            axes.plot(*zip(*points["eval_cosine"], strict=True), "o", color=drawn.get_color())
    axes.set_xlabel("steps of 384 texts")
    axes.set_ylabel("cosine to the original")
    axes.set_ylim(0.88, 0.98)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def unusual(row: dict) -> dict[str, str]:
    """What of a run is not as usual, by its field."""
    return {name: text for name, (usual, text) in USUAL.items() if row.get(name, usual) != usual}


def tried(rows: list[dict]) -> str:
    text = TRIED
    for fff, group in grouped([row for row in rows if row["run"] == "tried" and "=" not in row["fff"]]).items():
        for row in sorted(group, key=lambda row: row["eval_loss"]):
            others = [text.format(row[name]) for name, text in unusual(row).items()]
            cells = [fff, optimizer(row)]
            cells += ["" if fff == "none" else f"{row['fff_learning_rate']:g}"]
            cells += [
                ", ".join(others + ["MLP in units"] * ("mlp" in fff and mlp_in_units(row))),
                f"{row['eval_loss']:.3f}",
                f"{row['eval_cosine']:.3f}",
            ]
            cells += [f"{row['distilled']['unseen_short'][name]:.3f}" for name in ("cosine", "neighbours")]
            text += f"| {' | '.join(cells)} |\n"
    return text + TRIED_TAIL


def mixed(rows: list[dict], clocks: list[dict]) -> str:
    found = [row for row in rows if row["run"] == "tried" and row.get("muon") and not unusual(row)]
    layers = {row["fff"].partition("=")[0]: row for row in rows if row["run"] == "layers"}
    if not layers or not any("=" in row["fff"] for row in found):
        return ""
    first = next(iter(layers.values()))
    (clock,) = clocks
    took = {
        f"{engine}, {workload}": {kind: of[workload] for kind, of in kinds.items()}
        for engine, kinds in clock["microseconds_a_token"].items()
        for workload in ("1x16", "1x128", "8x128", "32x128")
    }
    text = MIXED.format(
        machine=f"{clock['cpu']}, {clock['isa']}, {clock['threads']} threads",
        timed=" | ".join(took),
        timed_lines="|".join(["---"] * len(took)),
        steps=first["calibration_steps"],
        texts=first["texts"],
        numbers=" | ".join(layers),
        lines="|".join(["---"] * len(layers)),
        worth=" | ".join(f"{row['calibrated']['unseen_short']['cosine']:.3f}" for row in layers.values()),
    )
    mixes = [used(row["fff"]) for row in found if "=" in row["fff"]]
    groups = sorted(grouped(found).items(), key=lambda item: (used(item[0]), "=" not in item[0]))
    for fff, group in groups:
        if any(abs(used(fff) - mix) < 0.2 * mix for mix in mixes):
            row = min(group, key=lambda row: row["eval_loss"])
            cells = [row["calibrated"]["unseen_short"]["cosine"], row["eval_loss"], row["eval_cosine"]]
            cells += [row["distilled"]["unseen_short"][name] for name in ("cosine", "neighbours")]
            times = [f"{of[fff]:.1f}" if fff in of else "" for of in took.values()]
            text += f"| {fff} | {neurons(fff)} | {' | '.join([*(f'{cell:.3f}' for cell in cells), *times])} |\n"
    halves = {
        row["fff"]: [
            *(row[when]["unseen_short"]["cosine"] for when in ("calibrated", "distilled")),
            row["distilled"]["unseen_short"]["neighbours"],
        ]
        for row in rows
        if row["run"] == "halves"
    }
    told = {"gained" if "3-5=mlp:224" in fff else "hardest": kept for fff, kept in halves.items()}
    return text + MIXED_TAIL + (HALVES.format(**told) if len(told) == 2 else "")


def undone(row: dict) -> bool:
    """Whether a student is as it was calibrated, since its training made it worse; older lines do not say it."""
    return row.get("undone", row["distilled"] == row["calibrated"])


def task_joint(rows: list[dict]) -> str:
    text = TASK_JOINT
    for fff, every in grouped([row for row in rows if row["fff"] != "dense"]).items():
        for units in (True, False):
            group = [row for row in every if mlp_in_units(row) == units]
            if group:
                cells = [fff, ("yes" if units else "no") if "mlp" in fff else "", str(len(group))]
                cells += [spread([100 * row[part]["f1"] for row in group], 1) for part in ("calibrated", "distilled")]
                cells += [spread([100 * row["held_out"] for row in group], 1)]
                cells += [f"{spread([100 * row['distilled']['agreement'] for row in group], 1)} %"]
                text += f"| {' | '.join(cells)} |\n"
    teacher = next(row for row in rows if row["fff"] == "dense")
    return text + f"| the teacher | | | | {100 * teacher['scores']['f1']:.1f} | | |\n" + TASK_JOINT_TAIL


def task_rates(rows: list[dict]) -> str:
    text = TASK_RATES
    for row in sorted(
        (row for row in rows if row["fff"] != "dense"), key=lambda row: (row["name"], row["fff_learning_rate"])
    ):
        title, score = _SCORES[row["name"]]
        cells = [
            title,
            f"{row['fff_learning_rate']:g}",
            f"{100 * row['held_out']:.1f}",
            f"{100 * row['distilled'][score]:.1f}" + ", undone" * undone(row),
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text


def by_command(rows: list[dict]) -> str:
    text = COMMAND.format(
        commands="\n".join(row["command"] for row in rows),
        texts=" and ".join(f"{row['rows'] + row['held_out']:,}" for row in rows),
        device=" or ".join(sorted({row["device"] for row in rows})),
    )
    for row in rows:
        goal, cells = GOALS.get(row["fff"]), [row["fff"], str(row["steps"]), f"{row['whole_seconds'] / 60:.1f}"]
        for kind, names in (("short", ("cosine", "cosine_p5", "neighbours")), ("long", ("cosine", "neighbours"))):
            found = row["distilled"].get(f"unseen_{kind}", {})
            cells += [f"{found[name]:.3f}" if name in found else "" for name in names]
        reached = goal is not None and row["distilled"]["unseen_short"]["cosine"] >= goal
        cells += [f"{row['cosine']:.3f}", f"{goal}, {'reached' if reached else 'missed'}" if goal else ""]
        text += f"| {' | '.join(cells)} |\n"
    return text


def cropped(rows: list[dict]) -> str:
    groups, text = by_recipe(rows, "crop"), CROP
    for group in groups:
        first, ends = group[0], [end for end in map(at_the_end, group) if end is not None]
        cells = [first["fff"], first["device"], f"{first['texts']:,} texts"]
        cells += [f"{first['steps']} x {first['batch_size']}", f"{100 * first['crop']:.0f} %", str(len(group))]
        cells += [spread([row[name] for row in group]) for name in ("eval_loss", "eval_cosine")]
        cells += [spread(ends) if ends else "", spread(cosines(group, "short")), spread(cosines(group, "long"))]
        text += f"| {' | '.join(cells)} |\n"
    return text if groups else ""


def task_inputs(rows: list[dict]) -> str:
    students = [row for row in rows if row["fff"] != "dense" and not row.get("freeze")]
    if not students:
        return ""
    first = students[0]
    told = {"steps": first["calibration_steps"], "batch": first["calibration_batch"], "tokens": first["max_tokens"]}
    text = TASK_INPUTS.format(**told, device="a CPU" if first["device"] == "cpu" else first["device"])
    teacher = next(row["scores"] for row in rows if row["fff"] == "dense")
    text += f"| the teacher | | {100 * teacher['accuracy']:.1f} | |\n"
    for row in students:
        cells = [row["fff"], "single texts" if row["first_text_alone"] else "pairs"]
        cells += [f"{100 * row['calibrated'][name]:.1f}" for name in ("accuracy", "agreement")]
        text += f"| {' | '.join(cells)} |\n"
    return text


def task_frozen(rows: list[dict]) -> str:
    students = [row for row in rows if row.get("freeze")]
    if not students:
        return ""
    first, dense = students[0], next(row["scores"]["accuracy"] for row in rows if row["fff"] == "dense")
    seeds = len({row["seed"] for row in students})
    told = {
        "steps": first["steps"],
        "batch": first["batch_size"],
        "seeds": "one seed" if seeds == 1 else f"{seeds} seeds",
    }
    text = TASK_FROZEN.format(**told, device="a CPU" if first["device"] == "cpu" else first["device"])
    for fff, group in grouped(students).items():
        before, after = ([row[part] for row in group] for part in ("calibrated", "distilled"))
        cells = [spread([100 * score[name] for score in before], 1) for name in ("accuracy", "agreement")]
        cells += [spread([100 * score["accuracy"] for score in after], 1)]
        cells += [f"{spread([100 * score['accuracy'] / dense for score in after], 1)} %"]
        cells += [spread([100 * score["agreement"] for score in after], 1)]
        text += f"| {fff} | {' | '.join(cells)} |\n"
    return text + TASK_FROZEN_TAIL


def packed(rows: list[dict]) -> str:
    """Of the longest runs alone, so that those of a table are alike."""
    runs = [row for row in rows if row["run"] == "rows" and "distilled" in row]
    if not runs:
        return ""
    recipe = max((row["steps"], row["batch_size"]) for row in runs)
    text = PACKED.format(steps=recipe[0], batch_size=recipe[1])
    for fff, every in grouped([row for row in runs if (row["steps"], row["batch_size"]) == recipe]).items():
        for trained_for in (None, "int8"):
            group = [row for row in every if row["rows"] == trained_for]
            if not group:
                continue
            plain, int8, bf16 = (
                [row[f"distilled{rows_of_trees}"]["unseen_short"] for row in group]
                for rows_of_trees in ("", "_int8_rows", "_bf16_rows")
            )
            cells = [fff, trained_for or "float32", str(len(group))]
            cells += [spread([score["cosine"] for score in scores], 4) for scores in (plain, int8, bf16)]
            cells += [spread([a["cosine"] - b["cosine"] for a, b in zip(plain, int8, strict=True)], 4)]
            cells += [spread([score["neighbours"] for score in scores]) for scores in (plain, int8)]
            text += f"| {' | '.join(cells)} |\n"
    return text


MLM_GOALS = {"1x11": 45, "8x8": 70, "4x8+mlp:36": 70, "32x6": 85}  # per cent recovered
AHEAD_GOALS = {("1x11", "mlp:12"): 10, ("8x8", "mlp:72"): 15, ("32x6", "mlp:224"): 5}  # points above the MLP


def by_teacher(rows: list[dict]) -> list[tuple[dict, dict[str, list[dict]]]]:
    """Of masked words each teacher and its students of one optimizer by kind, those first that are most."""
    found = []
    rows = [row for row in rows if row["name"] == "mlm"]
    for teacher in (row for row in rows if row["fff"] == "dense"):
        key = [teacher[name] for name in ("teacher_steps", "device")]
        students = [row for row in rows if "distilled" in row and [row["teacher_steps"], row["device"]] == key]
        for muon in (False, True):
            group = [row for row in students if bool(row.get("muon")) == muon]
            found += [(teacher, grouped(group))] if group else []
    return sorted(found, key=lambda pair: -sum(map(len, pair[1].values())))


def masked_words(rows: list[dict]) -> str:
    every = by_teacher(rows)
    text = MLM
    for teacher, groups in every:
        dense, first = teacher["scores"], groups["none"][0]
        none = mean(row["distilled"]["loss"] for row in groups["none"])
        text += f"| **teacher of {teacher['teacher_steps']} steps of {teacher['teacher_batch_size']} texts** | {INNER} | | | {dense['loss']:.3f} | 100 % | | {dense['accuracy']:.3f} | |\n"
        text += f"| students of {first['steps']} steps of {first['batch_size']} texts, {optimizer(first)}, {first['device']} |{' |' * 8}\n"
        for fff, group in groups.items():
            done = [row["distilled"] for row in group]
            shares = [100 * (none - row["loss"]) / (none - dense["loss"]) for row in done]
            cells = [fff, neurons(fff), str(len(group)), spread([row["calibrated"]["loss"] for row in group])]
            cells += [spread([row["loss"] for row in done]), f"{spread(shares, 0).replace('-0', '0')} %"]
            goal = MLM_GOALS.get(fff)
            cells += [f"{goal} %, {'reached' if mean(shares) >= goal else 'missed'}" if goal else ""]
            cells += [spread([row[name] for row in done]) for name in ("accuracy", "agreement")]
            text += f"| {' | '.join(cells)} |\n"
    kept, groups = {fff: mean(shares) for fff, shares in masked_words_kept(rows).items()}, every[0][1]
    pairs = {pair: goal for pair, goal in AHEAD_GOALS.items() if {*pair} <= {*kept}}
    losses = {fff: mean(row["calibrated"]["loss"] for row in group) for fff, group in groups.items()}
    told = {
        "ahead": [f"{t} {100 * (kept[t] - kept[mlp]):.0f} points (goal: {goal})" for (t, mlp), goal in pairs.items()],
        "calibrated": [f"{t} {losses[t]:.2f}, {mlp} {losses[mlp]:.2f}" for t, mlp in pairs],
    }
    return text + (MLM_TAIL.format(**{name: "; ".join(parts) for name, parts in told.items()}) if pairs else "")


def masked_words_kept(rows: list[dict]) -> dict[str, list[float]]:
    """By kind, of each seed, what of the difference in masked words' loss between no FFN and the teacher is kept, of the teacher with most students."""
    teacher, groups = by_teacher(rows)[0]
    losses = {fff: [row["distilled"]["loss"] for row in group] for fff, group in groups.items()}
    none, dense = mean(losses["none"]), teacher["scores"]["loss"]
    return {fff: [(none - loss) / (none - dense) for loss in every] for fff, every in losses.items()}


# In the order of the table: those that tell designs apart first.
_SCORES = {
    "mlm": ("masked words, loss", "loss"),
    "qa": ("XQuAD en, F1", "f1"),
    "mnli": ("MNLI matched, accuracy", "accuracy"),
    "wnut17": ("wnut17, F1", "f1"),
    "mrpc": ("MRPC, accuracy", "accuracy"),
    "sst2": ("SST-2, accuracy", "accuracy"),
    "qnli": ("QNLI, accuracy", "accuracy"),
    "stsb": ("STS-B, Spearman", "spearman"),
}


def apart(dense: list[float], none: list[float]) -> bool:
    """Whether two means are more than two standard errors apart. Of one teacher what its students leave counts; of single runs nobody
    can tell."""
    errors = [stdev(values) ** 2 / len(values) for values in (dense, none) if len(values) > 1]
    return len(none) > 1 and abs(mean(dense) - mean(none)) > 2 * sum(errors) ** 0.5


def tasks(rows: list[dict], title: str = "Tasks") -> str:
    """Of ``tasks_table.py``, or runs of ``tasks_minilm.py`` with one teacher a task."""
    rows = [row for row in rows if not row.get("first_text_alone") and not row.get("freeze")]
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    agreements: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        found = row["scores"] if row["fff"] == "dense" else row["distilled"]
        scale = 1 if row["name"] == "mlm" else 100
        scores[row["fff"], row["name"]].append(scale * found[_SCORES[row["name"]][1]])
        if "agreement" in found:
            agreements[row["fff"], row["name"]].append(100 * found["agreement"])
    names = [name for name in _SCORES if any(fff != "dense" and of == name for fff, of in scores)]
    students = [row for row in rows if row["fff"] != "dense"]
    kinds = list(grouped(students))
    others = [kind for kind in kinds if kind != "none"]
    example = next(row for row in students if row["name"] != "mlm")
    every = [row.get("epochs", 3) for row in rows if row["name"] != "mlm"]
    several = max(len(values) for (fff, _), values in scores.items() if fff == "dense") > 1
    text = TASKS.format(
        title=title,
        **{name: example[name] for name in ("calibration_steps", "steps", "batch_size")},
        **{name: f"at most {example[name]:,}" if example.get(name) else "all" for name in ("limit", "report_limit")},
        **{name: ", ".join(sorted({row[name] for row in students})) for name in ("device", "torch")},
        epochs=" to ".join(f"{epochs:g}" for epochs in sorted({min(every), max(every)})),
        tokens=" or ".join(f"{count:,}" for count in sorted({row["max_tokens"] for row in students})),
        teachers="each with a teacher of its own" if several else "all with the same teacher",
    )
    columns = ["dense", "seeds", *kinds, *(f"{kind} recovered" for kind in others)]
    columns += [f"{kind} agreement" for kind in kinds]
    text += f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
    kept = {}
    for name in names:
        dense, none = scores["dense", name], scores["none", name]
        digits = 3 if name == "mlm" else 1
        cells = [spread(scores[kind, name], digits) if scores[kind, name] else "-" for kind in ("dense", *kinds)]
        cells.insert(1, str(len(none)))
        for kind in others:
            told = scores[kind, name] and apart(dense, none)
            cells.append(recovered(mean(scores[kind, name]), mean(none), mean(dense)) if told else "-")
        cells += [f"{spread(agreements[kind, name], 1)} %" if agreements[kind, name] else "-" for kind in kinds]
        text += f"| {_SCORES[name][0]} | {' | '.join(cells)} |\n"
        if name != "mlm" and dense and none:
            kept[name] = mean(none) / mean(dense)
    if not kept:
        return text
    where = min(kept, key=lambda name: kept[name])
    if any(
        mean(scores[kind, name]) > mean(scores["dense", name]) for kind in others for name in kept if scores[kind, name]
    ):
        text += TASKS_ABOVE
    again = [f"{row['name']} {row['fff']} ({row['seed']})" for row in students if row.get("calibrated") and undone(row)]
    if again:
        text += TASKS_UNDONE.format(undone=", ".join(sorted(again)))
    pairs = [(scores["mlp:72", name], scores["8x8", name]) for name in kept if scores["mlp:72", name]]
    clear = [mean(mlp) > mean(tree) for mlp, tree in pairs if apart(mlp, tree)]
    return text + TASKS_TAIL.format(
        worst=f"{100 * kept[where]:.1f} %",
        where=_SCORES[where][0].split(",")[0],
        ahead=sum(clear),
        behind=len(clear) - sum(clear),
        of=len(pairs),
    )


def equal_time(rows: list[dict], found: dict) -> str:
    speeds = {row["workload"]: row["ratios"] for row in found["rows"]}
    text = EQUAL
    for fff, groups in sorted(ways(rows).items(), key=lambda item: speeds["8x128"].get(item[0], 9)):
        if fff not in speeds["8x128"]:
            continue
        best = [row["distilled"]["unseen_short"] for row in groups[0]]
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


def loop(rows: list[dict]) -> str:
    done = {(row["fff"], row["batch_size"], row["way"]): row for row in rows if "steps_a_second" in row}
    if not done:
        return ""
    first = next(iter(done.values()))
    text = LOOP.format(**{k: first[k] for k in ("device", "torch")})
    for fff, size in dict.fromkeys(key[:2] for key in done):
        plain, graphs = (done.get((fff, size, way)) for way in ("plain", "graphs"))
        cells = [fff, str(size), *(f"{row['steps_a_second']:.0f}" if row else "" for row in (plain, graphs))]
        cells += [f"{graphs['steps_a_second'] / plain['steps_a_second']:.1f}x" if plain and graphs else ""]
        cells += [f"{row['loss']:.3f}" if row else "" for row in (plain, graphs)]
        text += f"| {' | '.join(cells)} |\n"
    return text


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
    rows = runs()
    speeds = rows_of("model_time.jsonl")[-1]
    done = rows_of("tasks_minilm.jsonl")
    page = (
        HEAD
        + general(rows)
        + by_command(rows_of("command.jsonl"))
        + longer(rows)
        + tried(rows)
        + mixed(rows, rows_of("layers_time.jsonl"))
        + cropped(rows)
        + ablation(rows)
        + masked_words(done)
    )
    page += tasks(rows_of("tasks_table.jsonl"))
    page += tasks([row for row in done if row["name"] != "mlm"], "Tasks, with longer trainings and one teacher each")
    page += (
        task_inputs(rows_of("tasks_inputs.jsonl"))
        + task_frozen(rows_of("tasks_inputs.jsonl"))
        + task_joint(rows_of("tasks_joint.jsonl"))
        + task_rates(rows_of("tasks_rates.jsonl"))
        + calibrated(rows)
        + packed(rows)
    )
    page += models(speeds) + equal_time(rows, speeds) + rates(rows) + step(rows_of("step_time.jsonl")[-1])
    page += loop(rows_of("trainer_time.jsonl")) + MISSING
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    draw_curves(rows, PAGE.with_name("quality-curves.png"))


if __name__ == "__main__":
    main()
