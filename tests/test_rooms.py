"""The package's rooms import one way: each only what stands above it, and nothing in a circle."""

import ast
import graphlib
import itertools
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "eim_jax"
ROOMS = (
    "utils", "config", "parallel", "models", "pretrained", "data", "losses", "training", "generation", "evaluation",
    "planning", "reporting", "serving", "commands", "main",
)  # fmt: skip


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in PACKAGE.rglob("*.py") if "configs" not in file.parts}


def imported(file: Path, everywhere: bool) -> set[str]:
    """The package's modules that a file imports; `everywhere`: also inside functions and under TYPE_CHECKING."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A package that is imported for one of its modules is not itself what is needed.
            found |= {name for name in names if name in MODULES} or {node.module}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{file}:{node.lineno}: a relative import hides its room: write it out")
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None  # the package itself belongs to no room


def test_every_folder_is_a_room():
    found = {room_of(module) for module in MODULES} - {None, "api", "__main__"}
    assert found == set(ROOMS)


def test_rooms_import_only_what_stands_above_them():
    place = {room: i for i, room in enumerate(ROOMS)}
    upward = []
    for module, file in MODULES.items():
        here = place.get(room_of(module), len(ROOMS))
        for name in imported(file, everywhere=True):
            there = place.get(room_of(name), len(ROOMS))
            if there > here and room_of(name) is not None:
                upward.append(f"{module} imports {name}")
    assert not upward, "\n".join(sorted(upward))


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imported(file, everywhere=False) - {module} for module, file in MODULES.items()}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(" -> ".join(itertools.chain(error.args[1]))) from None
