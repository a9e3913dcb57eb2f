"""The shape of `trainer` and `benchmarks`: rooms by role, no import that comes back to itself."""

import ast

import pytest

from trainer.paths import ROOT


def modules(*packages: str) -> dict[str, ast.Module]:
    """Every module of some packages by its dotted name, parsed."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def arrows(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Which of these modules each imports, anywhere in it, for type checkers alone included."""
    graph = {}
    for name, tree in trees.items():
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = {f"{node.module}.{alias.name}" for alias in node.names} & trees.keys()
                graph[name] |= named or {node.module} & trees.keys()
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & trees.keys()
    return graph


def circle(graph: dict[str, set[str]]) -> set[str]:
    """The modules that remain when those that import none of the others are taken away."""
    left = dict(graph)
    while done := [name for name, to in left.items() if not to & left.keys() - {name}]:
        for name in done:
            del left[name]
    return set(left)


def test_the_search_finds_a_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {*"abcd"}


@pytest.mark.parametrize("packages", [("trainer",), ("benchmarks",), ("trainer", "benchmarks")])
def test_no_module_imports_itself_through_others(packages):
    assert not circle(arrows(modules(*packages)))


def test_the_trainer_imports_no_benchmark_and_the_kernels_no_trainer():
    graph = arrows(modules("trainer", "benchmarks", "rpo_kernels"))
    ours = {name: to for name, to in graph.items() if not name.startswith("benchmarks")}
    assert not [(a, b) for a, to in ours.items() for b in to if b.startswith("benchmarks")]
    kernels = {name: to for name, to in graph.items() if name.startswith("rpo_kernels")}
    assert not [(a, b) for a, to in kernels.items() for b in to if b.startswith("trainer")]


# Rooms of the trainer from the ground up; a room imports from those below it, and from itself.
FLOORS = ("errors", "paths", "console", "config", "data", "model", "reference", "parallel")


def test_arrows_between_rooms_point_down():
    graph = arrows(modules("trainer"))
    floor = {f"trainer.{room}": number for number, room in enumerate(FLOORS)}

    def room(name: str) -> int:
        return floor.get(".".join(name.split(".")[:2]), len(FLOORS))

    assert not [(a, b) for a, to in graph.items() for b in to if room(b) > room(a)]


def test_no_module_stands_beside_a_folder_of_its_name():
    folders = {path for path in (ROOT / "trainer").rglob("*") if path.is_dir()}
    assert not [
        path for path in (ROOT / "trainer").rglob("*.py") if path.with_suffix("") in folders
    ]
