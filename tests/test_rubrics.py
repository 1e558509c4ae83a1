"""The judge's questions, answers and tables, with a local server as the judge."""

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_server import Server, about, quick, reply, text, well, write_bench
from PIL import Image

from judges import chat, rubrics
from recipe import Prompt


@pytest.fixture
def bench(tmp_path) -> tuple[dict[str, Prompt], Path]:
    return write_bench(tmp_path), tmp_path


def score(server: Server, bench: tuple, parallel: int = 3) -> tuple[dict, dict]:
    cases, folder = bench
    return rubrics.judge(quick(server), cases, folder / "pictures", folder / "answers", parallel)


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "answers").glob("*.json"))


def test_nothing_is_scored_twice_and_nothing_lost(serve, bench):
    """Half of the questions fail once, one for ever; then only what is missing or new is asked."""
    cases, folder = bench
    never = next(name for name, case in cases.items() if case.prompt == "text 1")
    bad = [429, 500, None, "prose", text(score=9)]

    def answer(question, n):
        if "text 1" in about(question):
            return "I would rather not."
        return bad[len(about(question)) % 5] if n == 0 and len(about(question)) % 2 else well(question)

    server = serve(answer)
    answers, unscored = score(server, bench)
    assert answers.keys() == cases.keys() - {never} and unscored.keys() == {never}
    assert "rather not" in unscored[never] and all(a["score"] == 4.5 for a in answers.values())
    assert [file.name[:-38] + ".png" for file in kept(folder)] == sorted(answers)
    assert [json.loads(file.read_text()) for file in kept(folder)] == [answers[name] for name in sorted(answers)]

    def asked_anew() -> list[str]:
        before = len(server.asked)
        again, _ = score(server, bench)
        assert again == answers
        return [about(json.loads(body)) for body in server.asked[before:]]

    assert asked_anew() == ["Prompt: text 1"] * chat.ATTEMPTS
    server.answer = lambda question, n: well(question)
    assert score(server, bench)[1] == {}  # it answers at last
    answers = score(server, bench)[0]
    assert answers.keys() == cases.keys() and asked_anew() == []

    # Another picture, another rubric, another prompt: asked; the same elsewhere: not.
    name = next(name for name, case in cases.items() if case.category == "scene")
    Image.new("RGBA", (4, 4), "green").save(folder / "pictures" / name)
    assert asked_anew() == ["Instruction: do it change of a whole scene"]
    Image.new("RGBA", (8, 8), "red").save(folder / "source.png")  # the source of six edits
    assert len(asked_anew()) == 6
    # An answer that somebody broke is an error; without its file it is asked again.
    broken = kept(folder)[0]
    for content in ('{"score": 9, "reason": "x"}', '{"score": 1'):
        broken.write_text(content)
        with pytest.raises(ValueError, match=f"{broken.name}: not an answer of a judge .*remove the file to ask again"):
            score(server, bench)
    broken.unlink()
    assert len(asked_anew()) == 1 and asked_anew() == []


def test_a_dead_endpoint_ends_the_run_and_keeps_the_answers(serve, bench, monkeypatch):
    monkeypatch.setattr(chat, "GIVE_UP", 3)
    server = serve(lambda question, n: well(question) if len(server.asked) <= 4 else 503)
    with pytest.raises(ValueError, match="3 questions in a row without an answer, .*HTTP 503"):
        score(server, bench, parallel=1)
    assert len(kept(bench[1])) == 4
    before = len(server.asked)
    assert before - 4 - 3 * chat.ATTEMPTS in (0, 1)  # one more may have been under way
    server.answer = lambda question, n: well(question)
    answers, unscored = score(server, bench, parallel=1)
    assert len(answers) == 10 and not unscored and len(server.asked) - before == 6


@pytest.mark.parametrize("refusal", [400, reply(None, refusal="I cannot judge people.")])
def test_refused_cases_do_not_end_a_run_first_or_later(serve, bench, monkeypatch, refusal):
    """Only refused cases are left for the second run: more in a row than a dead server would be given."""
    monkeypatch.setattr(chat, "GIVE_UP", 3)
    cases, _ = bench
    server = serve(lambda question, n: refusal if "Instruction" in about(question) else well(question))
    first = score(server, bench, parallel=1)
    before = len(server.asked)
    second = score(server, bench, parallel=1)
    assert first == second and len(first[0]) == 4 and len(first[1]) == 6
    with_and_without_json_mode = 2 if isinstance(refusal, int) else 1
    assert len(server.asked) - before == 6 * with_and_without_json_mode
    tables = [rubrics.summary(cases, *run) for run in (first, second)]
    assert tables[0] == tables[1] and tables[0]["t2i"]["average"] == 4.5 and tables[0]["edit"]["average"] is None


def test_refusals_between_failures_do_not_hide_a_dead_endpoint(serve, bench, monkeypatch):
    monkeypatch.setattr(chat, "GIVE_UP", 3)
    server = serve(lambda question, n: 400 if "portrait" in about(question) else 503)
    with pytest.raises(ValueError, match="3 questions in a row without an answer, .*HTTP 503"):
        score(server, bench, parallel=1)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on(serve, bench, signal_number):
    cases, folder = bench
    slow = threading.Event()

    def answer(question, n):
        if len(server.asked) > 4:
            slow.wait(0.5)
        return well(question)

    server = serve(answer)
    lines = [json.dumps({"task": c.task, "category": c.category, "prompt": c.prompt, "images": [str(i) for i in c.images]})
             for c in cases.values()]  # fmt: skip
    (folder / "cases.jsonl").write_text("\n".join(line.replace(', "images": []', "") for line in lines))
    # A shell starts background jobs with Ctrl-C ignored, and children inherit that: it is asked for here.
    code = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import sys; from pathlib import Path; from judges import rubrics; from judges.cases import name_cases
