"""A chat model behind an HTTP endpoint: one more frozen network, which other people's machines may run.

Any server that speaks OpenAI's chat format will do, a local one too. judge.py asks it to grade pictures; at the end of
this file it writes prompts to train on. An answer counts only if it is exactly what was asked for:

    prose around the JSON, another key, a 6        asked again, ATTEMPTS times in all; then it stays unanswered
    429, 5xx, a time-out, a cut connection         the same, after a pause that doubles (or what Retry-After says)
    another 4xx: the server wants not this one     unanswered at once
    401, 403, 404, a redirect                      the end: the next question would fare no better; and so would it after
                                                   GIVE_UP unanswered ones in a row

The standard library's HTTP is enough.
"""

import base64
import http.client
import io
import json
import math
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from recipe import read_prompts

ATTEMPTS = 6  # at one question
GIVE_UP = 10  # unanswered questions in a row
LONGEST_PAUSE = 120.0  # seconds, whatever a server's Retry-After says
LONGEST_SIDE = 2048  # of a picture sent, in pixels; judges look at smaller ones
LARGEST_REPLY = 1 << 22  # bytes
TRANSIENT = {408, 409, 425, 429}  # HTTP statuses to try again at, besides every 5xx
HOPELESS = {301, 302, 303, 307, 308, 401, 403, 404}  # ... and those that every other question would meet as well


# ----------------------------------------------------------------------------------------------------------------------
# The client


class Unanswered(Exception):
    """One question without a usable answer. Its text says why."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow, and show the key to whoever it is sent to."""

    def redirect_request(self, *_):
        return None


@dataclass
class Chat:
    """One model at one endpoint. `url` ends where /chat/completions follows; model None: the server's only one."""

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    timeout: float = 180.0  # seconds, for a whole reply
    pause: float = 2.0  # seconds after the first failure, then twice as long each time
    stop: threading.Event = field(default_factory=threading.Event)  # once set, nothing more is asked

    def __post_init__(self):
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{self.url}: no address; one like http://localhost:8000/v1 is expected")
        self.opener = urllib.request.build_opener(NoRedirect)

    def ask(self, system: str, content: list[dict], check: Callable[[dict], None]) -> dict:
        """The JSON object that answers, after `check` found nothing in it to raise ValueError about.

        Unanswered when that took too many attempts or the server does not want this question; ValueError when it
        wants none.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        # No temperature: the models that think first accept none, and a second attempt should not repeat the first.
        question = {"messages": messages, "response_format": {"type": "json_object"}}
        body = json.dumps(question | ({"model": self.model} if self.model else {})).encode()
        problem, pause = "stopped", self.pause
        for attempt in range(ATTEMPTS):
            if attempt and self.stop.wait(min(pause, LONGEST_PAUSE)) or self.stop.is_set():
                break
            pause = self.pause * 2**attempt * random.uniform(0.75, 1.25)  # many waiting threads, spread out
            try:
                answer = strict_json(self.reply(body))
                check(answer)
                return answer
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {self.excerpt(error)}"
                if error.code in HOPELESS:
                    raise ValueError(f"{self.url}: {problem}") from None
                if error.code not in TRANSIENT and error.code < 500:
                    raise Unanswered(problem) from None
                after = error.headers.get("Retry-After", "")
                pause = max(pause, float(after)) if after.isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:  # no connection, a time-out, a cut one
                problem = f"{type(error).__name__}: {error}"
            except ValueError as error:  # an answer, but not the one asked for: no reason to wait
                problem, pause = str(error), 0.0
        raise Unanswered(problem)

    def reply(self, body: bytes) -> str:
        """What the model says. ValueError if the reply is no chat completion."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url + "/chat/completions", body, headers)
        raw, deadline = b"", time.monotonic() + self.timeout
        with self.opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):  # the socket's own time-out starts anew with every byte
                raw += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole reply within {self.timeout:g} seconds")
                if len(raw) > LARGEST_REPLY:
                    raise ValueError(f"a reply of more than {LARGEST_REPLY} bytes")
            if response.length:  # read1 ends without a word where the connection does
                raise ConnectionError(f"cut off {response.length} bytes before the end")
        try:
            choice = json.loads(raw)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"no chat completion: {raw[:200]!r}") from None
        if choice.get("finish_reason") == "length":
            raise ValueError("the answer was cut off at the server's limit of tokens")
        if not isinstance(text, str):
            raise ValueError(f"no answer but {choice['message']}"[:300])
        return text

    def excerpt(self, error: urllib.error.HTTPError) -> str:
        """The start of what a server says about an error. Some repeat the key in it."""
        try:
            text = error.read(500).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        return " ".join(text.replace(self.key or "\0", "***").split())[:300] or error.reason


def strict_json(text: str) -> dict:
    """One JSON object and nothing around it, no key twice, no NaN; else ValueError."""

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def constant(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not the JSON that was asked for ({error}): {text[:200]!r}") from None
    if type(value) is not dict:
        raise ValueError(f"not a JSON object: {text[:200]!r}")
    return value


def image_part(path: Path) -> dict:
    """A picture as part of a question: upright, over white, as PNG inside the JSON."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    flat.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    flat.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()},
    }


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


# ----------------------------------------------------------------------------------------------------------------------
# Many questions, and answers that outlive a killed run


def in_parallel(chat: Chat, ask: Callable, jobs: list, parallel: int, title: str) -> Iterator[tuple]:
    """(job, answer or Unanswered) as they come. ValueError after GIVE_UP in a row without an answer."""
    pool, in_a_row = ThreadPoolExecutor(parallel), 0
    try:
        futures = {pool.submit(ask, job): job for job in jobs}
        for future in tqdm(as_completed(futures), desc=title, total=len(jobs), leave=False):
            try:
                result, in_a_row = future.result(), 0
            except Unanswered as error:
                result, in_a_row = error, in_a_row + 1
                if in_a_row == GIVE_UP:
                    raise ValueError(
                        f"{chat.url}: {GIVE_UP} questions in a row without an answer, the last because of {error}; "
                        f"all answers so far are kept, and the same command asks for the rest"
                    ) from None
            yield futures[future], result
    except BaseException:  # Ctrl-C, too: what is under way may end, but is not tried again, and nothing else is asked
        chat.stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def finish_last_line(path: Path) -> None:
    """Of a file of JSON objects, one a line, that is appended to: a run may have been killed in the middle of a line."""
    content = path.read_bytes() if path.exists() else b""
    start = content.rfind(b"\n") + 1
    if not content[start:].startswith(b"{"):
        return  # whole, or no such file
    with open(path, "r+b") as file:
        try:
            json.loads(content[start:])
            file.seek(0, io.SEEK_END)
            file.write(b"\n")  # only the line's end is missing
        except ValueError:
            file.truncate(start)


# ----------------------------------------------------------------------------------------------------------------------
# Writing prompts: the paper's 3 x 20,000 were written by a language model too (section 3)

AT_ONCE = 20  # prompts asked for in one question
STALE = 20  # answers in a row without a new prompt

WRITER = """
You write prompts for a text-to-image model. Each describes one picture, in one to three English sentences, so that a
painter could start: what is to be seen, where, in which light, in which medium. No two may have the same idea, and
none may speak of itself, of prompts or of models. No real people, brands or living artists.
Reply with one JSON object and nothing else, no code fence: {"prompts": ["...", "..."]}
"""

BRIEFS = {
    "landscape": "landscapes: nature, towns or the sky are the subject, and people, if any, are small in it",
    "portrait": "portraits: one person, face and character are the subject; say age, features, clothes and surroundings",
    "text": "pictures with words: posters, signs, covers, packages, screens; quote in double quotes exactly what is to be "
    "read in the picture, from one word to a few lines",
}
# One draw from each goes with every question. A model that is asked the same thing twice gives much the same answer.
TURNS = (
    "at dawn, at noon, in the evening, at night, in fog, in rain, in snow, in a storm, in harsh sun",
    "photographs, oil paintings, drawings, illustrations, prints, film stills, any medium",
    "Africa, the Arctic, Central Asia, East Asia, Europe, India, an island, Latin America, an imagined place",
    "today, a hundred years ago, the Middle Ages, antiquity, the near future",
    "quiet, joyful, solemn, odd, tense, tender",
    "at most 15 words each, about 30 words each, about 60 words each",
)


def write_prompts(chat: Chat, category: str, count: int, out: Path, parallel: int) -> int:
    """Append prompts to a file of JSON lines until it has `count` of this category, all different; returns how many it has.

    A file that is there is gone on with. ValueError when it holds other prompts, or the model has no more ideas.
    """
    finish_last_line(out)
    found = read_prompts([out]) if out.exists() and out.stat().st_size else []
    for prompt in found:
        if (prompt.task, prompt.category) != ("t2i", category):
            raise ValueError(
                f"{out}: has a {prompt.task} prompt of category {prompt.category!r}, {category!r} is expected"
            )
    seen = {plain(prompt.prompt) for prompt in found}
    stale, rng = 0, random.Random(len(seen))

    def check(answer: dict) -> None:
        texts = answer.get("prompts")
        if answer.keys() != {"prompts"} or type(texts) is not list or not texts:
            raise ValueError(f"a list 'prompts' and nothing else is expected: {json.dumps(answer)[:200]}")
        if not all(isinstance(text, str) and plain(text) and len(text.encode()) <= 4000 for text in texts):
            raise ValueError("every prompt must be a text of at most 4,000 bytes")  # encode() finds halves of emoji

    def ask(turn: str) -> dict:
        return chat.ask(WRITER, [text_part(turn)], check)

    about = f"{AT_ONCE} prompts for {BRIEFS.get(category, 'pictures of the kind: ' + category)}. This time: "
    bar = tqdm(total=count, initial=len(seen), desc=category, unit="prompt")
    with bar, open(out, "a", encoding="utf-8") as file:
        while len(seen) < count:
            some = range(min(parallel, math.ceil((count - len(seen)) / AT_ONCE)))
            turns = [about + "; ".join(rng.choice(words.split(", ")) for words in TURNS) for _ in some]
            for _, answer in in_parallel(chat, ask, turns, parallel, "ask"):
                before, useful = len(seen), isinstance(answer, dict)
                for text in answer["prompts"] if useful else ():
                    if plain(text) not in seen and len(seen) < count:
                        seen.add(plain(text))
                        line = {"task": "t2i", "category": category, "prompt": " ".join(text.split())}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(seen) - before)
                stale = 0 if len(seen) > before else stale + 1
                problem = "only prompts that are there already" if useful else answer
            if stale >= STALE and len(seen) < count:
                raise ValueError(
                    f"{out}: {len(seen)} of {count} prompts; {stale} answers in a row were no use: {problem}"
                )
    return len(seen)


def plain(text: str) -> str:
    """The words alone: prompts that differ in case, space or punctuation are one."""
    return " ".join(re.findall(r"\w+", text.casefold()))
