"""Makes a checkpoint like toy/checkpoint: `python -m toy.build --out runs/toy` (about eight hours of two cores).

Stages. Each is done once; a killed build goes on where it was:

    language    tokenizer trained on the captions; a random, frozen Qwen3-VL                              seconds
    vae         the autoencoder (toy/train_vae.py)                                                        an hour
    pool        captions, sources and targets, encoded once                                               minutes
    shallow     the base teacher with six blocks, from random weights, by train.py's flow objective       35 minutes
    grow, base  two blocks more, and more steps                                                           70 minutes
    spelling    more steps, mostly on words, where it was still bad                                       an hour
    finish      on words, landscapes and wordy edits                                                      two hours
    editing     mostly on edits                                                                           an hour
    text, edit  the specialised teachers, from the base, each on its own task alone                       an hour and a half
    scores      of the autoencoder, and of every teacher at 80 NFE                                        minutes

OUT/checkpoint has the published layout. OUT/build.json, with a copy in the checkpoint, is the log: steps, seconds, losses,
scores. How the committed checkpoint differs: toy/README.md.
"""

import argparse
import json
import random
import shutil
import time
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import recipe as recipes
import train
from model import MMDiT, MMDiTConfig
from sample import Pipeline
from support import presets
from support.checkpoint import Scheduler
from support.conditions import Pool, encode_pool
from support.files import write_json
from support.run import open_run
from toy import bench as benches
from toy import judge, language, world
from toy.figures import answer
from toy.train_vae import train_vae

SEED = 0
RESOLUTION = world.SIDE * world.ENLARGE
# Ours: a size that two cores can train. The text encoder's width is language.build_text_encoder's.
TEACHER = dict(
    num_layers=6, num_attention_heads=3, attention_head_dim=64, context_in_dim=128, axes_dims_rope=(16, 24, 24)
)
SCHEDULER = Scheduler(shift_terminal=0.02)  # as published
GUIDANCE = 2.0  # of the teachers; ours
TIME_SHIFT = 1.65  # of the teachers' p(t): e^0.5, about the schedule's shift for 64 tokens
VAE_STEPS = 8250  # nearly two cycles of train_vae.CYCLE
POOL = {"t2i": 16000, "edit": 8000}  # prompts in a category
BATCH, MICRO_BATCH = 64, 32  # smaller than train.py's: more and noisier steps get further in the same time here
GROWN_AFTER = (2, 5)  # blocks of the shallow teacher after which a new one is put
# The base teacher's last recipes, with more of what it was still bad at.
OWN_RECIPES = {
    "spelling": ((7, 3), (1, 1, 5), (2, 2, 2, 3, 1, 1)),  # ratio, parts of world.CATEGORIES, parts of world.FAMILIES
    "finish": ((6, 4), (2, 1, 3), (2, 2, 1, 3, 1, 1)),
    "editing": ((4, 6), (1, 1, 2), (2, 3, 3, 4, 1, 1)),
}
# name -> (recipe, steps, scale of the learning rates). The base begins shallow, which is cheaper, and grows once.
TEACHERS = {
    "shallow": ("flash", 3400, 1.0),
    "base": ("mix-7-3", 4900, 1.0),
    "spelling": ("spelling", 1500, 0.5),
    "finish": ("finish", 2800, 0.7),
    "editing": ("editing", 1400, 0.5),
    "text": ("e3-text", 1200, 0.5),
    "edit": ("mix-0-10", 1800, 0.5),
}


def build_language(folder: Path) -> None:
    rng = random.Random(SEED)
    captions = [world.caption(world.draw_spec(c, rng)) for c in world.CATEGORIES for _ in range(2000)]
    captions += [world.draw_edit(f, rng).instruction for f in world.FAMILIES for _ in range(1000)]
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


def build_pool(folder: Path, cache: Path) -> Pool:
    """Every prompt that the teachers learn from, encoded: 96,000 of them, about 2.5 GB in memory."""
    if cache.exists():
        return Pool(torch.load(cache, weights_only=False))
    pipeline = Pipeline.from_pretrained(folder)
    pipeline.vae.to(memory_format=torch.channels_last)  # half again as fast on a CPU
    prompts = world.prompts(POOL, SEED, targets=True)
    pool = encode_pool(pipeline, prompts, RESOLUTION, targets=True)
    torch.save(pool.entries, cache.with_suffix(".part"))
    cache.with_suffix(".part").replace(cache)
    return pool


def grow(shallow: Path, folder: Path) -> dict:
    """Write the transformer in `shallow` with more blocks, as folder/transformer. A new block is a copy of the one before it,
    with zeros in the two matrices that write to the stream. So the network draws what it drew, and can learn more (as in
    LLaMA Pro, arXiv 2401.02415)."""
    model, blocks = MMDiT.from_pretrained(shallow), []
    for i, block in enumerate(model.transformer_blocks):
        blocks.append(block)
        if i in GROWN_AFTER:
            blocks.append(deepcopy(block))
            torch.nn.init.zeros_(blocks[-1].attn.to_out[0].weight)
            torch.nn.init.zeros_(blocks[-1].img_mlp.out.weight)
    model.transformer_blocks = torch.nn.ModuleList(blocks)
    model.config = replace(model.config, num_layers=len(blocks))
    model.save_pretrained(folder / "transformer", torch.float32)
    return {"blocks": len(blocks)}


