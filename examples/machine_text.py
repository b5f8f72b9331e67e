"""English prose that is on every machine with Python: calibration text without a download.

It comes from docstrings and documentation files of the standard library and of the installed
packages. Only text that reads like English stays; code, tables, signatures and markup go.
"""

from __future__ import annotations

import ast
import codecs
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

SHARE, LICENCE_SHARE = 0.1, 0.02  # the most of the characters that one source may give
SUFFIXES = {".py", ".rst", ".md", ".html", ".txt"}
SKIPPED = {"test", "tests", "testing", "include", "site-packages", "dist-packages", "hf_fff"}
COMMON = frozenset(
    "a all also an and any are as at be been but by can do does each for from has have if in into "
    "is it its may more most no not of on one only or other should since so some such than that "
    "the their then there these they this to up use used was we when where which while will with "
    "you your".split()
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MARKUP = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<[/!]?[a-zA-Z][^<>]*>", " "),  # HTML tags
        (r"!\[[^\]]*\]\([^)]*\)| ?\[(?:\d+|\^?\w+_?\d{4}\w*)\]_?", ""),  # images, citations
        (r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])", r"\1"),  # links
        (r"(?::[a-z:]+:)?`+[~!]?\.?([^`<]*[^`<\s])\s*<[^`>]*>`+_{0,2}", r"\1"),
        (r":[a-z:]+:`[~!]?\.?([^`]+)`|`+([^`]+)`+_{0,2}", r"\1\2"),
        (r"\*\*([^*]+)\*\*|(?<!\w)\*([^*\s][^*]*)\*(?!\w)|(?<!\w)_([^_\s]+)_(?!\w)", r"\1\2\3"),
        (r"^(?:[-*+•#>]+|\d+[.)]|\(?[a-z]\)) +", ""),  # list marks
        (r"^[\w.,* -]{1,50} \((?:[^()]|\([^()]*\))*\)\s*(?::|--?) *", ""),  # parameters
        (r"\s+", " "),
        (r" (?=[,.;:])", ""),
    )
]
CODE = re.compile(r"\s*(>>>|\.\.\.|\.\. |In \[|:\w[^:`]*:|@\w|\||\+[-=+]|[=\-~^#*\"'`]{3,}|\$ |% )")
ITEM = re.compile(r"\s*([-*+•]|\d+[.)]|[\w.`*]+ \(.*\)\s*:|#+)\s")
SENTENCE = re.compile(r"(?<!e\.g\.)(?<!i\.e\.)(?<!cf\.)(?<!vs\.)(?<!etc\.)(?<!\b[A-Z]\.)(?<=[.!?]) +(?=[A-Z\"])")
BAD = re.compile(  # signs of code, markup or a cut sentence
    r"[^\w\s.,;:!?'\"()/%&+-]|_|:\w|https?|www\.|--|\.\.|\w\(|\w/\w+/|\)\w| [.,;] |[A-Z]{9}|TODO"
    r"|\b[ie]\.[eg]\.$"
)
ODD = re.compile(r"\d|[a-z][A-Z]|\w\.\w|/|\+|[A-Z]{2}|^[^aAI]$")


