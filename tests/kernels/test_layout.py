"""The shape of `rpo_kernels`: which way imports point, what a backend is, how long calls may be."""

import ast
import inspect
from pathlib import Path

import pytest

import rpo_kernels
from rpo_kernels.backends import Backend, torch_backend

FOLDER = Path(rpo_kernels.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
MOST = 8  # positional arguments of a call


def name_of(path: Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """The package's modules that a module imports, wherever in it."""
    modules, found = {name_of(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rpo_kernels"):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole & modules or {node.module}
    return found


GRAPH = {name_of(path): imports(path) for path in FILES}
LAZY = {("rpo_kernels.backends", f"rpo_kernels.backends.{x}_backend") for x in ("torch", "triton")}


def test_no_module_imports_itself_through_others():
    left = {name: {x for x in to if (name, x) not in LAZY} for name, to in GRAPH.items()}
    while free := [name for name, to in left.items() if not to & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_the_oracle_is_imported_by_the_doctor_only():
    found = [name for name, to in GRAPH.items() if "rpo_kernels.oracle" in to]
    assert found == ["rpo_kernels.doctor.accuracy"]


def test_nothing_imports_the_doctor():
    found = [name for name, to in GRAPH.items() if any(".doctor" in other for other in to)]
    assert not [name for name in found if ".doctor" not in name]


def test_the_backends_do_not_import_each_other():
    ours = {name: to for name, to in GRAPH.items() if ".backends." in name}
    triton = {name for name in ours if "triton" in name}
    assert "rpo_kernels.backends.torch_backend" in ours and len(triton) == 5
    for name, to in ours.items():
        other = "torch_backend" if name in triton else "triton"
        assert not [x for x in to if other in x], name


@pytest.mark.parametrize("name", ["torch_backend", "triton_backend"])
def test_a_backend_has_the_functions_of_the_protocol(name):
    module = torch_backend
    if name == "triton_backend":
        module = pytest.importorskip("rpo_kernels.backends.triton_backend")
    functions = {k: v for k, v in vars(Backend).items() if inspect.isfunction(v) and k[0] != "_"}
    assert len(functions) == 8
    for method, declared in functions.items():
        wanted = list(inspect.signature(declared).parameters.values())[1:]
        assert list(inspect.signature(getattr(module, method)).parameters.values()) == wanted


def jitted(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def calls(node: ast.AST):
    """Every call in plain Python; kernels have no structures to pass."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.FunctionDef) and jitted(child)):
            if isinstance(child, ast.Call):
                yield child
            yield from calls(child)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_call_has_more_than_eight_positional_arguments(path):
    found = list(calls(ast.parse(path.read_text(encoding="utf-8"))))
    long = [ast.unparse(call) for call in found if len(call.args) > MOST]
    assert not long
