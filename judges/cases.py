"""The bench of files, without its judge: cases from JSON lines, pictures drawn once and kept, and what is said of them."""

import json
import os
import re
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from checkpoint.files import KEPT, digest, visible
from checkpoint.layout import fingerprint, read_index
from data.pictures import open_picture, save
from judges.chat import Chat
from judges.rubrics import FAMILIES
from program.eval_options import Args
from recipe import Prompt, read_prompts
from sample import Pipeline


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


def check_folder(folder: Path, cases: dict[str, Prompt], whole: bool) -> None:
    """ValueError for a file that is no case's picture and, if the folder has to be whole, for a picture that is missing."""
    there = {path.name for path in visible(folder)}  # a killed run's unfinished picture begins with a dot
    if extra := sorted(there - cases.keys()):
        raise ValueError(f"{folder / extra[0]}: belongs to no case ({len(extra)} such in all); take it away")
    if whole and (missing := sorted(cases.keys() - there)):
        case = cases[missing[0]]
        what = f"it is {case.category!r}, {case.prompt!r}"
        raise ValueError(f"{folder / missing[0]}: missing ({len(missing)} in all); {what}")


def draw_cases(cases: dict[str, Prompt], folder: Path, args: Args) -> None:
    """Draw the cases that have no picture in the folder yet. A case's noise is the same for every model.

    Every picture has in it what made it. ValueError for pictures of other weights or settings: a bench is of one model.
    """
    index = read_index(args.checkpoint)
    guidance = index["guidance"] if args.guidance is None else args.guidance
    made = {"steps": args.steps or len(index["sample_sigmas"] or [0] * 40), "guidance": guidance, "seed": args.seed}
    made["weights"] = fingerprint(args.checkpoint, kept=args.out / KEPT)
    missing = [name for name in cases if not (folder / name).exists()]
    for name in cases.keys() - set(missing):
        if {key: notes_in(folder / name).get(key) for key in made} != made:
            raise ValueError(f"{folder / name}: drawn by other weights or settings; name another --out for these")
    if not missing:
        return
    cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    pipeline = Pipeline.from_pretrained(args.checkpoint, dtype, device, args.offload, keep_encoder=True)
    pipeline.progress = False
    for name in tqdm(missing, desc="draw", unit="picture"):
        began, case, own = time.perf_counter(), cases[name], int(name[-20:-4], 16) % 2**31
        settings = {"steps": made["steps"], "guidance": guidance, "seed": args.seed + own}
        picture = pipeline(case.prompt, list(case.images), **settings)
        seconds = round(time.perf_counter() - began, 3)
        save(picture, folder / name, made | {"prompt": case.prompt, "seconds": seconds})


def notes_in(picture: Path) -> dict:
    """What `draw_cases` noted in a picture; empty for a picture from elsewhere."""
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
    return row | {"bench": digest(" ".join(sorted(cases)))[:16]}


def open_chats(urls: list[str], args: Args) -> list[Chat]:
    """The judges, or the one that writes. The last of the addresses, and of the keys, serves all further models."""
    models, variables = args.judge_model or [None], args.judge_key or []
    if unset := [variable for variable in variables if variable not in os.environ]:
        raise ValueError(f"--judge-key {unset[0]}: there is no such environment variable")
    keys = [os.environ[variable] for variable in variables] or [os.environ.get("JUDGE_API_KEY")]
    chats = []
    for i in range(max(len(urls), len(models))):
        url, model, key = (some[min(i, len(some) - 1)] for some in (urls, models, keys))
        chats.append(Chat(url, model, key, args.timeout))
    if len({chat.model for chat in chats}) < len(chats):
        raise ValueError("two judges need two names: --judge URL [URL] --judge-model NAME NAME")
    return chats
