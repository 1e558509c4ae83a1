"""The plane: closed forms against sampling and autograd, training against a teacher that one can check, and the commands."""

import json
import math

import pytest
import torch
from PIL import Image

import dmd
import recipe
from dmd import Round, rollout
from flow import score_from_velocity, student_sigmas
from plane import claims, dimension, rows, tables
from plane import method as plane_method
from plane.__main__ import main
from plane.dimension import World
from plane.method import Mixture, Network, Setting, evaluate, from_samples, measure, ring, train


@pytest.mark.parametrize("t", [0.2, 0.6, 0.95])
def test_velocity_is_the_mean_of_eps_minus_x(t):
    """Among many pairs of data and noise, those that meet at z: weigh each x by how likely noise leads it there."""
    rng = torch.Generator().manual_seed(0)
    some = Mixture(ring(3, 1.0), 0.3, torch.tensor([[0.5, -0.2]]))
    z = torch.tensor([[0.1, 0.3], [0.7, -0.6], [-0.4, 0.2]])
    x = some.sample(100_000, rng)
    eps = (z[:, None] - (1 - t) * x) / t  # (3, n, 2)
    share = (-eps.square().sum(-1) / 2).softmax(1)  # (3, n)
    expected = (share[..., None] * (eps - x)).sum(1)
    found = Mixture(some.modes, some.sd, some.centre.expand(3, 2)).velocity(z, torch.full((3,), t))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.0)


def test_velocity_has_the_score_of_the_noised_mixture():
    modes, sd, centre = ring(4, 1.5), 0.3, torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    z, t = torch.randn(50, 2, generator=torch.Generator().manual_seed(2)).requires_grad_(), torch.linspace(0.05, 1, 50)
    var = ((1 - t) ** 2 * sd**2 + t**2)[:, None]
    means = (1 - t)[:, None, None] * (centre[:, None] + modes)  # (50, 4, 2)
    log_p = (-(z[:, None] - means).square().sum(-1) / (2 * var)).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), z)
    with torch.no_grad():
        found = score_from_velocity(z, Mixture(modes, sd, centre).velocity(z, t), t)
    torch.testing.assert_close(found, score, atol=1e-3, rtol=1e-3)


def test_modes_of_each_seed():
    """With other modes for each seed, every seed gets what its own mixture says."""
    rng = torch.Generator().manual_seed(0)
    modes, z, t = torch.randn(3, 5, 2, generator=rng), torch.randn(12, 2, generator=rng), torch.rand(12, generator=rng)
    together = Mixture(modes, 0.2).velocity(z, t)
    for seed in range(3):
        mine = slice(4 * seed, 4 * seed + 4)
        torch.testing.assert_close(together[mine], Mixture(modes[seed], 0.2).velocity(z[mine], t[mine]))


@pytest.mark.parametrize("apart", [1.0, 3.0])
def test_in_more_dimensions_the_modes_plane_has_the_planes_velocity_and_across_is_one_gaussian(apart):
    flat, wide = World(apart=apart), World(apart=apart, dims=8)
    rng, t = torch.Generator().manual_seed(0), torch.linspace(0.05, 1, 20)
    z, source = torch.randn(20, 8, generator=rng), torch.zeros(20, 2)
    for category in plane_method.CATEGORIES["t2i"]:
        v = wide.mixture("base", category, source).velocity(z, t)
        base = flat.mixture("base", category, source)
        torch.testing.assert_close(dimension.project(v), base.velocity(dimension.project(z), t), atol=1e-5, rtol=1e-4)
        off, v_off = (x - dimension.embed(dimension.project(x), 8) for x in (z, v))
        gaussian = Mixture(torch.zeros(1, 8), base.sd).velocity(off, t)
        torch.testing.assert_close(v_off, gaussian, atol=1e-5, rtol=1e-4)
        if apart == 1:
            plain = Setting().mixture("base", category, source).velocity(z[:, :2], t)
            torch.testing.assert_close(base.velocity(z[:, :2], t), plain, atol=0.0, rtol=0.0)


def test_in_more_dimensions_many_steps_draw_exact_samples():
    world = World(seeds=2, dims=4, apart=2.0)
    scored = dimension.scores(world, world.teacher(), student_sigmas(300), renoise=False)["landscape"]
    assert scored["precision"].mean().item() == pytest.approx(1 - math.exp(-4.5), abs=0.01)
    assert scored["across"].mean().item() == pytest.approx(1, abs=0.05)
    assert abs(scored["distance"].mean().item()) < 0.02


