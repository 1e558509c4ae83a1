"""Training on tiny random checkpoints: exact resumption, who learns when, and what stops a run.

The world here is a few smooth random pictures; nothing is learnt but in the one test that overfits them.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from safetensors.torch import load_file

import dmd
import flow
import train
from checkpoint.files import save_config
from checkpoint.weights import write_tensors
from data.batches import nth_entries
from data.encode import How, encode_prompts
from data.pool import ENOUGH
from model import Condition, MMDiT, MMDiTConfig
from program import options
from recipe import read_prompts
from sample import Pipeline
from training import presets, watch
from training import trainee as trainees_file
from training.options import TrainOptions
from training.run import fill_defaults, whole_checkpoints
from training.trainee import Record

STEPS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny checkpoint with one specialised teacher, which the default recipe calls for edits."""
    folder = reference.write_checkpoint(tmp_path_factory.mktemp("train") / "checkpoint", guidance=2.0, resolution=64)
    reference.write_transformer(folder / "teachers" / "edit", seed=7)
    (folder / "teachers" / "edit" / "transformer").rename(folder / "teachers" / "transformer")
    (folder / "teachers" / "edit").rmdir()
    (folder / "teachers" / "transformer").rename(folder / "teachers" / "edit")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """JSON lines of both tasks, two categories each; sources of odd sizes and modes, in two layouts."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for i in range(4):
        reference.picture(64, 64, i).save(folder / f"target{i}.png")
        size = (100, 40) if i == 3 else (41 + i, 43)
        reference.picture(*size, 10 + i, mode="RGBA" if i % 2 else "L").save(folder / f"source{i}.png")
        line = {"task": "t2i", "category": ["portrait", "text"][i % 2], "prompt": f"a wizard{' hat' * i}"}
        lines.append(line | {"target": f"target{i}.png"})
        line = {"task": "edit", "category": ["scene", "style"][i % 2], "prompt": f"make the sky red{', red' * i}"}
        lines.append(line | {"images": [f"source{i}.png"], "target": f"target{i}.png"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "prompts.jsonl"


@pytest.fixture
def command(checkpoint, prompts) -> list[str]:
    words = f"--checkpoint {checkpoint} --prompts {prompts} --steps {STEPS} --batch 6 --micro-batch 3 --warmup 2 "
    return [*words.split(), *"--save-every 2 --panel-every 3 --seed 5".split()]


@pytest.fixture(scope="module")
def pools(checkpoint, prompts, tmp_path_factory) -> dict[str, train.Pool]:
    folder, listed = tmp_path_factory.mktemp("pools"), read_prompts([prompts])
    return {o: encode_prompts(folder, listed, checkpoint, How(64, targets=o == "flow")) for o in ("flow", "dmd")}


def make_args(checkpoint: Path, out: Path, objective: str = "dmd", **numbers) -> TrainOptions:
    numbers = dict(steps=STEPS, batch=4, micro_batch=2, dtype="float32", panel_every=10**6, save_every=10**6) | numbers
    return TrainOptions(**presets.defaults(objective, 0, 0) | numbers, checkpoint=checkpoint, out=out)


def job_of(options, pool, recipe, teachers=None, trainees=None) -> train.Job:
    """A job as train.open_job makes it; without networks the draws can be looked at."""
    per_step = {"fake": options.fake_updates, "student": 1, "teacher": 1}
    sigmas = flow.student_sigmas(options.student_steps)
    return train.Job(options, pool, recipe, sigmas, teachers or {}, trainees or {}, per_step)


def newest(out: Path) -> tuple[int, dict]:
    """The newest checkpoint: its step, and {network: {tensor's name: tensor}}."""
    folder = whole_checkpoints(out)[-1]
    return int(folder.name), {f.name.split("-")[0]: load_file(f) for f in folder.iterdir()}


def same(a, b) -> bool:
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("seconds", "images_per_second", "memory_gb")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


# ---- a run and its interruption --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, dtype, number", [("dmd", "bfloat16", signal.SIGTERM), ("flow", "float32", signal.SIGINT)]
)
def test_interrupted_and_resumed_is_bit_identical(command, tmp_path, monkeypatch, objective, dtype, number):
    command = [*command, "--objective", objective, "--dtype", dtype]
    train.main([*command, "--out", str(tmp_path / "whole")])

    # The signal arrives in the middle of step 1: the step is finished, saved (no save is due), and nothing more is done.
    real = train.Trainee.update
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainee, "update", lambda self, rate: (os.kill(os.getpid(), number), real(self, rate))[1])
        with pytest.raises(SystemExit) as exit:
            train.main([*command, "--out", str(tmp_path / "parts")])
    assert exit.value.code == 128 + number
    assert newest(tmp_path / "parts")[0] == 1 and len(metrics(tmp_path / "parts")) == 1
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # what a kill -9 after the save would have left
    train.main([*command, "--out", str(tmp_path / "parts"), "--resume"])

    assert same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    result = "student/transformer" if objective == "dmd" else "transformer"
    name = f"{result}/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()

    # What the finished folder holds: the EMA as a checkpoint that opens, pictures, and the two newest states.
    model = MMDiT.from_pretrained(tmp_path / "whole" / result)
    saved = newest(tmp_path / "whole")[1]["student" if objective == "dmd" else "teacher"]
    assert all(torch.equal(p, saved[f"average {n}"].bfloat16().float()) for n, p in model.named_parameters())
    assert {f.name for f in (tmp_path / "whole" / "checkpoints").iterdir()} == {"00000002", "00000003"}
    assert (tmp_path / "whole" / "grid.png").is_file() and (tmp_path / "whole" / "panels" / "000003.png").is_file()
    if objective == "dmd":
        assert Pipeline.from_pretrained(tmp_path / "whole" / "student").sample_sigmas == [1.0, 0.9, 0.75, 0.5]