from judges.chat import Chat; from recipe import read_prompts
folder = Path(sys.argv[2])
cases = name_cases(read_prompts([folder / "cases.jsonl"]))
rubrics.judge(Chat(sys.argv[1], "judge-1"), cases, folder / "pictures", folder / "answers", 2)
"""
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(folder)], cwd=Path(__file__).parents[1])
    while len(server.asked) < 5:
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal_number)
    assert process.wait(20) != 0
    slow.set()
    before = len(kept(folder))
    # Another server, since what the killed process sent last may reach the first one only now.
    again = serve(lambda question, n: well(question))
    answers, _ = score(again, bench)
    assert len(answers) == len(cases) and len(again.asked) == len(cases) - before
    if signal_number == signal.SIGINT:  # what was under way has been kept, too
        assert before == len(server.asked)


def test_a_question_shows_all_that_counts(serve, bench, tmp_path):
    server = serve(lambda question, n: well(question))
    cases, folder = bench
    name, case = next((n, c) for n, c in cases.items() if c.category == "identity")
    picture = Image.new("RGBA", (3000, 1000), (255, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 1500, 1000))  # half is transparent
    picture.save(folder / "pictures" / name)
    score(server, bench, parallel=1)
    question = next(q for q in map(json.loads, server.asked) if "same person" in q["messages"][0]["content"])
    system, user = (message["content"] for message in question["messages"])
    title, focus, severe, names = rubrics.FAMILIES["identity"].values()
    for words in (title, focus, severe, *names, "from 1 to 5", "JSON"):
        assert words in system
    kinds = [part.get("text", "picture") for part in user]
    assert kinds == ["Source picture 1:", "picture", "Instruction: do it", "Result:", "picture"]
    source, result = [
        Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))))
        for part in user
        if part["type"] == "image_url"
    ]
    assert (source.mode, source.getpixel((0, 0))) == ("RGB", (0, 0, 255))
    assert result.size == (1536, 512) and result.getpixel((9, 9)) == (255, 0, 0)
    assert result.getpixel((1500, 9)) == (255, 255, 255)
    assert len({rubrics.system_text(case) for case in cases.values()}) == 7  # T2I and six families


def test_each_family_of_edits_has_sub_scores_of_its_own(bench):
    """The form that the rubric shows is the form that is accepted."""
    cases, _ = bench
    of_family = set()
    for case in cases.values():
        form = json.loads(well({"messages": [{"content": rubrics.system_text(case)}]}))
        rubrics.check_answer(form, rubrics.form_of(case))
        of_family.add(frozenset(form.get("sub_scores", ())))
    assert len(of_family) == 6 + 1  # T2I has none


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def test_summary_is_means_of_means_and_names_what_is_missing():
    cases = {f"{i}": Prompt("t2i", "ab"[i % 2], str(i)) for i in range(8)}
    scores = [1, 2, 3, 4, 5, 4, 3, 2]
    out = rubrics.summary(cases, {f"{i}": {"score": s} for i, s in enumerate(scores)}, {})
    assert out["t2i"] == {"a": 3.0, "b": 3.0, "average": 3.0}
    assert out["t2i_interval"] == pytest.approx(1.96 * ((8 / 3 / 4 + 4 / 3 / 4) ** 0.5) / 2)
    out = rubrics.summary(cases, {"0": {"score": 2}}, {"1": "refused"})
    assert out["t2i"] == {"a": 2.0, "b": None, "average": None} and out["unscored"] == {"1": "refused"}
    assert "t2i_interval" not in out


def test_rank_column_is_the_papers():
    """Table 1 and table 3, from the averages of the paper's two judges."""

    def row(name: str, one: float, two: float, bench: str = "x") -> dict:
        judges = {n: {"t2i": {"a": s, "average": s}, "scored": 1, "unscored": {}} for n, s in (("G", one), ("O", two))}
        return {"name": name, "nfe": 4, "bench": bench, "t2i": judges["G"]["t2i"], "judges": judges}

    def ranks(rows: list[dict]) -> list[str]:
        lines = [[cell.strip() for cell in line.split(" | ")] for line in rubrics.table(rows).splitlines()[2:]]
        assert [line[2] for line in lines] == ["G", "O"] * len(rows)
        return [line[-2] for line in lines[::2]]

    paper = [(3.30, 4.13), (3.42, 4.15), (2.63, 3.29), (3.40, 4.06), (3.02, 3.62)]
    assert ranks([row(f"E{i}", *pair) for i, pair in enumerate(paper)]) == list("31524")
    paper = [(2.77, 3.44), (2.77, 3.28), (2.58, 3.31), (2.87, 3.36), (2.97, 3.41)]
    assert ranks([row(f"E{i}", *pair) for i, pair in enumerate(paper)]) == list("34521")
    missing = row("none", 3, 3)
    missing["judges"]["G"]["t2i"]["average"] = None
    assert ranks([row("a", 3, 3), missing, row("b", 3, 3)]) == ["1", "-", "1"]
    with pytest.raises(ValueError, match="a, b"):
        rubrics.table([row("a", 3, 3), row("b", 3, 3, bench="y")])