def test_student_starts_as_the_base_teacher():
    rng, setting = torch.Generator().manual_seed(0), Setting(seeds=3)
    (noise,), _, source, t = setting.draw(12, rng)
    for category in plane_method.TASKS:
        student = Network(setting, rng)(category, source)
        base = setting.mixture("base", category, source).velocity
        torch.testing.assert_close(student(noise, t), base(noise, t), rtol=0.0, atol=0.0)


def test_seeds_are_separate():
    """What one seed draws depends on its own weights and noise alone."""
    rng, setting = torch.Generator().manual_seed(0), Setting(seeds=2)
    network = Network(setting, rng)
    network.weights[-1] = torch.randn(network.weights[-1].shape, generator=rng)
    (noise,), _, source, t = setting.draw(8, rng)
    v = network("object", source)
    before = v(noise, t)
    noise[4:] += 1
    after = v(noise, t)
    assert torch.equal(before[:4], after[:4]) and not torch.equal(before[4:], after[4:])


def test_measures_of_exact_samples():
    rng, truth = torch.Generator().manual_seed(0), Mixture(ring(4, 1.5), 0.3)
    found = measure(truth.sample(8000, rng), truth, 8, rng)
    assert found["precision"].mean().item() == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    assert found["fine"].mean().item() == pytest.approx(1 - math.exp(-0.5), abs=0.02)
    assert found["coverage"].tolist() == [1.0] * 8
    assert abs(found["distance"].mean().item()) < 0.005
    missing = measure(Mixture(truth.modes[:3], 0.3).sample(8000, rng), truth, 8, rng)
    assert missing["coverage"].tolist() == [0.75] * 8
    assert missing["precision"].mean().item() > 0.98 and missing["distance"].mean().item() > 0.1


def test_guidance_pushes_away_from_all_categories_together(monkeypatch):
    """Where all modes of two categories are of one width, their mixture is one mixture of all modes."""
    monkeypatch.setattr(plane_method, "CATEGORIES", {"t2i": ("landscape", "portrait"), "edit": ()})
    rng, source, t = torch.Generator().manual_seed(0), torch.zeros(20, 2), torch.linspace(0.05, 0.95, 20)
    z = torch.randn(20, 2, generator=rng)
    modes = [Setting().mixture("base", category, source).modes for category in ("landscape", "portrait")]
    everything = Mixture(torch.cat(modes), 0.3).velocity(z, t)
    torch.testing.assert_close(Setting().unconditional("base", "portrait", source)(z, t), everything)
    plain = Setting().mixture("base", "portrait", source).velocity(z, t)
    guided = Setting(guidance=3.0).teacher()("portrait", source)(z, t)
    torch.testing.assert_close(guided, everything + 3 * (plain - everything))


