"""Makes the checkpoint in toy/checkpoint: `python -m toy.build --out runs/toy` (hours of two cores: toy/README.md).

Its stages. Each is done once, so a killed build resumes; a new version of the judge scores everything again:

    language     tokenizer trained on the captions; a random, frozen Qwen3-VL
    vae          the autoencoder (toy/build/autoencoder.py)
    base         the base teacher, from random weights, by train.py's flow objective
    more         the same network, trained further with more edits and more words
    text, edit   the specialised teachers, from the base, each on its own task alone and on narrower pictures
    scores       of the autoencoder and of every teacher, and whether the paper's premises hold

OUT/checkpoint has the published layout. OUT/build.json, with a copy in the checkpoint, is the log: steps, seconds, losses,
scores.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import eval as evaluation
import flow
import recipe as recipes
import train
from checkpoint.files import read_json, write_json
from checkpoint.layout import Scheduler
from data.encode import How, encode_prompts
from model import MMDiT, MMDiTConfig
from recipe import Prompt, Recipe
from scores.rows import difference_of_scores, with_interval
from toy import judge, world
from toy.build import language
from toy.build.autoencoder import train_vae
from toy.draw import RESOLUTION, open_checkpoint, reconstruct, teacher_samplers
from toy.figures import table
from training import presets
from training.options import TrainOptions
from training.run import open_run

SEED = 0
# Ours: a size that two cores can train. The text encoder's width is language.build_text_encoder's.
TEACHER = {
    "num_layers": 6,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "context_in_dim": 128,
    "axes_dims_rope": (16, 24, 24),
}
SCHEDULER = Scheduler(shift_terminal=0.02)  # as published
GUIDANCE = 2.0  # of the teachers; ours
TIME_SHIFT = 1.65  # of the teachers' p(t): e^0.5, about the schedule's shift for 64 tokens
VAE_STEPS = 3600
BATCH, MICRO_BATCH = 64, 32  # smaller than train.py's: here more, noisier steps get further in the same time


@dataclass(frozen=True)
class TeacherRun:
    """One run of train.py that makes a teacher."""

    recipe: Recipe
    steps: int
    scale: float  # of the learning rates
    pool: dict[str, int]  # by task, prompts in each category
    narrow: bool = False  # see world.draw_spec

    def prompts(self) -> list[Prompt]:
        """What the run learns from."""
        prompts = []
        for task, count in self.pool.items():
            composition = self.recipe.t2i if task == "t2i" else self.recipe.edit
            for category in tuple(composition) or world.BENCHES[task]:
                prompts += world.training_prompts(task, category, count, SEED, narrow=self.narrow)
        return prompts


# The base sees few posters and few edits first, then more of both, but not enough of either. So it is worst at text, and a
# specialised teacher can be better. These are the paper's premises. A specialised teacher learns from narrower pictures, as
# if they had been selected.
BASE = Recipe("base", (7, 3), t2i={"landscape": 3, "portrait": 3, "text": 2})
MORE = Recipe("more", (4, 6))
TEXT = Recipe("text", (10, 0), t2i={"text": 1})
EDIT = Recipe("edit", (0, 10))
TEACHER_RUNS = {
    "base": TeacherRun(BASE, 3400, 1.0, {"t2i": 6000, "edit": 2500}),
    "more": TeacherRun(MORE, 2400, 0.7, {"t2i": 6000, "edit": 2500}),
    "text": TeacherRun(TEXT, 500, 0.5, {"t2i": 6000}, narrow=True),
    "edit": TeacherRun(EDIT, 1000, 0.5, {"edit": 2500}, narrow=True),
}


def build_language(folder: Path) -> None:
    rng, captions = random.Random(SEED), []
    for category in world.CATEGORIES:
        captions += [world.caption(world.draw_spec(category, rng)) for _ in range(2000)]
    for family in world.FAMILIES:
        captions += [world.draw_edit(family, rng).prompt for _ in range(1000)]
    language.build_tokenizer(captions, folder)
    language.build_text_encoder(folder, SEED)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | asdict(SCHEDULER)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKLQwenImage21"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "processor": ["transformers", "Qwen3VLProcessor"],
        "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
    }
    index = {"_class_name": "QwenImage21Pipeline", "resolution": RESOLUTION, "guidance": GUIDANCE}
    write_json(folder / "model_index.json", index | classes)


def random_teacher(folder: Path) -> None:
    torch.manual_seed(SEED)
    MMDiT(MMDiTConfig(**TEACHER)).save_pretrained(folder / "transformer", torch.float32)


def train_teacher(name: str, folder: Path, out: Path, compile: bool) -> dict:
    """One run of train.py's flow objective from folder/transformer, as TEACHER_RUNS says. Returns the log's entry.

    p(t) is shifted as the teacher's own steps are: most times lie where the parts of a picture find their places.
    """
    run = TEACHER_RUNS[name]
    # The base has 33,000 prompts, about 0.8 GB. Runs with the same prompts share them.
    pool = encode_prompts(out.parent / "conditions", run.prompts(), folder, How(RESOLUTION, targets=True))
    preset = TrainOptions(**presets.FLOW)
    options = replace(
        preset,
        checkpoint=folder,
        recipe=run.recipe.name,
        out=out,
        batch=BATCH,
        micro_batch=MICRO_BATCH,
        time_shift=TIME_SHIFT,
        steps=run.steps,
        muon_lr=run.scale * preset.muon_lr,
        lr=run.scale * preset.lr,
        guidance=GUIDANCE,
        seed=SEED,
        compile=compile,
        save_every=100,
        resume=(out / "args.json").exists(),
    )
    recipes.RECIPES[run.recipe.name] = run.recipe  # not on import: for everyone else the table stays the paper's
    options, state = open_run(options)
    train.train(options, pool, state)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    every = max(1, len(lines) // 20)
    curve = [{"step": line["step"], "loss": round(line["loss"], 4)} for line in lines[every - 1 :: every]]
    return {"steps": run.steps, "seconds": round(sum(line["seconds"] for line in lines)), "curve": curve}


def put_in_place(name: str, folder: Path, out: Path) -> None:
    """Copy the trained network to folder/transformer (base and more) or to folder/teachers/NAME. It is a stage of its own, so
    a build that is killed here only copies again."""
    place = folder / "transformer" if name in ("base", "more") else folder / "teachers" / name
    shutil.copytree(out / "transformer", place, dirs_exist_ok=True)


def score_autoencoder(folder: Path) -> dict:
    """The scores of the right answers, through the autoencoder and back: no teacher can do better."""
    pipeline = open_checkpoint(folder)
    row = {}
    for task, categories in evaluation.BENCHES.items():
        verdicts = {}
        for category in categories:
            cases = world.bench_cases(task, category, evaluation.CASES[task])
            answers = np.stack([np.asarray(case.answer().convert("RGB"), np.float32) / 255 for case in cases])
            arrays = (reconstruct(pipeline, answers) * 255).round().astype(np.uint8)
            pictures = [Image.fromarray(array) for array in arrays]
            verdicts[category] = judge.judge(pictures, cases, partial(reconstruct, pipeline))
        row |= evaluation.summary(task, evaluation.case_scores(verdicts))
    return row


def score_teacher(folder: Path, name: str) -> dict:
    """The rows of a teacher: at 80 NFE, and for the base also in the student's four steps, by both samplers. A specialised
    teacher is scored on what it was trained for."""
    pipeline = open_checkpoint(folder)
    samplers = teacher_samplers(pipeline, flow.student_sigmas(4))
    counts, only = evaluation.CASES, ()
    if name != "base":
        pipeline.mmdit = MMDiT.from_pretrained(folder / "teachers" / name).eval()
        samplers = [replace(samplers[0], name=f"{name} teacher")]
        task, only = {"text": ("t2i", ("text",)), "edit": ("edit", ())}[name]
        counts = {task: evaluation.CASES[task]}
    rows = [evaluation.evaluate(pipeline, sampler, counts, only)[0] for sampler in samplers]
    print(table(rows))
    return {"rows": rows}


def premises(log: dict) -> list[dict]:
    """What the paper takes for granted, what was measured, and whether it holds.

    Differences of scores are paired by case, with 95% intervals. The pictures of one prompt by a narrower teacher lie nearer
    to each other.
    """
    base, euler, renoise = log["score base"]["rows"]
    (text,), (edit,) = log["score text"]["rows"], log["score edit"]["rows"]
    listed = []

    def add(premise: str, measured: str, holds: bool) -> None:
        listed.append({"premise": premise, "measured": measured, "holds": bool(holds)})

    for task, title in (("t2i", "drawing"), ("edit", "editing")):
        for row, most in ((euler, 0.85), (renoise, 0.92)):
            share = row[task]["average"] / base[task]["average"]
            add(f"{row['name']} keep at most {most} of {title}", f"{share:.2f}", share <= most)
    scores = {category: base["t2i"][category] for category in evaluation.BENCHES["t2i"]}
    numbers = ", ".join(f"{category} {score:.3f}" for category, score in scores.items())
    add("text is what the base teacher draws worst", numbers, min(scores, key=scores.get) == "text")
    for teacher, task, category in ((text, "t2i", "text"), (edit, "edit", "average")):
        name = f"the {teacher['name']}"
        mean, half = difference_of_scores([teacher], [base], task, "score", category)
        add(f"{name} is better at its task by 0.1", with_interval(mean, half, "+"), mean >= 0.1 and mean > half)
        own, other = (row[f"{task}_diversity"]["distance"][category] for row in (teacher, base))
        numbers = f"distance of pictures {own:.3f}, the base teacher's {other:.3f}"
        add(f"{name} is narrower", numbers, own < other)
    return listed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    args = parser.parse_args(argv)
    folder, log_file = args.out / "checkpoint", args.out / "build.json"
    log = read_json(log_file) if log_file.exists() else {}

    if log.get("judge") != judge.version():
        old_scores = [name for name in log if name.startswith("score ") or name == "premises"]
        for name in old_scores:
            del log[name]
        log["judge"] = judge.version()

    def stage(name: str, work: Callable[[], dict | None]) -> None:
        """Do the work unless the log has it. What it returns is logged."""
        if name not in log:
            began = time.time()
            print(f"--- {name}", flush=True)
            entry = work() or {}
            log[name] = {"wall_seconds": round(time.time() - began)} | entry
            write_json(log_file, log)

    stage("language", lambda: build_language(folder))
    stage("vae", lambda: train_vae(folder / "vae", args.out / "vae-state", VAE_STEPS, SEED, compile=args.compile))
    stage("init", lambda: random_teacher(folder))
    for name in TEACHER_RUNS:
        stage(name, partial(train_teacher, name, folder, args.out / name, args.compile))
        stage(f"{name} in place", partial(put_in_place, name, folder, args.out / name))
    stage("score autoencoder", lambda: score_autoencoder(folder))
    for name in ("base", "text", "edit"):
        stage(f"score {name}", partial(score_teacher, folder, name))
    stage("premises", lambda: {"premises": premises(log)})
    write_json(folder / "build.json", log | {"fingerprint": evaluation.fingerprint_with_teachers(folder)})
    print(f"finished: {folder}")


if __name__ == "__main__":
    main()
