"""The table of docs/memory.md is what the plan says."""

import pytest

from scripts.memory_table import DOCUMENT, written

pytestmark = pytest.mark.quick


def test_the_table_is_what_the_plan_says():
    document = DOCUMENT.read_text()
    assert document == written(document), "run python scripts/memory_table.py --write"