def test_guidance_seen_elsewhere_moves_the_clean_picture_by_as_much_at_any_time():
    setting, rng = Setting(seeds=1, guidance=3.0), torch.Generator().manual_seed(0)
    noises, xi, source, u = setting.draw(16, rng)
    student = Network(setting, rng)("text", source)
    real = setting.real_score({"base": 0.5, "text": 0.5}, "text", source)
    fresh = lambda name, shape: torch.randn(16, *shape, generator=rng)  # noqa: E731
    round = Round(student, student, real, noises, plane_method.SIGMAS, 2, xi, u, fresh)
    pushed, z = plane_method.guided_above(round), torch.randn(16, 2, generator=rng)
    early, late = (time * (pushed(z, u * 0 + time) - real.plain(z, u * 0 + time)) for time in (0.9, 0.1))
    assert early.abs().max() > 0.01
    torch.testing.assert_close(early, late, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("below", [True, False])
def test_below_noises_each_step_again_up_to_its_own_level(below, monkeypatch):
    times, losses = {k: [] for k in range(4)}, plane_method.fake_losses

    def record(round):
        times[round.k].append(round.t)
        return losses(round)

    monkeypatch.setattr(plane_method, "fake_losses", record)
    list(train(Setting(seeds=2, updates=12, below=below), recipe.find("flash"), set()))
    for k, sigma in enumerate(plane_method.SIGMAS[:-1]):
        t, top = torch.cat(times[k]), min(sigma, 0.98) if below else 0.98
        assert t.min() >= 0.02 and top - 0.05 < t.max() <= top


class OneMode(Setting):
    """Base and specialist with one mode each, at other places and of other widths."""

    def mixture(self, teacher, category, source):
        return Mixture(torch.tensor([[0.8, -0.4]]), 0.5) if teacher == "text" else Mixture(torch.zeros(1, 2), 1.0)


def test_student_reaches_mean_and_variance_of_one_mode(monkeypatch):
    """Trained at its last step alone, for a quick test: with all steps in turn it takes many times as long."""
    monkeypatch.setattr(dmd, "rollout", lambda v, noises, sigmas, k: rollout(v, noises, sigmas, 3))
    row = recipe.Recipe("text", (10, 0), t2i={"text": 1}, rules=recipe.routing(1.0, 1.0, 1.0, 1.0))
    setting = OneMode(seeds=2, updates=250, lr=2e-3, below=False)
    ((_, student, _),) = train(setting, row, {250})
    noises, _, source, _ = setting.draw(4000, torch.Generator().manual_seed(9))
    before, after = (
        plane_method.walk(model("text", source), noises, plane_method.SIGMAS) for model in (setting.teacher(), student)
    )
    assert before.mean(0).abs().max() < 0.05 and before.std(0).min() > 0.59
    torch.testing.assert_close(after.mean(0), torch.tensor([0.8, -0.4]), atol=0.06, rtol=0.0)
    torch.testing.assert_close(after.std(0), torch.tensor([0.5, 0.5]), atol=0.06, rtol=0.0)


def test_oracle_is_the_students_own_distribution():
    """A student that is exact has samples whose kernel density is the teacher's, one kernel wider."""
    one, rng = Mixture(torch.tensor([[0.3, 0.2]]), 0.4), torch.Generator().manual_seed(0)
    exact = lambda z, t: z - one.sample(len(z), rng) if t[0] == 1 else one.velocity(z, t)  # noqa: E731
    found = from_samples(exact, torch.randn(1, 1, 4000, 2, generator=rng), seeds=2)
    z, t = torch.randn(20, 2, generator=rng), torch.full((20,), 0.7)
    wider = Mixture(one.modes, math.hypot(one.sd, found.sd)).velocity(z, t)
    torch.testing.assert_close(found.velocity(z, t), wider, atol=0.1, rtol=0.0)


def test_same_seeds_same_digits():
    def weights(seed):
        setting = Setting(seeds=2, seed=seed, updates=3)
        return [network.weights[-1] for _, network, _ in train(setting, recipe.find("flash"), {3})][0]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_rows_are_paired(monkeypatch):
    """Every recipe sees the same draws."""
    seen, draw = {}, Setting.draw
    for name in ("e1-landscape", "flash"):
        seen[name] = []

        def record(*args, to=seen[name]):
            to.append(draw(*args))
            return to[-1]

        monkeypatch.setattr(Setting, "draw", record)
        list(train(Setting(seeds=2, updates=3), recipe.find(name), set()))
    pairs = list(zip(seen["e1-landscape"], seen["flash"], strict=True))
    assert len(pairs) == 9 and all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other))


def test_the_source_of_an_edit_is_a_landscape():
    _, _, source, _ = Setting().draw(4000, torch.Generator().manual_seed(0))
    landscape = Setting().mixture("truth", "landscape", source)
    assert measure(source, landscape, 4, torch.Generator())["precision"].min() > 0.97


@pytest.mark.parametrize(
    "parts, verdict",
    [
        ([(0.3, 0.1), (0.2, 0.1)], "agree"),
        ([(0.3, 0.1), (0.05, 0.1)], "cannot tell"),
        ([(0.3, 0.1), (-0.2, 0.1)], "disagree"),
        ([(0.004, 0.003)], "no effect"),  # above 0, but too small to count
        ([(0.3, 0.1), (-0.002, 0.001)], "no effect"),
        ([(0.008, 0.003)], "agree"),  # the effect may be larger than the band
        ([(-0.3, 0.1), (-0.002, 0.001)], "disagree"),
    ],
)
def test_a_verdict_follows_the_rules_written_down(parts, verdict):
    assert claims.word(parts) == verdict


def test_table_and_sweep_with_tiny_numbers(tmp_path, capsys, monkeypatch):
    few = ["--seeds", "2", "--updates", "2", "--out", str(tmp_path)]
    main(["--experiment", "guidance", *few])
    main(["--experiment", "oracle", *few])
    monkeypatch.setattr(dimension, "WORLDS", ((4, 1.5),))
    main(["--experiment", "dimension", *few])
    assert "| 4 " in (tmp_path / "dimension.md").read_text()
    main(["--experiment", "sharp", *few, "--seeds", "1"])  # one seed has no interval
    assert "± inf" in (tmp_path / "sharp.md").read_text() and (tmp_path / "sharp.png").exists()
    table = json.loads((tmp_path / "guidance.json").read_text())
    assert list(table) == list(tables.TABLES["guidance"])
    assert table["teacher, w 1"]["t2i"]["precision"] > table["student, w 1"]["t2i"]["precision"]
    assert "- undistilled" in (tmp_path / "oracle.md").read_text()
    assert Image.open(tmp_path / "oracle.png").width > 100
    assert "written to" in capsys.readouterr().out


