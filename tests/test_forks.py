"""The forks: every patch applies to the sources as they are, imports, does what its head says, and trains in its world."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from checkpoint.files import read_json
from model import MMDiT
from plane import forks
from plane.__main__ import main
from plane.forks import ORDER, UNCHANGED, Row, changed_lines, copy_sources, patch, rows_to_make
from plane.method import TASKS
from scores import pages
from scores.rows import with_interval

NAMES = sorted(file.stem for file in forks.PATCHES.glob("*.patch"))


def world(name: str) -> str:
    """What a patch's head says of where it works: "both", "plane" or "pictures"."""
    return re.search(r"^World: (?:the )?(both|plane|pictures)\b", patch(name).read_text(), re.M)[1]


ON_THE_PLANE = [name for name in NAMES if world(name) != "pictures"]
IN_PICTURES = [name for name in NAMES if world(name) != "plane"]


# ---- every patch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_patch_applies_and_imports(name, forked):
    load = forked(name)
    files = re.findall(r"^\+\+\+ b/(.+)\.py$", patch(name).read_text(), re.M)
    assert files
    for file in files:
        load(file.replace("/", "."))


@pytest.mark.parametrize("name", NAMES)
def test_every_head_names_idea_source_equation_and_world(name):
    head = patch(name).read_text().split("diff --git")[0]
    assert head.startswith(f"{name}: ")
    assert all(f"\n{word}: " in head for word in ("Source", "Equation", "World"))
    assert len(changed_lines(name)) <= 25


def test_the_plane_command_knows_every_fork_of_the_plane():
    assert sorted(ORDER) == ON_THE_PLANE


# ---- what they change ------------------------------------------------------------------------------------------------


def gaussian(mean: float, load: Callable[[str], ModuleType]) -> Callable:
    """The velocity of one Gaussian of width 1 around a mean."""
    return load("plane.method").Mixture(torch.tensor([[mean, -mean]]), 1.0).velocity


