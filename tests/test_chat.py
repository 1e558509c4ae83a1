"""One question to a chat model: a local server answers, and misbehaves in every way."""

import base64
import io
import json
import random
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from urllib.request import ProxyHandler

import numpy as np
import pytest
from chat_server import GOOD, quick, reply, text
from PIL import Image

from data.pictures import open_picture
from judges import chat, rubrics
from judges.chat import Chat, Refused, Unanswered
from recipe import Prompt


def ask(client: Chat) -> dict:
    form = rubrics.form_of(Prompt("t2i", "portrait", "a man"))
    return client.ask("grade", [chat.text_part("a man")], lambda answer: rubrics.check_answer(answer, form))


MISBEHAVIOURS = {
    "too many requests": (429, {"Retry-After": "0"}),
    "a date to retry after": (429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    "server error": 500,
    "hangs up": None,
    "hangs up in the middle": (reply(text())[:40], {"Content-Length": 4000}),
    "empty": b"",
    "not JSON": b"<html>",
    "no completion": b'{"error": "quota"}',
    "no choices": b'{"choices": []}',
    "a deep nest": b"[" * 100_000,
    "no message": b'{"choices": [{"message": null}]}',
    "nothing": reply(None),
    "cut off": reply(text(), finish_reason="length"),
    "parts without a text": reply([{"type": "thinking", "thinking": text()}]),
    "parts that are no parts": reply([text(), 3]),
    "a part without its text": reply([{"type": "text", "text": None}]),
    "prose": "Sure! " + text(),
    "a fence and prose": f"Here:\n```json\n{text()}\n```",
    "an open fence": f"```json\n{text()}",
    "a thought without an end": f"<think>\n{text()}",
    "two thoughts": f"<think>a</think>b</think>{text()}",
    "a thought alone": f"<think>{text()}</think>",
    "half an answer": text()[:-3],
    "a list": f"[{text()}]",
    "a key twice": '{"score": 1, "score": 5, "reason": "x"}',
    "too much": text(score=5.01),
    "a text for a number": text(score="4.00"),
    "not a number": '{"score": NaN, "reason": "x"}',
    "three decimals": text(score=3.257),
    "a missing key": '{"score": 3}',
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


@pytest.mark.parametrize(
    "before", [[], [{"type": "thinking", "thinking": text(score=5)}], [{"type": "text", "text": ""}]]
)
def test_the_text_parts_of_an_answer_in_parts_are_the_answer(serve, before):
    halves = [{"type": "text", "text": text()[:9]}, {"type": "text", "text": text()[9:]}]
    server = serve(lambda question, n: reply([*before, *halves]))
    assert ask(quick(server)) == GOOD and len(server.asked) == 1


def random_text(rng: random.Random) -> str:
    """What models write into an answer, and what could be mistaken for its end."""
    pieces = ["a cat", " ", "</think>", "<think>", "```", "```json\n", "{", "}", '"', "\\", "\n", "é猫", "🐈", "\x00"]
    return "".join(rng.choices(pieces, k=rng.randint(1, 8)))


def wrapped(rng: random.Random, answer: str) -> str:
    """The answer with or without a thought before it and a fence around it."""
    fence = rng.choice(["{}", "```json\n{}\n```", "```\n{}\n```\n"])
    thought = rng.choice(["", "", "hm\n</think>", "<think>{5}</think>\n\n"])
    return thought + fence.replace("{}", answer)


def test_every_good_answer_is_found_whatever_its_words_are():
    rng = random.Random(0)
    for _ in range(2000):
        answer = {"score": rng.randint(100, 500) / 100, "reason": "so: " + random_text(rng)}
        written = json.dumps(answer, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 2]))
        assert chat.json_object(wrapped(rng, written)) == answer
        rubrics.check_answer(answer, GOOD)


def damaged(rng: random.Random, content: str) -> str:
    """A few letters are taken out, put in, or replaced by what JSON readers stumble over."""
    traps = ["[" * 5000, '{"a":' * 3000, "9" * 5000, "9" * 400, "1e999", "-0", "NaN", "\\ud83d", "\ud83d", "\x00",
             "null", "true", "[]", "{}", '"', "\\", ",", ":", "{", "}", "]", "```", "</think>", "\n", "é", ""]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        content = content[:start] + rng.choice(traps) + content[start + rng.choice([0, 0, 1, 12]) :]
    return content


