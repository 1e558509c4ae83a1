"""Training: distil a few-step student (--objective dmd, the default), or train a teacher (--objective flow).

    update_fake       the fake score learns what the student draws
    update_student    the student moves against g, the difference of fake and real score
    update_flow       the flow objective: a teacher learns from pictures
    train             the loop: several fake updates, one of the student, then the log, the pictures and the checkpoint

Every prompt is encoded once, before the first update; then the encoders are freed. A STEP of training is one update of
the student (or, with the flow objective, of the teacher). The student's own steps, from noise to picture, are counted
by k. A MICRO-BATCH has one task, one category and one k; each process has an equal part of it. Every random number
follows from (seed, step, sample, purpose), so a resumed run needs no saved state of random generators. A picture is
here its latent from the VAE, (B, 64, h, w).

    python train.py                                                  the laptop run
    python train.py --prompts mine.jsonl --out runs/mine             your own prompts and pictures
    python train.py --objective flow --prompts pairs.jsonl           every line needs a "target"
    python train.py --plan --gpus 8 --checkpoint DIR                 memory and time, by arithmetic
    torchrun --nproc_per_node=8 train.py --checkpoint DIR --prompts mine.jsonl        all weights, sharded
    python train.py --lora-rank 32 --checkpoint DIR --prompts mine.jsonl              LoRA roles on one GPU

Exit status: 0 finished; 2 bad input; 1 a value is not finite; 130 and 143 after Ctrl-C and SIGTERM, which save the run.
Paper: Qwen-Image-Flash, arXiv 2606.03746; "2.0 report": the technical report of its teacher, Qwen-Image-2.0. Symbols and
conventions: flow.py and dmd.py.
"""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import recipe as recipes
from program import edges, options
from program.options import TOY, Options, option
from recipe import Recipe
from training import presets

# ---- the options -----------------------------------------------------------------------------------------------------


@dataclass
class Args(Options):
    """The options of a run: value, allowed range, and the text of --help. The values are those of the laptop's
    distillation. A teacher, or a network of billions, gets others: training/presets.py."""

    objective: str = option("dmd", "dmd: distil a few-step student; flow: train a teacher", "dmd | flow")
    checkpoint: Path = option(TOY, "folder laid out as Qwen-Image-2.1 is published; every network starts from it")
    prompts: tuple[Path, ...] = option((), "files of JSON lines; without any, the toy world's own prompts")
    pool: int = option(1024, "without --prompts: number of toy prompts for each task", "[1, 1e6]")
    recipe: str = option("flash", "composition, ratio and teachers: " + ", ".join(recipes.RECIPES))
    out: Path | None = option(None, "folder of this run; default: runs/OBJECTIVE-RECIPE")
    cache: Path | None = option(None, "folder of encoded prompts, for several runs; default: OUT/conditions")
    teacher: tuple[str, ...] = option((), "NAME=FOLDER_OR_LORA: specialised teachers besides the checkpoint's own")
    lora_rank: int = option(
        0, "student and fake score become LoRAs of this rank on one copy of the weights; 0: off", "[0, 4096]"
    )
    guidance: float | None = option(None, "the teachers' guidance w, 1 is off; default: the checkpoint's", "[1, 100]")
    resolution: int | None = option(None, "side of the pictures' area; default: the checkpoint's", "[32, 16384]")
    fit: str = option("stretch", "where sources and targets must change their shape", "stretch | crop | pad")
    aspects: bool = option(False, "draw T2I prompts in five aspects (a hash of the words picks one), not as squares")
    student_steps: int = option(4, "number of steps of the student, its NFE", "[1, 1000]")
    sampler: str = option("renoise", "how the student draws: with new noise at every step, or not", "renoise | euler")
    steps: int = option(110, "updates of the student", "[1, 1e9]")
    batch: int = option(24, "samples in an update, over all its micro-batches", "[1, 1e6]")
    micro_batch: int = option(6, "samples that run at once, over all processes", "[1, 1e6]")
    seed: int = option(0, "every random number follows from it", "[-9e18, 9e18]")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    redraw: int | None = option(
        None, "give this step other random numbers, after it ended the run as not finite", "[1, 1e9]"
    )
    save_every: int = option(50, "steps between two checkpoints", "[1, 1e9]")
    panel_every: int = option(50, "steps between two panels, pictures of x_theta and both predictions", "[1, 1e9]")
    device: str | None = option(None, "cpu, mps, cuda or cuda:NUMBER; default: cuda if there is one")
    dtype: str | None = option(None, "of the working weights; default: the faster one", "bfloat16 | float32")
    compile: bool = option(False, "torch.compile every block; the first step takes minutes")
    recompute: bool = option(False, "compute blocks again in the backward pass: less memory, a third more work")
    plan: bool = option(False, "print memory, work and time of such a run, and do nothing else")
    gpus: int | None = option(None, "with --plan: number of processes", "[1, 1e6]")
    peak_tflops: float = option(989.0, "with --plan: of one GPU in bf16; this is an H100's", "(0, 1e6]")
    utilisation: float = option(0.4, "with --plan: the part of the peak that is reached", "(0, 1]")

    # The optimisation. Ours, from a prototype of the laptop's size, unless a source is named.
    muon_lr: float = option(0.002, "Muon, for the blocks' matrices; 0: AdamW for those too", "[0, 1]")
    lr: float = option(2e-4, "AdamW, for all other tensors", "[0, 1]")
    fake_muon_lr: float = option(0.005, "Muon of the fake score, higher because it has to keep up", "[0, 1]")
    fake_lr: float = option(5e-4, "AdamW of the fake score", "[0, 1]")
    beta1: float = option(0.9, "AdamW's momentum, of student and fake score", "[0, 1)")
    fake_updates: int = option(2, "updates of the fake score before each of the student; DMD2: 5", "[1, 1000]")
    warmup: int = option(10, "steps over which the learning rates rise from 0", "[0, 1e9]")
    decay: float = option(0.4, "last part of the run, in which the learning rates fall to 0", "[0, 1]")
    clip: float = option(1.0, "largest norm of a gradient (2.0 report, section 4)", "(0, 1e9]")
    ema: float = option(0.97, "decay of the averaged weights, which are exported; 0: no average", "[0, 1)")
    time_shift: float = option(1.5, "moves p(t) towards noise; 1: not at all", "[0.01, 100]")
    text_dropout: float = option(0.1, "flow: part of the micro-batches without words (2.0 report, section 4)", "[0, 1]")

    @property
    def home(self) -> Path:
        return self.out or Path("runs") / f"{self.objective}-{self.recipe}"

    @property
    def sizes(self) -> list[int]:
        """Sizes of an update's micro-batches. The last is smaller where they do not divide the batch."""
        return [min(self.micro_batch, self.batch - i) for i in range(0, self.batch, self.micro_batch)]


