"""Pages name tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`")


def names_in(path):
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def rows(page, header):
    """The cells of the lines of a table that starts with ``header``, by columns."""
    lines = iter(page.splitlines())
    assert any(line.startswith(header) for line in lines), f"there is no table {header}"
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_that_are_named_exist(page):
    for file, test in NAMED.findall(page.read_text(encoding="utf-8")):
        path = ROOT / "tests" / file.removeprefix("tests/")
        assert path.is_file(), f"{page.name} names {file}"
        assert not test or test in names_in(path), f"{page.name} names {test}, which {file} does not have"


def test_each_row_of_interop_has_its_test():
    found = list(rows((ROOT / "docs" / "interop.md").read_text(encoding="utf-8"), "| what | with converted models |"))
    assert len(found) > 20
    for what, _, tests in found:
        named = NAMED.findall(tests)
        assert named and all(test for _, test in named), f"no test is named for: {what}"
        assert NAMED.sub("", tests).strip(", ") == "", f"something else stands beside the tests of: {what}"