def test_a_damaged_answer_is_refused_or_still_a_good_one(monkeypatch):
    """Damage inside the answer and around it. What is accepted can be written and read again."""
    rng, client, accepted = random.Random(0), Chat("http://localhost/v1", pause=0.0), 0
    monkeypatch.setattr(chat, "ATTEMPTS", 1)
    for _ in range(3000):
        answer = wrapped(rng, text(reason="well drawn, " * 9))
        if rng.random() < 0.5:
            raw = reply(damaged(rng, answer))
        else:
            raw = damaged(rng, reply(answer).decode()).encode(errors="surrogatepass")
        monkeypatch.setattr(client, "send", lambda question, raw=raw: raw)
        with suppress(Unanswered):
            found = ask(client)
            assert found.keys() == GOOD.keys() and 1 <= found["score"] <= 5 and found["reason"].strip()
            assert json.loads(json.dumps(found, ensure_ascii=False).encode()) == found
            accepted += 1
    assert 300 < accepted < 2500


def test_a_server_without_json_mode_is_asked_without_it(serve):
    """Found out once, by the first question. One that refuses the question itself gets no third request."""
    server = serve(lambda question, n: 400 if "response_format" in question else text())
    client = quick(server)
    assert [ask(client) for _ in range(3)] == [GOOD] * 3
    assert ["response_format" in json.loads(body) for body in server.asked] == [True, False, False, False]

    refusing = True
    server = serve(lambda question, n: 400 if refusing else text())
    client = quick(server)
    for requests in 2, 2:  # still not known which of the two is refused
        before = len(server.asked)
        with pytest.raises(Refused, match="HTTP 400"):
            ask(client)
        assert len(server.asked) - before == requests
    refusing = False
    assert ask(client) == GOOD and "response_format" in json.loads(server.asked[-1])
    refusing, before = True, len(server.asked)
    with pytest.raises(Refused):
        ask(client)
    assert len(server.asked) - before == 1  # known: the server takes JSON mode


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
    after = [None, None, "9.5", "9999", "Fri, 31 Dec 2100 00:00:00 GMT", "-5", "nan", "1e999"]
    server = serve(lambda question, n: 500 if after[n] is None else (429, {"Retry-After": after[n]}))
    client = Chat(server.url, "x", pause=2.0, stop=stop)
    monkeypatch.setattr(chat, "ATTEMPTS", 8)
    monkeypatch.setattr(chat, "LONGEST_PAUSE", 1000.0)
    with pytest.raises(Unanswered, match="HTTP 429"):
        ask(client)
    assert waits == [0.0, 2.0, 4.0, 9.5, 1000.0, 1000.0, 64.0, 128.0]


@pytest.mark.parametrize("header, seconds", [
    ("7.5", 7.5), ("12", 12), ("", 0), ("soon", 0), ("Wed, 21 Oct", 0), ("Wed, 32 Oct 2026 07:28:00 GMT", 0),
    ("Thu, 01 Jan 2026 00:01:30 GMT", 90), ("Thursday, 01-Jan-26 00:01:30 GMT", 90), ("Thu Jan  1 00:01:30 2026", 90),
    ("Wed, 31 Dec 2025 23:59:50 GMT", -10), ("Thu, 01 Jan 2026 00:00:30 -0000", 30), ("1" * 30 + " Jan 2026 0:0:0", 0),
])  # fmt: skip
def test_retry_after_is_seconds_or_a_date(monkeypatch, header, seconds):
    class Clock(datetime):
        @classmethod
        def now(cls, zone):
            return cls(2026, 1, 1, tzinfo=zone)

    monkeypatch.setattr(chat, "datetime", Clock)
    assert chat.seconds_until(header) == seconds


