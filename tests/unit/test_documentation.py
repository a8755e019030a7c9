"""The documents name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.md")})
PATH = re.compile(r"(?<![\w/.-])(?:tests|server|client|docs|examples|bench|proto)/[\w./*-]*\w/?")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document):
    named = set(PATH.findall(document.read_text()))
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []
