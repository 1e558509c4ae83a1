"""A chat model behind an HTTP endpoint. It grades pictures (rubrics.py) and writes prompts (writing.py).

Any server that speaks OpenAI's chat format will do, local or remote. An answer counts only if it is one JSON object of
the requested form. Otherwise:

    text around the JSON, a wrong key, a score of 6    ask again, up to ATTEMPTS times; then it is unanswered
    429, 5xx, a time-out, a cut connection             the same, after a pause that doubles or that Retry-After sets
    400 and the like, or the model refuses             the question is refused; the others are still asked
    401, 404 and the like, a redirect                  the run ends: every question would get the same reply
    GIVE_UP unanswered questions in a row              the run ends: the server is dead; refused ones do not count
"""

import base64
import http.client
import io
import json
import os
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
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
from scores.colours import over_white

ATTEMPTS = 6  # for one question
GIVE_UP = 10  # unanswered questions in a row
LONGEST_PAUSE = 120.0  # seconds, whatever Retry-After says
LONGEST_SIDE = 1536  # pixels of a picture that is sent; judges reduce larger ones themselves
LARGEST_PNG = 4_000_000  # bytes; servers limit a question, so a larger picture is sent as JPEG
JSON_MODE = {"response_format": {"type": "json_object"}}  # not every server knows it
THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}  # asked directly, without a proxy

# HTTP statuses. 5xx is transient, too. Any other status refuses this one question.
TRANSIENT = {408, 409, 425, 429}
HOPELESS = {301, 302, 303, 307, 308, 401, 402, 403, 404, 405, 407, 410}


class Unanswered(Exception):
    """A question without a usable answer. The message says why."""


class Refused(Unanswered):
    """A question that the server refuses, for example for its content. The server is alive."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Raises redirects as errors. urllib would follow them and send the key to another server."""

    def redirect_request(self, *_):
        return None


@dataclass
class Chat:
    """One model at one endpoint. ValueError for an address or a key that HTTP cannot use."""

    url: str  # without /chat/completions
    model: str | None = None  # None: the server's only one
    key: str | None = field(default=None, repr=False)
    timeout: float = 180.0  # seconds without a byte from the server
    pause: float = 2.0  # seconds after the first failure; doubles with each further one
    stop: threading.Event = field(default_factory=threading.Event)  # once set, nothing is asked
    json_mode: bool | None = field(default=None, init=False)  # whether the server knows it; None: not known yet

    def __post_init__(self):
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        try:
            parts = urlsplit(self.url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, a bracket that is not closed
            valid = False
        if not valid or not re.fullmatch("[!-~]+", self.url):
            raise ValueError(f"{self.url}: no address such as http://localhost:8000/v1")
        if not re.fullmatch("[ -~]*", self.key or ""):
            raise ValueError(f"{self.url}: the key for it has letters that HTTP cannot send")
        no_proxy = urllib.request.ProxyHandler({})
        direct = [no_proxy] if parts.hostname in THIS_MACHINE else []
        self.opener = urllib.request.build_opener(NoRedirect, *direct)

    def ask(self, system: str, content: list[dict], check: Callable[[dict], None]) -> dict:
        """Ask until the answer is a JSON object that passes `check`, which raises ValueError for a wrong one.

        Unanswered after ATTEMPTS; Refused if the server refuses this question; ValueError if it refuses all questions.
        """
        # No temperature: reasoning models do not accept it, and a second attempt should not repeat the first.
        question = {"messages": [{"role": "system", "content": system}, {"role": "user", "content": content}]}
        if self.model:
            question["model"] = self.model
        problem = "stopped"
        pause = 0.0
        for attempt in range(ATTEMPTS):
            if self.stop.wait(min(pause, LONGEST_PAUSE)):
                break
            spread = random.uniform(0.75, 1.25)  # so that waiting threads do not return at once
            pause = self.pause * 2**attempt * spread
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
            except (OSError, http.client.HTTPException) as error:  # no connection, a time-out
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:  # an answer of the wrong form: no reason to wait
                problem = str(error)
                pause = 0.0
        raise Unanswered(problem)

    def reply(self, question: dict) -> str:
        """The model's answer. ValueError if there is none or only a part of it; Refused if the model refuses."""
        raw = self.post(question)
        try:
            choice = parse_json(raw)["choices"][0]
            message, ended = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            if isinstance(text, list):  # of texts and thoughts; the texts are the answer
                text = "".join(part["text"] for part in text if part["type"] == "text")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"no chat completion: {raw[:200]!r}") from None
        if refusal or ended == "content_filter":
            raise Refused(f"refused (finish_reason {ended}): {refusal}"[:300])
        if not isinstance(text, str) or ended == "length":
            raise ValueError(f"no whole answer (finish_reason {ended}): {message}"[:300])
        return text

    def post(self, question: dict) -> bytes:
        """The server's reply, in JSON mode where the server knows it. HTTPError for a status other than success.

        A server without JSON mode refuses the question, but so does a content filter. So until the first success a
        refused question is sent a second time, without JSON mode.
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
        body = json.dumps(question).encode()
        request = urllib.request.Request(self.url + "/chat/completions", body, headers)
        with self.opener.open(request, timeout=self.timeout) as response:
            return response.read()

    def excerpt(self, error: urllib.error.HTTPError) -> str:
        """The start of a server's error message. Some servers repeat the key in it, so the key is masked."""
        try:
            text = error.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return " ".join(text.replace(self.key or "\0", "***").split())[:300] or error.reason


