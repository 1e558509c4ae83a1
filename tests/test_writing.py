"""Prompts written by a model: a local server has the ideas."""

import json
import threading

import pytest
from chat_server import quick

from judges import writing
from recipe import read_prompts


def test_prompts_are_written_once_and_gone_on_with(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "AT_ONCE", 4)
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
    assert writing.write_prompts(quick(server), "portrait", 10, out, 3) == 10
    first = read_prompts([out])
    assert len({writing.plain(p.prompt) for p in first}) == 10 and {(p.task, p.category) for p in first} == {
        ("t2i", "portrait")
    }
    assert "Zoë said “hi” twice" in {p.prompt for p in first}
    before = len(server.asked)
    assert writing.write_prompts(quick(server), "portrait", 10, out, 3) == 10 and len(server.asked) == before
    lines = out.read_bytes()
    out.write_bytes(lines[:-9])
    with pytest.raises(ValueError, match="portrait.jsonl, line 10"):
        writing.write_prompts(quick(server), "portrait", 25, out, 3)
    out.write_bytes(lines[:-1])  # only the line's end is missing
    assert writing.write_prompts(quick(server), "portrait", 25, out, 3) == 25
    assert [p.prompt for p in read_prompts([out])][:10] == [p.prompt for p in first]
    asked = [json.loads(body)["messages"][1]["content"][0]["text"] for body in server.asked]
    assert len(set(asked)) > len(asked) / 2 and all(writing.BRIEFS["portrait"] in words for words in asked)
    with pytest.raises(ValueError, match="'portrait', 'text' is expected"):
        writing.write_prompts(quick(server), "text", 30, out, 3)

    # A file that is something else keeps every byte.
    (tmp_path / "notes.md").write_text("mine\nno line end")
    with pytest.raises(ValueError, match="notes.md, line 1"):
        writing.write_prompts(quick(server), "portrait", 30, tmp_path / "notes.md", 3)
    assert (tmp_path / "notes.md").read_text() == "mine\nno line end"


@pytest.mark.parametrize("answer", ['{"prompts": ["the same"]}', '{"prompts": ["\\ud83d"]}', '{"prompts": []}', "no"])
def test_a_writer_without_ideas_ends(serve, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(writing, "STALE", 4)
    monkeypatch.setattr(writing, "AT_ONCE", 1)
    with pytest.raises(ValueError, match=r"of 30 prompts; \d answers in a row were no use: "):
        writing.write_prompts(quick(serve(lambda question, n: answer)), "cats", 30, tmp_path / "out.jsonl", 2)
