"""Students and their scores, in a folder that several commands use: finished ones are reused."""

import fcntl
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
    """What all students in the folder were made with, from its settings.json, which the first command writes.

    "dtype" is added, the faster one, which is measured once. ValueError if the folder was made with other settings.
    """
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, {"dtype": faster_dtype(device)} | settings)
    before = read_json(file)
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        raise ValueError(f"{folder}: its students were made with other {', '.join(changed)}; name another folder")
    return before


def row_name(model: str, cases: dict[str, int]) -> str:
    """The name of a row's file. It has the judge's version: a changed judge scores every student again, and no table mixes
    two judges. Students do not depend on the judge."""
    return f"{model}-{'-'.join(map(str, cases.values()))}-judge-{judge.version()}.json"