def open_chats(urls: Sequence[str], models: Sequence[str], variables: Sequence[str], timeout: float) -> list[Chat]:
    """The models at these addresses: several judges, or the one that writes prompts.

    models       their names; empty: each server's only model
    variables    environment variables with their keys; empty: JUDGE_API_KEY, where it is set
    timeout      in seconds

    With several models the last address and the last key serve all that remain. ValueError: a variable is not set, or
    two models share a name.
    """
    if unset := [variable for variable in variables if variable not in os.environ]:
        raise ValueError(f"there is no environment variable {unset[0]}; it should have the key")
    keys = [os.environ[variable] for variable in variables] or [os.environ.get("JUDGE_API_KEY")]
    count = max(len(urls), len(models))
    columns = [[*values, *values[-1:] * count][:count] for values in (urls, models or [None], keys)]
    chats = [Chat(url, model, key, timeout) for url, model, key in zip(*columns, strict=True)]
    if len({chat.model for chat in chats}) < len(chats):
        raise ValueError("two judges need two names: --judge URL [URL] --judge-model NAME NAME")
    return chats


def refuses(status: int) -> bool:
    """Whether an HTTP error means that the server refuses this question but not all questions."""
    return status < 500 and status not in TRANSIENT | HOPELESS


def seconds_until(retry_after: str) -> float:
    """The seconds that a Retry-After header asks for, as a number or as a date. 0 for anything else."""
    with suppress(ValueError):
        return float(retry_after)
    with suppress(ValueError, OverflowError):  # not a date, or a year that does not exist
        date = parsedate_to_datetime(retry_after).replace(tzinfo=UTC)  # HTTP has no other zone
        return (date - datetime.now(UTC)).total_seconds()
    return 0.0


def json_object(text: str) -> dict:
    """The JSON object that is the whole answer; ValueError for anything else.

    A finished thought before it and a code fence around it are removed, because many models write them unasked.
    """
    bare = text.strip()
    if not bare.startswith(("{", "```")) and "</think>" in bare:
        bare = bare.partition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", bare, re.DOTALL)
    try:
        value = parse_json(fenced[1] if fenced else bare)
        json.dumps(value, ensure_ascii=False).encode()  # fails for half an emoji
    except ValueError as error:
        raise ValueError(f"not the JSON that was asked for ({error}): {text[:200]!r}") from None
    if type(value) is not dict:
        raise ValueError(f"not a JSON object: {text[:200]!r}")
    return value


def text_part(text: str) -> dict:
    """A text as part of a question."""
    return {"type": "text", "text": text}


def image_part(path: Path) -> dict:
    """A picture as part of a question: upright, on white, no side above LONGEST_SIDE, as PNG or JPEG."""
    flat = over_white(open_picture(path))
    flat.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    kind, file = "png", io.BytesIO()
    flat.save(file, "PNG")
    if file.tell() > LARGEST_PNG:
        kind, file = "jpeg", io.BytesIO()
        flat.save(file, "JPEG", quality=95, subsampling="4:4:4")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}


def in_parallel(chat: Chat, ask: Callable, jobs: list, parallel: int, title: str) -> Iterator[tuple]:
    """Call `ask` on each job, `parallel` at a time. Yields (job, answer or Unanswered) in the order of completion.

    ValueError after GIVE_UP unanswered questions in a row. Refused questions neither count nor end the row.
    """
    pool = ThreadPoolExecutor(parallel)
    unanswered = 0  # in a row
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
    except BaseException:  # also Ctrl-C: pending questions may end, but none is asked again
        chat.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
