"""How the toy checkpoint is made, with tiny numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.files import read_json
from toy import draw
from toy.build import autoencoder as train_vae
from toy.build import stages as build


@pytest.fixture
def tiny(monkeypatch):
    """Two steps of a few small pictures."""
    monkeypatch.setattr(train_vae, "CONFIG", train_vae.CONFIG | {"dim_mult": [1, 2, 2, 2, 2]})
    drawn = train_vae.random_pictures
    monkeypatch.setattr(train_vae, "random_pictures", lambda count, seed: drawn(min(count, 4), seed))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_autoencoder_training_resumes(tiny, tmp_path):
    train_vae.train_vae(tmp_path / "straight", tmp_path / "a", 2, batch=4)
    train_vae.train_vae(tmp_path / "half", tmp_path / "b", 1, batch=4)
    train_vae.train_vae(tmp_path / "resumed", tmp_path / "b", 2, batch=4)
    assert files(tmp_path / "resumed") == files(tmp_path / "straight") != files(tmp_path / "half")


def test_the_whole_chain(tiny, tmp_path, monkeypatch):
    """python -m toy.build, killed when a teacher is trained but not yet logged, and called again. Then the premises are in the
    checkpoint's log."""
    runs = {name: replace(run, steps=1, pool=dict.fromkeys(run.pool, 2)) for name, run in build.TEACHER_RUNS.items()}
    monkeypatch.setattr(build, "TEACHER_RUNS", runs)
    monkeypatch.setattr(build, "VAE_STEPS", 1)
    monkeypatch.setattr(build, "BATCH", 2)
    monkeypatch.setattr(build, "MICRO_BATCH", 2)
    monkeypatch.setattr(build, "TEACHER", build.TEACHER | {"num_layers": 1, "num_attention_heads": 1})
    monkeypatch.setattr(build.train.watch, "draw_pictures", lambda *_: None)
    monkeypatch.setattr(build.recipes, "RECIPES", dict(build.recipes.RECIPES))
    monkeypatch.setattr(build.evaluation, "CASES", {"t2i": 2, "edit": 2})
    monkeypatch.setattr(build.evaluation, "BENCHES", {"t2i": ("landscape", "text"), "edit": ("object",)})
    monkeypatch.setattr(build.evaluation, "VARIETY", (1, 2))
    monkeypatch.setattr(
        build.judge,
        "judge",
        lambda pictures, *_: [build.judge.Verdict({"nothing extra": True}, {}, 0.5) for _ in pictures],
    )
    full = draw.default_sampler
    monkeypatch.setattr(draw, "default_sampler", lambda name, pipeline, steps, w: full(name, pipeline, 1, w))
    real = build.train_teacher

    def killed(name, *arguments):
        done = real(name, *arguments)
        if name == "edit":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(build, "train_teacher", killed)
    with pytest.raises(KeyboardInterrupt):
        build.main(["--out", str(tmp_path / "toy")])
    folder = tmp_path / "toy" / "checkpoint"
    base, edit = files(folder / "transformer"), files(tmp_path / "toy" / "edit" / "transformer")
    assert base == files(tmp_path / "toy" / "more" / "transformer") != files(tmp_path / "toy" / "base" / "transformer")
    monkeypatch.setattr(build, "train_teacher", real)
    build.main(["--out", str(tmp_path / "toy")])
    assert files(folder / "transformer") == base and files(folder / "teachers" / "edit") == edit
    assert edit != files(folder / "teachers" / "text")
    log = read_json(folder / "build.json")
    assert set(log) >= {"language", "vae", "base", "more", "text", "edit", "score base", "premises"}
    assert len(log["premises"]["premises"]) == 9 and log["score base"]["rows"][0]["nfe"] == 2
    assert build.evaluation.build_log(folder) == log
    used = read_json(tmp_path / "toy" / "edit" / "args.json")["arguments"]
    assert (used["recipe"], used["steps"], used["batch"], used["guidance"]) == ("edit", 1, 2, build.GUIDANCE)
    assert (used["muon_lr"], used["lr"]) == pytest.approx((0.5 * 0.02, 0.5 * 2e-3))


def row(name: str, t2i: dict[str, float], edit: float, apart: float) -> dict:
    """A teacher's row with these scores, the same in all of a category's cases."""
    content = {"name": name}
    for task, scores in (("t2i", t2i), ("edit", dict.fromkeys(build.world.FAMILIES, edit))):
        content[task] = scores | {"average": sum(scores.values()) / len(scores)}
        content[f"{task}_each"] = {"score": {category: [score] * 4 for category, score in scores.items()}}
        content[f"{task}_diversity"] = {"distance": dict.fromkeys((*scores, "average"), apart)}
    return content


def test_premises_of_known_rows():
    """All hold; then each is broken alone, and is the only one that does not."""
    good = {
        "base": row("teacher", {"landscape": 0.6, "portrait": 0.6, "text": 0.3}, 0.5, 0.2),
        "euler": row("Euler", {"landscape": 0.4, "portrait": 0.4, "text": 0.2}, 0.4, 0.2),
        "renoise": row("re-noising", {"landscape": 0.5, "portrait": 0.5, "text": 0.2}, 0.45, 0.2),
        "text": row("text teacher", {"text": 0.5}, 0.0, 0.1),
        "edit": row("edit teacher", {"text": 0.0}, 0.7, 0.1),
    }
    worse = [  # what breaks a premise, in the order of the premises
        {"euler": row("Euler", {"landscape": 0.6, "portrait": 0.6, "text": 0.2}, 0.4, 0.2)},
        {"renoise": row("re-noising", {"landscape": 0.6, "portrait": 0.6, "text": 0.2}, 0.45, 0.2)},
        {"euler": row("Euler", {"landscape": 0.4, "portrait": 0.4, "text": 0.2}, 0.45, 0.2)},
        {"renoise": row("re-noising", {"landscape": 0.5, "portrait": 0.5, "text": 0.2}, 0.49, 0.2)},
        {"base": row("teacher", {"landscape": 0.35, "portrait": 0.8, "text": 0.36}, 0.5, 0.2)},
        {"text": row("text teacher", {"text": 0.38}, 0.0, 0.1)},
        {"text": row("text teacher", {"text": 0.5}, 0.0, 0.3)},
        {"edit": row("edit teacher", {"text": 0.0}, 0.58, 0.1)},
        {"edit": row("edit teacher", {"text": 0.0}, 0.7, 0.3)},
    ]
    for broken in [None, *range(len(worse))]:
        rows = good | (worse[broken] if broken is not None else {})
        log = {"score base": {"rows": [rows["base"], rows["euler"], rows["renoise"]]}}
        log |= {f"score {name}": {"rows": [rows[name]]} for name in ("text", "edit")}
        holds = [premise["holds"] for premise in build.premises(log)]
        assert [i for i, held in enumerate(holds) if not held] == ([] if broken is None else [broken])