def parse(argv: list[str] | None = None) -> Args:
    return options.parse(argv, Args, __doc__, presets.of_run)


# Here already, and not at the end: --help and a mistyped flag do not wait for torch. The work begins in main().
if __name__ == "__main__":
    edges.start("train.py", parse)

import torch
from torch import Tensor
from tqdm import tqdm

import dmd
import flow
from data.encode import Pool, cached_pool
from networks.attention import kernels
from program.ranks import all_gather, joined, on_rank0, raise_on_all_ranks, rank, ranks, say
from training import plan, watch
from training.batches import Batch, batches
from training.run import export_run, fill_defaults, find_teachers, located, noted_signals, open_run, restore, save
from training.trainee import Network, Trainee, frozen, learner

# In `with raise_on_all_ranks()` an error on one rank ends all. `located` says where an error was. `on_rank0` has rank 0 do it.

# ---- the updates -----------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What the updates work with. flow.py and dmd.py see a network as its velocity v(z, t)."""

    args: Args
    pool: Pool  # the encoded prompts
    recipe: Recipe
    sigmas: list[float]  # the student's steps, K + 1 numbers
    teachers: dict[str, Network]  # frozen; "base" and the specialised ones
    trainee: Trainee  # the student, or with the flow objective the teacher in training
    fake: Trainee | None  # the fake score

    @property
    def trainees(self) -> dict[str, Trainee]:  # by the names of their files in a checkpoint
        return {"student": self.trainee} | ({"fake": self.fake} if self.fake else {})


def update_fake(job: Job, update: int, lr_factor: float) -> watch.Record:
    """One update of the fake score: flow matching on what the student draws now. The student does not learn."""
    record = watch.Record("fake_loss", "fake_grad_norm")
    for batch in batches(job.args, job.pool, job.recipe, "fake", update):  # its fields: training/batches.py
        fake = job.fake.network.velocity(batch.condition)
        with torch.no_grad():
            student = job.trainee.network.velocity(batch.condition, keep=True)
            x_theta = dmd.rollout(student, batch.noises, job.sigmas, batch.k)  # (B, 64, h, w)
            del student  # and the prefix that it keeps between its steps, before the fake score computes
        losses = dmd.fake_score_loss(fake, x_theta, batch.xi, batch.t)  # (B,)
        job.fake.backward(losses, batch)
        record.add(batch, losses)
    record.grad_norm = job.fake.update(lr_factor)
    return record


