"""The judge behind an endpoint, and the writer of prompts: a local server that answers, and misbehaves in every way."""

import base64
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import eval as evaluation
from data.pictures import open_picture
from judges import chat, rubrics
from judges import writing as prompts
from judges.cases import name_cases
from judges.chat import Chat, Unanswered
from recipe import Prompt, read_prompts
from sample import Pipeline
from toy import world

ROOT = Path(evaluation.__file__).parent
GOOD = {"score": 3.25, "reason": "fine"}


class Server(ThreadingHTTPServer):
    """`answer(question, attempt)` says what happens: a text is the model's, an int a status, bytes are sent as they are,
    None hangs up. Attempts at equal questions are counted; `asked` and `answered` hold what came and was answered well."""

    daemon_threads = True

    def __init__(self, answer: Callable):
        self.answer, self.asked, self.headers, self.lock = answer, [], [], threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            attempt = self.server.asked.count(body)
            self.server.asked.append(body)
            self.server.headers.append(dict(self.headers) | {"path": self.path})
        action = self.server.answer(json.loads(body), attempt)
        extra = {}
        if isinstance(action, tuple):
            action, extra = action
        if action is None:
            return self.connection.close()
        status = action if isinstance(action, int) else 200
        content = (
            action if isinstance(action, bytes) else f'{{"error": "you sent {self.headers["Authorization"]}"}}'.encode()
        )
        if isinstance(action, str):
            content = reply(action)
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | extra).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def reply(text: str | None, **choice) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}} | choice]}).encode()


@pytest.fixture
def serve():
    servers = []

    def start(answer: Callable) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def quick(server: Server, **settings) -> Chat:
    return Chat(server.url, "judge-1", **{"pause": 0.001, "timeout": 5.0} | settings)


def ask(client: Chat, case: Prompt | None = None) -> dict:
    case = case or Prompt("t2i", "portrait", "a man")
    return client.ask(
        "grade", [chat.text_part("a man")], lambda answer: rubrics.check_answer(answer, rubrics.form_of(case))
    )


def text(**changes) -> str:
    return json.dumps(GOOD | changes)


# ----------------------------------------------------------------------------------------------------------------------
# One question

