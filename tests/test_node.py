"""Two processes are one: the same trajectories, whatever stops one stops both, and checkpoints that fit any number.

The processes are forks of this one, which costs no imports; one run at the end goes through torchrun itself.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_networks import TINY, randomise
from safetensors.torch import load_file
from training_runs import exit_codes, forked_process

import dmd
import train
from checkpoint.files import visible, write_json
from checkpoint.lora import merge, new_lora, read_lora, write_lora
from data import encode
from data.encode import How, encode_prompts
from data.pool import Entry, Pool
from model import MMDiT
from networks.vae import VAE, VAEConfig
from recipe import Prompt
from training import sharding, watch
from training.options import TrainOptions
from training.run import whole_checkpoints

COMMON = dict(dtype="float32", device="cpu", seed=3, batch=4, micro_batch=2, warmup=0, save_every=2, panel_every=100)
COMMON |= dict(muon_lr=0.0, fake_muon_lr=0.0, lr=3e-4, fake_lr=3e-4, fake_updates=2, guidance=2.0)


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory) -> Path:
    """Random networks; a full specialised teacher for edits, and one for text that is a LoRA. Nothing here is encoded.

    Not the shared checkpoint: some of its gradients are so small that Adam makes steps of their rounding."""
    folder = tmp_path_factory.mktemp("node") / "checkpoint"
    randomise(MMDiT(TINY), 1).save_pretrained(folder / "transformer")
    randomise(MMDiT(TINY), 2).save_pretrained(folder / "teachers" / "edit")
    lora = new_lora(MMDiT.from_pretrained(folder / "transformer"), 2, rng=torch.Generator().manual_seed(3))
    for _, b, _ in lora.values():
        b.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    write_lora(folder / "teachers" / "text.safetensors", lora)
    torch.manual_seed(5)
    VAE(VAEConfig(base_dim=4, decoder_base_dim=4, num_res_blocks=1)).save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir()
    (folder / "processor").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", {})
    write_json(folder / "model_index.json", {"_class_name": "QwenImage21Pipeline", "resolution": 64})
    return folder


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Random prompts of several lengths, which a micro-batch has to pad, and edits in two buckets."""
    generator, entries = torch.Generator().manual_seed(0), []

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for i in range(8):
        entries.append(Entry("t2i", ["portrait", "text"][i % 2], draw(3 + i, 24), draw(2, 24), [], [], None, (4, 4)))
        h, w = (4, 4) if i < 5 else (2, 6)
        slots, source = [(1, 1 + h * w // 4)], draw(64, h, w)
        entries.append(Entry("edit", "scene", draw(8 + i % 3, 24), draw(6, 24), slots, [source], None, (h, w)))
    return Pool(entries)


def in_processes(number: int | None, work: Callable[[], None]) -> None:
    """Run `work` in so many ranks of one group; None: in a process without any."""

    def joined(rank: int = 0) -> None:
        with train.joined():
            work()

    if number is None:
        assert os.waitpid(forked_process(joined), 0)[1] == 0
    else:
        assert exit_codes(number, joined) == [0] * number


def run(checkpoint: Path, pool: Pool, out: Path, wrong: str | None = None, **numbers) -> None:
    """One training run of this rank, which leaves a note of what it did and how it ended."""
    done = {"calls": 0, "batches": [], "teachers": [], "updates": [], "unrounded": [], "ended": "finished"}
    real = {"batches": train.draw_batches, "score": dmd.RealScore, "gradient": dmd.dmd_gradient}
    real |= {"update": train.Trainee.update, "forward": MMDiT.forward, "with_prefix": MMDiT.with_prefix}

    def counted(name: str):
        def call(self, *arguments, **keywords):
            done["calls"] += 1
            return real[name](self, *arguments, **keywords)

        return call

    def draw_batches(job, name, update):
        for batch in real["batches"](job, name, update):
            done["batches"].append(
                [name, update, batch.task, batch.category, batch.k, batch.noises[0, 0, 0].numel(), len(batch.t)]
            )
            yield batch

    class Score(real["score"]):
        def __call__(self, z, t):
            done["teachers"].append(self.weights)
            return super().__call__(z, t)

    def update(self, rate):
        if wrong == "signal" and train.rank() == 1 and self.title == "student":
            os.kill(os.getpid(), signal.SIGTERM)
        grads = torch.cat([sharding.local_rows(m.grad).flatten() for m in self.masters])
        done["unrounded"].append((grads != grads.bfloat16().float()).float().mean().item())
        real["update"](self, rate)
        done["updates"].append([self.title, self.grad_norm])

    def gradient(*arguments):
        g = real["gradient"](*arguments)
        wrong_here = wrong == "value" and train.rank() == 1 and "student" in dict(done["updates"])
        return g / 0 if wrong_here else g

    patch = pytest.MonkeyPatch()
    for where, name, what in [
        (train, "draw_batches", draw_batches),
        (dmd, "RealScore", Score),
        (dmd, "dmd_gradient", gradient),
        (train.Trainee, "update", update),
        (MMDiT, "forward", counted("forward")),
        (MMDiT, "with_prefix", counted("with_prefix")),
    ]:
        patch.setattr(where, name, what)
    if not numbers.pop("pictures", False):
        patch.setattr(watch, "draw_pictures", lambda *arguments: None)
    try:
        args, state = train.open_run(TrainOptions(checkpoint=checkpoint, out=out, **COMMON | numbers))
        train.train(args, pool, state)
    except (ArithmeticError, ValueError, OSError, SystemExit) as error:
        done["ended"] = f"{type(error).__name__}: {error}"
    finally:
        patch.undo()
    out.with_name(f"{out.name}.{train.rank()}.json").write_text(json.dumps(done))


def states(out: Path, step: int) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, the rows of all ranks joined."""
    found: dict[str, list[torch.Tensor]] = {}
    for file in sorted((out / "checkpoints" / f"{step:08d}").iterdir()):
        for name, tensor in load_file(file).items():
            found.setdefault(f"{file.name.split('-')[0]} {name}", []).append(tensor)
    return {name: torch.cat(parts) if parts[0].ndim else parts[0] for name, parts in found.items()}


def assert_same_trajectory(one: Path, two: Path, step: int) -> None:
    a, b = states(one, step), states(two, step)
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 1e-5 * max(1.0, a[name].abs().max()), name
    lines = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, two)]
    for x, y in zip(lines[0][:step], lines[1][:step], strict=True):
        assert [x[k] for k in ("tasks", "k", "categories")] == [y[k] for k in ("tasks", "k", "categories")]
        for key in ("loss", "fake_loss", "grad_norm", "fake_grad_norm"):
            assert abs(x[key] - y[key]) <= 2e-5 * abs(x[key])


@pytest.fixture(scope="module")
def runs(two_teachers, pool, tmp_path_factory) -> Path:
    """The folder of all runs: one-* by one process, two-* by two, and notes of what their ranks did."""
    folder = tmp_path_factory.mktemp("runs")
    first = dict(recipe="specialised-first-step", recompute=True, steps=1, sampler="euler")
    muon = dict(muon_lr=0.01, fake_muon_lr=0.01, steps=2)  # its step needs whole matrices, of which a rank has rows

    def alone():
        run(two_teachers, pool, folder / "one", steps=3)
        run(two_teachers, pool, folder / "one-lora", steps=2, lora_rank=4)
        run(two_teachers, pool, folder / "one-first", **first)
        run(two_teachers, pool, folder / "one-muon", **muon)

    def both():
        run(two_teachers, pool, folder / "two", steps=2, pictures=True)
        run(two_teachers, pool, folder / "two-from-one", steps=3, resume=True)
        run(two_teachers, pool, folder / "two-lora", steps=2, lora_rank=4)
        run(two_teachers, pool, folder / "two-first", **first)
        run(two_teachers, pool, folder / "two-muon", **muon)
        run(two_teachers, pool, folder / "two-bf16", steps=1, dtype="bfloat16")
        run(two_teachers, pool, folder / "two-wrong", "value", steps=3, save_every=1)
        run(two_teachers, pool, folder / "two-stopped", "signal", steps=3)
        run(two_teachers, pool, folder / "two-uneven", micro_batch=3)

    in_processes(None, alone)
    shutil.copytree(folder / "one", folder / "two-from-one")
    shutil.rmtree(folder / "two-from-one" / "checkpoints" / "00000003")
    in_processes(2, both)
    shutil.copytree(folder / "two", folder / "one-from-two")
    in_processes(None, lambda: run(two_teachers, pool, folder / "one-from-two", steps=3, resume=True))
    shutil.copytree(folder / "two", folder / "two-from-two")
    in_processes(2, lambda: run(two_teachers, pool, folder / "two-from-two", steps=3, resume=True))
    return folder


def noted(runs: Path, name: str) -> list[dict]:
    return [json.loads((runs / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_follow_the_trajectory_of_one(runs):
    files = {file.name for file in (runs / "two" / "checkpoints" / "00000002").iterdir()}
    ranks = [f"{rank:04d}-of-0002.safetensors" for rank in range(2)]
    assert files == {f"{name}-{rank}" for name in ("student", "fake") for rank in ranks}
    assert_same_trajectory(runs / "one", runs / "two", 2)
    assert_same_trajectory(runs / "one-lora", runs / "two-lora", 2)
    assert_same_trajectory(runs / "one-first", runs / "two-first", 1)  # two forwards before one backward, recomputed
    assert_same_trajectory(runs / "one-muon", runs / "two-muon", 2)
    a, b = states(runs / "one", 2), states(runs / "one", 3)
    assert sum(torch.equal(a[name], b[name]) for name in a) == 0  # everything moves, and the scale of it is not 1e-5
    assert (a["student master proj_out.weight"] - b["student master proj_out.weight"]).abs().max() > 1e-4
    for name in ("", "-lora", "-first"):
        students = [runs / f"{number}{name}" / "student" / "transformer" for number in ("one", "two")]
        if name:  # `one` went one step further
            for x, y in zip(*(MMDiT.from_pretrained(s).parameters() for s in students), strict=True):
                assert (x - y).abs().max() <= 2**-7 * x.abs().max()  # a step of bf16
    assert (runs / "two" / "grid.png").is_file() and (runs / "two" / "panels" / "000002.png").is_file()


def test_resumed_on_another_number_of_processes(runs):
    assert_same_trajectory(runs / "one", runs / "two-from-one", 3)
    assert_same_trajectory(runs / "one", runs / "one-from-two", 3)
    assert_same_trajectory(runs / "one", runs / "two-from-two", 3)  # each rank reads its own file


def test_ranks_do_the_same(runs):
    """The same tasks, categories, k, teachers and sizes in the same order, and the same number of forwards."""
    for name in ("two", "two-lora", "two-first", "two-muon", "two-bf16"):
        first, second = noted(runs, name)
        assert first["ended"] == second["ended"] == "finished"
        assert first["calls"] == second["calls"] > 0 and first["batches"] == second["batches"]
        assert first["teachers"] == second["teachers"] and first["updates"] == second["updates"]
    assert any("edit" in weights for weights in noted(runs, "two")[0]["teachers"])
    assert any("text" in weights for weights in noted(runs, "two-first")[0]["teachers"])  # a LoRA on sharded weights


def test_gradients_are_averaged_in_fp32(runs):
    """Were they reduced in bf16, every number of them would be a bf16 number."""
    assert min(noted(runs, "two-bf16")[0]["unrounded"]) > 0.1


def test_one_rank_stops_all(runs):
    for end in noted(runs, "two-wrong"):
        assert end["ended"].startswith("FloatingPointError: step 2: task")
        assert end["ended"].endswith("the student's loss is not finite")
        assert [name for name, _ in end["updates"]].count("student") == 1  # the broken step took none
    assert [f.name for f in whole_checkpoints(runs / "two-wrong")] == ["00000001"]
    stopped = [end["ended"] for end in noted(runs, "two-stopped")]
    assert stopped == ["SystemExit: 143"] * 2  # rank 1 alone had the signal
    assert [f.name for f in whole_checkpoints(runs / "two-stopped")] == ["00000001"]
    for end in noted(runs, "two-uneven"):
        assert end["ended"].startswith("ValueError: --batch 4 in --micro-batch 3 makes parts of 3 samples, which")


def test_ranks_share_the_encoding(two_teachers, tmp_path, monkeypatch):
    """Each group of prompts is hashed and encoded by one rank, in the groups of a single process; both have all of it."""
    (tmp_path / "log").mkdir()
    real_key = encode.content_key

    def content_key(prompt, *arguments):
        with open(tmp_path / "hashed", "a") as file:
            file.write(prompt.prompt)
        return real_key(prompt, *arguments)

    def encode_group(encoder, vae, prompts, *arguments):
        words = [prompt.prompt for prompt in prompts]
        (tmp_path / "log" / hashlib.md5(" ".join(words).encode()).hexdigest()).write_text(str(train.rank()))
        nothing = dict(empty=None, slots=[], sources=[], target=None)
        return [dict(states=torch.full((2, 3), float(w)).bfloat16(), **nothing) for w in words]

    monkeypatch.setattr(encode, "encode_group", encode_group)
    monkeypatch.setattr(encode, "content_key", content_key)
    monkeypatch.setattr(encode.VAE, "from_pretrained", lambda *arguments: None)
    monkeypatch.setattr(encode.Qwen3VL, "from_pretrained", lambda *arguments: None)
    monkeypatch.setattr(encode, "GROUP", 2)
    prompts = [Prompt("t2i", "text", str(number)) for number in range(9)]

    def work():
        pool = encode_prompts(tmp_path / str(train.ranks()), prompts, two_teachers, How(64, empty=False))
        assert [int(entry.states[0, 0]) for entry in pool.entries] == list(range(9))

    groups = []
    for number in (1, 2):
        in_processes(number, work)
        groups.append({file.name for file in (tmp_path / "log").iterdir()})
        names = [{file.name for file in visible(tmp_path / str(n))} for n in range(1, number + 1)]
    assert groups[0] == groups[1] and len(groups[0]) == 5 and names[0] == names[1]
    assert sorted((tmp_path / "hashed").read_text()) == sorted("012345678" * 2)
    assert {file.read_text() for file in (tmp_path / "log").iterdir()} == {"0", "1"}


def test_torchrun(tmp_path):
    """The launcher itself, as far as a run gets without a checkpoint: one line, and not one from each process."""
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    script = [str(Path(train.__file__)), "--checkpoint", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *launch, *script], capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and result.stderr.count("train.py: ") == 1
    assert "nowhere/model_index.json: no such file" in result.stderr


# ---- LoRA roles ------------------------------------------------------------------------------------------------------


def test_roles_share_one_copy_of_the_weights(two_teachers, tmp_path):
    """Counted in bytes: base weights once, in bf16; each role its own factors; the student's average."""
    args = TrainOptions(checkpoint=two_teachers, out=tmp_path, lora_rank=4, dtype="bfloat16", device="cpu")
    teachers = train.frozen(args, {"text": two_teachers / "teachers" / "text.safetensors"})
    student, fake = (
        train.Trainee(role, train.learner(args, role, teachers["base"]), args, 0.0, 1e-4, ema)
        for role, ema in (("student", 0.9), ("fake", 0.0))
    )
    networks = [*teachers.values(), student.network, fake.network]
    tensors = [t for n in networks for t in (*n.model.parameters(), *n.model.buffers())]
    tensors += [t for trainee in (student, fake) for t in (*trainee.masters, *trainee.weights, *trainee.average)]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    base = sum(p.numel() for p in MMDiT(TINY).parameters())
    factors = sum(a.numel() + b.numel() for a, b, _ in new_lora(teachers["base"].model, 4).values())
    assert held == 2 * base + 2 * (factors // 2) + 3 * 4 * factors  # the text teacher's are bf16, of rank 2
    assert {p for p in teachers["base"].model.parameters() if p.requires_grad} == {*student.weights, *fake.weights}


def test_lora_run_trains_its_factors_alone_and_exports_both_ways(runs, two_teachers):
    """The student's folder is the base with the averaged factors merged in; lora.safetensors holds these."""
    base = MMDiT.from_pretrained(two_teachers / "transformer")
    student = MMDiT.from_pretrained(runs / "one-lora" / "student" / "transformer")
    lora, sigmas, stochastic = read_lora(runs / "one-lora" / "lora.safetensors", base)
    assert sigmas == [1.0, 0.9, 0.75, 0.5] and stochastic and all(alpha == 4 for _, _, alpha in lora.values())
    assert all(b.abs().max() > 1e-5 for _, b, _ in lora.values())
    merged = MMDiT.from_pretrained(two_teachers / "transformer")
    merge(merged, [("the LoRA", lora, 1.0)])
    for name, weight in student.named_parameters():
        expected = merged.get_parameter(name)
        assert name.removesuffix(".weight") in lora or torch.equal(weight, base.get_parameter(name))
        assert (weight - expected).abs().max() <= 2**-7 * expected.abs().max()
    kept = states(runs / "one-lora", 2)
    assert all(name.endswith((".A", ".B", "updates")) for name in kept)
    student, fake = (kept[f"{who} master transformer_blocks.0.attn.to_q.B"] for who in ("student", "fake"))
    assert student.any() and fake.any() and not torch.equal(student, fake)