def forked(work) -> int:
    """Start `work` in a copy of this process, which is cheap, and return its number."""
    if pid := os.fork():
        return pid
    torch.set_num_threads(1)  # the other threads were not copied
    sys.stdout = sys.stderr = open(os.devnull, "w")
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)  # gone without any cleaning up, like a program that is killed


def test_killed_at_any_moment_of_saving(tmp_path):
    """Twenty writers that do nothing but save are killed at random moments: what is newest is whole, and no older than
    the last save that came to its end."""
    moments, told = random.Random(0), tmp_path / "told"
    (tmp_path / "run").mkdir()
    for _ in range(20):
        first = [0, *(int(f.name) for f in whole_checkpoints(tmp_path / "run"))][-1] + 1

        def write(first=first):
            for step in range(first, first + 10**6):
                tensors = {name: torch.from_numpy(np.full(50_000, step)) for name in "ab"}
                trainee = SimpleNamespace(sharded=False, state=lambda tensors=tensors: tensors)
                train.save(tmp_path / "run", step, {"student": trainee, "fake": trainee})
                told.write_text(f"{step:09d}")

        told.unlink(missing_ok=True)
        pid = forked(write)
        while not told.exists():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step, networks = newest(tmp_path / "run")
        assert step >= int(told.read_text() or 0) and networks.keys() == {"student", "fake"}
        assert all((tensor == step).all() for tensors in networks.values() for tensor in tensors.values())
        assert len(whole_checkpoints(tmp_path / "run")) <= 3  # two, and one that it did not come to remove
    assert step >= 20


def test_killed_training_goes_on_as_if_nothing_had_been(checkpoint, pools, tmp_path):
    numbers = dict(steps=4, batch=2, micro_batch=2, save_every=1, fake_updates=1)

    def run(out: str, resume: bool = False) -> None:
        args, state = train.open_run(make_args(checkpoint, tmp_path / out, resume=resume, **numbers))
        train.train(args, pools["dmd"], state)

    began = time.perf_counter()
    assert os.waitpid(forked(lambda: run("whole")), 0)[1] == 0
    length, moments = time.perf_counter() - began, random.Random(1)
    for life in range(4):
        pid = forked(lambda life=life: run("parts", resume=life > 0))
        time.sleep(moments.uniform(0.3, 0.9) * length)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(forked(lambda: run("parts", resume=True)), 0)[1] == 0
    assert same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path):
    def trainees(step: int) -> dict:
        return {"student": SimpleNamespace(sharded=False, state=lambda: {"a": torch.full((10_000,), step)})}

    train.save(tmp_path, 1, trainees(1))

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may be larger, as if no room were left
        with pytest.raises(OSError, match=r"no checkpoint of step 2 \(.*the last whole one: 00000001"):
            train.save(tmp_path, 2, trainees(2))

    assert os.waitpid(forked(write), 0)[1] == 0
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    assert newest(tmp_path)[0] == 1


# ---- who learns when -------------------------------------------------------------------------------------------------