MISBEHAVIOURS = {
    "too many requests": (429, {"Retry-After": "0"}),
    "a date to retry after": (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "server error": 500,
    "overloaded": 503,
    "hangs up": None,
    "hangs up in the middle": (reply(text())[:40], {"Content-Length": 4000}),
    "empty": b"",
    "not JSON": b"<html>",
    "no completion": b'{"error": "quota"}',
    "no choices": b'{"choices": []}',
    "a deep nest": b"[" * 100_000,
    "a refusal": reply(None),
    "cut off": reply(text(), finish_reason="length"),
    "prose": "Sure! " + text(),
    "two fences": f"```\n```json\n{text()}\n```\n```",
    "a fence and prose": f"Here:\n```json\n{text()}\n```",
    "an open fence": f"```json\n{text()}",
    "a thought without an end": f"<think>\n{text()}",
    "two thoughts": f"<think>a</think>b</think>{text()}",
    "a thought alone": f"<think>{text()}</think>",
    "half an answer": text()[:-3],
    "a list": f"[{text()}]",
    "a key twice": '{"score": 1, "score": 5, "reason": "x"}',
    "too much": text(score=5.01),
    "too little": text(score=0.99),
    "a text for a number": text(score="4.00"),
    "true for one": text(score=True),
    "not a number": '{"score": NaN, "reason": "x"}',
    "infinity": '{"score": 1e999, "reason": "x"}',
    "three decimals": text(score=3.257),
    "another key": text(confidence=1),
    "a missing key": '{"score": 3}',
    "no reason": text(reason=" "),
    "a number for a reason": '{"score": 3, "reason": 5}',
    "half an emoji": '{"score": 3, "reason": "a cat \\ud83d"}',
}


def test_whatever_goes_wrong_once_is_asked_again(serve):
    names = list(MISBEHAVIOURS)
    server = serve(lambda question, n: MISBEHAVIOURS[question["model"]] if n == 0 else text())
    for name in names:
        client = Chat(server.url, name, pause=0.001, timeout=5.0)
        assert ask(client) == GOOD, name
    assert Counter(json.loads(body)["model"] for body in server.asked) == dict.fromkeys(names, 2)


@pytest.mark.parametrize("around", ["```json\n{}\n```", "```\n{}\n```\n", "<think>5?\n</think>\n\n{}", "so\n</think>{}",
                                    "<think>x</think>\n```json\n{}\n```"])  # fmt: skip
def test_one_fence_and_one_finished_thought_are_taken_off(serve, around):
    """Whatever stands in the thought: what is scored is the answer behind it."""
    server = serve(lambda question, n: around.replace("x", text(score=5)).replace("{}", text()))
    assert ask(quick(server)) == GOOD and len(server.asked) == 1
    tags = text(reason="a sign with </think> on it")  # inside the JSON it is a part of the answer
    assert ask(quick(serve(lambda question, n: tags)))["reason"] == "a sign with </think> on it"


def test_too_slow_is_asked_again(serve):
    def answer(question, n):
        if n == 0:
            time.sleep(1.0)
        return text()

    server = serve(answer)
    assert ask(quick(server, timeout=0.5)) == GOOD and len(server.asked) in (2, 3)  # 3 on a machine that is busy


def test_pauses_double_and_follow_the_server(serve, monkeypatch):
    waits = []
    # The client's own event: one of another thread, tqdm's monitor for one, has to go on waiting.
    stop = threading.Event()
    monkeypatch.setattr(chat.random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(stop, "wait", lambda timeout: waits.append(timeout))
    server = serve(lambda question, n: [500, 500, (429, {"Retry-After": "9"}), (503, {"Retry-After": "9999"}), "no"][n])
    client = Chat(server.url, "x", pause=2.0, stop=stop)
    monkeypatch.setattr(chat, "ATTEMPTS", 5)
    with pytest.raises(Unanswered, match="'no'"):
        ask(client)
    assert waits == [2.0, 4.0, 9.0, chat.LONGEST_PAUSE]


def test_what_cannot_be_answered_says_why(serve):
    server = serve(lambda question, n: {"never": 500, "not this": 400, "chatty": "Well..."}[question["model"]])
    for model, why, attempts in (
        ("never", "HTTP 500", chat.ATTEMPTS),
        ("not this", "HTTP 400", 1),
        ("chatty", "Well", 6),
    ):
        before = len(server.asked)
        with pytest.raises(Unanswered, match=why):
            ask(Chat(server.url, model, pause=0.001))
        assert len(server.asked) - before == attempts
    server.shutdown()
    server.server_close()
    with pytest.raises(Unanswered, match="refused"):
        ask(quick(server))


def test_hopeless_endpoints_and_the_key(serve):
    """The first 401 ends the run; nobody but the endpoint sees the key, neither another server nor a reader."""
    other = serve(lambda question, n: text())
    server = serve(
        lambda question, n: int(question["model"]) if question["model"] != "302" else (302, {"Location": other.url})
    )
    for code in ("401", "403", "404", "302"):
        with pytest.raises(ValueError, match=f"HTTP {code}") as error:
            ask(Chat(server.url, code, "secret-key"))
        assert "secret-key" not in str(error.value)
    assert len(server.asked) == 4 and other.asked == []
    assert all(h["Authorization"] == "Bearer secret-key" for h in server.headers)
    assert "secret" not in repr(Chat(server.url, "x", "secret-key"))

    ask(Chat(other.url + "/chat/completions/", None))
    assert "Authorization" not in other.headers[0] and other.headers[0]["path"] == "/v1/chat/completions"
    assert "model" not in json.loads(other.asked[0])
    for url in "localhost:8000", "http://", "http://a b/v1", "http://[::1", "http://a:99999", "http://ä", "file:///etc":
        with pytest.raises(ValueError, match="no address"):
            Chat(url)
    with pytest.raises(ValueError, match="key for it") as error:
        Chat(server.url, "x", "secret\nkey")
    assert "secret" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# A bench


@pytest.fixture
def bench(tmp_path) -> tuple[dict[str, Prompt], Path]:
    """Four T2I cases and one edit of each category, with their pictures."""
    Image.new("RGBA", (8, 8), (0, 0, 255, 255)).save(tmp_path / "source.png")
    cases = [Prompt("t2i", category, f"{category} {i}") for category in ("portrait", "text") for i in range(2)]
    cases += [Prompt("edit", category, "do it", [tmp_path / "source.png"]) for category in rubrics.FAMILIES]
    named = name_cases(cases)
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate(named):
        Image.new("RGBA", (4, 4), (20 * i, 0, 0, 255)).save(tmp_path / "pictures" / name)
    return named, tmp_path


def about(question: dict) -> str:
    """The case of a question: its words, and the category's title."""
    system, user = (message["content"] for message in question["messages"])
    words = next(part["text"] for part in user if part.get("text", "").startswith(("Prompt: ", "Instruction: ")))
    titles = [family["title"] for family in rubrics.FAMILIES.values() if family["title"] in system]
    return " ".join([words, *titles])


def well(question: dict) -> str:
    """An answer in the form that the rubric itself shows."""
    form = question["messages"][0]["content"].rsplit("in this form: ", 1)[1]
    return form.replace("3.42", "4.5")


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
        with pytest.raises(ValueError, match=f"{broken.name}: not a kept answer .*take the file away"):
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
    assert result.size == (2048, 683) and result.getpixel((9, 9)) == (255, 0, 0)
    assert result.getpixel((2000, 9)) == (255, 255, 255)
    assert len({rubrics.system_text(case) for case in cases.values()}) == 7  # T2I and six families


def test_the_judge_sees_what_the_network_sees(tmp_path):
    """Grey of 16 bits, a camera's rotation: as data.pictures opens them, over white."""
    grey = np.linspace(0, 65535, 64 * 32).round().astype(np.uint16).reshape(32, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.new("RGBA", (8, 4), (255, 0, 0, 128)).save(tmp_path / "turned.png", exif=exif)
    for name in "grey.png", "turned.png":
        url = chat.image_part(tmp_path / name)["image_url"]["url"]
        with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as sent:
            picture = open_picture(tmp_path / name)
            over = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            assert sent.size == over.size and sent.tobytes() == over.tobytes()
    assert chat.image_part(tmp_path / "grey.png") != chat.image_part(tmp_path / "turned.png")


def test_edits_are_graded_by_their_own_sub_scores(bench):
    cases, _ = bench
    forms = {}
    for case in cases.values():
        if case.task == "edit":
            form = forms[case.category] = json.loads(rubrics.system_text(case).rsplit("in this form: ", 1)[1])
            rubrics.check_answer(form, rubrics.form_of(case))
            for wrong in (
                form | {"sub_scores": form["sub_scores"] | {"beauty": 5}},
                form | {"sub_scores": dict(list(form["sub_scores"].items())[1:])},
                form | {"sub_scores": dict.fromkeys(form["sub_scores"], 6)},
                form | {"sub_scores": [5, 5, 5]},
                form | {"failures": "none"},
                form | {"failures": [1]},
                GOOD,
            ):
                with pytest.raises(ValueError):
                    rubrics.check_answer(wrong, rubrics.form_of(case))
    assert len({frozenset(form["sub_scores"]) for form in forms.values()}) == 6


def test_names_of_pictures(bench, tmp_path):
    cases, folder = bench
    again = name_cases(list(cases.values())[::-1])
    assert again == cases  # whatever the order
    with pytest.raises(ValueError, match="twice: t2i, text, 'text 1'"):
        name_cases([*cases.values(), Prompt("t2i", "text", "text 1")])
    (folder / "copy.png").write_bytes((folder / "source.png").read_bytes())
    with pytest.raises(ValueError, match="twice: edit, scene"):  # the same picture under another name
        name_cases([*cases.values(), Prompt("edit", "scene", "do it", [folder / "copy.png"])])
    with pytest.raises(
        ValueError, match="edit, motion, 'run': no rubric is for such edits; categories are scene, enhance"
    ):
        name_cases([Prompt("edit", "motion", "run", [folder / "source.png"])])


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


# ----------------------------------------------------------------------------------------------------------------------
# Writing prompts


def test_prompts_are_written_once_and_gone_on_with(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "AT_ONCE", 4)
    ideas = iter(range(10**6))
    lock = threading.Lock()

    def answer(question, n):
        with lock:
            i = next(ideas)
        if i % 5 == 4:
            return 500
        words = [f"A face, number {i}.", f"a FACE;  number {i}", f"Old {i // 2}", "Zoë said “hi”\n twice"]
        return json.dumps({"prompts": words})

    server, out = serve(answer), tmp_path / "portrait.jsonl"
    assert prompts.write_prompts(quick(server), "portrait", 10, out, 3) == 10
    first = read_prompts([out])
    assert len({prompts.plain(p.prompt) for p in first}) == 10 and {(p.task, p.category) for p in first} == {
        ("t2i", "portrait")
    }
    assert "Zoë said “hi” twice" in {p.prompt for p in first}
    before = len(server.asked)
    assert prompts.write_prompts(quick(server), "portrait", 10, out, 3) == 10 and len(server.asked) == before
    lines = out.read_bytes()
    out.write_bytes(lines[:-9])
    with pytest.raises(ValueError, match="portrait.jsonl, line 10"):
        prompts.write_prompts(quick(server), "portrait", 25, out, 3)
    out.write_bytes(lines[:-1])  # only the line's end is missing
    assert prompts.write_prompts(quick(server), "portrait", 25, out, 3) == 25
    assert [p.prompt for p in read_prompts([out])][:10] == [p.prompt for p in first]
    asked = [json.loads(body)["messages"][1]["content"][0]["text"] for body in server.asked]
    assert len(set(asked)) > len(asked) / 2 and all(prompts.BRIEFS["portrait"] in words for words in asked)
    with pytest.raises(ValueError, match="'portrait', 'text' is expected"):
        prompts.write_prompts(quick(server), "text", 30, out, 3)

    # A file that is something else keeps every byte.
    (tmp_path / "notes.md").write_text("mine\nno line end")
    with pytest.raises(ValueError, match="notes.md, line 1"):
        prompts.write_prompts(quick(server), "portrait", 30, tmp_path / "notes.md", 3)
    assert (tmp_path / "notes.md").read_text() == "mine\nno line end"


@pytest.mark.parametrize("answer", ['{"prompts": ["the same"]}', '{"prompts": ["\\ud83d"]}', '{"prompts": []}', "no"])
def test_a_writer_without_ideas_ends(serve, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(prompts, "STALE", 4)
    monkeypatch.setattr(prompts, "AT_ONCE", 1)
    with pytest.raises(ValueError, match=r"of 30 prompts; \d answers in a row were no use: "):
        prompts.write_prompts(quick(serve(lambda question, n: answer)), "cats", 30, tmp_path / "out.jsonl", 2)


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def cases(tmp_path) -> Path:
    """A folder of two files: one T2I prompt, one edit. The toy's template knows no other words than the toy's."""
    folder = tmp_path / "bench"
    folder.mkdir()
    case = world.bench("edit", "style", 1)[0]
    case.images[0].save(folder / "source.png")
    edit = {"task": "edit", "category": "style", "prompt": case.prompt, "images": ["source.png"]}
    draw = {"task": "t2i", "category": "text", "prompt": world.bench("t2i", "text", 1)[0].prompt}
    (folder / "edit.jsonl").write_text(json.dumps(edit))
    (folder / "t2i.jsonl").write_text(json.dumps(draw))
    return folder


def test_files_are_drawn_once_and_judged_by_two(toy_checkpoint, cases, serve, tmp_path, monkeypatch, capsys):
    def answer(question, n):
        if question["model"] == "strict/2" and "style" in about(question) and refusing:
            return 400
        return well(question).replace("4.5", "2.25" if question["model"] == "strict/2" else "4.5")

    refusing, server, out = True, serve(answer), tmp_path / "turbo"
    monkeypatch.setenv("MY_KEY", "secret-key")
    words = f"--checkpoint {toy_checkpoint} --prompts {cases} --out {out} --steps 2 --judge {server.url} "
    words = (words + "--judge-model kind strict/2 --judge-key MY_KEY").split()
    with pytest.raises(SystemExit) as stop:
        evaluation.main(words)
    shown = capsys.readouterr()
    assert stop.value.code == 1 and "not scored by strict/2: style-" in shown.err and "HTTP 400" in shown.err
    row = json.loads((out / "row.json").read_text())
    assert (row["scale"], row["nfe"], row["guidance"], row["name"]) == (5, 4, 2.0, "turbo")
    assert row["t2i"] == {"text": 4.5, "average": 4.5} and row["judges"]["strict/2"]["t2i"]["average"] == 2.25
    assert row["edit"] == {"style": 4.5, "average": 4.5} and row["judges"]["strict/2"]["edit"]["average"] is None
    assert row["seconds_per_image"] > 0 and "secret" not in shown.out + shown.err + str(list(out.rglob("*")))

    # Again: nothing is drawn, one question is asked.
    times = {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    refusing, before = False, len(server.asked)
    evaluation.main(words)
    assert len(server.asked) == before + 1 and len(times) == 2
    assert times == {path: path.stat().st_mtime_ns for path in (out / "pictures").iterdir()}
    row = json.loads((out / "row.json").read_text())
    assert row["judges"]["strict/2"]["edit"] == {"style": 2.25, "average": 2.25}
    capsys.readouterr()
    evaluation.main(["--table", str(out / "row.json"), str(out / "row.json")])
    table = capsys.readouterr().out
    assert table.count("turbo") == 4 and table.count("| strict/2 | 2.25") == 4

    # The pictures are those of the pipeline, from a noise of their own.
    name, case = next((n, c) for n, c in name_cases(read_prompts([cases / "t2i.jsonl"])).items())
    pipeline = Pipeline.from_pretrained(toy_checkpoint)
    seed = int(name[-20:-4], 16) % 2**31
    with Image.open(out / "pictures" / name) as picture:
        assert picture.tobytes() == pipeline(case.prompt, steps=2, guidance=2.0, seed=seed).tobytes()

    # Everything that is wrong is said before the first question.
    before = len(server.asked)

    def fails(message: str, *more: str) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            evaluation.main([*words, *more])
        assert len(server.asked) == before

    fails("drawn by other weights or settings", "--steps", "3")
    fails("two names", "--judge-model", "kind", "kind")
    fails("nowhere", "--prompts", str(tmp_path / "nowhere"))
    fails("--prompts and --experiment: give one of them", "--experiment", "teachers")
    moved = tmp_path / "moved"
    shutil.copytree(out / "pictures", moved)
    (moved / name).unlink()
    fails(r"missing \(1 in all\); it is 'text'", "--pictures", str(moved))
    (moved / name).write_bytes(b"no picture")
    fails("cannot be read as a picture", "--pictures", str(moved))
    shutil.copy(out / "pictures" / name, moved)
    shutil.copy(out / "pictures" / name, moved / "extra.png")
    fails(r"extra.png: belongs to no case \(1", "--pictures", str(moved))
    (moved / "extra.png").unlink()
    (cases / "again.jsonl").write_text((cases / "t2i.jsonl").read_text())
    fails("a case is there twice")
    (cases / "again.jsonl").unlink()
    evaluation.main([*words, "--pictures", str(moved)])  # equal pictures, wherever they lie: known
    assert len(server.asked) == before
    fails("turbo/row.json: exists; name another, or give --overwrite", "--name", "mine")
    row = json.loads((out / "row.json").read_text())
    assert (row["nfe"], row["guidance"]) == (4, 2.0)  # they say so themselves

    # Pictures of the most used web interface have text under the same key, which is no JSON.
    notes = PngInfo()
    notes.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7")
    with Image.open(moved / name) as picture:
        picture.save(moved / name, pnginfo=notes)
    evaluation.main([*words, "--pictures", str(moved)])
    row = json.loads((out / "row.json").read_text())
    assert row["nfe"] is None and row["guidance"] is None and "seconds_per_image" not in row


def test_what_lies_beside_the_pictures_stays(toy_checkpoint, cases, tmp_path):
    """Only a killed run's own unfinished file may lie there. Nothing is removed that has another name."""
    words = f"--checkpoint {toy_checkpoint} --prompts {cases} --out {tmp_path / 'out'} --steps 1".split()
    folder = tmp_path / "out" / "pictures"
    folder.mkdir(parents=True)
    (folder / "film.part").write_bytes(b"mine")
    with pytest.raises(ValueError, match="film.part: belongs to no case"):
        evaluation.main(words)
    assert (folder / "film.part").read_bytes() == b"mine" and len(list(folder.iterdir())) == 1
    (folder / "film.part").unlink()
    names = name_cases(read_prompts(sorted(cases.glob("*.jsonl"))))
    (folder / f".{min(names)}.qwen-image-flash.part").write_bytes(b"half a picture")
    evaluation.main(words)
    assert {path.name for path in folder.iterdir()} == names.keys()


def test_prompts_from_the_command_line(serve, tmp_path, capsys):
    out = tmp_path / "portrait.jsonl"
    server = serve(lambda question, n: json.dumps({"prompts": [f"face {len(server.asked)} {i}" for i in range(3)]}))
    words = ["--write-prompts", "5", "--category", "portrait", "--endpoint", server.url, "--out", str(out)]
    evaluation.main(words)
    assert len(read_prompts([out])) == 5 and "5 prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--category"):
        evaluation.main(words[:2])
    with pytest.raises(ValueError, match="--judge is for --prompts, not for the toy"):
        evaluation.main(["--judge", server.url])


def test_the_layout_of_a_public_bench(tmp_path, monkeypatch):
    """The code of docs/benches.md, on rows of the form that GEdit-Bench has."""
    kinds = (
        "background_change color_alter material_alter motion_change ps_human style_change subject-add subject-remove "
    )
    kinds = (kinds + "subject-replace text_change tone_transfer").split()
    rows = [
        {"task_type": kind, "key": f"{kind}{i}", "instruction": f"edit {i}", "instruction_language": ["en", "cn"][i]}
        | {"input_image_raw": Image.new("RGB", (8, 8)), "input_image": None, "Intersection_exist": True}
        for kind in kinds
        for i in range(2)
    ]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "benches.md").read_text()
    code = next(block.split("```")[0] for block in page.split("```python\n")[1:] if "GEdit-Bench" in block)
    exec(code, {})
    cases = read_prompts([tmp_path / "gedit" / "edit.jsonl"])
    assert len(cases) == 11 and {case.category for case in cases} <= rubrics.FAMILIES.keys()


def test_the_pages_commands(toy_checkpoint, cases, serve, monkeypatch, capsys):
    """As they stand there, in an empty folder: only the checkpoint is tiny, the endpoint local, and numbers small."""
    monkeypatch.chdir(cases.parent)
    server = serve(lambda question, n: well(question) if "grade" in str(question) else '{"prompts": ["a", "b", "c"]}')
    page = (ROOT / "docs" / "benches.md").read_text().replace("http://localhost:8000/v1", server.url)
    page = page.replace("runs/mine/student", str(toy_checkpoint)).replace("--write-prompts 20000", "--write-prompts 3")

    def commands(text: str) -> list[list[str]]:
        return [shlex.split(line)[2:] for line in text.splitlines() if "python eval.py" in line]

    score, table, write = commands(page)
    evaluation.main([*score, "--steps", "1"])
    shutil.copytree("results/mine", "results/other")
    evaluation.main(table)
    assert capsys.readouterr().out.count("| mine |") == 2 + 4  # two tasks, of one model and of two
    evaluation.main(write)
    assert {prompt.prompt for prompt in read_prompts(["portrait.jsonl"])} == {"a", "b", "c"}
    experiments = commands((ROOT / "results" / "README.md").read_text())
    tables = [["composition"], ["teachers"], ["mixture", "--seeds", "7"]]
    assert experiments == [["--experiment", *table] for table in tables]