def _texts(path: Path) -> Iterator[str]:
    """Yield a file's docstrings or, if it is documentation, its text; nothing if unreadable."""
    try:
        content = path.read_text(encoding="utf-8") if path.stat().st_size < 1_000_000 else ""
        if path.name in ("this.py", "METADATA"):
            yield codecs.decode(content, "rot13") if path.suffix else content.partition("\n\n")[2]
        elif path.parent.name == "pydoc_data" and path.suffix:
            yield from ast.literal_eval(content.partition("topics = ")[2] or "{}").values()
        elif path.suffix != ".py":
            yield re.sub(r"</(?:p|h\d|li|d[dt])>", "\n\n", content)
        elif len("".join(content.split('"""')[1::2])) > 0.3 * len(content):  # worth parsing
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nodes: list[ast.AST] = [ast.parse(content)]
            for node in nodes:  # grows below
                if isinstance(node, DOCUMENTED):
                    yield ast.get_docstring(node) or ""
                    nodes.extend(node.body)
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text, each on one line and without its markup."""
    lines: list[str] = []
    indent, skipping, fenced = -1, False, False
    for line in [*text.splitlines(), ""]:
        margin = len(line) - len(line.lstrip())
        fenced ^= line.lstrip().startswith("```")
        skipping = bool(line.strip()) and (skipping or fenced or CODE.match(line) is not None)
        item = ITEM.match(line) is not None
        if lines and (not line.strip() or skipping or item or indent not in (-1, margin)):
            paragraph = " ".join(lines)
            for pattern, replacement in MARKUP:
                paragraph = pattern.sub(replacement, paragraph)
            yield paragraph.strip()
            lines = []
        indent = -1 if item else margin  # after the first line of an item, any margin goes on
        if line.strip() and not skipping:
            lines.append(line.strip())


def _is_english(sentence: str) -> bool:
    """Tell whether a sentence reads like English prose, and not like code, a title or a table."""
    words = sentence.split()
    return (
        6 <= len(words) <= 60
        and sentence[-1] in ".?!"
        and (sentence[0].isupper() or sentence[0] == '"')
        and BAD.search(sentence) is None
        and sum(c.isalpha() for c in sentence) >= 0.76 * len(sentence)
        and sum(ODD.search(w) is not None for w in words) <= 0.15 * len(words)
        and sum(w.strip('.,;:"()').lower() in COMMON for w in words) >= 0.25 * len(words)
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
    )


def _pieces(paths: Iterable[Path], seen: set[str], rng: random.Random) -> Iterator[str]:
    """Yield what is new in files: lone sentences, and runs of neighbours of up to 80 words."""
    for text in (text for path in paths for text in _texts(path)):
        limit = 0 if rng.random() < 0.25 else rng.randint(40, 80)
        runs: list[list[str]] = [[]]
        for sentence in (s for p in _paragraphs(text) for s in SENTENCE.split(p)):
            plain = re.sub(r"(?<!^)\b\w*[A-Z\d]\w*", "", sentence)  # names and numbers alone differ
            key = re.sub(r"[^a-z]+", " ", plain.lower())
            if key not in seen and _is_english(sentence):
                seen.add(key)
                if runs[-1] and len(" ".join([*runs[-1], sentence]).split()) > limit:
                    runs.append([])
                runs[-1].append(sentence)
        yield from (" ".join(run) for run in runs if len(run) > 1 or (run and rng.random() < 0.6))


def _files(root: Path, rng: random.Random) -> Iterator[Path]:
    """Yield the Python and documentation files of a folder, or a lone file, in shuffled order."""
    found = sorted(root.rglob("*.*")) if root.is_dir() else [root]
    rng.shuffle(found)
    for path in found:
        if path.suffix in SUFFIXES and not SKIPPED.intersection(path.relative_to(root).parts):
            yield path


def machine_text(max_chars: int, seed: int = 0) -> list[str]:
    """Return distinct English sentences and paragraphs from the machine's own texts, shuffled.

    They hold at most ``max_chars`` characters in all (fewer if the machine has no more) and are
    the same for the same seed and installed files. Half of them or more are single sentences.
    """
    rng, seen = random.Random(seed), set[str]()
    paths = sysconfig.get_paths()
    roots = sorted({Path(paths[key]) for key in ("stdlib", "purelib", "platlib")})
    entries = sorted(entry for root in roots if root.is_dir() for entry in root.iterdir())
    dists = [e for e in entries if e.suffix == ".dist-info" and not e.name.startswith("hf_fff")]
    licences = [p for e in dists for p in sorted(e.glob("licenses/**/*")) if p.is_file()]
    licences += [e for e in entries if e.name == "LICENSE.txt"]
    sources = [(_pieces(licences, seen, rng), LICENCE_SHARE)]
    sources += [(_pieces([e / "METADATA"], seen, rng), SHARE) for e in dists]
    packages = [e for e in entries if e.suffix == ".py" or (e.is_dir() and "." not in e.name)]
    packages = [e for e in packages if e.name not in SKIPPED]
    sources += [(_pieces(_files(e, rng), seen, rng), SHARE) for e in packages]
    rng.shuffle(sources)
    chosen: list[str] = []
    taken, total, live = [0] * len(sources), 0, list(range(len(sources)))
    while live:  # in turns: no source drowns the others, and reading stops early
        for index in list(live):
            piece = next(sources[index][0], "")
            if not piece or taken[index] + len(piece) > sources[index][1] * max_chars:
                live.remove(index)
                continue
            if total + len(piece) > max_chars:
                live.clear()
                break
            taken[index] += len(piece)
            total += len(piece)
            chosen.append(piece)
    rng.shuffle(chosen)
    return chosen
