"""A chat model behind an HTTP endpoint. It grades pictures (rubrics.py) and writes prompts (prompts.py).

Any server that speaks OpenAI's chat format will do, also a local one. An answer counts only if it is exactly what was
asked for. What happens otherwise:

    other text around the JSON, another key, a 6       asked again, ATTEMPTS times in all; then it stays unanswered
    429, 5xx, a time-out, a cut connection             the same, after a pause that doubles (or that Retry-After names)
    another 4xx, or the model's own "refusal"          refused at once: this question, not the next one
    401, 403, 404, a redirect                          the run ends: the next question would fare no better
    GIVE_UP unanswered questions in a row              the run ends: nothing usable comes. Refused ones do not count

Python's own HTTP client is enough.
"""

import base64
import http.client
import io
import json
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

from data.pictures import open_picture
from program.edges import parse_json

ATTEMPTS = 6  # at one question
GIVE_UP = 10  # unanswered questions in a row
LONGEST_PAUSE = 120.0  # seconds, whatever a server's Retry-After says
THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}  # asked directly, whatever proxy the environment names
LONGEST_SIDE = 1536  # in pixels, of a picture that is sent. Judges reduce larger ones themselves
LARGEST_PNG = 4_000_000  # bytes; a larger one is sent as JPEG. Servers limit a question's size
JSON_MODE = {"response_format": {"type": "json_object"}}  # not every server knows it
TRANSIENT = {408, 409, 425, 429}  # HTTP statuses after which the question is asked again, as after every 5xx
HOPELESS = {301, 302, 303, 307, 308, 401, 403, 404}  # every other question would get the same status


class Unanswered(Exception):
    """One question without a usable answer. Its text says why."""


class Refused(Unanswered):
    """The server refuses this question, for its content say. It is alive, and other questions may be answered."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow a redirect, and send the key to the other server."""

    def redirect_request(self, *_):
        return None


@dataclass
class Chat:
    """One model at one endpoint. `url` ends where /chat/completions follows; model None: the server's only one."""

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    timeout: float = 180.0  # seconds in which a server may send nothing
    pause: float = 2.0  # seconds after the first failure, then twice as long each time
    stop: threading.Event = field(default_factory=threading.Event)  # once set, nothing more is asked
    json_mode: bool | None = None  # whether the server takes JSON_MODE; None until a reply has shown it

    def __post_init__(self):
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        try:
            parts = urlsplit(self.url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, a bracket that is not closed
            right = False
        if not right or not re.fullmatch("[!-~]+", self.url):
            raise ValueError(f"{self.url}: no address; one like http://localhost:8000/v1 is expected")
        if not re.fullmatch("[ -~]*", self.key or ""):
            raise ValueError(f"{self.url}: the key for it has letters that HTTP cannot send")
        no_proxy = [urllib.request.ProxyHandler({})] if parts.hostname in THIS_MACHINE else []
        self.opener = urllib.request.build_opener(NoRedirect, *no_proxy)

    def ask(self, system: str, content: list[dict], check: Callable[[dict], None]) -> dict:
        """The JSON object that answers. `check` raises ValueError for an answer that is not what was asked for.

        Unanswered: too many attempts. Refused: the server refuses this question. ValueError: it refuses every question.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        # No temperature: models that think first accept none, and a second attempt should not repeat the first.
        question = {"messages": messages} | ({"model": self.model} if self.model else {})
        problem, pause = "stopped", self.pause
        for attempt in range(ATTEMPTS):
            if attempt and self.stop.wait(min(pause, LONGEST_PAUSE)) or self.stop.is_set():
                break
            pause = self.pause * 2**attempt * random.uniform(0.75, 1.25)  # so that waiting threads spread out
            try:
                answer = json_object(self.reply(question))
                check(answer)
                return answer
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {self.excerpt(error)}"
                if error.code in HOPELESS:
                    raise ValueError(f"{self.url}: {problem}") from None
                if refuses(error.code):
                    raise Refused(problem) from None
                pause = max(pause, seconds_until(error.headers.get("Retry-After", "")))
            except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, a cut one
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:  # an answer, but not what was asked for: no reason to wait
                problem, pause = str(error), 0.0
        raise Unanswered(problem)

    def reply(self, question: dict) -> str:
        """The text of the model's answer. ValueError if the reply is no chat completion; Refused if the model refuses."""
        raw = self.post(question)
        try:
            choice = parse_json(raw)["choices"][0]
            message, ended = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            if isinstance(text, list):  # of parts: thoughts, which are left out, and texts
                text = "".join(part["text"] for part in text if part["type"] == "text")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"no chat completion: {raw[:200]!r}") from None
        if refusal or ended == "content_filter":
            raise Refused(f"refused (finish_reason {ended}): {refusal}"[:300])
        if not isinstance(text, str) or ended == "length":
            raise ValueError(f"no whole answer (finish_reason {ended}): {message}"[:300])
        return text

    def post(self, question: dict) -> bytes:
        """The server's reply to a question, asked in JSON mode unless the server does not know it; else HTTPError.

        Such a server refuses, and so does a content filter. So a refused question is asked once more without JSON mode,
        until a reply has shown which it was.
        """
        if self.json_mode is not False:
            try:
                raw = self.send(question | JSON_MODE)
                self.json_mode = True
                return raw
            except urllib.error.HTTPError as error:
                if self.json_mode or not refuses(error.code):
                    raise
        raw = self.send(question)
        self.json_mode = False
        return raw

    def send(self, question: dict) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url + "/chat/completions", json.dumps(question).encode(), headers)
        with self.opener.open(request, timeout=self.timeout) as response:
            return response.read()

    def excerpt(self, error: urllib.error.HTTPError) -> str:
        """The start of a server's error message, without the key, which some servers repeat in it."""
        try:
            text = error.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return " ".join(text.replace(self.key or "\0", "***").split())[:300] or error.reason