def update_student(job: Job, update: int, lr_factor: float) -> watch.Record:
    """One update of the student, along -g. Teachers and fake score are evaluated without gradient."""
    record = watch.Record("loss", "grad_norm")
    for batch in batches(job.args, job.pool, job.recipe, "student", update):
        student = job.trainee.network.velocity(batch.condition, keep=True)
        fake, real = job.fake.network.velocity(batch.condition), real_velocity(job, batch)
        x_theta = dmd.rollout(student, batch.noises, job.sigmas, batch.k)  # (B, 64, h, w), with gradient of step k
        with raise_on_all_ranks(), located(batch.where):  # a value that is not finite on one rank stops all of them
            g, x0_real, x0_fake = dmd.dmd_gradient(real, fake, x_theta, batch.xi, batch.t)  # (B, 64, h, w) each
        loss = dmd.surrogate_loss(x_theta, g)  # ()
        if job.recipe.first_step_weight:
            loss = loss + job.recipe.first_step_weight * first_step(job, student, batch)
        job.trainee.backward(loss, batch)
        record.add(batch, 0.5 * g.square().flatten(1).mean(1))  # the surrogate's value for each sample
        record.panel = {"x_theta": x_theta.detach(), "x0_real": x0_real, "x0_fake": x0_fake}
    record.grad_norm = job.trainee.update(lr_factor)
    return record


def real_velocity(job: Job, batch: Batch, keep: bool = False) -> flow.Velocity:
    """The real score for the batch's student step k: each teacher guided, then mixed by the recipe's lambdas (Eq. 5).
    keep: for several steps, see Network.velocity."""
    weights = job.recipe.weights(batch.k, job.args.student_steps, batch.task, batch.category)
    guided, w = {}, job.args.guidance
    for name in weights:
        guided[name] = job.teachers[name].velocity(batch.condition, keep)
        if w != 1:  # the unconditional side of guidance has the same sources, but no words
            guided[name] = flow.guided(guided[name], job.teachers[name].velocity(batch.empty, keep), w)
    return dmd.mix_teachers(weights, guided)


def first_step(job: Job, student: flow.Velocity, batch: Batch) -> Tensor:
    """The first-step loss (section 6.1), (). The teacher walks to the end of the student's first step in 5 steps (ours)."""
    batch = replace(batch, k=0)  # the teachers of that step, whichever one DMD scores
    start, end = job.sigmas[:2]
    stops = [start + (end - start) * i / 5 for i in range(6)]
    z_teacher = flow.euler(real_velocity(job, batch, keep=True), batch.noises[0], stops)  # (B, 64, h, w)
    return dmd.first_step_loss(student, batch.noises[0], z_teacher, stops[-1]).mean()


def update_flow(job: Job, update: int, lr_factor: float) -> watch.Record:
    """One update with the flow objective: the squared error of the velocity on pictures (Eq. 2)."""
    record = watch.Record("loss", "grad_norm")
    for batch in batches(job.args, job.pool, job.recipe, "flow", update):
        velocity = job.trainee.network.velocity(batch.condition)
        losses = flow.flow_matching_loss(velocity, batch.target, batch.noises[0], batch.t)  # (B,)
        job.trainee.backward(losses, batch)
        record.add(batch, losses)
        if due(job.args, job.args.panel_every, update + 1):
            record.panel = flow_panel(velocity, batch)
    record.grad_norm = job.trainee.update(lr_factor)
    return record


@torch.no_grad()
def flow_panel(velocity: flow.Velocity, batch: Batch) -> dict[str, Tensor]:
    """What the flow objective's panel shows, (B, 64, h, w) each."""
    z = flow.add_noise(batch.target, batch.noises[0], batch.t)
    return {"clean": batch.target, "noised": z, "x0": flow.x0_from_velocity(z, velocity(z, batch.t), batch.t)}


# ---- the loop --------------------------------------------------------------------------------------------------------