def test_dmd_updates_touch_one_network_each(checkpoint, pools, tmp_path, monkeypatch):
    trainees, loaded, order = [], [], []
    build, update, load = train.Trainee.__init__, train.Trainee.update, trainees_file.load

    def watched_build(self, *arguments, **keywords):
        build(self, *arguments, **keywords)
        trainees.append(self)

    def watched_update(self, rate):
        (other,) = (t for t in trainees if t is not self)
        assert all(m.grad is not None for m in self.masters) and any(m.grad.any() for m in self.masters)
        assert all(m.grad is None for m in (*other.masters, *other.weights))
        before = [[m.detach().clone() for m in t.masters] for t in (self, other)]
        update(self, rate)
        assert not same(before[0], self.masters) and same(before[1], other.masters)
        order.append(self.title)

    def watched_load(args, folder, dtype):
        loaded.append((folder, load(args, folder, dtype)))
        return loaded[-1][1]

    monkeypatch.setattr(train.Trainee, "__init__", watched_build)
    monkeypatch.setattr(train.Trainee, "update", watched_update)
    monkeypatch.setattr(trainees_file, "load", watched_load)
    args, state = train.open_run(make_args(checkpoint, tmp_path / "run", steps=2, fake_updates=3))
    train.train(args, pools["dmd"], state)

    assert order == ["fake score", "fake score", "fake score", "student"] * 2
    teachers = [(f, m) for f, m in loaded if m not in [t.network.model for t in trainees]]
    assert [f for f, _ in teachers] == [checkpoint / "transformer", checkpoint / "teachers" / "edit"]
    for folder, model in teachers:
        assert all(w.grad is None for w in model.parameters())
        assert same(model.state_dict(), MMDiT.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_dmd_round_is_the_method(checkpoint, pools, tmp_path, monkeypatch, sampler):
    """One round, written out again without prefixes, micro-batch machinery or masters, gives the same two gradients.

    The bar is a tenth of what doubling the guidance alone would change."""
    numbers = dict(steps=1, batch=2, micro_batch=2, fake_updates=1, clip=1e9, warmup=0, ema=0.5, muon_lr=0.0)
    numbers |= dict(fake_muon_lr=0.0, lr=1e-3, fake_lr=1e-3, recipe="mix-0-10", sampler=sampler)
    args, state = train.open_run(make_args(checkpoint, tmp_path / "run", **numbers))
    seen, real_update = {}, train.Trainee.update

    def watched(self, lr_factor):
        seen[self.title] = torch.cat([master.grad.flatten() for master in self.masters])
        real_update(self, lr_factor)

    monkeypatch.setattr(train.Trainee, "update", watched)
    train.train(args, pools["dmd"], state)

    recipe = train.recipes.find("mix-0-10").resolve(train.recipes.categories(pools["dmd"].entries), ["edit"])
    student, fake, base = (MMDiT.from_pretrained(checkpoint / "transformer") for _ in range(3))
    expert = MMDiT.from_pretrained(checkpoint / "teachers" / "edit")
    sigmas = flow.student_sigmas(4)

    def gradient(model, loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)])

    def far(a, b):
        return ((a - b).norm() / b.norm()).item()

    (batch,) = train.draw_batches(job_of(args, pools["dmd"], recipe), "fake", 0)
    x = dmd.rollout(lambda z, t: student(z, t, batch.condition), batch.noises, sigmas, batch.k).detach()
    z = flow.add_noise(x, batch.xi, batch.t)
    loss = (fake(z, batch.t, batch.condition) - (batch.xi - x)).square().mean()
    assert far(seen["fake score"], gradient(fake, loss)) < 1e-3
    loss.backward()
    torch.optim.AdamW(fake.parameters(), lr=1e-3, weight_decay=0.0).step()

    (batch,) = train.draw_batches(job_of(args, pools["dmd"], recipe), "student", 0)
    assert len(batch.noises) == {"renoise": 4, "euler": 1}[sampler]
    exported = Pipeline.from_pretrained(args.out / "student")
    assert exported.scheduler.stochastic_sampling == (sampler == "renoise")  # as it was trained, so it draws
    x = dmd.rollout(lambda z, t: student(z, t, batch.condition), batch.noises, sigmas, batch.k)
    z, t = flow.add_noise(x, batch.xi, batch.t).detach(), batch.t
    weights = recipe.weights(batch.k, 4, "edit", batch.category)

    def by_hand(w):
        v = 0
        for name, weight in weights.items():
            model = {"base": base, "edit": expert}[name]
            uncond = model(z, t, batch.empty)
            v = v + weight * (uncond + w * (model(z, t, batch.condition) - uncond))
        s = t[:, None, None, None]
        x0_real, x0_fake = z - s * v, z - s * fake(z, t, batch.condition)
        g = (x0_fake - x0_real) / ((x - x0_real).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
        return gradient(student, (g.detach() * x).mean())

    expected = by_hand(2.0)
    assert far(seen["student"], expected) < 0.1 * far(by_hand(3.0), expected)


def test_each_update_moves_one_network_alone(checkpoint, pools, tmp_path, monkeypatch):
    """Also where a loss lets a gradient through to another network: nothing is left of it in .grad, and it is not learnt."""
    args, state = train.open_run(make_args(checkpoint, tmp_path / "run", steps=1, fake_updates=1))
    job = train.open_job(args, pools["dmd"], state)

    def leaky(job, batch):
        losses, panel = train.student_losses(job, batch)
        fake = job.trainees["fake"].network.velocity(batch.condition)
        return losses + fake(batch.noises[0], batch.t).square().flatten(1).mean(1), panel

    monkeypatch.setitem(train.LOSSES, "student", leaky)
    for name in ("student", "fake", "student"):
        before = {other: [m.clone() for m in trainee.masters] for other, trainee in job.trainees.items()}
        train.update(job, name, 0, 1.0)
        for other, trainee in job.trainees.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[other], trainee.masters, strict=True))
            assert moved == (other == name)
            assert all(tensor.grad is None for tensor in (*trainee.masters, *trainee.weights))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_added_parameters_learn_resume_and_are_not_exported(checkpoint, pools, tmp_path, monkeypatch, lora_rank):
    """A hack that gives the fake score an embedding of the student's step, and the student a bias."""
    learner = train.learner

    def with_more(options, name, base):
        network = learner(options, name, base)
        network.add_parameters(torch.nn.ParameterDict({"shift": torch.nn.Parameter(torch.zeros(64, 1, 1))}))
        return network

    def shifted(name):
        real = train.LOSSES[name]

        def losses(job, batch):
            found, panel = real(job, batch)
            network = job.trainees[name].network
            shift = network.model.added[network.role or "all"]["shift"]
            return found + (shift - 1).square().mean(), panel

        return losses

    monkeypatch.setattr(train, "learner", with_more)
    for name in ("student", "fake"):
        monkeypatch.setitem(train.LOSSES, name, shifted(name))
    numbers = dict(fake_updates=1, save_every=1, warmup=0, decay=0.0, lora_rank=lora_rank)
    for out, steps in (("whole", [2]), ("parts", [1, 2])):
        for last in steps:
            resume = last != steps[0]
            args, state = train.open_run(make_args(checkpoint, tmp_path / out, steps=last, resume=resume, **numbers))
            folder = train.train(args, pools["dmd"], state)
    whole, parts = (newest(tmp_path / out)[1] for out in ("whole", "parts"))
    for name in ("student", "fake"):
        (key,) = [key for key in whole[name] if key.startswith("master added.")]
        assert 0 < whole[name][key].abs().min() < 1 and torch.equal(whole[name][key], parts[name][key])
    MMDiT.from_pretrained(folder / "transformer")  # strict: nothing was added


