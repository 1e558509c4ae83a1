"""Your own cases, drawn by one checkpoint into a folder. A killed run resumes."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint.files import KEPT
from checkpoint.layout import fingerprint, read_index
from data.pictures import save
from data.prompts import Prompt
from judges.cases import notes_in
from program.eval_options import EvalOptions
from sample import Pipeline
from scores.rows import machine


def draw_missing(cases: dict[str, Prompt], several: dict[str, list[str]], folder: Path, options: EvalOptions) -> None:
    """Draw the cases that have no picture in the folder yet. A case has the same noise for every model.

    several: the names of each case's pictures; each has a noise of its own.

    Every picture holds the settings that made it, with a fingerprint of the weights. ValueError for pictures of other
    weights or settings, because a row describes one model.
    """
    index = read_index(options.checkpoint)
    guidance = index["guidance"] if options.guidance is None else options.guidance
    steps = options.steps or len(index["sample_sigmas"] or [0] * 40)
    weights = fingerprint(options.checkpoint, kept=options.out / KEPT)
    notes = {"steps": steps, "guidance": guidance, "seed": options.seed, "weights": weights}
    owners = {name: (picture, n) for picture, names in several.items() for n, name in enumerate(names)}
    missing = [name for name in owners if not (folder / name).exists()]
    for name in owners.keys() - set(missing):
        its_notes = notes_in(folder / name)
        if any(its_notes.get(key) != value for key, value in notes.items()):
            raise ValueError(f"{folder / name}: drawn by other weights or settings; name another --out for these")
    if not missing:
        return
    dtype, device = (torch.bfloat16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
    pipeline = Pipeline.from_pretrained(options.checkpoint, dtype, device, options.offload, keep_encoder=True)
    pipeline.progress = False
    for name in tqdm(missing, desc="draw", unit="picture"):
        picture_name, n = owners[name]
        case = cases[picture_name]
        case_seed = int(picture_name[-20:-4], 16) % 2**31  # from the hash in the name
        seed = options.seed + case_seed + n
        began = time.perf_counter()
        picture = pipeline(case.prompt, list(case.images), steps=steps, guidance=guidance, seed=seed)
        seconds = round(time.perf_counter() - began, 3)
        made = {**notes, "prompt": case.prompt, "seconds": seconds, "machine": machine(pipeline.device)}
        save(picture, folder / name, made)
