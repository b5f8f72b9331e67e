"""Passages for calibrate_minilm.py: runs of 12 to 100 words from text files NAME.train.txt and NAME.valid.txt (one paragraph a line).

python examples/experiments/passages.py DATA OUT      # writes OUT/shared.txt and OUT/shared_valid.txt
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

PASSAGES = {
    "brown": 12000,
    "novels": 14000,
    "imdb_unsup": 14000,
    "wiki_paragraphs": 6000,
    "wiki_sentences": 12000,
    "speeches": 5000,
    "python_peps": 4000,
    "rust_book": 1000,
}
UNSEEN = 150  # of each


def passages(path: Path, rng: random.Random) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split() if len(line) >= 20 else []
        while words:
            size = rng.choice([12, 20, 40, 80, 90, 100])
            yield " ".join(words[:size])
            words = words[size:]


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    rng = random.Random(0)
    for split, file in (("train", "shared.txt"), ("valid", "shared_valid.txt")):
        chosen: list[str] = []
        for name, count in PASSAGES.items():
            found = list(passages(data / f"{name}.{split}.txt", rng))
            rng.shuffle(found)
            chosen += found[: count if split == "train" else UNSEEN]
        rng.shuffle(chosen)
        (out / file).write_text("\n".join(chosen), encoding="utf-8")


if __name__ == "__main__":
    main()
