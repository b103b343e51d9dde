"""What README.md and docs/ tell to type works.

The blocks of Python and of commands of a page run one after the other, in an empty folder. A comment on the line before
a block says what else becomes of it:

    <!-- needs real weights -->     (or a GPU, several hosts, ...) it does not run; its commands go through the parser,
                                    and its imports and arguments are looked up
    <!-- file: prompts.jsonl -->    it is written to that file

Of a diff, which names its file, the lines that were there before must be there still.
"""

import ast
import importlib
import inspect
import os
import pathlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from unittest import mock

import pytest

from tests.quick_compiles import quick_compiles  # noqa: F401 (a fixture)
from wan_jax import WanPipeline
from wan_jax.cli.main import main, make_parser
from wan_jax.cli.options import options_of
from wan_jax.cli.recipes import get_recipe, load_recipe
from wan_jax.cli.train import TRAINERS, load_train_recipe
from wan_jax.training.config import TrainOptions

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
CALLS = {"pipe": WanPipeline.__call__, "from_pretrained": WanPipeline.from_pretrained, "results": WanPipeline.results}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    comment: str
    language: str
    text: str
    line: int

    @property
    def commands(self) -> Iterator[list[str]]:
        """The words of each `wan-jax` command; of a line that starts it by another program, those from `wan-jax` on."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            names = [pathlib.PurePath(word).name for word in words]
            if "wan-jax" in names:
                yield words[names.index("wan-jax") + 1 :]
            elif words:
                assert self.comment, f"line {self.line}: only wan-jax runs here, not {words[0]}; say what it needs"


def blocks_of(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(match["comment"] or "", match["language"], match["text"], text[: match.start()].count("\n") + 1)
        for match in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "wan_jax"):  # as in a clone
        (tmp_path / folder).symlink_to(ROOT / folder)
    names: dict = {}
    with mock.patch.dict(os.environ):
        for block in blocks_of(page):
            kind, _, file = block.comment.partition(": ")
            if kind == "file":
                path = tmp_path / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
            elif block.language == "python":
                code = compile("\n" * block.line + block.text, page.name, "exec")
                check_python(block.text) if block.comment else exec(code, names)
            elif block.language == "bash":
                for words in block.commands:
                    if block.comment:
                        check_command(words)
                    else:
                        assert main(words) == 0, f"line {block.line}: wan-jax {shlex.join(words)}"


def check_command(words: list[str]) -> None:
    """Reads a command as `wan-jax` does, but for running it."""
    values, rest = make_parser().parse_known_args(words)
    assert not rest or "takes_rest" in values, f"unknown arguments {rest}"
    if values.command == "sample":
        load_recipe(rest)
    elif values.command == "train":
        trainers = [entry.load()[0] for entry in entry_points(group=TRAINERS)]
        load_train_recipe(rest, (TrainOptions, *trainers))
    elif values.command != "bench":  # whose --mesh is a list
        recipe = vars(values).get("recipe")
        options_of(values, {} if recipe is None else get_recipe(recipe))


def check_python(text: str) -> None:
    """Looks up what is imported of this project, and the arguments of calls of a pipeline."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition("_")[0] == "wan":
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            known = inspect.signature(CALLS[name]).parameters if name in CALLS else None
            assert known is None or {str(each.arg) for each in node.keywords} <= known.keys(), ast.unparse(node)


def check_diff(text: str) -> None:
    """Looks up the lines that a diff leaves or takes away, and where it adds a file, the folder."""
    first, *lines = text.splitlines()
    path, _, is_new = first.removeprefix("--- ").partition(" ")
    source = (ROOT / path).parent.glob("*.py") if is_new else [ROOT / path]
    known = {line for file in source for line in file.read_text().splitlines()}
    assert {line[1:] for line in lines if line[0] in " -"} <= known, path


@pytest.mark.quick
def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


@pytest.mark.quick
@pytest.mark.parametrize(("page", "lines"), [("README.md", 120), ("ARCHITECTURE.md", 90)])
def test_front_pages_are_short(page, lines):
    assert len((ROOT / page).read_text().splitlines()) <= lines