def test_claims_go_on_where_they_were_killed(tmp_path, monkeypatch):
    """A row that is lost is trained again, to the same digits, and nothing else is; rows of other settings are refused."""
    monkeypatch.setattr(claims, "FIRST", {rows.EDITS_BASE: "base alone"})
    monkeypatch.setattr(claims, "OTHERS", ("5:5",))
    monkeypatch.setattr(claims, "SHARES", (1 / 10, 1))
    few = ["--experiment", "claims", "--seeds", "2", "--updates", "20", "--out", str(tmp_path)]
    main(few)
    kept = {path: path.read_text() for path in (tmp_path / "rows").iterdir()}
    assert len(kept) == 6
    first = (tmp_path / "claims.json").read_text()
    found = json.loads(first)["claims"]
    assert list(found) == list(claims.CLAIMS)
    some = found["At 5:5 the student edits better than its teachers (Gemini; not GPT)."]
    assert some["early"] == some["late"] == some["told"]["late"] == some["below"]["early"] == "disagree"
    assert found["Mixed into the others they hurt text."] == {}  # its rows are not there
    assert Image.open(tmp_path / "claims.png").width == 3 * Image.open(tmp_path / "drift.png").width == 1200
    assert not list(tmp_path.glob("dmd.*"))  # the picture of `python -m plane` is another experiment's

    (tmp_path / "rows" / "base-5-5-told.json").unlink()
    trained, train = [], claims.train

    def noted(setting, row, looks):
        trained.append(row.name)
        return train(setting, row, looks)

    monkeypatch.setattr(claims, "train", noted)
    main(few)
    assert trained == ["base-5-5"] and (tmp_path / "claims.json").read_text() == first
    assert {path: path.read_text() for path in (tmp_path / "rows").iterdir()} == kept
    with pytest.raises(SystemExit):
        main([*few, "--seeds", "3"])


def test_claims_speak_of_rows_that_are_trained():
    trained = {rows.ROWS[row].name for row in (*claims.FIRST, *claims.OTHERS)}
    for part in (part for parts in claims.CLAIMS.values() for part in parts):
        for row in (part.row, part.other):
            assert row in rows.UNTRAINED or rows.ROWS[row.removesuffix(rows.HALFWAY)].name in trained


def test_main_job_with_tiny_numbers(tmp_path):
    main(["--seeds", "1", "--updates", "2", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "dmd.png").width == 1200
    assert Image.open(tmp_path / "dmd.gif").format == "GIF"
    assert "Student, 4 steps" in (tmp_path / "dmd.md").read_text()


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--experiment", "painting"], "invalid choice: 'painting'"),
        (["--seeds", "0"], "--seeds 0: a number in [1"),
        (["--updates", "-3"], "--updates -3: a number in [1"),
        (["--fake-updates", "-1"], "--fake-updates -1: a number in [0"),
        (["--recipe", "soup"], "invalid choice: 'soup'"),
        (["--experiment", "sharp", "--guidance", "2"], "leave out --recipe and the other options"),
        (["--forks", "--no-told"], "leave out --recipe and the other options"),
        (["--out", "FILE/plane"], "cannot be written"),
    ],
)
def test_bad_input(words, complaint, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        main([word.replace("FILE", str(tmp_path / "file")) for word in words])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_teachers_differ_as_the_world_says():
    """Wider or narrower by its factor, and moved: read off the samples of 40 steps."""
    world, few = Setting(blur=3.0, sharp=0.5, displaced=1.0, seeds=2), torch.Generator().manual_seed(0)
    for name, width, moved in (("truth", 1.0, 0.0), ("base", 3.0, 0.0), ("text", 0.5, 0.12)):
        some = world.mixture(name, "text", torch.zeros(1, 2))
        x = some.sample(20_000, few)
        assert x[:, 0].mean().item() == pytest.approx(moved, abs=0.03)
        middle = x[(x - torch.tensor([moved, 0.0])).abs().max(1).values < 0.55]
        if name != "base":  # the base's modes run into each other
            assert middle.std(0).mean().item() == pytest.approx(0.12 * width, abs=0.01)
    scores = evaluate(world, world.teacher(specialised=True), plane_method.TEACHER_SIGMAS)
    assert scores["text"]["precision"].min() > 0.99