def make_round(load: Callable[[str], ModuleType], k: int, w: float = 1.0):
    """A round of three different velocities, with the same draws each time."""
    dmd, flow = load("dmd"), load("flow")
    rng = torch.Generator().manual_seed(k)
    velocities = {"base": gaussian(0.5, load)}
    real = dmd.RealScore({"base": 1.0}, velocities, {"base": gaussian(-0.5, load)}, w)
    student = scaled(gaussian(0.2, load))
    noises, xi = torch.randn(1, 6, 2, generator=rng), torch.randn(6, 2, generator=rng)
    t = 0.1 + 0.8 * torch.rand(6, generator=rng)

    def fresh(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(6, *shape, generator=torch.Generator().manual_seed(len(name)))

    fake = gaussian(-0.3, load)
    return dmd.Round(student, fake, real, noises, flow.student_sigmas(4), k, xi, t, fresh), student.scale


def scaled(velocity: Callable) -> Callable:
    """The same velocity at first, with a parameter."""

    def student(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return velocity(z, t) * student.scale

    student.scale = torch.ones(2, requires_grad=True)
    return student


@pytest.mark.parametrize("name, below, told", [("pooled", False, False), ("below", True, False), ("told", False, True)])
def test_below_and_told_are_each_alone_on_the_plane_and_pooled_is_neither(name, below, told, forked):
    setting = forked(name)("plane.method").Setting()
    assert (setting.below, setting.told) == (below, told)


def test_interval_noises_again_within_the_step(forked):
    flow = forked("interval")("flow")
    sigmas, u = flow.student_sigmas(4), torch.linspace(0, 1, 11)
    for k in range(4):
        t = flow.renoise_times(u, 1.0, sigmas, k)
        assert t.min() >= max(sigmas[k + 1], 0.02) - 1e-6 and t.max() <= min(sigmas[k], 0.98) + 1e-6


def test_projected_g_is_orthogonal_to_the_fake_scores_error(forked):
    dmd = forked("projected")("dmd")
    x, real, fake = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    g = dmd.dmd_gradient(x, real, fake)
    angle = (g * (x - fake)).flatten(1).sum(1)
    assert angle.abs().max() < 1e-4 < (g * (real - fake)).flatten(1).sum(1).abs().min()


def test_through_carries_the_gradient_of_the_earlier_steps(forked):
    """The loss's gradient in x_theta is g / n. Times d x_theta / d scale, with the walk in the graph."""
    load = forked("through")
    round, scale = make_round(load, 3)
    losses, panel = load("dmd").student_losses(round)
    (found,) = torch.autograd.grad(losses.sum(), scale)
    g = load("dmd").dmd_gradient(panel["x_theta"], panel["x0_real"], panel["x0_fake"])
    for through in (True, False):
        x_theta = load("dmd").rollout(round.student, round.noises, round.sigmas, 3, through=through)
        (expected,) = torch.autograd.grad((x_theta * g / 2).sum(), scale)
        assert torch.allclose(found, expected, atol=1e-5) == through


def test_decoupled_is_the_planes_guidance_at_times_of_its_own(forked):
    load = forked("decoupled")
    round, _ = make_round(load, 2, w=3.0)
    losses, panel = load("dmd").student_losses(round)
    add_noise, predict_x0 = load("flow").add_noise, load("flow").predict_x0
    with torch.no_grad():
        real = load("plane.method").guided_above(round)
        expected = predict_x0(real, add_noise(panel["x_theta"], round.xi, round.t), round.t)
    torch.testing.assert_close(panel["x0_real"], expected)
    plain, _ = make_round(load, 2, w=1.0)
    assert (load("dmd").student_losses(plain)[1]["x0_real"] - expected).abs().min() > 1e-3


def test_chords_are_zero_where_the_teacher_walks_straight(forked):
    load = forked("chords")
    round, _ = make_round(load, 1)
    round.real = lambda z, t: torch.ones_like(z)
    round.student = lambda z, t: torch.ones_like(z)
    assert load("dmd").student_losses(round)[0].abs().max() < 1e-8
    round.student = lambda z, t: torch.ones_like(z) * 3
    torch.testing.assert_close(load("dmd").student_losses(round)[0], torch.full((6,), 4.0))


def test_sid_moves_the_picture_along_g_where_the_guesses_do_not_depend_on_it(forked):
    load = forked("sid")
    round, _ = make_round(load, 0)
    x0 = {"real": torch.tensor([0.5, 0.1]), "fake": torch.tensor([-0.2, 0.3])}
    for name, guess in x0.items():  # a velocity whose guess of the clean picture is the same everywhere
        setattr(round, name, lambda z, t, guess=guess: (z - guess) / t[:, None])
    x_theta = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    load("dmd").rollout = lambda *arguments: x_theta
    losses, panel = load("dmd").student_losses(round)
    (found,) = torch.autograd.grad(losses.sum(), x_theta)
    g = load("dmd").dmd_gradient(x_theta.detach(), panel["x0_real"], panel["x0_fake"])
    torch.testing.assert_close(found, g / 2)


def test_huber_divides_g_by_what_a_pseudo_huber_norm_does(forked):
    """The loss's gradient in x_theta is g / (n sqrt(1 + mean g^2)): g / n where g is small, never more than 1 in all."""
    dmd = forked("huber")("dmd")
    x, g = torch.randn(2, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    g = g * torch.tensor([1e-3, 0.1, 1.0, 100.0]).reshape(-1, 1, 1, 1)
    (found,) = torch.autograd.grad(dmd.surrogate_loss(x.requires_grad_(), g).sum(), x)
    root = (1 + g.square().flatten(1).mean(1)).sqrt().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, g / (50 * root), atol=1e-6, rtol=1e-3)
    assert torch.allclose(found[0], g[0] / 50, atol=1e-6) and not torch.allclose(found[3], g[3] / 50, rtol=0.1)


def test_told_starts_as_the_unchanged_fake_score_and_knows_k_afterwards(forked, toy_checkpoint):
    load = forked("told")
    model = load("model").MMDiT.from_pretrained(toy_checkpoint / "transformer")
    network = load("training.trainee").Network(model)
    steps = torch.nn.Embedding.from_pretrained(torch.zeros(4, model.img_in.out_features), freeze=False)
    network.add_parameters(steps)
    rng = torch.Generator().manual_seed(0)
    states, z = torch.randn(1, 3, 128, generator=rng), torch.randn(1, 64, 2, 2, generator=rng)
    condition = load("model").Condition(states, torch.ones(1, 3, dtype=torch.bool), [], [])
    t = torch.full((1,), 0.5)
    with torch.no_grad():
        plain = network.velocity(condition)(z, t)
        assert torch.equal(network.velocity(replace(condition, k=2))(z, t), plain)
        steps.weight[2] = torch.randn(model.img_in.out_features, generator=rng)
        assert torch.equal(network.velocity(replace(condition, k=1))(z, t), plain)
        assert not torch.equal(network.velocity(replace(condition, k=2))(z, t), plain)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_fork_is_compared_with_the_unchanged_code_under_its_own_setting():
    rows = rows_to_make(2, 5)
    assert len(rows) == len(set(rows)) == 2 * (len(ORDER) + 2)  # two recipes; two unchanged codes, for guidance 1 and 2
    assert all(row.other in rows for row in rows)
    assert len({row.file for row in rows}) == len(rows)


def test_forks_resume_and_leave_the_pages_own_words(tmp_path, monkeypatch, capsys):
    """Rows are made with a stand-in. One is lost, and it alone is made again."""
    made = []

    def make_row(row: Row, file: Path) -> None:
        made.append(row)
        line = "0.5 0.7" if row.fork == UNCHANGED else "0.6 0.8"
        looks = {look: {c: {m: line for m in ("precision", "fine", "distance")} for c in TASKS} for look in ("1", "5")}
        row_file = {"setting": dict(row.values), "patch": forks.fingerprint(row.fork), "looks": looks}
        forks.write_json(file, row_file | {"seconds": {"1": 1.0, "5": 2.0}})

    monkeypatch.setattr(forks, "make_row", make_row)
    (tmp_path / "README.md").write_text(f"# Before\n\n{pages.START}\n\nstale\n\n{pages.END}\n\nAfter.\n")
    words = ["--forks", "--seeds", "2", "--updates", "5", "--out", str(tmp_path)]
    main(words)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Before\n\n") and page.endswith("\n\nAfter.\n") and "stale" not in page
    assert "+0.100 ± 0.000 / +0.100 ± 0.000; +0.100 ± 0.000" in page and "0.600 / 0.600; 0.600" in page
    assert len(made) == len(rows_to_make(2, 5))
    lost = made[3]
    (tmp_path / "rows" / lost.file).unlink()
    made.clear()
    main(words)
    assert made == [lost] and (tmp_path / "README.md").read_text() == page

    made.clear()
    main(["--forks", "below", *words[1:-1], str(tmp_path / "below")])
    assert [row.fork for row in made] == [UNCHANGED, UNCHANGED, "below", "below"]  # under two recipes
    with pytest.raises(SystemExit):
        main(["--forks", "belwo", *words[1:]])
    assert "--forks belwo: expected are pooled, below" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words[:4], "6", *words[5:]])
    assert "remove it, or name another --out" in capsys.readouterr().err


