"""The order of the house: which room may import which. Read from the sources, nothing is imported."""

import ast
import json
import shutil
import subprocess
import sys
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


# Room, or file of the book -> what it may import. From the leaves up; no two import each other.
ARROWS = {
    "flow": "",
    "dmd": "flow",
    "program": "",
    "checkpoint": "flow program",
    "scores": "checkpoint program",
    "networks": "checkpoint program",
    "model": "checkpoint networks program",
    "data": "checkpoint model networks program",
    "recipe": "data",
    "training": "checkpoint data flow model networks program",
    "judges": "checkpoint data program sample scores",
    "train": "data dmd eval flow networks program recipe toy training",  # toy and eval: see below
    "sample": "checkpoint data flow model networks program recipe training",
    "toy": "checkpoint data flow model program recipe sample scores",
    "eval": "checkpoint data judges program recipe sample scores toy",
    "experiments": "checkpoint data eval flow model program recipe sample scores toy train training",
    "toy.build": "checkpoint data eval experiments flow model networks program recipe scores toy train training",
    "plane": "checkpoint dmd experiments flow program recipe scores",
}
# train.py's run without --prompts is of the picture world. It imports that inside the two functions that need it.
LAZY = {"train": {"toy", "eval"}}


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


def test_each_room_imports_what_stands_below_it():
    found = rooms()
    assert found.keys() == ARROWS.keys()
    for name, needed in found.items():
        assert needed <= set(ARROWS[name].split()), f"{name} imports {sorted(needed - set(ARROWS[name].split()))}"


def test_train_imports_the_picture_world_inside_functions_alone():
    for name, lazy in LAZY.items():
        for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {module.split(".")[0] for module in modules} & lazy


def test_train_and_sample_work_without_plane_judges_and_toy(toy_checkpoint, tmp_path):
    """In a copy from which these rooms, and what stands on them, are deleted."""
    house = tmp_path / "house"
    kept = [room for room in ROOMS if room not in ("plane", "judges", "toy", "toy.build", "experiments")]
    for name in kept:
        shutil.copytree(ROOT / name, house / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in BOOK:
        shutil.copy(ROOT / f"{page}.py", house)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"task": "t2i", "category": "text", "prompt": "a hat"}) + "\n")

    def python(*words: str) -> None:
        done = subprocess.run([sys.executable, *words], cwd=house, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    tiny = "--recipe e3-text --steps 1 --batch 1 --micro-batch 1 --fake-updates 1 --student-steps 1 --out run".split()
    python("train.py", "--checkpoint", str(toy_checkpoint), "--prompts", str(tmp_path / "mine.jsonl"), *tiny)
    python("sample.py", "--checkpoint", "run/student", "--prompt", "a hat", "--out", "hat.png")
    assert (house / "hat.png").is_file()


def test_the_papers_claims_are_a_leaf():
    """experiments/claims.py, which the plane reads, imports nothing of ours."""
    assert not imports()["experiments.claims"]
