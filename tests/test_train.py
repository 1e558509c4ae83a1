"""Training on tiny random checkpoints: exact resumption, who learns when, and what stops a run.

The world here is a few smooth random pictures; nothing is learnt but in the one test that overfits them.
"""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from training_runs import forked_process, job_of, metrics, newest, recipe_for, run_options, same, train_run

import dmd
import flow
import train
from model import MMDiT
from sample import Pipeline
from training.run import fill_defaults

STEPS = 3


@pytest.fixture
def command(checkpoint, prompts) -> list[str]:
    words = f"--checkpoint {checkpoint} --prompts {prompts} --steps {STEPS} --batch 6 --micro-batch 3 --warmup 2 "
    return [*words.split(), *"--save-every 2 --panel-every 3 --seed 5 --guidance 2 --resolution 64".split()]


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


def test_killed_training_goes_on_as_if_nothing_had_been(checkpoint, pools, tmp_path):
    numbers = dict(steps=4, batch=2, micro_batch=2, save_every=1, fake_updates=1)

    def run(out: str, resume: bool = False) -> None:
        train_run(checkpoint, tmp_path / out, pools["dmd"], resume=resume, **numbers)

    began = time.perf_counter()
    assert os.waitpid(forked_process(lambda: run("whole")), 0)[1] == 0
    length, moments = time.perf_counter() - began, random.Random(1)
    for life in range(4):
        pid = forked_process(lambda life=life: run("parts", resume=life > 0))
        time.sleep(moments.uniform(0.3, 0.9) * length)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(forked_process(lambda: run("parts", resume=True)), 0)[1] == 0
    assert same(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_dmd_round_is_the_method(checkpoint, pools, tmp_path, monkeypatch, sampler):
    """One round, written out again without prefixes, micro-batch machinery or masters, gives the same two gradients.

    The bar is a tenth of what doubling the guidance alone would change."""
    numbers = dict(steps=1, batch=2, micro_batch=2, fake_updates=1, clip=1e9, warmup=0, ema=0.5, muon_lr=0.0)
    numbers |= dict(fake_muon_lr=0.0, lr=1e-3, fake_lr=1e-3, recipe="mix-0-10", sampler=sampler)
    args, state = train.open_run(run_options(checkpoint, tmp_path / "run", **numbers))
    seen, real_update = {}, train.Trainee.update

    def watched(self, lr_factor):
        seen[self.title] = torch.cat([master.grad.flatten() for master in self.masters])
        real_update(self, lr_factor)

    monkeypatch.setattr(train.Trainee, "update", watched)
    train.train(args, pools["dmd"], state)

    recipe = recipe_for(pools["dmd"], "mix-0-10", ["edit"])
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
    """Also where a loss lets a gradient through to another network: nothing is left of it in .grad, and it is not learnt. Teachers
    stay as their folders have them."""
    args, state = train.open_run(run_options(checkpoint, tmp_path / "run", steps=1, fake_updates=1))
    job = train.open_job(args, pools["dmd"], state)

    def leaky(job, batch):
        losses, panel = train.student_batch_losses(job, batch)
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
    assert job.teachers.keys() == {"base", "edit"}
    for name, folder in (("base", "transformer"), ("edit", "teachers/edit")):
        teacher, written = job.teachers[name].model, MMDiT.from_pretrained(checkpoint / folder)
        assert all(weight.grad is None for weight in teacher.parameters())
        assert same(teacher.state_dict(), written.state_dict())


def test_flow_objective_overfits_two_pictures(checkpoint, pools, tmp_path):
    entries = [e for e in pools["flow"].entries if e.task == "t2i"][:2]
    numbers = dict(steps=80, batch=8, micro_batch=8, warmup=5, decay=0.3, ema=0.8, recipe="step-wise", muon_lr=0.01)
    args, state = train.open_run(run_options(checkpoint, tmp_path / "run", "flow", **numbers))
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


def test_draws_follow_from_seed_update_sample_and_purpose(checkpoint, pools, tmp_path):
    """The same sample has the same noises and time in micro-batches of any size; any of the four changes them."""
    pool = train.Pool([e for e in pools["dmd"].entries if e.size == (4, 4)])  # of one shape
    recipe = recipe_for(pools["flow"])

    def draws(purpose="fake", update=4, micro_batch=4, seed=0) -> list[tuple]:
        args = fill_defaults(run_options(checkpoint, tmp_path, batch=8, micro_batch=micro_batch, seed=seed))
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
    recipe = recipe_for(pools["dmd"])
    pooled, below = (
        job_of(fill_defaults(run_options(checkpoint, tmp_path, renoise_times=times)), pools["dmd"], recipe)
        for times in ("pooled", "below")
    )
    for name in ("student", "fake"):
        for update in range(6):
            drawn = (train.draw_batches(job, name, update) for job in (pooled, below))
            for one, other in zip(*drawn, strict=True):
                assert other.t.max() <= below.sigmas[other.k] and one.k == other.k
                assert torch.equal(one.noises, other.noises) and torch.equal(one.xi, other.xi)


def test_the_first_step_loss_has_the_teachers_of_step_0(checkpoint, pools, tmp_path, monkeypatch):
    """Whichever step DMD scores in this batch: also those where other teachers have weight."""
    args, asked = fill_defaults(run_options(checkpoint, tmp_path, recipe="specialised-first-step")), []
    recipe = recipe_for(pools["dmd"], args.recipe, ["text"])
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
            losses, _ = train.student_batch_losses(job, batch)
            assert losses.shape == batch.t.shape and losses.isfinite().all()
    assert {k for _, k in asked} <= {1, 2, 3}  # step 0 has this loss of its own
    assert [k for k, _ in asked[1::2]] == [0] * (len(asked) // 2)


@pytest.mark.parametrize("where", ["flow loss", "fake loss", "student loss", "real score", "gradient"])
def test_non_finite_stops_before_the_update(checkpoint, pools, tmp_path, monkeypatch, where):
    objective = "flow" if where == "flow loss" else "dmd"
    args, state = train.open_run(run_options(checkpoint, tmp_path / "run", objective, save_every=1))
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


def test_ctrl_c_while_prompts_are_encoded_is_one_line(command, tmp_path):
    run = [sys.executable, train.__file__, *command, "--out", str(tmp_path / "run")]
    ask = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(run, preexec_fn=ask, **pipes)
    while not process.stdout.readline().startswith("prompts: "):
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    said = [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and "encode" not in line]
    assert said == ["train.py: stopped by Ctrl-C"]
