"""A server that speaks the chat format on this machine: it answers, and misbehaves in every way."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from judges import rubrics
from judges.cases import name_cases
from judges.chat import Chat
from recipe import Prompt

GOOD = {"score": 3.25, "reason": "fine"}


class Server(ThreadingHTTPServer):
    """`answer(question, attempt)` says what happens to a question that came `attempt` times before:

    a text             the model's answer
    bytes              the body of the reply
    a number           the status of an error
    None               the server hangs up
    (any, headers)     further headers of the reply

    `asked` holds the bodies of all questions, `headers` their headers and path.
    """

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
        action, headers = self.server.answer(json.loads(body), attempt), {}
        if isinstance(action, tuple):
            action, headers = action
        if action is None:
            return self.connection.close()
        status, content = 200, action
        if isinstance(action, str):
            content = reply(action)
        elif isinstance(action, int):
            status, content = action, f'{{"error": "you sent {self.headers["Authorization"]}"}}'.encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name, str(value))
        with suppress(OSError):  # a client that waited no longer
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def reply(content: str | list | None, refusal: str | None = None, **choice) -> bytes:
    """A chat completion."""
    return json.dumps({"choices": [{"message": {"content": content, "refusal": refusal}} | choice]}).encode()


def quick(server: Server, **settings) -> Chat:
    """A client that hardly pauses."""
    return Chat(server.url, "judge-1", **{"pause": 0.001, "timeout": 5.0} | settings)


def text(**changes) -> str:
    """A good answer, or a changed one."""
    return json.dumps(GOOD | changes)


def write_bench(folder: Path) -> dict[str, Prompt]:
    """Four T2I cases and one edit of each category, with their pictures in `folder`/pictures."""
    Image.new("RGBA", (8, 8), (0, 0, 255, 255)).save(folder / "source.png")
    cases = [Prompt("t2i", category, f"{category} {i}") for category in ("portrait", "text") for i in range(2)]
    cases += [Prompt("edit", category, "do it", [folder / "source.png"]) for category in rubrics.FAMILIES]
    named = name_cases(cases)
    (folder / "pictures").mkdir()
    for i, name in enumerate(named):
        Image.new("RGBA", (4, 4), (20 * i, 0, 0, 255)).save(folder / "pictures" / name)
    return named


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
