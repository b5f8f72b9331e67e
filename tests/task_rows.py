"""Small data of each task, for the tiny models."""

import random

from tiny import tiny_config
from transformers import BertTokenizer

from hf_fff.tasks import get_task

WORDS = [f"word{i}" for i in range(100)]


def tiny_tokenizer():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})


def rows_of(task, count, seed=0):
    """Rows with words that are all different, from a range of words that depends on the seed."""

    def text(n, length):
        return " ".join(WORDS[50 * seed + (7 * n + i) % 50] for i in range(length))

    made = {
        "classification": lambda n: {"sentence1": text(n, 3), "sentence2": text(n + 1, 2 + n % 3), "label": n % 3},
        "regression": lambda n: {"sentence": text(n, 3 + n % 4), "score": n / 2},
        "tokens": lambda n: {
            "tokens": text(n, 3 + n % 4).split(),
            "tags": ["O", "B-x", "O", "I-x", "O", "O"][: 3 + n % 4],
        },
        "qa": lambda n: {
            "question": text(n, 2),
            "context": text(n, 6),
            "answers": [{"text": text(n, 1), "answer_start": 0}],
        },
        "mlm": lambda n: {"text": text(n, 5 + n % 9)},
    }[task]
    return [made(n) for n in range(count)]


def learnable(task, count, seed=0):
    """Rows in which one thing tells all: whether or where one of the first ten words stands, or which word all others are."""
    g = random.Random(seed)

    def text(length):
        return [g.choice(WORDS[50:]) for _ in range(length)]

    def with_word(length, word):
        words = text(length)
        place = g.randrange(length)
        return [*words[:place], word, *words[place + 1 :]], place

    made = []
    for n in range(count):
        word = g.choice(WORDS[:10])
        if task == "classification":
            words, _ = with_word(6, WORDS[n % 2])
            made.append({"sentence": " ".join(words), "label": ["left", "right"][n % 2]})
        elif task == "regression":
            words, _ = with_word(6, WORDS[n % 4])
            made.append({"sentence": " ".join(words), "score": n % 4 / 2})
        elif task == "tokens":
            words, place = with_word(6, word)
            made.append({"tokens": words, "tags": ["B-x" if i == place else "O" for i in range(6)]})
        elif task == "qa":
            words, place = with_word(8, word)
            start = sum(len(w) + 1 for w in words[:place])
            answers = [{"text": word, "answer_start": start}]
            made.append({"question": "word20 word21", "context": " ".join(words), "answers": answers})
        else:
            made.append({"text": " ".join([word] * 8)})
    return made


def encode(task, rows, tokenizer):
    config = tiny_config(num_labels=1 if task == "regression" else 3)
    if task == "tokens":
        config.id2label, config.label2id = {0: "O", 1: "B-x", 2: "I-x"}, {"O": 0, "B-x": 1, "I-x": 2}
    return get_task(task).encode(rows, tokenizer, config, max_length=48)


def bare(task, count, tokenizer, seed=1):
    columns = {"label", "score", "tags", "answers"}
    return encode(
        task, [{k: v for k, v in r.items() if k not in columns} for r in rows_of(task, count, seed)], tokenizer
    )
