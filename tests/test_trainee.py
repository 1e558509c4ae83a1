"""A network that learns: masters, average, added parameters, and what is compiled."""

from functools import partial

import pytest
import torch
from training_runs import job_of, newest, recipe_for, run_options, train_run

import flow
import train
from model import MMDiT
from training import trainee as trainees_file
from training.run import fill_defaults


def test_masters_keep_what_bf16_rounds_away_and_average_them(checkpoint, pools, tmp_path):
    args = fill_defaults(run_options(checkpoint, tmp_path, "flow", dtype="bfloat16"))
    recipe = recipe_for(pools["flow"])
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
            folder = train_run(checkpoint, tmp_path / out, pools["dmd"], steps=last, resume=resume, **numbers)
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
            numbers = dict(steps=1, fake_updates=1, muon_lr=0.0, fake_muon_lr=0.0, lora_rank=rank, recipe=recipe)
            numbers["compile"] = compiled
            train_run(checkpoint, tmp_path / str(compiled), pools["dmd"], **numbers)
            networks.append(newest(tmp_path / str(compiled))[1])
    torch._dynamo.reset()
    plain, compiled = networks
    assert len(plain) > 1 and plain.keys() == compiled.keys()
    for name, tensors in plain.items():
        assert all(torch.allclose(tensors[key], compiled[name][key], atol=1e-5) for key in tensors)