def refuses(status: int) -> bool:
    """Whether a server answers this HTTP status to a question that it does not want, while it takes others."""
    return status < 500 and status not in TRANSIENT | HOPELESS


def seconds_until(retry_after: str) -> float:
    """What a Retry-After header says, which is a number of seconds or a date; 0 if it says anything else."""
    try:
        return float(retry_after)
    except ValueError:
        with suppress(ValueError, OverflowError):  # no date; one that no calendar has
            date = parsedate_to_datetime(retry_after).replace(tzinfo=UTC)  # HTTP knows no other zone
            return (date - datetime.now(UTC)).total_seconds()
    return 0.0


def json_object(text: str) -> dict:
    """The one JSON object in an answer; ValueError for anything else. What many models put around it is taken off: a
    finished thought before it, and a code fence around it."""
    bare = text.strip()
    if not bare.startswith("{") and "</think>" in bare:
        bare = bare.partition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", bare, re.DOTALL)
    try:
        value = parse_json(fenced[1] if fenced else bare)
        json.dumps(value, ensure_ascii=False).encode()  # finds halves of emoji
    except ValueError as error:
        raise ValueError(f"not the JSON that was asked for ({error}): {text[:200]!r}") from None
    if type(value) is not dict:
        raise ValueError(f"not a JSON object: {text[:200]!r}")
    return value


def text_part(text: str) -> dict:
    """Words as part of a question."""
    return {"type": "text", "text": text}


def image_part(path: Path) -> dict:
    """A picture as part of a question: upright, over white, as PNG, or as JPEG if the PNG would be too large."""
    picture = open_picture(path)
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    flat.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    kind, data = "png", file_content(flat, "PNG")
    if len(data) > LARGEST_PNG:
        kind, data = "jpeg", file_content(flat, "JPEG", quality=95, subsampling="4:4:4")
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def file_content(picture: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def in_parallel(chat: Chat, ask: Callable, jobs: list, parallel: int, title: str) -> Iterator[tuple]:
    """(job, answer or Unanswered), in the order in which they end.

    ValueError after GIVE_UP questions in a row without an answer. Refused ones neither count nor end the row.
    """
    pool = ThreadPoolExecutor(parallel)
    unanswered = 0  # questions in a row
    try:
        futures = {pool.submit(ask, job): job for job in jobs}
        for future in tqdm(as_completed(futures), desc=title, total=len(jobs), leave=False):
            try:
                result = future.result()
                unanswered = 0
            except Refused as refusal:
                result = refusal
            except Unanswered as error:
                result = error
                unanswered += 1
            if unanswered == GIVE_UP:
                raise ValueError(
                    f"{chat.url}: {GIVE_UP} questions in a row without an answer, the last because of {result}; "
                    f"all answers so far are kept, and the same command asks for the rest"
                )
            yield futures[future], result
    except BaseException:  # also Ctrl-C: questions under way may end, but are not asked again
        chat.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
