"""The held-out cases of the toy world, drawn by any checkpoint, and the autoencoder's own part in the pictures.

No training prompt has a benched case's source, or the picture that it was made from (toy/world.py). Every model starts
from the same noise. How the pictures are scored: toy/judge.py and eval.py.
"""

import time
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import flow
from checkpoint.layout import check_stage, read_index
from data.pictures import to_pictures
from model import Condition, MMDiT
from sample import Pipeline
from toy import world
from toy.world import Case

RESOLUTION = world.SIDE * world.ENLARGE  # of the toy world's pictures, in pixels
BATCH = 32  # pictures drawn at once


@dataclass
class Sampler:
    """How pictures are drawn. renoise: new noise after every step (flow.renoise), else Euler's method."""

    name: str
    sigmas: list[float]  # with the final 0
    guidance: float = 1.0
    renoise: bool = False
    specialists: dict[tuple[str, str], MMDiT] = field(default_factory=dict)  # (task, category) -> instead of the base

    @property
    def nfe(self) -> int:
        """Network evaluations for one picture: the steps, and twice as many with guidance."""
        return (len(self.sigmas) - 1) * (2 if self.guidance > 1 else 1)


@torch.no_grad()
def draw_cases(
    pipeline: Pipeline, sampler: Sampler, cases: list[Case], seeds: list[int]
) -> tuple[list[Image.Image], float]:
    """One picture for each case, and the seconds that it took. All cases have one task and category.

    A picture's noise follows from its seed alone. Prompts run together, at most BATCH of them, where they are equally
    long: padding is masked, but it moves the rotary positions of the picture's tokens, and a picture would depend on its
    neighbours. ValueError where latents or pixels are not finite.
    """
    if own := sampler.specialists.get((cases[0].task, cases[0].category)):
        pipeline = copy(pipeline)
        pipeline.mmdit = own
    side, began, named = pipeline.resolution // 16, time.perf_counter(), f"{pipeline.directory}: {sampler.name}"
    images = [case.images for case in cases]
    conditions = [pipeline.condition([case.prompt for case in cases], images)]
    if sampler.guidance > 1:  # the same sources with other words
        states, mask, slots = pipeline.encoder.encode([""] * len(cases), images)
        conditions.append(Condition(states, mask, conditions[0].sources, slots))
    latents = torch.empty(len(cases), 64, side, side)
    lengths = conditions[0].mask.sum(1)  # (N,)
    for length in lengths.unique():
        for rows in (lengths == length).nonzero()[:, 0].split(BATCH):
            noises = []  # (B, 64, h, w) each: one for the start, and one for every stop that is noised again
            for stop in range(len(sampler.sigmas) - 1 if sampler.renoise else 1):
                rngs = [torch.Generator().manual_seed(1000 * seeds[row] + stop) for row in rows]
                noise = torch.stack([torch.randn(64, side, side, generator=rng) for rng in rngs])
                noises.append(noise.to(pipeline.device))
            velocity, *negative = [pipeline.velocity(excerpt(condition, rows)) for condition in conditions]
            if negative:
                velocity = flow.guided(velocity, negative[0], sampler.guidance)
            z = flow.walk(velocity, torch.stack(noises), sampler.sigmas)  # (B, 64, h, w)
            latents[rows.cpu()] = check_stage(f"{named}: latents", z, pipeline.dtype).cpu()
    pictures = []
    for z in latents.to(pipeline.device, pipeline.dtype).split(BATCH):
        pictures += to_pictures(check_stage(f"{named}: decoded pixels", pipeline.vae.decode(z), pipeline.dtype))
    return pictures, time.perf_counter() - began


def excerpt(condition: Condition, rows: Tensor) -> Condition:
    """The condition of some of its prompts, rows (B,), without padding. They are equally long."""
    length = int(condition.mask[rows[0]].sum())
    sources = [source[rows] for source in condition.sources]
    return Condition(condition.states[rows, :length], condition.mask[rows, :length], sources, condition.slots)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """(B, 128, 128, 3) in [0, 1], through the autoencoder and back: what a perfect model's picture would look like."""
    again = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(BATCH):
        images = torch.cat([part, torch.ones_like(part[:, :1])], dim=1) * 2 - 1  # (b, 4, 128, 128), opaque
        images = images.to(pipeline.device, pipeline.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(images))
        check_stage(f"{pipeline.directory}: the autoencoder's pixels", decoded, pipeline.dtype)
        decoded = decoded.float().cpu().clamp(-1, 1) / 2 + 0.5  # (b, 4, 128, 128)
        again.append(decoded[:, :3] * decoded[:, 3:] + 1 - decoded[:, 3:])  # over white, as the judge sees pictures
    return torch.cat(again).permute(0, 2, 3, 1).numpy()


def open_checkpoint(folder: Path) -> Pipeline:
    """A checkpoint to be scored. ValueError before anything is loaded if it does not draw the toy world's pictures."""
    resolution = read_index(folder)["resolution"]
    if resolution != RESOLUTION:
        raise ValueError(
            f"{folder}: draws {resolution} x {resolution} pixels (resolution in model_index.json); these benches judge "
            f"pictures of the toy world, {RESOLUTION} x {RESOLUTION}"
        )
    pipeline = Pipeline.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    pipeline.vae.to(memory_format=torch.channels_last)  # on a CPU it decodes in half the time, a student's largest part
    pipeline.progress = False
    return pipeline


def default_sampler(name: str, pipeline: Pipeline, steps: int | None, guidance: float) -> Sampler:
    """What `sample.py` would do with this many steps (None: the checkpoint's own)."""
    sigmas = pipeline.sigmas(steps, (pipeline.resolution // 16) ** 2)
    return Sampler(name, sigmas, guidance, renoise=pipeline.scheduler.stochastic_sampling)


def teacher_samplers(pipeline: Pipeline, short: list[float]) -> list[Sampler]:
    """A teacher at 80 NFE, and in the student's few steps by both samplers."""
    few = len(short) - 1
    return [
        default_sampler("teacher", pipeline, 40, pipeline.guidance),
        Sampler(f"teacher, {few} Euler steps", short),
        Sampler(f"teacher, {few} re-noising steps", short, renoise=True),
    ]
