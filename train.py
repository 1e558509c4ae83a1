"""Training: distil a few-step student (--objective dmd, the default), or train a teacher (--objective flow).

    draw_batches            the draws: which prompts, which student step k, which noises and times
    fake_batch_losses       the fake score learns what the student draws
    student_batch_losses    the student moves along -g, the difference of fake and real score
    teacher_batch_losses    the flow objective: a teacher learns from pictures
    update                  one update of one network, from these
    take_step               several fake updates, then one of the student
    train                   the loop: a step, then the log, the pictures and the checkpoint

Every prompt is encoded once, before the first update; then the encoders are freed. A STEP of training is one update of
the student (or, with the flow objective, of the teacher). The student's own steps, from noise to picture, are counted
by k. A MICRO-BATCH has one task, one category and one k; each process has an equal part of it. Every random number
follows from (seed, update, sample, purpose), so a resumed run needs no saved state of random generators. A picture is
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

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import recipe as recipes
from program import edges
from program import options as program_options
from recipe import Recipe
from training import presets
from training.options import TrainOptions


def parse(argv: list[str] | None = None) -> TrainOptions:
    names = f"Recipes, for python train.py --recipe NAME: {', '.join(recipes.RECIPES)}."
    return program_options.parse(argv, TrainOptions, f"{__doc__}\n\n{names}", presets.of_run)


if __name__ == "__main__":  # here already, and not at the end: --help and a mistyped flag do not wait for torch
    edges.run("train", parse)  # imports the rest, and calls run(options)

import torch
from torch import Tensor
from tqdm import tqdm

import dmd
import flow
from data.batches import Batch, condition_of, generator, nth_entries
from data.encode import How, encode_prompts
from data.pool import Pool
from networks.attention import kernels
from program.ranks import all_gather, joined, on_rank0, rank, ranks, say
from training import plan, watch
from training.passes import Passes
from training.run import export_run, fill_defaults, find_teachers, located, noted_signals, open_run, restore, save
from training.trainee import Network, Trainee, frozen, learner


@dataclass
class Job:
    """What the updates work with. flow.py and dmd.py see a network as its velocity v(z, t)."""

    options: TrainOptions
    pool: Pool  # the encoded prompts
    recipe: Recipe
    sigmas: list[float]  # the student's steps, K + 1 numbers
    teachers: dict[str, Network]  # frozen; "base" and the specialised ones
    trainees: dict[str, Trainee]  # "student" and "fake"; with the flow objective "teacher"
    updates_per_step: dict[str, int]  # of each trainee, in this order


# ---- the draws -------------------------------------------------------------------------------------------------------


def draw_batches(job: Job, name: str, update: int) -> Iterator[Batch]:
    """The micro-batches of one update of the trainee `name`, this rank's part of each.

    Each has one task, one category and one layout, and for DMD one k. The teachers' weights depend on these, so all ranks
    run the same networks equally often. Each k and t is drawn by itself; what other draws of them are worth is measured in
    results/plane/findings.md.

    The updates of each trainee are counted separately. With one count for all, a ratio of 1:1 and five fake updates for
    each of the student, the student would have the same task in every update. The step options.redraw gets other random
    numbers, for the same prompts. So a run goes on past a value that was not finite.
    """
    options = job.options
    purpose = "flow" if options.objective == "flow" else name
    step = update // job.updates_per_step[name] + 1  # as the progress line and errors count
    stream = f"{purpose}, again" if step == options.redraw else purpose
    for micro in range(len(options.sizes)):
        yield draw_batch(job, purpose, stream, update, micro)


def draw_batch(job: Job, purpose: str, stream: str, update: int, micro: int) -> Batch:
    """One micro-batch. `purpose` decides which prompts it has, `stream` all other random numbers."""
    options = job.options
    device, dtype = options.device, getattr(torch, options.dtype)
    flows = options.objective == "flow"

    # Which prompts. Each rank takes its part of them.
    size = options.sizes[micro]
    task, category, n = job.recipe.turn(update * len(options.sizes) + micro)
    entries = nth_entries(job.pool, options.seed, purpose, task, category, n, options.micro_batch)[:size]
    longest = max(len(entry.states) for entry in entries)
    mine = range(rank() * size // ranks(), (rank() + 1) * size // ranks())
    entries = [entries[i] for i in mine]

    # What the micro-batch has in common: the student's step, or whether its words are dropped.
    rng = generator(options.seed, update, micro, f"{stream} micro-batch")
    k = None if flows else draw_k(job, rng)
    wordless = flows and torch.rand((), generator=rng).item() < options.text_dropout

    # What each sample has for itself. Each has a generator, so its numbers depend on no neighbour.
    samples = [micro * options.micro_batch + i for i in mine]
    rngs = [generator(options.seed, update, sample, stream) for sample in samples]
    shape = (64, *entries[0].size)
    noises = torch.stack([torch.randn(options.noises, *shape, generator=rng) for rng in rngs], dim=1)
    xi = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])  # (B, 64, h, w)
    t = draw_times(job, rngs, k)  # (B,)

    def fresh(what: str, shape: tuple[int, ...]) -> Tensor:
        rngs = [generator(options.seed, update, sample, f"{stream} {what}") for sample in samples]
        return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)

    wants_empty = entries[0].empty is not None
    return Batch(
        task=task,
        category=category,
        fraction=size / options.batch,
        condition=condition_of(entries, device, dtype, empty=wordless, length=0 if wordless else longest),
        empty=condition_of(entries, device, dtype, empty=True) if wants_empty else None,
        target=torch.stack([entry.target for entry in entries]).to(device).float() if flows else None,
        k=k,
        noises=noises.to(device),
        xi=xi.to(device),
        t=t.to(device),
        times=t.tolist(),
        fresh=fresh,
    )


def draw_k(job: Job, rng: torch.Generator) -> int:
    """The student's step, 0 .. K - 1."""
    steps = job.options.student_steps
    lowest = dmd.lowest_step(job.recipe.first_step_weight, steps)
    return torch.randint(lowest, steps, (), generator=rng).item()


