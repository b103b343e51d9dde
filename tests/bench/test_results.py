"""Every measured figure has a file that is there, and every file is quoted."""

import json
import pathlib
import re

import pytest

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "convert/*.md", "configs/*.md", "notebooks/*.md")
    for path in ROOT.glob(pattern)
]
SOURCES = [path for folder in ("wan_jax", "wan_bench", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]


def quoted(path):
    """Names of the result files in a text."""
    return set(re.findall(r"results/(\w+\.json)", path.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_quoted_results_are_there():
    for path in [*PAGES, *SOURCES]:
        missing = {name for name in quoted(path) if not (RESULTS / name).exists()}
        assert not missing, f"{path.relative_to(ROOT)} quotes {sorted(missing)}"


def test_results_are_quoted_and_named_by_what_they_claim():
    names = {path.name for path in RESULTS.iterdir()}
    assert names - set().union(*map(quoted, PAGES)) == set(), "quoted nowhere"
    assert [name for name in sorted(names) if re.search(r"_(first|second|third|clean|new|old)\b", name[:-5])] == []
    for name in names:
        json.loads((RESULTS / name).read_text())