# What a server always does, and how a question to it ends: the error, words in it, the number of requests.
ENDINGS = [
    (500, Unanswered, "HTTP 500: .*you sent Bearer \\*\\*\\*", chat.ATTEMPTS),
    ("Well...", Unanswered, "not the JSON that was asked for .*Well", chat.ATTEMPTS),
    ("[1]", Unanswered, "not a JSON object: '.1.'", chat.ATTEMPTS),
    (b"<html>", Unanswered, "no chat completion: b'<html>'", chat.ATTEMPTS),
    (reply(text(), finish_reason="length"), Unanswered, "no whole answer .finish_reason length", chat.ATTEMPTS),
    (400, Refused, "HTTP 400", 2),  # with JSON mode and without
    (reply(None, refusal="I cannot."), Refused, "refused .finish_reason None.: I cannot", 1),
    (reply("", finish_reason="content_filter"), Refused, "refused .finish_reason content_filter", 1),
    *((code, ValueError, f"/v1: HTTP {code}", 1) for code in (401, 402, 403, 404, 405, 407)),
]


@pytest.mark.parametrize("action, error, words, requests", ENDINGS)
def test_a_question_without_an_answer_says_why(serve, action, error, words, requests):
    server = serve(lambda question, n: action)
    with pytest.raises(error, match=words) as raised:
        ask(quick(server, key="secret-key"))
    assert raised.type is error and len(server.asked) == requests
    assert "secret-key" not in str(raised.value)


def test_without_a_server_the_connection_is_refused(serve):
    server = serve(lambda question, n: text())
    server.shutdown()
    server.server_close()
    with pytest.raises(Unanswered, match="Connection refused"):
        ask(quick(server))


def test_a_proxy_is_for_other_machines_only(serve, monkeypatch):
    """This machine is asked directly; another through the proxy, which then gets the whole address."""
    proxy = serve(lambda question, n: text())
    for name in "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY":
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in "no_proxy", "NO_PROXY":
        monkeypatch.delenv(name, raising=False)
    server = serve(lambda question, n: text())
    for host in "127.0.0.1", "localhost", "LOCALHOST":
        assert ask(Chat(f"http://{host}:{server.server_port}/v1")) == GOOD
    assert len(server.asked) == 3 and proxy.asked == []
    assert ask(Chat("http://judge.invalid/v1")) == GOOD
    assert proxy.headers[0]["path"] == "http://judge.invalid/v1/chat/completions"
    opener = Chat("http://[::1]:8000/v1").opener
    assert not any(isinstance(handler, ProxyHandler) for handler in opener.handlers)


def test_the_key_goes_to_the_endpoint_alone(serve):
    """Not to the server that a redirect names, and not into what a client prints."""
    other = serve(lambda question, n: text())
    server = serve(lambda question, n: (302, {"Location": other.url}))
    client = quick(server, key="secret-key")
    with pytest.raises(ValueError, match="HTTP 302"):
        ask(client)
    assert other.asked == [] and "secret" not in repr(client)
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer secret-key"]


def test_a_server_of_one_model_needs_neither_its_name_nor_a_key(serve):
    server = serve(lambda question, n: text())
    ask(Chat(server.url + "/chat/completions/"))
    assert "Authorization" not in server.headers[0] and server.headers[0]["path"] == "/v1/chat/completions"
    assert "model" not in json.loads(server.asked[0])


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


def test_a_large_picture_is_reduced_and_sent_as_jpeg_where_png_would_be_larger_than_4_mb(tmp_path):
    """Noise is what PNG cannot compress. One flat colour of the same size stays PNG."""
    noise = np.random.default_rng(0).integers(32, 224, (1200, 1600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.bmp")
    Image.new("RGB", (1200, 1600), "red").save(tmp_path / "flat.png")
    for name, kind, size in (("noise.bmp", "jpeg", (1536, 1152)), ("flat.png", "png", (1152, 1536))):
        head, data = chat.image_part(tmp_path / name)["image_url"]["url"].split(",")
        content = base64.b64decode(data)
        assert head == f"data:image/{kind};base64" and len(content) < 4e6
        reduced = open_picture(tmp_path / name).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        with Image.open(io.BytesIO(content)) as sent:
            assert (sent.format, sent.size) == (kind.upper(), size)
            assert np.abs(np.asarray(sent).astype(int) - np.asarray(reduced)).mean() < 4  # another noise: about 64
