"""Your own cases: read from JSON lines, named, and matched with the pictures of a folder."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from checkpoint.files import digest, visible
from data.pictures import open_picture
from data.prompts import Prompt, read_prompts
from judges.rubrics import FAMILIES
from scores.colours import pixels
from scores.measures import colour_measures, edit_measures, mean_distance
from scores.statistics import averages, interval_over_cases

SMALL = (64, 64)  # pixels; pictures of one prompt are compared at this size


def read_cases(paths: list[Path]) -> dict[str, Prompt]:
    """The cases in these files, and in the *.jsonl of these folders, by the names of their pictures."""
    files = []
    for path in paths:
        if path.is_dir():
            files += [file for file in visible(path) if file.suffix == ".jsonl"]
        else:
            files.append(path)
    if not files:
        raise ValueError(f"--prompts {paths[0]}: no *.jsonl in it")
    return name_cases(read_prompts(files))


def name_cases(cases: list[Prompt]) -> dict[str, Prompt]:
    """Every case by the name of its picture, CATEGORY-HASH.png.

    The hash covers the whole content of a case, so a bench that is sorted again, moved or extended keeps its pictures.
    ValueError for duplicate cases, and for an edit without a rubric.
    """
    named = {}
    for case in cases:
        shown = f"{case.task}, {case.category}, {case.prompt!r}"
        if case.task == "edit" and case.category not in FAMILIES:
            raise ValueError(f"--prompts: {shown}: such edits have no rubric; categories are {', '.join(FAMILIES)}")
        sources = [digest(Path(image).read_bytes()) for image in case.images]
        content = json.dumps([case.task, case.category, case.prompt, sources])
        word = re.sub(r"\W+", "_", case.category)[:32]
        name = f"{word}-{digest(content)[:16]}.png"
        if name in named:
            raise ValueError(f"--prompts: a case is there twice: {shown}")
        named[name] = case
    return named


def several_name(picture: str, n: int) -> str:
    """The n-th picture of a case: NAME.png, NAME-1.png, NAME-2.png."""
    return picture if n == 0 else f"{Path(picture).stem}-{n}.png"


def check_folder(folder: Path, cases: dict[str, Prompt], several: dict[str, list[str]], whole: bool) -> None:
    """ValueError for a file that belongs to no case and, if the folder must be whole, for a missing picture.

    several: the pictures that each case needs. The folder may have further ones of the same cases, NAME-3.png.
    """
    present = {path.name for path in visible(folder)}  # a killed run's unfinished picture is hidden
    extra = []
    for name in sorted(present):
        first = re.sub(r"-\d{1,4}\.png$", ".png", name)
        if first not in cases and name not in cases:
            extra.append(name)
    if extra:
        raise ValueError(f"{folder / extra[0]}: belongs to no case ({len(extra)} such files); remove it")
    owners = {name: picture for picture, names in several.items() for name in names}
    missing = sorted(owners.keys() - present)
    if whole and missing:
        case = cases[owners[missing[0]]]
        shown = f"it is {case.category!r}, {case.prompt!r}"
        raise ValueError(f"{folder / missing[0]}: missing ({len(missing)} in all); {shown}")


def notes_in(picture: Path) -> dict:
    """What eval.py noted in a picture that it drew; empty for a picture from elsewhere."""
    try:
        with Image.open(picture) as opened:
            notes = json.loads(opened.info["parameters"])
    except (OSError, KeyError, ValueError):  # no notes, or those of another program under the same key
        return {}
    are_ours = isinstance(notes, dict) and {"steps", "guidance", "weights", "seconds"} <= notes.keys()
    return notes if are_ours else {}


def describe(cases: dict[str, Prompt], folder: Path) -> dict:
    """The part of a row about its pictures: of which cases they are and, if this program drew them all, how.

    ValueError for a picture that cannot be decoded.
    """
    for name in tqdm(cases, desc="read", unit="picture", leave=False):
        open_picture(folder / name)
    row = {"nfe": None, "guidance": None, "scale": 5}
    notes = [notes_in(folder / name) for name in cases]
    if all(notes) and len({(note["steps"], note["guidance"]) for note in notes}) == 1:
        steps, guidance = notes[0]["steps"], notes[0]["guidance"]
        machines = {note["machine"] for note in notes if "machine" in note}
        row["nfe"] = steps * (2 if guidance > 1 else 1)
        row["guidance"] = guidance
        row["seconds_per_image"] = sum(note["seconds"] for note in notes) / len(notes)
        row["machine"] = ", ".join(sorted(machines)) or "unknown"
    row["bench"] = digest(" ".join(sorted(cases)))[:16]
    return row


def file_measures(
    cases: dict[str, Prompt], several: dict[str, list[str]], folder: Path, reference: Path | None
) -> dict:
    """The measures that need no judge, of the pictures in a folder. reference: a folder of another model's pictures."""

    def sources_and_results() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for name in tqdm(edited, desc="measure", unit="picture", leave=False):
            result = pixels(open_picture(folder / name))
            height, width = result.shape[:2]
            yield pixels(open_picture(cases[name].images[-1]), (width, height)), result

    edited = [name for name, case in cases.items() if case.task == "edit"]
    drawn = [name for name, case in cases.items() if case.task == "t2i"]
    measured = edit_measures(sources_and_results()) if edited else {}
    if drawn:
        pictures = (pixels(open_picture(folder / name)) for name in drawn)
        others = (pixels(open_picture(reference / name)) for name in drawn) if reference else ()
        measured |= colour_measures(pictures, others)
    if variety := variety_of(cases, several, folder):
        measured["variety"] = variety
    return measured


def variety_of(cases: dict[str, Prompt], several: dict[str, list[str]], folder: Path) -> dict[str, float]:
    """How far the several pictures of one case are apart, on average; empty where every case has one picture."""
    variety = {}
    for task, key in (("t2i", "distance"), ("edit", "edit_distance")):
        distances = {}  # category -> the distance between the pictures of each case
        for name, names in several.items():
            if cases[name].task == task and len(names) > 1:
                small = [pixels(open_picture(folder / picture), SMALL) for picture in names]
                distances.setdefault(cases[name].category, []).append(mean_distance(small))
        if distances:
            variety[key] = averages(distances)["average"]
            if min(map(len, distances.values())) > 1:
                variety[f"{key}_half"] = interval_over_cases(distances)
    return variety
