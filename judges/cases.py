"""Your own cases: read from JSON lines, named, and found again in a folder of pictures; and the judges that are asked."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint.files import digest, visible
from data.pictures import open_picture
from data.prompts import Prompt, read_prompts
from judges.chat import Chat
from judges.rubrics import FAMILIES
from scores.colours import pixels
from scores.measures import colour_measures, edit_measures, mean_distance
from scores.statistics import averages, interval_over_cases

SMALL = (64, 64)  # pixels, to which pictures of one prompt are reduced before they are compared


def read_cases(paths: list[Path]) -> dict[str, Prompt]:
    """The cases in these files, and in the *.jsonl of these folders, by their pictures' names."""
    files = [
        file
        for path in paths
        for file in ([f for f in visible(path) if f.suffix == ".jsonl"] if path.is_dir() else [path])
    ]
    if not files:
        raise ValueError(f"--prompts {paths[0]}: no *.jsonl in it")
    return name_cases(read_prompts(files))


def name_cases(cases: list[Prompt]) -> dict[str, Prompt]:
    """Every case under the name of its picture, CATEGORY-HASH.png.

    The hash is of all that the case consists of, so a bench that is sorted again, moved or extended keeps its pictures.
    ValueError for a case that is there twice, and for an edit without a rubric.
    """
    named = {}
    for case in cases:
        what = f"{case.task}, {case.category}, {case.prompt!r}"
        if case.task == "edit" and case.category not in FAMILIES:
            raise ValueError(f"--prompts: {what}: no rubric is for such edits; categories are {', '.join(FAMILIES)}")
        sources = [digest(Path(image).read_bytes()) for image in case.images]
        content = json.dumps([case.task, case.category, case.prompt, sources])
        word = re.sub(r"\W+", "_", case.category)[:32]
        name = f"{word}-{digest(content)[:16]}.png"
        if name in named:
            raise ValueError(f"--prompts: a case is there twice: {what}")
        named[name] = case
    return named


def check_folder(folder: Path, cases: dict[str, Prompt], several: dict[str, list[str]], whole: bool) -> None:
    """ValueError for a file that is no case's picture and, if the folder has to be whole, for a picture that is missing.

    several: the pictures that are needed of each case. More of the same, NAME-1.png, NAME-2.png, may be there.
    """
    there = {path.name for path in visible(folder)}  # a killed run's unfinished picture begins with a dot
    if extra := sorted(
        name for name in there if re.sub(r"-\d{1,4}\.png$", ".png", name) not in cases and name not in cases
    ):
        raise ValueError(f"{folder / extra[0]}: belongs to no case ({len(extra)} such in all); take it away")
    owners = {name: picture for picture, names in several.items() for name in names}
    if whole and (missing := sorted(owners.keys() - there)):
        case = cases[owners[missing[0]]]
        what = f"it is {case.category!r}, {case.prompt!r}"
        raise ValueError(f"{folder / missing[0]}: missing ({len(missing)} in all); {what}")


def notes_in(picture: Path) -> dict:
    """What eval.py noted in a picture that it drew; empty for a picture from elsewhere."""
    try:
        with Image.open(picture) as opened:
            notes = json.loads(opened.info["parameters"])
    except (OSError, KeyError, ValueError):  # no notes, or those of another program in the same place
        return {}
    return notes if isinstance(notes, dict) and {"steps", "guidance", "weights", "seconds"} <= notes.keys() else {}


def describe(cases: dict[str, Prompt], folder: Path) -> dict:
    """What a row says of its pictures: which cases they are of, and, if this program drew all of them, how.

    ValueError for a picture that cannot be decoded."""
    for name in tqdm(cases, desc="read", unit="picture", leave=False):
        open_picture(folder / name)
    row, notes = {"nfe": None, "guidance": None, "scale": 5}, [notes_in(folder / name) for name in cases]
    if all(notes) and len({(note["steps"], note["guidance"]) for note in notes}) == 1:
        steps, guidance = notes[0]["steps"], notes[0]["guidance"]
        row |= {"nfe": steps * (2 if guidance > 1 else 1), "guidance": guidance}
        row["seconds_per_image"] = sum(note["seconds"] for note in notes) / len(notes)
        row["machine"] = ", ".join(sorted({note["machine"] for note in notes if "machine" in note})) or "unknown"
    return row | {"bench": digest(" ".join(sorted(cases)))[:16]}


def several_name(picture: str, n: int) -> str:
    """The n-th picture of a case: NAME.png, NAME-1.png, NAME-2.png."""
    return picture if n == 0 else f"{Path(picture).stem}-{n}.png"


def file_measures(
    cases: dict[str, Prompt], several: dict[str, list[str]], folder: Path, reference: Path | None
) -> dict:
    """The measures that need no judge, of the pictures in a folder. reference: a folder of another model's pictures."""

    def edits() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in tqdm(edited, desc="measure", unit="picture", leave=False):
            picture = pixels(open_picture(folder / name))
            yield pixels(open_picture(cases[name].images[-1]), (picture.shape[1], picture.shape[0])), picture

    edited = [name for name, case in cases.items() if case.task == "edit"]
    drawn = [name for name, case in cases.items() if case.task == "t2i"]
    measured = edit_measures(edits()) if edited else {}
    if drawn:
        others = (pixels(open_picture(reference / name)) for name in drawn) if reference else ()
        measured |= colour_measures((pixels(open_picture(folder / name)) for name in drawn), others)
    for task, key in (("t2i", "distance"), ("edit", "edit_distance")):
        distances = {}  # category -> the distance between the pictures of each case
        for name, names in several.items():
            if cases[name].task == task and len(names) > 1:
                small = [pixels(open_picture(folder / other), SMALL) for other in names]
                distances.setdefault(cases[name].category, []).append(mean_distance(small))
        if distances:
            measured.setdefault("variety", {})[key] = averages(distances)["average"]
            if min(map(len, distances.values())) > 1:
                measured["variety"][f"{key}_half"] = interval_over_cases(distances)
    return measured


def open_chats(urls: Sequence[str], models: Sequence[str], variables: Sequence[str], timeout: float) -> list[Chat]:
    """The judges at these addresses, or the model that writes.

    models: their names; without any, the server's only one. variables: environment variables with their keys; without any,
    JUDGE_API_KEY. The last address, and the last key, serves all further models. timeout: in seconds.
    """
    if unset := [variable for variable in variables if variable not in os.environ]:
        raise ValueError(f"there is no environment variable {unset[0]}, which is to hold the key")
    keys = [os.environ[variable] for variable in variables] or [os.environ.get("JUDGE_API_KEY")]
    chats = []
    for i in range(max(len(urls), len(models))):
        model = models[min(i, len(models) - 1)] if models else None
        chats.append(Chat(urls[min(i, len(urls) - 1)], model, keys[min(i, len(keys) - 1)], timeout))
    if len({chat.model for chat in chats}) < len(chats):
        raise ValueError("two judges need two names: --judge URL [URL] --judge-model NAME NAME")
    return chats