@pytest.mark.parametrize("rank, recipe", [(0, "flash"), (2, "mix-0-10")])
def test_compiled_blocks_train_the_same(checkpoint, pools, tmp_path, monkeypatch, rank, recipe):
    """In all the forms in which a run meets them, none left to run uncompiled. Dynamo's part alone: no C++ is written."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    networks = []
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for compiled in (False, True):
            numbers = dict(steps=2, fake_updates=1, muon_lr=0.0, fake_muon_lr=0.0, lora_rank=rank, recipe=recipe)
            numbers["compile"] = compiled
            args, state = train.open_run(make_args(checkpoint, tmp_path / str(compiled), **numbers))
            train.train(args, pools["dmd"], state)
            networks.append(newest(args.out)[1])
    torch._dynamo.reset()
    plain, compiled = networks
    assert len(plain) > 1 and plain.keys() == compiled.keys()
    for name, tensors in plain.items():
        assert all(torch.allclose(tensors[key], compiled[name][key], atol=1e-5) for key in tensors)


def test_flow_objective_overfits_two_pictures(checkpoint, pools, tmp_path):
    entries = [e for e in pools["flow"].entries if e.task == "t2i"][:2]
    numbers = dict(steps=80, batch=8, micro_batch=8, warmup=5, decay=0.3, ema=0.8, recipe="step-wise", muon_lr=0.01)
    args, state = train.open_run(make_args(checkpoint, tmp_path / "run", "flow", **numbers))
    folder = train.train(args, train.Pool(entries), state)

    recipe = train.recipes.find("step-wise").resolve({"t2i": ["portrait", "text"]}, [])
    args = replace(args, batch=32, micro_batch=16, text_dropout=0.0)
    losses = []
    for transformer in (checkpoint / "transformer", folder):
        model, each = MMDiT.from_pretrained(transformer), []
        for batch in train.draw_batches(job_of(args, train.Pool(entries), recipe), "teacher", 10**6):
            with torch.no_grad():
                v = train.Network(model).velocity(batch.condition)
                each.append(flow.flow_matching_loss(v, batch.target, batch.noises[0], batch.t).mean().item())
        losses.append(sum(each))
    assert losses[1] < 0.4 * losses[0]


def test_masters_keep_what_bf16_rounds_away_and_average_them(checkpoint, pools, tmp_path):
    args = fill_defaults(make_args(checkpoint, tmp_path, "flow", dtype="bfloat16"))
    recipe = train.recipes.find("flash").resolve(train.recipes.categories(pools["flow"].entries), [])
    network = train.Network(trainees_file.load(args, checkpoint / "transformer", torch.float32))
    trainee = train.Trainee("teacher", network, args, 0.0, 1e-6, ema=0.5)
    before = [m.clone() for m in trainee.masters], [w.clone() for w in trainee.weights]
    average = before[0]
    for step in range(3):
        for batch in train.draw_batches(job_of(args, pools["flow"], recipe), "teacher", step):
            v = trainee.network.velocity(batch.condition)
            trainee.backward(flow.flow_matching_loss(v, batch.target, batch.noises[0], batch.t), batch, {})
        trainee.update(1.0)
        decay = min(0.5, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * m for a, m in zip(average, trainee.masters, strict=True)]
    moved = torch.cat([(m - b).abs().flatten() for m, b in zip(trainee.masters, before[0], strict=True)])
    stuck = torch.cat([(w == b).flatten() for w, b in zip(trainee.weights, before[1], strict=True)])
    assert moved.median() > 2e-6 and stuck.float().mean() > 0.95
    for a, b in zip(average, trainee.average, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_pool_holds_what_the_pipeline_would_encode(checkpoint, prompts, pools):
    pipeline = Pipeline.from_pretrained(checkpoint)
    listed = read_prompts([prompts])
    for prompt, entry in zip(listed, pools["flow"].entries, strict=True):
        assert (entry.task, entry.category) == (prompt.task, prompt.category)
        for text, states in ((prompt.prompt, entry.states), ("", entry.empty)):
            condition = pipeline.condition([text], [prompt.images] if prompt.images else None, resolution=64)
            assert entry.slots == condition.slots
            words = [condition.states[0, start:stop] for start, stop, grid in condition.pieces if grid is None]
            torch.testing.assert_close(states.float(), torch.cat(words), rtol=1e-2, atol=1e-2)
        for mine, theirs in zip(entry.sources, condition.sources, strict=True):
            torch.testing.assert_close(mine.float(), theirs[0], rtol=1e-2, atol=1e-2)
        assert entry.size == tuple(entry.target.shape[1:])  # the picture to learn has the size that is to be drawn
    assert len({entry.size for entry in pools["flow"].entries}) == 2  # one source is wider than the others


def test_draws_follow_from_seed_update_sample_and_purpose(checkpoint, pools, tmp_path):
    """The same sample has the same noises and time in micro-batches of any size; any of the four changes them."""
    pool = train.Pool([e for e in pools["dmd"].entries if e.size == (4, 4)])  # of one shape
    recipe = train.recipes.find("flash").resolve(train.recipes.categories(pools["flow"].entries), [])

    def draws(purpose="fake", update=4, micro_batch=4, seed=0) -> list[tuple]:
        args = fill_defaults(make_args(checkpoint, tmp_path, batch=8, micro_batch=micro_batch, seed=seed))
        found = []
        for batch in train.draw_batches(job_of(args, pool, recipe), purpose, update):
            assert len(batch.t) == batch.fraction * 8 <= micro_batch
            found += zip(batch.t.tolist(), batch.noises.mean((0, 2, 3, 4)).tolist(), batch.xi.mean((1, 2, 3)).tolist())
        assert len(set(found)) == 8
        return found

    assert draws() == draws(micro_batch=8) == draws(micro_batch=3)
    for other in (draws(purpose="student"), draws(update=5), draws(seed=1)):
        assert not set(other) & set(draws())


def test_renoise_times_below_stay_under_the_steps_own_level(checkpoint, pools, tmp_path):
    """For the student and the fake score; no other draw moves."""
    recipe = train.recipes.find("flash").resolve(train.recipes.categories(pools["dmd"].entries), [])
    pooled, below = (
        job_of(fill_defaults(make_args(checkpoint, tmp_path, renoise_times=times)), pools["dmd"], recipe)
        for times in ("pooled", "below")
    )
    for name in ("student", "fake"):
        for update in range(6):
            drawn = (train.draw_batches(job, name, update) for job in (pooled, below))
            for one, other in zip(*drawn, strict=True):
                assert other.t.max() <= below.sigmas[other.k] and one.k == other.k
                assert torch.equal(one.noises, other.noises) and torch.equal(one.xi, other.xi)


def test_an_uneven_ratio_is_said(checkpoint, tmp_path, capsys):
    fill_defaults(make_args(checkpoint, tmp_path, batch=4, micro_batch=2))
    assert "does not divide" not in capsys.readouterr().out
    fill_defaults(make_args(checkpoint, tmp_path, batch=5, micro_batch=3))
    assert "--micro-batch 3 does not divide --batch 5" in capsys.readouterr().out


def test_the_first_step_loss_has_the_teachers_of_step_0(checkpoint, pools, tmp_path, monkeypatch):
    """Whichever step DMD scores in this batch: also those where other teachers have weight."""
    args, asked = fill_defaults(make_args(checkpoint, tmp_path, recipe="specialised-first-step")), []
    recipe = train.recipes.find(args.recipe).resolve(train.recipes.categories(pools["dmd"].entries), ["text"])
    network = train.Network(MMDiT.from_pretrained(checkpoint / "transformer"))
    trainees = {name: SimpleNamespace(network=network) for name in ("student", "fake")}
    job = job_of(args, pools["dmd"], recipe, {"base": network, "text": network}, trainees)
    real_score = train.real_score

    def watched(job, batch, k, calls=1):
        asked.append((k, batch.k))
        return real_score(job, batch, k, calls)

    monkeypatch.setattr(train, "real_score", watched)
    for update in range(4):
        for batch in train.draw_batches(job, "student", update):
            losses, _ = train.student_losses(job, batch)
            assert losses.shape == batch.t.shape and losses.isfinite().all()
    assert {k for _, k in asked} <= {1, 2, 3}  # step 0 has this loss of its own
    assert [k for k, _ in asked[1::2]] == [0] * (len(asked) // 2)


def test_micro_batches_are_not_padded_where_lengths_are_common(checkpoint, pools, tmp_path):
    """Padding would count in the target's rotary position: in a micro-batch each sample is as it would be alone."""
    args = fill_defaults(make_args(checkpoint, tmp_path, "flow", batch=64, micro_batch=4, text_dropout=0.5))
    recipe = train.recipes.find("flash").resolve(train.recipes.categories(pools["flow"].entries), [])
    model, lengths = MMDiT.from_pretrained(checkpoint / "transformer"), set()
    pool = train.Pool(pools["flow"].entries * ENOUGH)
    for batch in train.draw_batches(job_of(args, pool, recipe), "teacher", 0):
        c = batch.condition
        lengths.add((batch.task, c.states.shape[1]))
        alone = Condition(c.states[1:2], c.mask[1:2], [s[1:2] for s in c.sources], c.slots)
        assert c.mask.all()
        assert all(c.states[:, a:b].abs().sum(2).all() for a, b, grid in c.pieces if grid is None)
        with torch.no_grad():
            v, one = model(batch.noises[0], batch.t, c), model(batch.noises[0, 1:2], batch.t[1:2], alone)
        torch.testing.assert_close(v[1:2], one, rtol=1e-4, atol=1e-5)
    assert len(lengths) > 4


