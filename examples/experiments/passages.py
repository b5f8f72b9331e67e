"""Text for the experiments: half of it single sentences, half runs of sentences of up to 90 words, one a line.

    python examples/experiments/passages.py DATA OUT

From DATA/NAME.train.txt and DATA/NAME.valid.txt (one paragraph a line) it writes OUT/train.txt, OUT/unseen_short.txt and
OUT/unseen_long.txt; and OUT/more.txt, what of the sources is left over.
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MEGABYTES = {  # of each source at most, in train.txt
    "brown": 6,
    "novels": 10,
    "imdb_unsup": 14,
    "wiki_paragraphs": 3,
    "wiki_sentences": 3,
    "speeches": 3,
    "python_peps": 5,
    "rust_book": 1,
}
UNSEEN = 400  # of each source, short and long each
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(])")


def sentences(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield from (s for s in _SENTENCE_END.split(line.strip()) if s and 4 <= len(s.split()) <= 90)


def short_and_long(every: list[str], characters: float) -> tuple[list[str], list[str], list[str]]:
    """Sentences alone, and runs of as many as fit into 90 words, of about ``characters`` together; and the sentences that are left."""
    runs: tuple[list[str], list[str]] = ([], [])
    at, size = 0, [0, 0]
    while at < len(every) and sum(size) < characters:
        kind = int(size[0] > size[1])  # whichever has less of it so far
        end, words = at + 1, len(every[at].split())
        while kind and end < len(every) and (words := words + len(every[end].split())) <= 90:
            end += 1
        runs[kind].append(" ".join(every[at:end]))
        size[kind] += len(runs[kind][-1])
        at = end
    return *runs, every[at:]


def turned(path: Path, rng: random.Random) -> list[str]:
    """The sentences of a file, from a random one on."""
    every = list(sentences(path))
    at = rng.randrange(len(every))
    return every[at:] + every[:at]


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    rng = random.Random(0)
    train: list[str] = []
    more: list[str] = []
    unseen: tuple[list[str], list[str]] = ([], [])
    for name, megabytes in MEGABYTES.items():
        short, long, rest = short_and_long(turned(data / f"{name}.train.txt", rng), 1e6 * megabytes)
        train += short + long
        short, long, _ = short_and_long(rest, float("inf"))
        more += short + long
        for all_of_it, part in zip(
            unseen, short_and_long(turned(data / f"{name}.valid.txt", rng), 1e6)[:2], strict=True
        ):
            rng.shuffle(part)
            all_of_it += part[:UNSEEN]
    for name, texts in (("train", train), ("unseen_short", unseen[0]), ("unseen_long", unseen[1]), ("more", more)):
        rng.shuffle(texts)
        (out / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
        print(f"{name}: {len(texts)} texts, {sum(len(t.split()) for t in texts)} words")


if __name__ == "__main__":
    main()
