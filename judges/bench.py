"""The two benches on files: cases from JSON lines, pictures drawn once and kept, a vision-language model as the judge."""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import recipe as recipes
from judges import chat
from judges import rubrics as language_judge
from sample import Pipeline
from support.checkpoint import fingerprint, read_index
from support.files import write_json
from support.pictures import save


def draw_files(
    cases: dict,
    folder: Path,
    checkpoint: Path,
    steps: int | None,
    guidance: float | None,
    seed: int,
    offload: bool,
) -> None:
    """Draw the cases that have no picture in the folder yet. Every picture knows what made it, and pictures of other
    weights or settings are a ValueError: a bench is of one model. A case's noise is the same for every model."""
    index = read_index(checkpoint)
    guidance = index["guidance"] if guidance is None else guidance
    made = {"steps": steps or len(index["sample_sigmas"] or [0] * 40), "guidance": guidance, "seed": seed}
    made["weights"] = fingerprint(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.part"):  # of a killed run
        leftover.unlink()
    for name in cases:
        if (folder / name).exists() and {key: made_by(folder / name).get(key) for key in made} != made:
            raise ValueError(f"{folder / name}: drawn by other weights or settings; name another --out for these")
    missing = [name for name in cases if not (folder / name).exists()]
    if missing:
        cuda = torch.cuda.is_available()
        dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
        pipeline = Pipeline.from_pretrained(checkpoint, dtype, device, offload, keep_encoder=True)
        pipeline.progress = False
    for name in tqdm(missing, desc="draw", unit="picture"):
        began, own = time.perf_counter(), int(name[-20:-4], 16) % 2**31
        images = list(cases[name].images)
        picture = pipeline(cases[name].prompt, images, steps=made["steps"], guidance=guidance, seed=seed + own)
        seconds = round(time.perf_counter() - began, 3)
        save(picture, folder / name, made | {"prompt": cases[name].prompt, "seconds": seconds})


def made_by(picture: Path) -> dict:
    """What `save` wrote into a picture; {} for one from elsewhere. ValueError: not a whole picture."""
    try:
        with Image.open(picture) as image:
            notes = image.info.get("parameters", "{}")
            image.verify()
        return json.loads(notes)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{picture}: no whole picture ({error})") from None


def score_files(args: argparse.Namespace) -> None:
    """Draw and judge one model's pictures. All that can be wrong is looked at first: a question costs money.

    SystemExit(1) at the end if something could not be scored; the same command asks for it again, and for nothing else.
    """
    files = [file for path in args.prompts for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"--prompts {args.prompts[0]}: no *.jsonl in it")
    cases = language_judge.name_cases(recipes.read_prompts(files))
    if args.list:
        print("\n".join(json.dumps({"picture": name, "prompt": case.prompt}) for name, case in cases.items()))
        return
    if not args.out:
        raise ValueError("--prompts needs --out DIR, for pictures and answers")
    judges = [open_chat(args, i) for i in range(max(len(args.judge), len(args.judge_model or ())) if args.judge else 0)]
    if len({asked.model for asked in judges}) < len(judges):
        raise ValueError("two judges need two names: --judge URL [URL] --judge-model NAME NAME")
    folder = args.pictures or args.out / "pictures"
    there = {path.name for path in folder.iterdir() if path.suffix != ".part"} if folder.is_dir() else set()
    if extra := sorted(there - cases.keys()):
        raise ValueError(f"{folder / extra[0]}: belongs to no case ({len(extra)} such in all); take it away")
    if not args.pictures:
        draw_files(cases, folder, args.checkpoint, args.steps, args.guidance, args.seed, args.offload)
    elif missing := sorted(cases.keys() - there):
        case = cases[missing[0]]
        raise ValueError(
            f"{folder / missing[0]}: missing ({len(missing)} in all); it is {case.category!r}, {case.prompt!r}"
        )
    notes = [made_by(folder / name) for name in cases]

    args.out.mkdir(parents=True, exist_ok=True)
    row = {"name": args.name or args.out.name, "nfe": None, "guidance": notes[0].get("guidance"), "scale": 5}
    if all("seconds" in note for note in notes):  # ours
        row["nfe"] = notes[0]["steps"] * (2 if row["guidance"] > 1 else 1)
        row["seconds_per_image"] = sum(note["seconds"] for note in notes) / len(notes)
    row |= {"bench": hashlib.sha256(" ".join(sorted(cases)).encode()).hexdigest()[:16], "judges": {}}
    for asked in judges:
        name = asked.model or "judge"
        kept = args.out / f"judge-{''.join(c if c.isalnum() or c in '-.' else '_' for c in name)}.jsonl"
        answers, unscored = language_judge.judge(asked, cases, folder, kept, args.parallel)
        row["judges"][name] = language_judge.summary(cases, answers, unscored)
    if not judges:
        print(f"{len(cases)} pictures in {folder}")
        return
    first, *_ = row["judges"].values()  # its numbers are the row's
    row |= {key: value for key, value in first.items() if key not in ("scored", "unscored")}
    write_json(args.json or args.out / "row.json", row)
    print(language_judge.table([row]))
    for name, judge_row in row["judges"].items():
        for picture, reason in judge_row["unscored"].items():
            print(f"not scored by {name}: {picture}, {cases[picture].prompt!r}: {reason}", file=sys.stderr)
    if any(judge_row["unscored"] for judge_row in row["judges"].values()):
        sys.exit(1)


def open_chat(args: argparse.Namespace, i: int = 0) -> chat.Chat:
    """The i-th judge, or the one that writes. The last of the addresses, and of the keys, serves all further ones."""
    urls, models, variables = args.judge or [args.endpoint], args.judge_model or [None], args.judge_key
    url, model, variable = (some[min(i, len(some) - 1)] for some in (urls, models, variables))
    return chat.Chat(url, model, os.environ.get(variable), args.timeout)