def test_rare_lengths_meet_their_neighbours(pools):
    """Of 40 prompts with a length each, a micro-batch holds neighbours, padded to the longest by a few tokens; and where
    eight have one length, these alone. Buckets never mix."""
    like = next(e for e in pools["dmd"].entries if e.task == "t2i")
    other = next(e for e in pools["dmd"].entries if e.task == "edit")
    words = [replace(like, states=torch.ones(length, 64)) for length in [*range(20, 60), *[300] * 8]]
    edits = [replace(other, category=like.category, task="t2i", states=torch.ones(30, 64))]  # another bucket
    pool = train.Pool(words + edits)
    seen = set()
    for n in range(50):
        drawn = nth_entries(pool, 0, "fake", like.task, like.category, n, size=6)
        lengths = [len(e.states) for e in drawn]
        assert len({e.bucket for e in drawn}) == 1 and max(lengths) - min(lengths) <= ENOUGH
        seen.update(map(id, drawn))
    assert seen == set(map(id, words + edits))  # each prompt is met


@pytest.mark.parametrize("lengths, size", [((10,) * 50, 6), ((10,) * 50, 50), ((3,) * 5, 8), ((7,), 3)])
def test_prompts_of_one_class_are_seen_equally_often_at_any_time(pools, lengths, size):
    like = next(e for e in pools["dmd"].entries if e.task == "t2i")
    pool = train.Pool([replace(like, states=torch.ones(length, 4)) for length in lengths])
    counts = Counter({id(e): 0 for e in pool.entries})
    orders = []
    for n in range(60):
        orders.append([id(e) for e in nth_entries(pool, 3, "student", like.task, like.category, n, size)])
        counts.update(orders[-1])
        assert max(counts.values()) - min(counts.values()) <= 1 and sum(counts.values()) == (n + 1) * size
    if size == 50:  # whole epochs, each in another order
        assert len(set(map(tuple, orders))) == 60
    for seed, purpose in ((4, "student"), (3, "fake")):  # another seed, another network
        again = [
            [id(e) for e in nth_entries(pool, seed, purpose, like.task, like.category, n, size)] for n in range(60)
        ]
        assert len(lengths) == 1 or again != orders


