"""The house: imports lead downwards only, from the commands to the ground floor."""

import ast
from pathlib import Path

import pytest

from conftest import CORE

ROOT = Path(__file__).parent.parent

# From the ground up; a room imports from floors below its own, and files of a room from each other.
FLOORS = [
    {"program", "kernels"},
    {"model", "tokens"},
    {"data", "checkpoint"},
    {"planning", "adapters"},
    {"training", "decoding", "tulu_mixture"},
    {"demo"},
    {"evals"},
    {"selection"},
    {"sft", "dpo", "generate", "evaluate", "mixture", "plot", "plan", "prune"},
    {"benchmarks"},
    {"bench"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = [path for room in sorted(FLOOR) for path in sorted((ROOT / room).glob("*.py"))]
FILES = [path.relative_to(ROOT) for path in FILES]
FILES += [Path(f"{room}.py") for room in sorted(FLOOR) if (ROOT / f"{room}.py").exists()]

# Arguments without a hint, whose class is not for that file to know: `config` and `less` (flags)
# and `run` are made on a higher floor, or would bring torch into a file that does without it.
UNHINTED = {"self", "cls", "ctx", "config", "run"}
UNHINTED_IN = {
    ("kernels/attention_tiles.py", "blocks"): {"dtype"},
    ("program/flags.py", "resolve"): {"device"},
    ("selection/cost.py", "scoring_flops"): {"less"},
}


def room_of(module):
    return module.split(".")[0]


def imports(path):
    """`{module: names}` that a file imports from this repository, wherever in the file."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name: [] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.setdefault(node.module, []).extend(alias.name for alias in node.names)
    return {module: names for module, names in found.items() if room_of(module) in FLOOR}


def test_every_file_has_a_floor():
    """The root holds commands and the inner circle; packages have an `__init__.py`."""
    assert {path.stem for path in ROOT.glob("*.py")} <= FLOOR.keys()
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {room for room in FLOOR if (ROOT / room).is_dir()}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_lead_downwards(path):
    """To lower floors, or to the same room."""
    room = path.parts[0].removesuffix(".py")
    for module in imports(path):
        below = FLOOR[room_of(module)] < FLOOR[room]
        assert below or room_of(module) == room, f"{path} imports {module}"


def test_no_circle_inside_a_room():
    """Files of one room import each other in one direction."""
    edges = {}
    for path in FILES:
        own = ".".join(path.with_suffix("").parts)
        edges[own] = set()
        for module, names in imports(path).items():
            modules = [f"{module}.{name}" for name in names]
            inside = [m for m in modules if (ROOT / f"{m.replace('.', '/')}.py").exists()]
            edges[own] |= set(inside or [module])
    while edges:
        leaves = {own for own, others in edges.items() if not others & edges.keys()}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {own: others for own, others in edges.items() if own not in leaves}


def test_the_inner_circle_does_not_know_the_rest():
    """The model knows kernels alone; no one imports a loop; data knows tokens and tiles."""
    assert {room_of(module) for module in imports("model.py")} == {"kernels"}
    known = {room_of(module) for module in imports("data.py")}
    assert known == {"kernels", "program", "tokens"}
    for path in (p for p in FILES if p.name != "bench.py" and p.parts[0] != "benchmarks"):
        assert not {"sft", "dpo"} & {room_of(module) for module in imports(path)}, path


def public_functions(node):
    """Functions of a module, methods of its classes; no nested ones, and no kernels of Triton."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.ClassDef):
            yield from public_functions(inner)
        elif isinstance(inner, ast.FunctionDef):
            is_kernel = any("triton.jit" in ast.unparse(d) for d in inner.decorator_list)
            if (inner.name == "__init__" or inner.name[0] != "_") and not is_kernel:
                yield inner


@pytest.mark.parametrize("path", [p for p in FILES if not str(p).startswith("bench")], ids=str)
def test_public_signatures_have_hints(path):
    """Every argument but *args and **kwargs, and the result: what a call takes and gives."""
    for function in public_functions(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        bare = {a.arg for a in arguments if a.annotation is None} - UNHINTED
        bare -= UNHINTED_IN.get((str(path), function.name), set())
        assert not bare and function.returns, f"{path}: {function.name}: {bare or 'its result'}"


@pytest.mark.parametrize("entry", CORE)
def test_what_is_called_core_exists(entry):
    """A test that is renamed or moved does not leave the core in silence."""
    path, _, name = entry.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") or not name
