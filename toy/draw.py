"""The held-out cases of the toy world, drawn by any checkpoint, and pictures through the autoencoder and back.

Training never shows the source of such a case, or the picture that it was made from (toy/world.py). Every model starts from
the same noise. How the pictures are scored: toy/judge.py and eval.py.
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
Pictures = dict[tuple[str, str], list[Image.Image]]  # one model's, by task and category, in the order of the bench


@dataclass
class Sampler:
    """How pictures are drawn. renoise: with new noise after every step (flow.renoise), else by Euler's method."""

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
    """One picture for each case, and the seconds that all of them took. All cases have one task and category.

    A picture's noise follows from its seed alone. Only prompts of equal length share a batch, of at most BATCH: padding is
    masked, but it moves the rotary positions of the picture's tokens, so a picture would depend on its neighbours.
    ValueError where latents or pixels are not finite.
    """
    began = time.perf_counter()
    place = (cases[0].task, cases[0].category)
    if place in sampler.specialists:
        pipeline = copy(pipeline)
        pipeline.mmdit = sampler.specialists[place]
    side = pipeline.resolution // 16
    name = f"{pipeline.directory}: {sampler.name}"
    conditions = encode_cases(pipeline, sampler, cases)
    lengths = conditions[0].mask.sum(1)  # (N,) tokens of each prompt
    latents = torch.empty(len(cases), 64, side, side)
    for length in lengths.unique():
        for rows in (lengths == length).nonzero()[:, 0].split(BATCH):  # (B,)
            velocities = [pipeline.velocity(excerpt(condition, rows)) for condition in conditions]
            noises = draw_noises(sampler, [seeds[row] for row in rows], side).to(pipeline.device)
            z = flow.draw(velocities, noises, sampler.sigmas, sampler.guidance)  # (B, 64, h, w)
            latents[rows.cpu()] = check_stage(f"{name}: latents", z, pipeline.dtype).cpu()
    pictures = []
    for z in latents.to(pipeline.device, pipeline.dtype).split(BATCH):
        decoded = check_stage(f"{name}: decoded pixels", pipeline.vae.decode(z), pipeline.dtype)
        pictures += to_pictures(decoded)
    return pictures, time.perf_counter() - began


def encode_cases(pipeline: Pipeline, sampler: Sampler, cases: list[Case]) -> list[Condition]:
    """The condition of all cases and, with guidance, the one to move away from: the same sources with an empty prompt."""
    images = [case.images for case in cases]
    condition = pipeline.condition([case.prompt for case in cases], images)
    if sampler.guidance == 1:
        return [condition]
    states, mask, slots = pipeline.encoder.encode([""] * len(cases), images)
    return [condition, Condition(states, mask, condition.sources, slots)]


def draw_noises(sampler: Sampler, seeds: list[int], side: int) -> Tensor:
    """(K, B, 64, side, side): one noise for the start and, to re-noise, one for each later stop."""
    stops = len(sampler.sigmas) - 1 if sampler.renoise else 1
    noises = torch.empty(stops, len(seeds), 64, side, side)
    for stop in range(stops):
        for row, seed in enumerate(seeds):
            rng = torch.Generator().manual_seed(1000 * seed + stop)
            noises[stop, row] = torch.randn(64, side, side, generator=rng)
    return noises


def excerpt(condition: Condition, rows: Tensor) -> Condition:
    """The condition of the prompts in these rows (B,), which are equally long, without padding."""
    length = int(condition.mask[rows[0]].sum())
    sources = [source[rows] for source in condition.sources]
    return Condition(condition.states[rows, :length], condition.mask[rows, :length], sources, condition.slots)


@torch.no_grad()
def reconstruct(pipeline: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """(B, 128, 128, 3) in [0, 1], through the autoencoder and back: what a perfect model's picture would look like."""
    batches = []
    for rgb in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(BATCH):
        opaque = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1)  # (b, 4, 128, 128)
        images = (opaque * 2 - 1).to(pipeline.device, pipeline.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(images))
        check_stage(f"{pipeline.directory}: the autoencoder's pixels", decoded, pipeline.dtype)
        decoded = decoded.float().cpu().clamp(-1, 1) / 2 + 0.5
        rgb, alpha = decoded[:, :3], decoded[:, 3:]
        batches.append(rgb * alpha + 1 - alpha)  # over white, as the judge sees pictures
    return torch.cat(batches).permute(0, 2, 3, 1).numpy()


def open_checkpoint(folder: Path) -> Pipeline:
    """A checkpoint to be scored. ValueError, before anything is loaded, if its pictures are of another size."""
    resolution = read_index(folder)["resolution"]
    if resolution != RESOLUTION:
        raise ValueError(
            f"{folder}: draws {resolution} x {resolution} pixels (resolution in model_index.json); these benches judge "
            f"pictures of the toy world, {RESOLUTION} x {RESOLUTION}"
        )
    pipeline = Pipeline.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    pipeline.vae.to(memory_format=torch.channels_last)  # halves decoding on a CPU, most of a student's time
    pipeline.progress = False
    return pipeline


def default_sampler(name: str, pipeline: Pipeline, steps: int | None, guidance: float) -> Sampler:
    """What sample.py does with so many steps. None: the checkpoint's own."""
    sigmas = pipeline.sigmas(steps, (pipeline.resolution // 16) ** 2)
    return Sampler(name, sigmas, guidance, renoise=pipeline.scheduler.stochastic_sampling)


def teacher_samplers(pipeline: Pipeline, short: list[float]) -> list[Sampler]:
    """A teacher at 80 NFE, and in the student's few steps by both samplers."""
    steps = len(short) - 1
    return [
        default_sampler("teacher", pipeline, 40, pipeline.guidance),
        Sampler(f"teacher, {steps} Euler steps", short),
        Sampler(f"teacher, {steps} re-noising steps", short, renoise=True),
    ]