def test_after_any_number_of_epochs_counts_differ_by_at_most_one(pools):
    """Over several lengths and buckets; a class that is smaller than a micro-batch comes as often in the long run."""
    like = next(e for e in pools["dmd"].entries if e.task == "t2i")
    sizes = {10: 23, 12: 8, 15: 40}
    entries = [replace(like, states=torch.ones(length, 4)) for length, n in sizes.items() for _ in range(n)]
    entries += [replace(like, states=torch.ones(5, 4), size=(2, 8)) for _ in range(9)]
    rare = [replace(like, states=torch.ones(5, 4), size=(8, 2)) for _ in range(2)]
    pool, size = train.Pool(entries + rare), 6
    counts, n = Counter(), 0
    for epoch in range(1, 40):
        for _ in range(
            sum(epoch * len(c) // size - (epoch - 1) * len(c) // size for c in pool.classes["t2i", like.category])
        ):
            batch = nth_entries(pool, 1, "fake", "t2i", like.category, n, size)
            assert len({(e.bucket, len(e.states)) for e in batch}) == 1
            counts.update(map(id, batch))
            n += 1
        assert {counts[id(e)] for e in entries} <= {epoch - 1, epoch}
        assert all(epoch - 3 <= counts[id(e)] <= epoch for e in rare)


def test_metrics_tell_times_and_tasks_apart():
    """Over the samples of two ranks."""
    times = [0.1, 0.95]
    records = [
        Record(task, "text", 2, times, torch.tensor(losses))
        for task, losses in (("t2i", [1.0, 2.0]), ("edit", [3.0, 3.0]))
    ]
    student = SimpleNamespace(records=records, grad_norm=0.5)
    fake = SimpleNamespace(records=[Record("t2i", "text", 1, times, torch.tensor([7.0, 9.0]))], grad_norm=0.25)
    theirs = [
        ("student", "t2i", 0.1, 5.0),
        ("student", "t2i", 0.95, 0.0),
        ("fake", "t2i", 0.1, 8.0),
        ("fake", "t2i", 0.95, 8.0),
    ]
    line = watch.metrics({"student": student, "fake": fake}, lambda mine: [mine, theirs])
    assert line["fake_loss"] == 8.0 and (line["grad_norm"], line["fake_grad_norm"]) == (0.5, 0.25)
    assert line["loss"] == pytest.approx(14 / 6) and line["loss_by_task"] == {"edit": 3.0, "t2i": 2.0}
    assert line["loss_by_t"] == [3.0, None, None, None, pytest.approx(5 / 3, abs=1e-4)]
    assert line["categories"] == {"t2i text": 8, "edit text": 4}  # each rank has as many
    assert line["tasks"] == ["t2i", "edit", "t2i"] and line["k"] == [2, 2, 1]


# ---- what stops a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["flow loss", "fake loss", "student loss", "real score", "gradient"])
def test_non_finite_stops_before_the_update(checkpoint, pools, tmp_path, monkeypatch, where):
    objective = "flow" if where == "flow loss" else "dmd"
    args, state = train.open_run(make_args(checkpoint, tmp_path / "run", objective, save_every=1))
    broken = {"now": False}
    update, backward = train.Trainee.update, train.Trainee.backward

    def watched_update(self, rate):
        update(self, rate)
        broken["now"] |= self.title != "fake score"  # from step 2 on

    def spoil(module, name, change):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: change(real(*a)) if broken["now"] else real(*a))

    monkeypatch.setattr(train.Trainee, "update", watched_update)
    if where == "flow loss":
        spoil(flow, "velocity_loss", lambda losses: torch.cat([losses[:1] / 0, losses[1:]]))
    elif where == "fake loss":
        spoil(dmd, "fake_losses", lambda losses: torch.cat([losses[:1] * torch.nan, losses[1:]]))
    elif where == "student loss":
        spoil(dmd, "surrogate_loss", lambda loss: loss * torch.inf)
    elif where == "real score":
        spoil(dmd, "predict_x0", lambda x0: x0 / 0)
    else:

        def poisoned(self, losses, batch, seen):
            backward(self, losses, batch, seen)
            if broken["now"]:
                self.masters[0].grad.view(-1)[0] = torch.nan

        monkeypatch.setattr(train.Trainee, "backward", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 2: .*task (t2i|edit), k = (None|\d).*t = \[0\.\d") as error:
        train.train(args, pools[objective], state)
    assert ("k = None" in str(error.value)) == (objective == "flow")
    assert newest(args.out)[0] == 1 and not (args.out / "student").exists()


@pytest.mark.parametrize("objective", ["dmd", "flow"])
@pytest.mark.parametrize("rank", [0, 32])
def test_a_network_of_billions_has_numbers_of_its_own(tmp_path, objective, rank):
    """Nothing of the toy's: AdamW, small rates, recomputation. The 7B's config alone decides, and flags go before it."""
    save_config(MMDiTConfig(), tmp_path / "transformer" / "config.json", "QwenImage21Transformer2DModel")
    words = ["--checkpoint", str(tmp_path), "--objective", objective, "--lora-rank", str(rank)]
    args = train.parse(words)
    assert args.muon_lr == args.fake_muon_lr * (objective == "dmd") == 0 and args.recompute
    assert (args.lr, args.micro_batch) == ((1e-4, 2) if rank else (2e-6 if objective == "dmd" else 1e-5, 8))
    assert args.batch == 32 and args.dtype == "bfloat16" and args.objective == objective
    assert train.parse([*words, "--lr", "3e-6"]).lr == 3e-6
    small = train.parse(words[2:])
    assert small.muon_lr > 0 and not small.recompute


@pytest.mark.parametrize("objective", ["dmd", "flow"])
def test_help_has_every_flag(objective, capsys):
    """argparse formats a help text only when it is asked for: a lone percent sign fails there, and only there."""
    with pytest.raises(SystemExit) as end:
        train.parse(["--objective", objective, "--help"])
    text = capsys.readouterr().out
    assert f"updates of the student [{TrainOptions.steps if objective == 'dmd' else presets.FLOW['steps']}]" in text
    assert end.value.code == 0 and all(f"--{f.name.replace('_', '-')}" in text for f in fields(TrainOptions))


def test_bad_input_is_one_clear_error(checkpoint, prompts, pools, tmp_path, command):
    out = tmp_path / "run"
    args, _ = train.open_run(make_args(checkpoint, out))
    train.open_run(make_args(checkpoint, out))  # a start that failed on its prompts may be repeated
    (out / "metrics.jsonl").touch()
    note = (out / "args.json").read_bytes()
    with pytest.raises(ValueError, match=r"run: not empty; --resume"):
        train.open_run(make_args(checkpoint, out))
    with pytest.raises(ValueError, match=r"--seed is 1, but the run in .* was started with 0"):
        train.open_run(make_args(checkpoint, out, seed=1, resume=True))
    assert (out / "args.json").read_bytes() == note
    with pytest.raises(ValueError, match="other: no run to go on with"):
        train.open_run(make_args(checkpoint, tmp_path / "other", resume=True))
    shutil.copytree(prompts.parent, tmp_path / "mine")
    mine = tmp_path / "mine" / "prompts.jsonl"
    train.open_run(make_args(checkpoint, tmp_path / "fourth", prompts=(mine,)))
    train.open_run(make_args(checkpoint, tmp_path / "fourth", prompts=(mine,), resume=True))
    mine.write_bytes(mine.read_bytes().replace(b"wizard", b"witch", 1))
    with pytest.raises(ValueError, match="a prompt or its picture is not what the run in .* was started with"):
        train.open_run(make_args(checkpoint, tmp_path / "fourth", prompts=(mine,), resume=True))
    with pytest.raises(OSError):
        train.open_run(make_args(checkpoint, prompts / "run"))  # a folder inside a file cannot be made
    with pytest.raises(ValueError, match="flash-2"):
        train.main([*command, "--out", str(tmp_path / "other"), "--recipe", "flash-2"])
    with pytest.raises(ValueError, match="--teacher edit="):
        train.open_run(make_args(checkpoint, tmp_path / "other", teacher=("edit=/nowhere",)))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="has no target"):
        lines = [p for p in read_prompts([prompts]) if p.task == "t2i"]
        without = [replace(lines[0], target=None)]
        encode_prompts(tmp_path / "conditions", without, checkpoint, How(64, targets=True))
    with pytest.raises(ValueError, match=r"--resolution 64: the toy's own prompts have 128"):
        train.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "third")])

    run = [sys.executable, train.__file__, *command, "--out", str(out)]  # the folder is taken
    ended = subprocess.run(run, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("train.py: ") and ended.stderr.count("\n") == 1


# ---- numbers ---------------------------------------------------------------------------------------------------------

NUMBERS = [f for f in fields(TrainOptions) if f.metadata["within"] and "|" not in f.metadata["within"]]


def nonsense(f) -> list[str]:
    """Values that are outside of the field's range, or no numbers."""
    low, high = (float(end) for end in f.metadata["within"][1:-1].split(","))
    whole = "int" in str(f.type)
    below, above = (int(low) - 1, int(high) * 2) if whole else (low - 1e-3, high * 1.001)
    ends = [low] * f.metadata["within"].startswith("(") + [high] * f.metadata["within"].endswith(")")
    return [str(x) for x in (below, above, *ends, 2**63, -(2**63), 10**400, -(10**400))] + [
        "nan",
        "inf",
        "-inf",
        "x",
        "",
    ]


def test_every_number_has_a_range():
    kinds = [f for f in fields(TrainOptions) if "int" in str(f.type) or "float" in str(f.type)]
    assert kinds == NUMBERS and len(kinds) == 25
    TrainOptions()  # checks its defaults


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
def test_nonsense_is_refused_before_anything_is_written(f, checkpoint, tmp_path, monkeypatch):
    """Through main: the error names the flag. --plan refuses the same."""
    monkeypatch.setattr(presets, "TOY", checkpoint)  # whose size is not looked up
    common = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "float32"]
    for value in nonsense(f):
        for more in ([], ["--plan"]):
            with pytest.raises(ValueError, match=options.flag(f.name)):
                train.main([*common, *more, f"{options.flag(f.name)}={value}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, complaint",
    [
        ("--dtype float16", "--dtype float16: expected is bfloat16 or float32"),
        ("--objective dmd2", "--objective dmd2: expected is dmd or flow"),
        ("--device meta", "--device meta: torch cannot use it"),
        ("--device cuda:99", "--device cuda:99: torch cannot use it"),
        ("--resolution 16", "--resolution 16: a number in"),
        ("--teacher edit", "--teacher edit: NAME="),
        ("--teacher base=toy", "--teacher base=toy: NAME="),
        ("--teacher edit=tests", "--teacher edit=tests: no transformer folder"),
        ("--recipe flush", "unknown recipe 'flush'"),
        ("--stepz 3", "unrecognized arguments: --stepz 3"),
        ("--prompts", "--prompts: expected at least one"),
    ],
)
@pytest.mark.parametrize("plan", ["", " --plan"])
def test_other_flags_are_refused_before_anything_is_written(checkpoint, tmp_path, monkeypatch, words, complaint, plan):
    monkeypatch.chdir(Path(train.__file__).parent)
    with pytest.raises(ValueError, match=complaint):
        train.main([*words.split(), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "run"), *plan.split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["scheduler", "processor", "text_encoder", "vae", "transformer"])
def test_a_checkpoint_that_lacks_a_part_is_refused_at_the_start(checkpoint, tmp_path, part):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    shutil.rmtree(folder / part)
    with pytest.raises((ValueError, OSError), match=f"checkpoint/{part}"):
        train.open_run(make_args(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(checkpoint, pools, tmp_path_factory) -> Path:
    """A run of two steps, with masters apart from the weights, both optimisers, and its own copy of the checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoint, folder / "checkpoint")
    args = make_args(folder / "checkpoint", folder / "run", steps=2, batch=2, fake_updates=1, dtype="bfloat16")
    args, state = train.open_run(args)
    train.train(args, pools["dmd"], state)
    return folder


def tamper(change: str, state: Path, tmp: Path) -> None:
    """One kind of damage to the folder of a checkpoint's state, or to what the run was started with."""
    student, fake = state / "student-0000-of-0001.safetensors", state / "fake-0000-of-0001.safetensors"
    tensors, run = load_file(student), state.parent.parent
    name = {
        "master": "master time_text_embed.timestep_embedder.linear_1.weight",
        "average": "average proj_out.weight",
        "moment": "exp_avg proj_out.weight",
        "momentum": "momentum_buffer transformer_blocks.0.attn.to_q.weight",
        "updates": "updates",
    }.get(change)
    if name:
        name = name if name in tensors else next(n for n in sorted(tensors) if n.startswith(name.split()[0]))
        del tensors[name]
    name = next(n for n in sorted(tensors) if n.startswith("exp_avg ") and len(set(tensors[n].shape)) == 2)
    if change == "stray tensor":
        tensors["master nothing"] = torch.zeros(1)
    elif change == "broadcast":
        tensors[name] = tensors[name][:1].clone()
    elif change == "transposed":
        tensors[name] = tensors[name].T.contiguous()
    elif change == "a number":
        tensors[name] = torch.zeros(())
    elif change == "integers":
        tensors[name] = tensors[name].int()
    elif change == "NaN":
        tensors[name].view(-1)[-1] = torch.nan
    elif change == "count":
        tensors["updates"] += 1
    write_tensors(student, tensors)
    if change == "empty file":
        fake.write_bytes(b"")
    elif change == "no file":
        fake.unlink()
    elif change == "other network":
        shutil.copy(student, fake)
    elif change == "stray file":
        (state / "notes.txt").touch()
    elif change == "another rank":
        shutil.copy(fake, state / "fake-0001-of-0002.safetensors")
    elif change == "weights":
        file = tmp / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["proj_out.weight"] += 1
        write_tensors(file, weights)
    elif change == "teacher":
        file = tmp / "checkpoint" / "teachers" / "edit" / "config.json"
        file.write_text(file.read_text() + " ")
    elif change == "args":
        (run / "args.json").write_text("{}")
    elif change == "args list":
        (run / "args.json").write_text('{"arguments": [], "contents": {}}')


DAMAGE = (
    "master, average, moment, momentum, updates, stray tensor, broadcast, transposed, a number, integers, NaN, count, "
)
DAMAGE += "empty file, no file, other network, stray file, another rank, "
DAMAGE += "weights, teacher, args, args list, fewer steps"


@pytest.mark.parametrize("change", DAMAGE.split(", "))
def test_resume_refuses_what_the_run_did_not_write(finished, pools, tmp_path, change):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "args.json").write_text(
        (finished / "run" / "args.json").read_text().replace(str(finished), str(tmp_path))
    )
    state = whole_checkpoints(tmp_path / "run")[0]
    tamper(change, state, tmp_path)

    def resume(steps: int) -> None:
        numbers = dict(steps=steps, batch=2, fake_updates=1, dtype=None, resume=True)
        args, state = train.open_run(make_args(tmp_path / "checkpoint", tmp_path / "run", **numbers))
        train.train(args, pools["dmd"], state)

    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises((ValueError, OSError)) as error:
        resume(1 if change == "fewer steps" else 3)
    assert str(tmp_path) in str(error.value) or "--steps" in str(error.value)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_finished_run_goes_on_and_says_from_where(finished, pools, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "args.json").write_text(
        (finished / "run" / "args.json").read_text().replace(str(finished), str(tmp_path))
    )
    (tmp_path / "run" / "student" / "thesis.txt").touch()
    for steps in (2, 3):
        numbers = dict(steps=steps, batch=2, fake_updates=1, dtype=None, resume=True)
        args, state = train.open_run(make_args(tmp_path / "checkpoint", tmp_path / "run", **numbers))
        train.train(args, pools["dmd"], state)
        said = capsys.readouterr().out
        assert f"goes on after step 2 of {steps}" in said and "student: from an earlier end of this run" in said
    assert (tmp_path / "run" / "student-1" / "thesis.txt").is_file() and (tmp_path / "run" / "student-2").is_dir()
    assert newest(tmp_path / "run")[0] == 3 and len(metrics(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "args.json").read_text())["arguments"]["steps"] == 3


@pytest.mark.parametrize("kind", ["masters", "average", "moment"])
def test_what_is_not_finite_is_neither_saved_nor_exported(checkpoint, pools, tmp_path, monkeypatch, kind):
    """At the last step, where no loss is left to show it."""
    update = train.Trainee.update

    def poisoned(self, rate):
        update(self, rate)
        if self.title == "student" and self.updates == 2:
            adam = self.optimizers[0]
            moment = adam.state[adam.param_groups[0]["params"][0]]["exp_avg"]
            tensor = {"masters": self.masters[-1], "average": (self.average or [None])[-1], "moment": moment}[kind]
            tensor.detach().view(-1)[-1] = torch.nan

    monkeypatch.setattr(train.Trainee, "update", poisoned)
    monkeypatch.setattr(watch, "draw_pictures", lambda *arguments: None)
    args, state = train.open_run(make_args(checkpoint, tmp_path / "run", steps=2, save_every=1, batch=2))
    with pytest.raises(FloatingPointError, match=r"no checkpoint of step 2 \(student: .* is not finite\); .*00000001"):
        train.train(args, pools["dmd"], state)
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000001"]
    assert not (tmp_path / "run" / "student").exists()


# ---- the command line ------------------------------------------------------------------------------------------------


def test_help_is_short_and_quick():
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", train.__file__, "--help"], capture_output=True, text=True
    )
    assert ended.returncode == 0 and "torch" not in ended.stderr and time.perf_counter() - began < 3
    for words in ("python train.py --plan --gpus 8", "specialised-first-step", "[110]"):
        assert words in ended.stdout


@pytest.mark.parametrize("moment", ["importing", "encoding"])
def test_ctrl_c_before_training_is_one_line(command, tmp_path, moment):
    run = [sys.executable, train.__file__, *command, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if moment == "importing":
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
    else:
        while not process.stdout.readline().startswith("prompts: "):
            pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and "encode" not in line] == [
        "train.py: stopped by Ctrl-C"
    ]