def draw_times(job: Job, rngs: list[torch.Generator], k: int | None) -> Tensor:
    """A time for each sample, (B,), rounded as the network is told it: the path is built at that time."""
    options = job.options
    u = torch.stack([torch.rand((), generator=rng) for rng in rngs])  # (B,)
    if k is None:  # the flow objective
        t = flow.logit_normal(u, math.log(options.time_shift))
    else:
        t = flow.renoise_times(u, options.time_shift, job.sigmas, k, options.renoise_times == "below")
    return flow.network_time(t, getattr(torch, options.dtype))


# ---- the losses ------------------------------------------------------------------------------------------------------
# Each gives one number for each sample, (B,), and what a panel may show, (B, 64, h, w) each.


def fake_batch_losses(job: Job, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow matching on what the student draws now. The student does not learn."""
    return dmd.fake_losses(make_round(job, batch)), {}


def student_batch_losses(job: Job, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The student moves along -g. Teachers and fake score are evaluated without gradient."""
    round = make_round(job, batch)
    losses, panel = dmd.student_losses(round)
    if job.recipe.first_step_weight:  # the teacher walks to the end of the student's first step in 5 steps (ours)
        start, end = job.sigmas[:2]
        stops = [start + (end - start) * i / 5 for i in range(6)]
        real = real_score(job, batch, k=0, calls=5)
        first = dmd.first_step_losses(round.student, real, batch.noises[0], stops)
        losses = losses + job.recipe.first_step_weight * first
    return losses, panel


def make_round(job: Job, batch: Batch) -> dmd.Round:
    """The three networks under the batch's condition, and its draws."""
    return dmd.Round(
        student=job.trainees["student"].network.velocity(batch.condition, calls=batch.k + 1),
        fake=job.trainees["fake"].network.velocity(batch.condition),
        real=real_score(job, batch, batch.k),
        noises=batch.noises,
        sigmas=job.sigmas,
        k=batch.k,
        xi=batch.xi,
        t=batch.t,
        fresh=batch.fresh,
    )


def real_score(job: Job, batch: Batch, k: int, calls: int = 1) -> dmd.RealScore:
    """The real score for the student's step k: each teacher guided, then mixed by the recipe's lambdas (Eq. 5). The
    unconditional side of guidance has the same sources, but no words. calls: see Network.velocity."""
    weights = job.recipe.weights(k, job.options.student_steps, batch.task, batch.category)
    teachers = {name: job.teachers[name] for name in weights}
    conditional = {name: teacher.velocity(batch.condition, calls) for name, teacher in teachers.items()}
    unconditional = None
    if job.options.guidance != 1:
        unconditional = {name: teacher.velocity(batch.empty, calls) for name, teacher in teachers.items()}
    return dmd.RealScore(weights, conditional, unconditional, job.options.guidance)


def teacher_batch_losses(job: Job, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The flow objective: the squared error of the velocity on pictures (Eq. 2)."""
    x, eps, t = batch.target, batch.noises[0], batch.t
    z = flow.add_noise(x, eps, t)  # (B, 64, h, w)
    v = job.trainees["teacher"].network.velocity(batch.condition)(z, t)  # (B, 64, h, w)
    panel = {"clean": x, "noised": z, "x0": flow.x0_from_velocity(z, v.detach(), t)}
    return flow.velocity_loss(v, x, eps), panel


LOSSES: dict[str, Callable[[Job, Batch], tuple[Tensor, dict[str, Tensor]]]] = {
    "fake": fake_batch_losses,
    "student": student_batch_losses,
    "teacher": teacher_batch_losses,
}

# ---- the loop --------------------------------------------------------------------------------------------------------


def update(job: Job, name: str, number: int, lr_factor: float) -> dict[str, Tensor]:
    """The trainee's update of this number. No other network learns. Returns the panel of the last micro-batch."""
    trainee = job.trainees[name]
    for batch in draw_batches(job, name, number):
        losses, panel = LOSSES[name](job, batch)  # (B,)
        trainee.backward(losses, batch, panel)
    trainee.update(lr_factor)
    for other in job.trainees.values():  # what this loss may have left in another network is not to be learnt
        other.clear_gradients()
    return panel


def take_step(job: Job, step: int, lr_factor: float) -> dict[str, Tensor]:
    """All updates of one step, in order. Returns the last panel: the student's, or with the flow objective the teacher's."""
    for name, count in job.updates_per_step.items():
        for number in range(step * count, (step + 1) * count):
            panel = update(job, name, number, lr_factor)
    return panel


def lr_factor_at(options: TrainOptions, step: int) -> float:
    """The factor of all learning rates at this step. It rises at the start of a run and falls at its end."""
    factor = min(1, (step + 1) / options.warmup) if options.warmup else 1.0
    return factor * min(1, (options.steps - step) / (options.decay * options.steps)) if options.decay else factor


def train(options: TrainOptions, pool: Pool, state: Path | None) -> Path:
    """Train on the pool. options and state come from open_run. Returns out/student, or out/transformer (flow).

    After Ctrl-C or SIGTERM the step is finished and saved, then SystemExit(128 + signal). FloatingPointError if a loss or
    gradient is not finite (before the update), or a weight (before it is saved).
    """
    job, first = open_job(options, pool, state), int(state.name) if state else 0
    networks = [*job.teachers.values(), *(trainee.network for trainee in job.trainees.values())]
    passes = Passes(network.model for network in networks)
    result = next(iter(job.trainees.values()))  # what is drawn and exported: the student, or the teacher
    steps = range(first, options.steps)
    bar = tqdm(steps, options.objective, options.steps, initial=first, unit="step", disable=rank() > 0)

    def due(every: int, done: int) -> bool:
        return done % every == 0 or done == options.steps

    with noted_signals() as signals:
        for step in bar:
            began, before, lr_factor = time.perf_counter(), passes.count, lr_factor_at(options, step)
            with located(f"step {step + 1}"):
                panel = take_step(job, step, lr_factor)
            done = step + 1

            # What follows changes no weight.
            seconds, computed = time.perf_counter() - began, passes.count - before
            record = result.records[-1]  # read before watch.note, which forgets the records
            note = watch.note(options, job.trainees, done, lr_factor, seconds, computed)
            bar.set_postfix_str(note, refresh=False)
            if due(options.panel_every, done):
                with result.averaged() as network:
                    watch.draw_pictures(options, pool, network, done, record, panel)
            stop = max(all_gather(signals[0] if signals else 0))
            if due(options.save_every, done) or stop:
                save(options.out, done, job.trainees)
            if stop and done < options.steps:
                bar.close()
                say(f"stopped after step {done}; --resume goes on from there")
                raise SystemExit(128 + stop)
    bar.close()
    return export_run(options, result, job.sigmas)


# ---- before the loop -------------------------------------------------------------------------------------------------


def encode(options: TrainOptions) -> Pool:
    """The run's prompts, encoded. They are kept in the run's conditions/, or in --cache."""
    flows = options.objective == "flow"
    recipe = recipes.find(options.recipe)
    if options.prompts:
        prompts = recipes.read_prompts(options.prompts)
    else:
        from toy.world import prompts_for  # a run on your own prompts does not need the toy

        prompts = prompts_for(recipe, options.pool, options.seed, targets=flows)
    recipe.resolve(recipes.categories(prompts), ())  # what is missing is said before the encoding
    counts = Counter(f"{prompt.task} {prompt.category}" for prompt in prompts)
    say("prompts: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items())))
    empty = flows or options.guidance != 1
    how = How(options.resolution, empty=empty, targets=flows, fit=options.fit, aspects=options.aspects)
    cache = options.cache or options.out / "conditions"
    return encode_prompts(cache, prompts, options.checkpoint, how, options.device)


def open_job(options: TrainOptions, pool: Pool, state: Path | None) -> Job:
    """Open the networks. state: the checkpoint that a resumed run goes on from."""
    flows = options.objective == "flow"
    recipe = recipes.find(options.recipe)
    places = {} if flows else find_teachers(options)
    if not flows and (missing := sorted(recipe.teacher_names - places.keys())):
        say(f"no teacher {', '.join(missing)} here: the base teacher takes its part")
    recipe = recipe.resolve(recipes.categories(pool.entries), places)

    # With LoRA, what learns is a role on the weights of the base teacher. A teacher in training takes the student's.
    teachers = {}
    if not flows or options.lora_rank:
        teachers = frozen(options, {name: places[name] for name in sorted(recipe.teacher_names)})
    base = teachers["base"] if options.lora_rank else None

    def learning(title: str, role: str, muon_lr: float, lr: float, ema: float) -> Trainee:
        return Trainee(title, learner(options, role, base), options, muon_lr, lr, ema)

    if flows:
        trainees = {"teacher": learning("teacher", "student", options.muon_lr, options.lr, options.ema)}
        updates_per_step = {"teacher": 1}
    else:
        trainees = {
            "student": learning("student", "student", options.muon_lr, options.lr, options.ema),
            "fake": learning("fake score", "fake", options.fake_muon_lr, options.fake_lr, ema=0.0),
        }
        updates_per_step = {"fake": options.fake_updates, "student": 1}
    config = next(iter(trainees.values())).network.model.config
    say(kernels(config.attention_head_dim, getattr(torch, options.dtype), options.device))
    if options.resume:
        restore(options, state, trainees, updates_per_step)
    sigmas = flow.student_sigmas(options.student_steps)
    return Job(options, pool, recipe, sigmas, teachers, trainees, updates_per_step)


def run(options: TrainOptions) -> None:
    recipe = recipes.find(options.recipe)
    if options.plan:
        options = fill_defaults(options)
        return say(plan.describe(options, recipe, options.gpus or ranks(), find_teachers(options)))
    presets.check_size(options)
    with joined():
        options, state = open_run(options)
        pool = encode(options)
        say(f"{options.out}: Ctrl-C or SIGTERM ends the run after the step at hand, and --resume goes on")
        folder = train(options, pool, state)
        say(f"finished: {folder}")
        if options.objective == "dmd" and not options.prompts:  # the toy world has a judge
            from eval import compare

            on_rank0(lambda: compare(folder, options.checkpoint, options.out) and None)


def main(argv: list[str] | None = None) -> None:
    """The command line, for a caller in Python."""
    run(parse(argv))
