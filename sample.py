"""Draw and edit with any checkpoint in the published layout: words and source pictures in, RGBA pictures out.

What a condition is. The MMDiT sees neither words nor pictures. It sees one sequence of tokens. Its last tokens are the
noisy target, and all tokens before them are the condition:

    words      the language model (Qwen3-VL, here the encoder) reads the prompt inside a fixed template; its states, one
               for each token, are the text (taken before its last norm, and why: networks/qwen3vl.py)
    sources    enter twice. The language model sees them as it reads, so that "the red one" finds its red one. The MMDiT
               does not get its states of the pictures, only what the words took from them. The pixels come from the
               VAE: the latents of the sources stand in the sequence where the language model had its image slots, four
               to a slot, before the words that speak about them

Nothing in it depends on the step. With `causal_condition` its keys and values do not either, so a picture pays for its
condition once (`MMDiT.with_prefix`) and then for the target's tokens alone at every step. A negative prompt is a second
condition with other words and the same sources.

Symbols: B prompts; H, W the picture's sides in pixels; h, w = H/16, W/16 the latent grid; t = 1 is noise, t = 0 the
picture; guidance is negative + w (positive - negative), off at w = 1. Reference for behaviour: `QwenImage21Pipeline`
of diffusers 0.42.1; tests/test_sample.py holds every picture to 1/255 of the reference's.

A call goes through the networks in turn: the encoder reads the words, looks at the sources, and is freed; the MMDiT
walks from noise to latents; the VAE makes pixels of them.

    python sample.py --prompt "A landscape of hills, clear day sky, house on the left." --out house.png
    python sample.py --prompt "This house at night, by the sea." --image house.png --out night.png
    python sample.py --help                                                         everything else, with examples
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from program import edges
from program.sample_options import SampleOptions, parse

if __name__ == "__main__":  # here already: --help and a mistyped flag do not wait for torch
    edges.run("sample", parse)  # imports the rest, and calls run(options)

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import flow
from checkpoint.export import export, export_lora
from checkpoint.files import config_from_json, may_write
from checkpoint.layout import (
    Scheduler,
    check_parts,
    check_stage,
    choose_schedule,
    how_it_draws,
    open_device,
    read_index,
)
from checkpoint.lora import LoRA, merge, read_lora
from data.pictures import MULTIPLE, Source, check_areas, fit, latent_grid, save, sides, to_pictures, to_tensor
from data.prompts import LONGEST, MOST_IMAGES
from model import Condition, MMDiT
from networks.qwen3vl import PixelSettings, Qwen3VL
from networks.vae import VAE
from recipe import read_prompts
from training.trainee import Network

# ---- The pipeline ----------------------------------------------------------------------------------------------------


@dataclass
class Pipeline:
    """A checkpoint in the published layout, ready to draw; `from_pretrained` opens one.

    Its three networks are read from the disk at their first use, and any may be replaced by assignment. The first call
    frees the encoder, the largest of them, before it reads the MMDiT, so these two do not share the memory. The MMDiT
    stays, and a second call reads the encoder again beside it. For many pictures in little memory make all `conditions`
    first and then the `pictures`, as `run` below does, or use `offload`. `keep_encoder` keeps it, where memory allows.
    """

    directory: Path
    scheduler: Scheduler
    sample_sigmas: list[float] | None  # a few-step student's own schedule
    resolution: int  # default side in pixels, and the area that sources are resized to
    guidance: float  # what the checkpoint was meant to be sampled with; a call's own default is 1
    dtype: torch.dtype
    device: torch.device
    offload: bool  # the networks rest on the CPU and take turns on the device
    keep_encoder: bool
    loras: list[tuple[str | Path, LoRA, float]]  # merged into the MMDiT: its file, itself, its scale
    compile: bool = False  # compile the MMDiT's blocks: minutes at first, for many pictures of a size
    progress: bool = True  # a bar over the steps
    source_fit: str = "stretch"  # how sources are brought to their size: stretch, crop or pad (pictures.fit)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        offload: bool = False,
        keep_encoder: bool = False,
        loras: list[tuple[str | Path, float]] | None = None,
        sigmas: list[float] | None = None,
        shift: str | float = "none",
    ) -> "Pipeline":
        """Open a folder in the published layout. ValueError or FileNotFoundError name the file that is wrong.

        loras               files, each with the scale at which it changes the MMDiT's weights
        sigmas, shift       instead of the checkpoint's schedule, as `choose_schedule` takes them
        """
        directory, device = Path(directory), open_device(device)
        index = read_index(directory)
        scheduler = config_from_json(Scheduler, directory / "scheduler" / "scheduler_config.json")
        # Files are checked now, before anything takes time, by opening them on a device that holds no values.
        encoder = Qwen3VL.from_pretrained(directory, dtype, "meta")
        vae = VAE.from_pretrained(directory / "vae", dtype, "meta")
        mmdit = MMDiT.from_pretrained(directory / "transformer", dtype, "meta")
        check_parts(directory, mmdit.config, vae.config, encoder.config)
        opened, students = [], {}
        for path, scale in loras or []:
            lora, own_sigmas, stochastic = read_lora(path, mmdit)
            opened.append((path, lora, scale))
            if own_sigmas is not None:
                students[path] = own_sigmas, stochastic
        few_steps = sigmas is not None or students
        scheduler, sample_sigmas = choose_schedule(
            directory, scheduler, index["sample_sigmas"], students, sigmas, shift
        )
        return cls(
            directory=directory,
            scheduler=scheduler,
            sample_sigmas=sample_sigmas,
            resolution=index["resolution"],
            guidance=1.0 if few_steps else index["guidance"],
            dtype=dtype,
            device=device,
            offload=offload,
            keep_encoder=keep_encoder,
            loras=opened,
        )

    # The three networks.

    @property
    def rest_device(self) -> torch.device:
        """Where networks are while they do not work."""
        return torch.device("cpu") if self.offload else self.device

    @cached_property
    def encoder(self) -> Qwen3VL:
        return Qwen3VL.from_pretrained(self.directory, self.dtype, self.rest_device)

    @cached_property
    def vae(self) -> VAE:
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype  # fp16 overflows in it
        return VAE.from_pretrained(self.directory / "vae", dtype, self.rest_device)

    @cached_property
    def mmdit(self) -> MMDiT:
        mmdit = MMDiT.from_pretrained(self.directory / "transformer", self.dtype, self.rest_device)
        merge(mmdit, self.loras)
        for block in mmdit.transformer_blocks if self.compile else ():
            block.compile(dynamic=True)
        return mmdit

    def free_encoder(self) -> None:
        """Drop the encoder from memory, unless keep_encoder is set. Its next use reads it from the disk again."""
        if not self.keep_encoder and "encoder" in vars(self):
            del self.encoder
            torch.cuda.empty_cache()  # else torch keeps its memory in pieces, too small for the next network

    @contextmanager
    def at_work(self, network: nn.Module) -> Iterator[nn.Module]:
        """Lend the device to one network, where they take turns."""
        if self.offload:
            network.to(self.device)
        yield network
        if self.offload:
            network.to("cpu")

    # Before the steps: conditions, schedule, noises.

    @torch.no_grad()
    def condition(
        self,
        prompts: list[str],
        images: list[list[Source]] | None = None,
        resolution: int | None = None,
        latents: list[Tensor] | None = None,
    ) -> Condition:
        """Encode B prompts, each with its own list of sources, into the MMDiT's condition.

        Sources, ten at most for a prompt, are fitted to `resolution` (None: the checkpoint's). A batch has one layout:
        all its prompts have equally many sources, which come to the same sizes; otherwise ValueError. `latents`: the
        sources', if they have been encoded before.
        """
        images = [[] for _ in prompts] if images is None else images
        most = max(map(len, images), default=0)
        if most > MOST_IMAGES:
            raise ValueError(f"{most} source pictures for one prompt: at most {MOST_IMAGES} are read")
        for prompt in prompts:
            if len(prompt) > LONGEST:
                raise ValueError(f"prompt {edges.short(prompt)}: {len(prompt)} letters; at most {LONGEST} are read")
        resolution = self.resolution if resolution is None else resolution
        if resolution < MULTIPLE:
            raise ValueError(f"resolution {resolution}: at least {MULTIPLE} pixels are needed")
        given = [image for row in images for image in row]
        fitted = {id(image): fit(image, resolution, self.source_fit) for image in given}  # a shared one is read once
        sources = [[fitted[id(image)] for image in row] for row in images]
        if given:
            limits = PixelSettings.from_pretrained(self.directory / "processor")
            sizes = [fitted[id(image)].size for image in given]
            check_areas(given, sizes, resolution, limits.shortest_edge, limits.longest_edge)
        with self.at_work(self.encoder) as encoder:
            states, mask, slots = encoder.encode(prompts, sources)  # (B, L, C), (B, L), one [start, stop) a source
        check_stage("the language model's states", states, self.dtype)
        if latents is None:
            latents = [self.encode(column) for column in zip(*sources, strict=True)]  # each (B, 64, h_i, w_i)
        return Condition(states, mask, latents, slots)

    def encode(self, pictures: tuple[Image.Image, ...]) -> Tensor:
        """The latents (B, 64, h, w) of B fitted pictures. A picture that all share is encoded once."""
        shared = all(picture is pictures[0] for picture in pictures)
        images = to_tensor(list(pictures[:1] if shared else pictures))  # (B or 1, 4, H, W)
        with self.at_work(self.vae) as vae:
            z = vae.encode(images.to(self.device, self.dtype))  # (B or 1, 64, h, w)
        check_stage("the latents of a source picture", z, vae.quant_conv.weight.dtype)
        return z.expand(len(pictures), -1, -1, -1)  # (B, 64, h, w)

    def conditions(
        self,
        prompts: list[str],
        images: list[list[Source]],
        resolution: int | None = None,
        guidance: float = 1.0,
        negative_prompt: str | list[str] | None = None,
    ) -> list[Condition]:
        """The first half of a call: what to draw and, for guidance, what to stay away from. Kept on the CPU."""
        if not prompts:
            raise ValueError("no prompt is given")
        if not 1 <= guidance < math.inf:  # below 1 the reference draws without it, and does not say so
            raise ValueError(f"guidance {guidance}: a number from 1 (off) on is expected")
        if guidance == 1 and negative_prompt:
            raise ValueError(
                f"negative prompt {negative_prompt!r}: guidance is 1, which is off; ask for more, or leave it out"
            )
        conditions = [self.condition(prompts, images, resolution)]
        if guidance > 1:  # the same sources with other words: guidance is about the words alone
            negative_prompts = negative_prompt or ""
            if isinstance(negative_prompts, str):
                negative_prompts = [negative_prompts] * len(prompts)
            conditions.append(self.condition(list(negative_prompts), images, resolution, conditions[0].sources))
        return [condition.to("cpu", self.dtype) for condition in conditions]

    def sigmas(self, steps: int | None, tokens: int) -> list[float]:
        """The schedule of a picture of `tokens` tokens, its final 0 included. steps None: the checkpoint's, else 40."""
        own = self.sample_sigmas
        if steps is not None and steps < 1:
            raise ValueError(f"steps {steps}: at least 1 is needed")
        if own is not None and steps not in (None, len(own)):
            fixed = f"the checkpoint, a LoRA file or given sigmas fix them to {len(own)}, at {own}"
            raise ValueError(f"{steps} steps: {fixed}; leave the number out")
        return self.scheduler.sigmas(own or steps or 40, tokens)

    def noises(self, batch: int, h: int, w: int, steps: int, seed: int, noise: Tensor | None = None) -> Tensor:
        """The noises of B pictures, (K, B, 64, h, w): one to start from; where the checkpoint re-noises, one a step.

        They are drawn in the reference's order. noise (B, h w, 64): to start from instead, tokens in row-major order.
        """
        rng, shape = torch.Generator().manual_seed(seed), (batch, self.mmdit.config.in_channels, h, w)
        start = torch.randn(shape, generator=rng, dtype=self.dtype)  # (B, 64, h, w), also where another is given
        if noise is not None:
            if noise.shape != (batch, h * w, shape[1]):
                raise ValueError(f"noise of shape {tuple(noise.shape)}: {(batch, h * w, shape[1])} is expected")
            start = rearrange(noise, "b (h w) c -> b c h w", h=h).to(self.dtype)  # (B, 64, h, w)
        if not self.scheduler.stochastic_sampling:
            return start[None]  # (1, B, 64, h, w)
        later = torch.randn(steps - 1, batch, h * w, shape[1], generator=rng)
        return torch.cat([start[None], rearrange(later, "k b (h w) c -> k b c h w", h=h)])  # (K, B, 64, h, w)

    # The steps.

    def velocity(self, condition: Condition) -> flow.Velocity:
        """The MMDiT under one condition, v(z, t), as flow.py takes it. z (B, 64, h, w); t (B,)."""
        return Network(self.mmdit).velocity(condition.to(self.device, self.dtype), calls=math.inf)

    @torch.no_grad()
    def draw(self, conditions: list[Condition], noises: Tensor, sigmas: list[float], guidance: float = 1.0) -> Tensor:
        """From noise to latents (B, 64, h, w) in fp32, checked to be finite.

        conditions          one, or with guidance two: what to draw, and what to stay away from
        noises              (1, B, 64, h, w) for Euler's method, (K, B, 64, h, w) to re-noise; see flow.walk
        sigmas              K + 1 times, the final 0 included
        """
        with self.at_work(self.mmdit), tqdm(total=len(sigmas) - 1, unit="step", disable=not self.progress) as bar:
            positive, *negative = [self.velocity(condition) for condition in conditions]

            def step(z: Tensor, t: Tensor) -> Tensor:
                bar.update()
                return positive(z, t)  # (B, 64, h, w)

            z = flow.draw([step, *negative], noises.to(self.device), sigmas, guidance)  # (B, 64, h, w) in fp32
        check_stage("the MMDiT's latents", z, self.dtype)
        return z

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of latents (B, 64, h, w), checked to be finite."""
        pictures = []
        with self.at_work(self.vae) as vae:
            for z in latents.split(1):  # one at a time: it is now that pixels take memory
                image = vae.decode(z.to(self.dtype))  # (1, 4, 16h, 16w)
                check_stage("the decoded pixels", image, image.dtype)
                pictures += to_pictures(image)
        return pictures

    # All of it.

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        images: Source | list[Source] | list[list[Source]] | None = None,
        height: int | None = None,
        width: int | None = None,
        resolution: int | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Draw one picture for each prompt; one string gives one RGBA picture, a list a list.

        images              sources, in the order the prompt speaks of them: one list that all prompts share, or a
                            list of lists, one for each prompt (a batch has one layout: equal numbers and sizes)
        height, width       in pixels, floored to multiples of 32. None: the last source's aspect ratio at the area
                            resolution^2, without sources resolution x resolution
        resolution          sources are resized to this side's area; None: the checkpoint's
        steps               None: the checkpoint's sample_sigmas, whose number is the only one it takes, else 40
        guidance            1 is off; above, a negative branch runs too, with negative_prompt (None: an empty one)
        seed                of the noise, which is drawn on the CPU: the same on every machine, and the reference's
        noise               (B, h w, 64) to start from instead, tokens in row-major order; the seed's are the noises of
                            later steps, where the checkpoint takes any (stochastic_sampling)
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        sources = source_lists(images, len(prompts))
        conditions = self.conditions(prompts, sources, resolution, guidance, negative_prompt)
        self.free_encoder()
        pictures = self.pictures(conditions, height, width, resolution, steps, guidance, seed, noise)
        return pictures[0] if isinstance(prompt, str) else pictures

    def pictures(
        self,
        conditions: list[Condition],
        height: int | None = None,
        width: int | None = None,
        resolution: int | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        noise: Tensor | None = None,
    ) -> list[Image.Image]:
        """The second half of a call: B pictures. conditions: one, or with guidance two, each of B prompts. The other
        arguments are those of a call."""
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed}: a number from 0 to 2^63 - 1 is expected")
        if conditions[0].sources:
            default = [16 * side for side in conditions[0].sources[-1].shape[-2:]]
        else:
            default = [self.resolution if resolution is None else resolution] * 2
        height = default[0] if height is None else height
        width = default[1] if width is None else width
        h, w = latent_grid(height, width, self.resolution)
        sigmas = self.sigmas(steps, h * w)
        noises = self.noises(len(conditions[0].mask), h, w, len(sigmas) - 1, seed, noise)
        _ = self.vae  # read before the steps: if its file is damaged, no step is lost
        return self.decode(self.draw(conditions, noises, sigmas, guidance))


def source_lists(images: Source | list[Source] | list[list[Source]] | None, prompts: int) -> list[list[Source]]:
    """A list of sources for each prompt, from what a call takes: none, one, one list for all, or the lists themselves."""
    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        images = [images]
    if images and isinstance(images[0], (list, tuple)):
        return list(images)
    return [images] * prompts


# ---- The command line ------------------------------------------------------------------------------------------------


def export_student(pipeline: Pipeline, options: SampleOptions) -> None:
    """--export: the checkpoint's student, changed by --lora, as a folder; or its difference from --base as a LoRA."""
    sigmas, scheduler = pipeline.sample_sigmas, pipeline.scheduler
    if sigmas is None:
        raise ValueError(
            f"{options.checkpoint}: no few-step student (it has no sample_sigmas); if it is one, give --sigmas"
        )
    may_write(options.export, options.overwrite, folder=not options.base)  # before the weights are read
    mmdit, out = pipeline.mmdit, options.export
    if options.base:
        print(export_lora(options.base, mmdit, out, sigmas, scheduler, options.rank, options.exact))
        return
    renoises = scheduler.stochastic_sampling
    export(options.checkpoint, mmdit, sigmas, out, link=options.link, stochastic=renoises, bend=scheduler)
    print(f"{out}: {how_it_draws(sigmas, renoises, scheduler)}")


def draw_jobs(pipeline: Pipeline, options: SampleOptions) -> None:
    """Draw and edit what --prompt or --prompt-file ask for. Everything is checked before the work."""
    jobs = [(options.prompt, options.image)]
    if options.prompt_file is not None:
        jobs = [(line.prompt, line.images) for line in read_prompts([options.prompt_file])]
    width, height = options.width, options.height
    if options.shape:
        width, height = sides(*options.shape, options.resolution or pipeline.resolution, "--aspect")
    if width and height:
        latent_grid(height, width, pipeline.resolution)  # checks them
    guidance = pipeline.guidance if options.guidance is None else options.guidance
    steps = len(pipeline.sigmas(options.steps, tokens=1)) - 1  # their number is the same for all sizes
    out, count = Path(options.out), len(jobs) * options.num_images
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]
    for path in paths:
        may_write(path, options.overwrite)

    # The encoder reads all prompts first, and leaves before the MMDiT comes.
    conditions, asked = [], (options.resolution, guidance, options.negative_prompt)
    for prompt, images in jobs:
        conditions.append(pipeline.conditions([prompt], [images], *asked))
    pipeline.free_encoder()

    size = {"height": height, "width": width, "resolution": options.resolution}
    settings = {"steps": steps, "guidance": guidance, **size}
    notes = {
        "negative_prompt": options.negative_prompt,
        "sigmas": pipeline.sample_sigmas,
        "shift": options.shift,
        "lora": options.lora,
        "checkpoint": options.checkpoint,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "fit": options.fit,
    }
    for number, path in enumerate(paths):
        job, repeat = divmod(number, options.num_images)
        prompt, images = jobs[job]
        seed = options.seed + repeat
        picture = pipeline.pictures(conditions[job], seed=seed, **settings)[0]
        job_notes = {"prompt": prompt, "images": [str(image) for image in images], "seed": seed}
        save(picture, path, job_notes | settings | notes)
        print(f"{path}: {picture.width} x {picture.height}, seed {seed}, {prompt!r}")


def run(options: SampleOptions) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    pipeline = Pipeline.from_pretrained(
        options.checkpoint,
        getattr(torch, dtype),
        device,
        options.offload,
        loras=options.loras,
        sigmas=list(options.sigmas) or None,
        shift=options.bend,
    )
    pipeline.compile, pipeline.source_fit = options.compile, options.fit
    if options.export is None:
        draw_jobs(pipeline, options)
    else:
        export_student(pipeline, options)


def main(arguments: list[str] | None = None) -> None:
    """The command line, for a caller in Python."""
    run(parse(arguments))
