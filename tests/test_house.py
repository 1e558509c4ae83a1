"""The order of the house: which room may import which. Read from the sources, nothing is imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOOK = ("flow", "dmd", "recipe", "train", "model", "sample", "eval")
ROOMS = (
    "networks",
    "checkpoint",
    "data",
    "program",
    "training",
    "scores",
    "judges",
    "toy",
    "toy.build",
    "plane",
    "experiments",
)


def modules() -> dict[str, Path]:
    folders = [ROOT / room.replace(".", "/") for room in ROOMS]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.glob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imports() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, anywhere in its file."""
    files, found = modules(), {}
    for module, file in files.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names & files.keys()
    return found


def room(module: str) -> str:
    return module.rpartition(".")[0] or module


def rooms() -> dict[str, set[str]]:
    """Room, or file of the book -> the others that it imports."""
    found: dict[str, set[str]] = {}
    for module, needed in imports().items():
        found.setdefault(room(module), set()).update({room(name) for name in needed} - {room(module)})
    return found


def no_circle(left: dict[str, set[str]]) -> None:
    while left:
        free = {name for name, needed in left.items() if not needed & left.keys()}
        assert free, "in a circle: " + "; ".join(
            f"{a} -> {', '.join(sorted(b & left.keys()))}" for a, b in left.items()
        )
        left = {name: needed for name, needed in left.items() if name not in free}


def test_no_import_runs_in_a_circle():
    no_circle(imports())


def test_no_two_rooms_import_each_other():
    no_circle(rooms())


def test_who_may_import_the_evaluation():
    """The toy and the judges know nothing of it; it knows nothing of what drives it."""
    found = rooms()
    assert not found["judges"] & {"sample", "recipe", "eval", "train"}
    assert not found["toy"] & {"eval", "train", "experiments", "judges"}
    assert not found["eval"] & {"train", "training", "experiments", "plane"}
    assert not found["scores"] - {"checkpoint"}
    claims = imports()["experiments.claims"]
    assert not claims, f"experiments/claims.py is a leaf, and imports {claims}"
