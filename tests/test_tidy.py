"""The shape of the source: imports point down, each dependency has its place.

ruff and mypy are not run here; contrib/test does that.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "fleecefs"

# Low to high. A module imports only from packages at or before its own.
ORDER = [
    "units",
    "errors",
    "killpoint",
    "logs",
    "block",
    "qcow2",
    "nbd",
    "state",
    "bitmaps",
    "inventory",
    "jobs",
    "replication",
    "fuse",
    "control",
    "daemon",
    "keeper",
    "cli",
]

# Who may import a library; every package for those not named here.
ONLY_IN = {
    "click": {"cli"},
    "pyfuse3": {"fuse"},
    "rich": {"cli"},
    "sdnotify": {"daemon"},
    "trio": set(ORDER) - {"block", "qcow2"},
}

# They name the package as a whole, not a place in it.
EXEMPT = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}

SHAPELESS = {"utils", "common", "helpers", "manager"}

MODULES = sorted(PACKAGE.rglob("*.py"))

each_module = pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.relative_to(TOP))) for p in MODULES]
)
each_placed_module = pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=str(p.relative_to(TOP))) for p in MODULES if p not in EXEMPT],
)


def place_of(path: Path) -> str:
    """Return the name in ORDER that a module should be found under."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str) -> Iterator[str]:
    """Return the dotted name of everything imported, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def libraries(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)}


def own_imports(source: str) -> set[str]:
    """Return the packages and modules of ours, as in ORDER, that are imported.

    `from fleecefs import __version__` names none; a relative import is named "".
    """
    names = (name.split(".") for name in imports(source))
    return {
        name[1] if name[0] else ""
        for name in names
        if name[0] in ("fleecefs", "") and len(name) > 1 and name[1] != "__version__"
    }


def pointing_up(place: str, source: str) -> set[str]:
    """Return what a module in this place imports and may not."""
    return own_imports(source) - set(ORDER[: ORDER.index(place) + 1])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        pytest.param("import fleecefs.block.disk", set(), id="below"),
        pytest.param("from fleecefs.control.qmp import encode", set(), id="itself"),
        pytest.param("from fleecefs import __version__", set(), id="version"),
        pytest.param("import fleecefs.cli", {"cli"}, id="above"),
        pytest.param("from fleecefs import keeper", {"keeper"}, id="above, from"),
        pytest.param("def f(): import fleecefs.cli", {"cli"}, id="in a function"),
        pytest.param("from fleecefs.extra import f", {"extra"}, id="not in the list"),
        pytest.param("from . import qmp", {""}, id="relative"),
        pytest.param("from ..block import disk", {""}, id="relative, two dots"),
        pytest.param("import os.path, json", set(), id="not ours"),
    ],
)
def test_the_search_for_imports_finds(source, found):
    assert pointing_up("control", source) == found


def test_there_are_modules():
    assert MODULES


@each_placed_module
def test_every_module_has_its_place(path):
    assert place_of(path) in ORDER


@each_placed_module
def test_imports_point_down(path):
    assert pointing_up(place_of(path), path.read_text()) == set()


@each_placed_module
def test_libraries_stay_in_their_place(path):
    place = place_of(path)

    found = libraries(path.read_text())

    assert {name for name in found if place not in ONLY_IN.get(name, {place})} == set()


def test_keeper_needs_nothing_that_could_fail():
    source = (PACKAGE / "keeper.py").read_text()

    assert libraries(source) <= sys.stdlib_module_names | {"fleecefs"}
    assert own_imports(source) <= {"errors", "units", "fuse"}
    # All it takes from fuse/ is how to mount, which needs no more than it does.
    mount = (PACKAGE / "fuse" / "mount.py").read_text()
    assert libraries(mount) <= sys.stdlib_module_names | {"fleecefs"}
    assert own_imports(mount) <= {"errors"}
    # It forks, which does not go together with threads.
    assert not libraries(source) & {"threading", "_thread", "concurrent"}


def test_qcow2_stands_on_its_own():
    sources = [path.read_text() for path in (PACKAGE / "qcow2").glob("*.py")]

    for source in sources:
        assert libraries(source) <= sys.stdlib_module_names | {"fleecefs", "bitarray"}
        assert own_imports(source) <= {"units", "errors", "qcow2"}


@each_module
def test_names_say_what_a_module_is(path):
    names = path.relative_to(PACKAGE).with_suffix("").parts

    assert not SHAPELESS.intersection(names)


def test_block_tests_are_named_for_their_module():
    tests = (TOP / "tests" / "block").glob("test_*.py")

    tested = {path.name.removeprefix("test_") for path in tests}

    assert tested <= {path.name for path in (PACKAGE / "block").glob("*.py")}
