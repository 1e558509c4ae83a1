"""The order of the house: which file may import which. Read from the sources, nothing is imported."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOOK = ("flow", "dmd", "recipe", "train", "model", "sample", "eval")
FOLDERS = ("encoders", "support", "judges", "toy")


def imports() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports, anywhere in its file."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    found = {}
    for module, file in modules.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = names & modules.keys()
    return found


def test_no_import_runs_in_a_circle():
    left = imports()
    while left:
        free = {module for module, needed in left.items() if not needed & left.keys()}
        assert free, f"in a circle: {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in free}


def test_the_direction_of_imports():
    found = imports()
    assert {module for module in found if "." not in module} == set(BOOK)
    for module, needed in found.items():
        if module.startswith(("support.", "encoders.")) or module in ("flow", "dmd", "model"):
            above = {name for name in needed if name.split(".")[0] in (*BOOK, "judges", "toy")}
            assert above <= {"flow", "model"}, f"{module} imports {sorted(above)}"
