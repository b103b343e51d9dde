"""The order of the house: which folder may import which, how many modules there are, and how long they may be.

Imports are read from the source, so that those inside functions and under TYPE_CHECKING count, too.
"""

import ast
import functools
import pathlib
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.quick

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = "wan_jax", "wan_nano", "wan_bench"

# From the ground up. A folder or module of wan_jax imports from floors below its own, and from its own without circles.
FLOORS = (
    ("errors",),
    ("config", "fields", "presets", "parameters", "assets"),
    ("kernels", "runtime"),
    ("parallel",),
    ("models",),
    ("media", "text"),
    ("diffusion",),
    ("checkpoint",),
    ("lora",),
    ("planning",),
    ("generation",),
    ("pipeline",),
    ("training", "testing"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FLOOR["wan_jax"] = FLOOR["pipeline"]  # what the package itself exports
LIMIT = 500  # lines of a module
LENGTHS = {"wan_jax.pipeline": 299, "wan_jax.models.denoiser": 560}  # of those with a limit of their own
# Fewer than these; the engine is wan_jax without its testing folder: 17,500 lines when its rooms were made, and what
# users have been given since.
LINES = {"engine": 20_500, "core": 6_000}
CORE = "models", "kernels", "diffusion", "parallel"

# What is still to be mended. A line goes when its import, circle or length does.
KNOWN: set[str] = set()
TORCH = "torch", "diffusers"  # only the tests under tests/parity may need them


@functools.cache
def sources() -> dict[str, str]:
    """Source of every module, by dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text()
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@functools.cache
def imports() -> dict[str, set[str]]:
    """The modules of these packages that each module imports anywhere in its source."""
    found: dict[str, set[str]] = {}
    for module, source in sources().items():
        names = {name for node in ast.walk(ast.parse(source)) for name in imported_names(node)}
        found[module] = {as_module(name) for name in names if name.split(".")[0] in PACKAGES} - {module}
    return found


def imported_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute in these packages"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def as_module(name: str) -> str:
    """The module that has a name: "wan_jax.config.WanConfig" -> "wan_jax.config"."""
    while name not in sources():
        name = name.rpartition(".")[0]
    return name


def room(module: str) -> str:
    """The folder or top-level module that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Every group of nodes that import each other, written "a <-> b <-> c"."""
    reach = {name: reachable(graph, name) for name in graph}
    return {
        " <-> ".join(sorted({name} | {other for other in reach[name] if name in reach[other]}))
        for name in graph
        if name in reach[name]
    }


def upward() -> set[str]:
    """Imports from a floor above."""
    return {
        f"{module} -> {target}"
        for module, targets in imports().items()
        if module.startswith("wan_jax.")
        for target in targets
        if not target.startswith("wan_jax") or FLOOR[room(target)] > FLOOR[room(module)]
    }


def room_circles() -> set[str]:
    graph: dict[str, set[str]] = {}
    for module, targets in imports().items():
        if module.startswith("wan_jax."):
            inside = {room(target) for target in targets if target.startswith("wan_jax.")}
            graph.setdefault(room(module), set()).update(inside - {room(module)})
    return circles(graph)


def too_long() -> set[str]:
    lengths = {module: len(source.splitlines()) for module, source in sources().items()}
    return {module for module, lines in lengths.items() if lines > LENGTHS.get(module, LIMIT)}


def too_large() -> set[str]:
    """Which of "engine" and "core" have too many lines."""
    lines = {module: len(source.splitlines()) for module, source in sources().items() if module.startswith("wan_jax")}
    sizes = {
        "engine": sum(count for module, count in lines.items() if room(module) != "testing"),
        "core": sum(count for module, count in lines.items() if room(module) in CORE),
    }
    return {name for name, size in sizes.items() if size >= LINES[name]}


def torch_outside_parity() -> set[str]:
    """Test files that import PyTorch, or an original that needs it, outside tests/parity."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if not path.is_relative_to(ROOT / "tests" / "parity")
        for name in imported_from(path)
        if name.split(".")[0] in TORCH or name.startswith("tests.parity")
    }


@functools.cache
def defined_names(module: str) -> set[str]:
    """The names that a module's source binds at its top."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(sources()[module])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def missing_names() -> set[str]:
    """What scripts, benchmarks and tests import of these packages and is not there."""
    missing = set()
    for folder in (*PACKAGES, "benchmarks", "scripts", "convert", "configs", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in imported_from(path):
                if name.split(".")[0] in PACKAGES:
                    module = as_module(name)
                    known = exported() if module == "wan_jax" else defined_names(module)
                    if name[len(module) + 1 :] not in {"", *known}:
                        missing.add(f"{path.relative_to(ROOT)}: {name}")
    return missing


@functools.cache
def imported_from(path: pathlib.Path) -> set[str]:
    """All that a file imports, anywhere in its source."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported_names(node)}


@functools.cache
def exported() -> set[str]:
    import wan_jax

    return {*dir(wan_jax), *wan_jax.__all__}


FINDERS = {
    "nothing imports from a floor above": upward,
    "no modules import each other": lambda: circles(imports()),
    "no folders import each other": room_circles,
    "modules are short": too_long,
    "the engine stays small": too_large,
    "torch is for tests of parity": torch_outside_parity,
    "what is imported is there": missing_names,
}


@pytest.mark.parametrize("rule", FINDERS)
def test_the_order_of_the_house(rule):
    found = FINDERS[rule]()
    assert found <= KNOWN, f"new: {sorted(found - KNOWN)}"


def test_what_is_mended_is_struck_off_the_list():
    found = set().union(*(find() for find in FINDERS.values()))
    assert found >= KNOWN, f"strike off: {sorted(KNOWN - found)}"


def test_every_room_has_a_floor():
    rooms = {room(module) for module in sources() if module.startswith("wan_jax.")}
    assert rooms <= FLOOR.keys(), f"give {sorted(rooms - FLOOR.keys())} a floor"


def test_few_modules_at_the_top():
    modules = [path.stem for path in (ROOT / "wan_jax").glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= 8, modules