def test_the_pages_scores_of_pictures_are_those_of_the_records():
    page = (forks.PATCHES / "README.md").read_text().split("## In pictures")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    names = {"unchanged": "main", "below": "below", "[told](told.patch)": "told"}
    rows = {row["name"]: row for row in read_json(forks.ROOT / "results" / "records.json")["rows"]}
    assert [line[0] for line in lines[2:]] == [*names]
    for fork, *cells in lines[2:]:
        if row := rows.get(names[fork]):
            score, minus = row["score"], row.get("minus main", {})
            expected = [
                f"{score['mean']:.3f} ± {score['half']:.3f}",
                *(f"{row[task]:.3f}" for task in forks.CATEGORIES),
            ]
            expected += [with_interval(**minus[task], sign="+") if minus else "" for task in forks.CATEGORIES]
            assert cells == expected
        else:
            assert set(cells) == {"not run"}


# ---- trained: slow ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_THE_PLANE)
def test_a_fork_of_the_plane_trains(name, tmp_path):
    """And ends elsewhere than the unchanged code."""
    looks = []
    for fork in (UNCHANGED, name):
        row = Row(fork, "step", tuple(({"seeds": 2, "seed": 1, "updates": 10} | forks.NEEDS.get(name, {})).items()))
        forks.make_row(row, tmp_path / row.file)
        looks.append(forks.read_row(row, tmp_path / row.file)["looks"])
    assert looks[0] != looks[1]


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [*((name, []) for name in IN_PICTURES), ("told", ["--lora-rank", "2"])])
def test_a_fork_of_pictures_trains_resumes_and_exports(name, more, small_run, toy_checkpoint, tmp_path):
    """Two updates, and the same as one, resumed: equal students, to the last bit, which load strictly."""
    folder = tmp_path / "code"
    folder.mkdir()
    copy_sources(folder, name)
    words = [*small_run, "--decay", "0", *(["--sampler", "euler"] if name == "chords" else []), *more]
    for out, steps, resume in (("whole", 2, []), ("parts", 1, []), ("parts", 2, ["--resume"])):
        command = [sys.executable, "train.py", *words, "--out", str(tmp_path / out), "--steps", str(steps), *resume]
        subprocess.run(command, cwd=folder, check=True)
    whole, parts = (tmp_path / out / "student" / "transformer" for out in ("whole", "parts"))
    for file in whole.glob("*.safetensors"):
        tensors, resumed = load_file(file), load_file(parts / file.name)
        assert tensors.keys() == resumed.keys() and all(torch.equal(tensors[key], resumed[key]) for key in tensors)
    before, after = (MMDiT.from_pretrained(place).state_dict() for place in (toy_checkpoint / "transformer", whole))
    assert any(not torch.equal(before[key], after[key]) for key in before)