def train_teacher(name: str, folder: Path, out: Path, pool: Pool, compile: bool) -> dict:
    """One run of train.py's flow objective from folder/transformer, as TEACHERS says; the log's entry.

    The result replaces folder/transformer (the base) or becomes folder/teachers/NAME. p(t) is shifted as the teacher's own
    steps are: most times lie where a picture's parts find their places.
    """
    recipe, steps, scale = TEACHERS[name]
    if recipe in OWN_RECIPES:  # not on import: for everyone else the table stays the paper's
        ratio, t2i, edit = OWN_RECIPES[recipe]
        t2i, edit = dict(zip(world.CATEGORIES, t2i, strict=True)), dict(zip(world.FAMILIES, edit, strict=True))
        recipes.RECIPES[recipe] = recipes.Recipe(recipe, ratio, t2i=t2i, edit=edit)
    args = train.Args(
        **presets.FLOW | {"batch": BATCH, "micro_batch": MICRO_BATCH, "time_shift": TIME_SHIFT, "steps": steps}
    )
    args = replace(args, checkpoint=folder, out=out, recipe=recipe, guidance=GUIDANCE, seed=SEED, compile=compile)
    args = replace(args, muon_lr=scale * args.muon_lr, lr=scale * args.lr, resume=(out / "args.json").exists())
    args, state = open_run(args)
    result = train.train(args, pool, state)
    place = folder / "teachers" / name if name in ("text", "edit") else folder / "transformer"
    shutil.copytree(result, place, dirs_exist_ok=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    every = max(1, len(lines) // 20)
    curve = [{"step": line["step"], "loss": round(line["loss"], 4)} for line in lines[every - 1 :: every]]
    return {"steps": steps, "seconds": round(sum(line["seconds"] for line in lines)), "curve": curve}


def score_autoencoder(folder: Path) -> dict:
    """The scores of the right answers, through the autoencoder and back: no teacher can have higher ones."""
    pipeline, row = benches.open_checkpoint(folder), {}
    for bench, categories in benches.CATEGORIES.items():
        verdicts = {}
        for category in categories:
            cases = world.bench(bench, category, benches.CASES[bench])
            flat = np.stack([np.asarray(answer(case).convert("RGB"), np.float32) / 255 for case in cases])
            again = (benches.reconstruct(pipeline, flat) * 255).round().astype(np.uint8)
            pictures = [Image.fromarray(picture) for picture in again]
            verdicts[category] = judge.judge(pictures, cases, partial(benches.reconstruct, pipeline))
        row |= benches.summary(bench, verdicts)
    return row


def score(folder: Path, name: str) -> dict:
    """The row of a teacher at 80 NFE."""
    pipeline = benches.open_checkpoint(folder)
    if name != "base":
        pipeline.mmdit = MMDiT.from_pretrained(folder / "teachers" / name).eval()
    sampler = benches.default_sampler(f"{name} teacher", pipeline, 40, GUIDANCE)
    row, _ = benches.evaluate(pipeline, sampler, ["t2i", "edit"])
    print(benches.table([row]))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"))
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    args = parser.parse_args()
    folder, log_file = args.out / "checkpoint", args.out / "build.json"
    args.out.mkdir(parents=True, exist_ok=True)
    log = json.loads(log_file.read_text()) if log_file.exists() else {}

    def stage(name: str, work) -> None:
        """Do the work unless the log has it; what it returns is logged."""
        if name not in log:
            began = time.time()
            print(f"--- {name}", flush=True)
            log[name] = {"wall_seconds": 0} | (work() or {})
            log[name]["wall_seconds"] = round(time.time() - began)
            write_json(log_file, log)

    stage("language", lambda: build_language(folder))
    stage("vae", lambda: train_vae(folder / "vae", args.out / "vae-state", VAE_STEPS, SEED, compile=args.compile))

    def fresh() -> None:
        torch.manual_seed(SEED)
        MMDiT(MMDiTConfig(**TEACHER)).save_pretrained(folder / "transformer", torch.float32)

    stage("init", fresh)
    if not TEACHERS.keys() <= log.keys():
        pool = build_pool(folder, args.out / "pool.pt")
        for name in TEACHERS:
            if name == "base":
                stage("grow", partial(grow, args.out / "shallow" / "transformer", folder))
            stage(name, partial(train_teacher, name, folder, args.out / name, pool, args.compile))
    stage("score autoencoder", lambda: score_autoencoder(folder))
    for name in ("base", "text", "edit"):
        stage(f"score {name}", partial(score, folder, name))
    shutil.copy(log_file, folder / "build.json")
    print(f"finished: {folder}")


if __name__ == "__main__":
    main()
