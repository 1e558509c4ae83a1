"""Prompts written by a model: a local server has the ideas."""

import json
import threading

import pytest
from chat_server import quick

from judges import writing
from recipe import read_prompts


def test_prompts_are_different_and_a_second_run_resumes(serve, tmp_path, monkeypatch):
    """One answer in five fails for ever. In the others half of the prompts are known, some in another spelling."""
    monkeypatch.setattr(writing, "AT_ONCE", 4)
    ideas = iter(range(10**6))
    lock = threading.Lock()

    def answer(question, n):
        with lock:
            i = next(ideas)
        if i % 5 == 4:
            return 500
        texts = [f"A face, number {i}.", f"a FACE;  number {i}", f"Old {i // 2}", "Zoë said “hi”\n twice"]
        return json.dumps({"prompts": texts})

    server, out = serve(answer), tmp_path / "portrait.jsonl"

    def write(count: int) -> list[str]:
        assert writing.write_prompts(quick(server), "portrait", count, out, 3) == count
        prompts = read_prompts([out])
        assert {(prompt.task, prompt.category) for prompt in prompts} == {("t2i", "portrait")}
        return [prompt.prompt for prompt in prompts]

    first = write(10)
    assert len({writing.plain(text) for text in first}) == 10 and "Zoë said “hi” twice" in first
    before = len(server.asked)
    assert write(10) == first and len(server.asked) == before
    out.write_bytes(out.read_bytes()[:-1])  # an editor may have taken the last line's end away
    assert write(25)[:10] == first
    asked = [json.loads(body)["messages"][1]["content"][0]["text"] for body in server.asked]
    assert len(set(asked)) > len(asked) / 2 and all(writing.BRIEFS["portrait"] in text for text in asked)


PORTRAIT = '{"task": "t2i", "category": "portrait", "prompt": "a face"}\n'


@pytest.mark.parametrize("content, words", [
    ("mine\nno line end", "line 1"),
    (PORTRAIT.replace("portrait", "text") + PORTRAIT[:-9], "line 2"),
    (PORTRAIT, "has a t2i prompt of category 'portrait'; T2I prompts of category 'text' are expected"),
])  # fmt: skip
def test_a_file_of_something_else_is_refused_and_keeps_every_byte(serve, tmp_path, content, words):
    server, out = serve(lambda question, n: "{}"), tmp_path / "text.jsonl"
    out.write_text(content)
    with pytest.raises(ValueError, match=f"text.jsonl.*{words}"):
        writing.write_prompts(quick(server), "text", 30, out, 3)
    assert out.read_text() == content and server.asked == []


@pytest.mark.parametrize("answer, words", [
    ('{"prompts": ["the same"]}', "1 of 30 prompts; the last . answers were of no use: only prompts that it has"),
    ('{"prompts": ["\\ud83d"]}', "0 of 30 prompts; .* of no use: not the JSON"),
    ('{"prompts": []}', "a list 'prompts' and nothing else is expected: {'prompts': ..}"),
    ('{"prompts": ["...", "a"]}', "every prompt must be a text"),
    ('{"prompts": ["a"], "n": 1}', "a list 'prompts' and nothing else"),
    ("no", "not the JSON"),
    (400, "HTTP 400"),
])  # fmt: skip
def test_a_writer_without_ideas_ends(serve, tmp_path, monkeypatch, answer, words):
    monkeypatch.setattr(writing, "PATIENCE", 4)
    monkeypatch.setattr(writing, "AT_ONCE", 1)
    with pytest.raises(ValueError, match=words):
        writing.write_prompts(quick(serve(lambda question, n: answer)), "cats", 30, tmp_path / "out.jsonl", 2)


def test_prompts_from_the_command_line(serve, tmp_path, monkeypatch, capsys):
    out = tmp_path / "portrait.jsonl"
    server = serve(lambda question, n: json.dumps({"prompts": [f"face {len(server.asked)} {i}" for i in range(3)]}))
    words = ["--count", "5", "--category", "portrait", "--endpoint", server.url, "--out", str(out)]
    monkeypatch.setenv("MY_KEY", "secret-key")
    writing.main([*words, "--model", "poet", "--key", "MY_KEY"])
    assert len(read_prompts([out])) == 5 and "5 prompts" in capsys.readouterr().out
    assert {json.loads(body)["model"] for body in server.asked} == {"poet"}
    assert all(headers["Authorization"] == "Bearer secret-key" for headers in server.headers)
    with pytest.raises(ValueError, match="--category"):
        writing.main(words[:2])
    with pytest.raises(ValueError, match="no environment variable NO_KEY"):
        writing.main([*words, "--key", "NO_KEY"])
