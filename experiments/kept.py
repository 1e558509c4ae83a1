"""Students and their rows are kept as files in a folder that several commands use, and finished ones are reused.

A row's file is named after its model, the number of its cases, and the judge. Nothing else is needed to resume: what is
missing is made, what is there is read.
"""

import fcntl
from collections.abc import Callable
from pathlib import Path

from checkpoint.files import read_json, write_json
from toy import judge
from training.run import faster_dtype


def hold(folder: Path) -> object:
    """Lock the folder for this command, until the returned file is closed. ValueError if another command has the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another command is at work in it; wait for it, or name another --runs") from None
    return lock


def check_settings(folder: Path, settings: dict, device: str) -> dict:
    """What all students in the folder were made with, from its settings.json. The first command writes that file.

    The file has one key more: "dtype", the faster one on this device, which is measured once. ValueError if the folder
    was made with other settings.
    """
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, {"dtype": faster_dtype(device)} | settings)
    before = read_json(file)
    changed = changed_keys(before, settings)
    if changed:
        raise ValueError(f"{folder}: its students were made with other {changed}; name another folder")
    return before


def changed_keys(before: dict, settings: dict) -> str:
    """The settings that have another value in `before`, as words of a message; "" if all agree."""
    return ", ".join(key for key in settings if before.get(key) != settings[key])


def row_name(model: str, cases: dict[str, int]) -> str:
    """The name of the file of a model's row; cases: in a category, by task.

    The judge's version is part of it. So a changed judge scores every student again, and no table mixes two judges. The
    students themselves do not depend on the judge.
    """
    model = model.replace(" ", "-").replace(",", "")
    counts = "-".join(str(count) for count in cases.values())
    return f"{model}-{counts}-judge-{judge.version()}.json"


def kept_row(file: Path, score: Callable[[], dict]) -> dict:
    """The row in the file. If there is none, `score` makes it, and it is kept there."""
    if not file.exists():
        write_json(file, score())
    return read_json(file)