def open_job(args: Args, pool: Pool, state: Path | None) -> Job:
    """Open the networks. state: the checkpoint that a resumed run goes on from."""
    flows = args.objective == "flow"
    found = {} if flows else find_teachers(args)
    recipe = recipes.find(args.recipe)
    if not flows and (missing := sorted(recipe.teacher_names - found.keys())):
        say(f"no teacher {', '.join(missing)} here: the base teacher takes its part")
    recipe = recipe.resolve(recipes.categories(pool.entries), found)
    needed = {name: found[name] for name in sorted(recipe.teacher_names)}
    teachers = {} if flows and not args.lora_rank else frozen(args, needed)
    base = teachers["base"] if args.lora_rank else None
    name, network = "teacher" if flows else "student", learner(args, "student", base)
    trainee = Trainee(name, network, args, args.muon_lr, args.lr, args.ema)
    job = Job(args, pool, recipe, flow.student_sigmas(args.student_steps), teachers, trainee, None)
    say(kernels(network.model.config.attention_head_dim, getattr(torch, args.dtype), args.device))
    if not flows:
        network = learner(args, "fake", base)
        job.fake = Trainee("fake score", network, args, args.fake_muon_lr, args.fake_lr, ema=0)
    if args.resume:
        restore(args, state, job.trainees)
    return job


def lr_factor_at(args: Args, step: int) -> float:
    """The factor of all learning rates at this step. It rises at the start of a run and falls at its end."""
    factor = min(1, (step + 1) / args.warmup) if args.warmup else 1.0
    return factor * min(1, (args.steps - step) / (args.decay * args.steps)) if args.decay else factor


def due(args: Args, every: int, done: int) -> bool:
    """Whether something that comes so often comes after `done` steps; the last step has all."""
    return done % every == 0 or done == args.steps


def train(args: Args, pool: Pool, state: Path | None) -> Path:
    """Train on the pool. args and state come from open_run. Returns out/student, or out/transformer (flow).

    After Ctrl-C or SIGTERM the step is finished and saved, then SystemExit(128 + signal). FloatingPointError if a loss or
    gradient is not finite (before the update), or a weight (before it is saved).
    """
    job, first = open_job(args, pool, state), int(state.name) if state else 0
    bar = tqdm(range(first, args.steps), args.objective, args.steps, initial=first, unit="step", disable=rank() > 0)
    with noted_signals() as signals:
        for step in bar:
            began, lr_factor = time.perf_counter(), lr_factor_at(args, step)
            with located(lambda step=step: f"step {step + 1}"):
                if args.objective == "flow":
                    records = [update_flow(job, step, lr_factor)]
                else:
                    updates = range(step * args.fake_updates, (step + 1) * args.fake_updates)
                    records = [update_fake(job, update, lr_factor) for update in updates]
                    records.append(update_student(job, step, lr_factor))
            done = step + 1
            seconds = time.perf_counter() - began
            bar.set_postfix_str(watch.note(args, records, done, lr_factor, seconds), refresh=False)
            if due(args, args.panel_every, done):
                with job.trainee.averaged() as network:
                    watch.draw_pictures(args, job.pool, network, records[-1], done)
            stop = max(all_gather(signals[0] if signals else 0))
            if due(args, args.save_every, done) or stop:
                save(args.out, done, job.trainees)
            if stop and done < args.steps:
                bar.close()
                say(f"stopped after step {done}; --resume goes on from there")
                raise SystemExit(128 + stop)
    bar.close()
    return export_run(args, job.trainee, job.sigmas)


def encode(args: Args) -> Pool:
    """The run's prompts, encoded. They are kept in the run's conditions/, or in --cache."""
    flows = args.objective == "flow"
    recipe = recipes.find(args.recipe)
    if args.prompts:
        prompts = recipes.read_prompts(args.prompts)
    else:
        from toy.world import prompts_for  # a run on your own prompts does not need the toy

        if args.resolution != 128:
            raise ValueError(f"--resolution {args.resolution}: the toy's own prompts have 128; give --prompts FILE")
        prompts = prompts_for(recipe, args.pool, args.seed, targets=flows)
    recipe.resolve(recipes.categories(prompts), ())  # what is missing is said before the encoding
    counts = Counter(f"{prompt.task} {prompt.category}" for prompt in prompts)
    say("prompts: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    cache, empty = args.cache or args.out / "conditions", flows or args.guidance != 1
    pictures = args.resolution, empty, flows, args.fit, args.aspects
    return cached_pool(cache, prompts, args.checkpoint, dtype, args.device, *pictures)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    recipe = recipes.find(args.recipe)
    if args.plan:
        args = fill_defaults(args)
        return say(plan.describe(args, recipe, args.gpus or ranks(), find_teachers(args)))
    with joined():
        args, state = open_run(args)
        pool = encode(args)
        say(f"{args.out}: Ctrl-C or SIGTERM ends the run after the step at hand, and --resume goes on")
        folder = train(args, pool, state)
        say(f"finished: {folder}")
        if args.objective == "dmd" and not args.prompts:  # the toy world has a judge
            from toy.score import compare

            on_rank0(lambda: compare(folder, args.checkpoint, args.out) and None)


if __name__ == "__main__":
    edges.begin()
    main()
