"""Prompts to train on, written by a language model, as the paper's 3 x 20,000 were (section 3)."""

import json
import math
import random
import re
from pathlib import Path

from tqdm import tqdm

from checkpoint.files import aside, may_write
from judges.chat import Chat, in_parallel, text_part
from recipe import read_prompts

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
# Every question has one of each line. A model that is asked the same thing twice gives much the same answer.
TURNS = (
    "at dawn, at noon, in the evening, at night, in fog, in rain, in snow, in a storm, in harsh sun",
    "photographs, oil paintings, drawings, illustrations, prints, film stills, any medium",
    "Africa, the Arctic, Central Asia, East Asia, Europe, India, an island, Latin America, an imagined place",
    "today, a hundred years ago, the Middle Ages, antiquity, the near future",
    "quiet, joyful, solemn, odd, tense, tender",
    "at most 15 words each, about 30 words each, about 60 words each",
)


def write_prompts(chat: Chat, category: str, count: int, out: Path, parallel: int) -> int:
    """Add prompts to a file of JSON lines until it has `count` of this category, all different; returns how many it has.

    After each answer the file is written anew, whole, so a run that was killed goes on. ValueError if it holds other
    prompts, or if the model has no more ideas.
    """
    may_write(out, overwrite=True)  # to be known before the first question, which costs money
    content = out.read_bytes() if out.exists() else b""
    found = read_prompts([out]) if content else []
    for prompt in found:
        if (prompt.task, prompt.category) != ("t2i", category):
            what = f"a {prompt.task} prompt of category {prompt.category!r}"
            raise ValueError(f"{out}: has {what}, {category!r} is expected")
    if content and not content.endswith(b"\n"):
        content += b"\n"
    seen = {plain(prompt.prompt) for prompt in found}
    stale, rng = 0, random.Random(len(seen))

    def check(answer: dict) -> None:
        texts = answer.get("prompts")
        if answer.keys() != {"prompts"} or type(texts) is not list or not texts:
            raise ValueError(f"a list 'prompts' and nothing else is expected: {json.dumps(answer)[:200]}")
        if not all(isinstance(text, str) and plain(text) and len(text.encode()) <= 4000 for text in texts):
            raise ValueError("every prompt must be a text of at most 4,000 bytes")

    def ask(turn: str) -> dict:
        return chat.ask(WRITER, [text_part(turn)], check)

    about = f"{AT_ONCE} prompts for {BRIEFS.get(category, 'pictures of the kind: ' + category)}. This time: "
    with tqdm(total=count, initial=len(seen), desc=category, unit="prompt") as bar:
        while len(seen) < count:
            some = range(min(parallel, math.ceil((count - len(seen)) / AT_ONCE)))
            turns = [about + "; ".join(rng.choice(words.split(", ")) for words in TURNS) for _ in some]
            for _, answer in in_parallel(chat, ask, turns, parallel, "ask"):
                problem = "only prompts that are there already" if isinstance(answer, dict) else answer
                before = len(seen)
                for text in answer["prompts"] if isinstance(answer, dict) else ():
                    if plain(text) not in seen and len(seen) < count:
                        seen.add(plain(text))
                        line = {"task": "t2i", "category": category, "prompt": " ".join(text.split())}
                        content += json.dumps(line, ensure_ascii=False).encode() + b"\n"
                with aside(out) as part:
                    part.write_bytes(content)
                bar.update(len(seen) - before)
                stale = 0 if len(seen) > before else stale + 1
            if stale >= STALE and len(seen) < count:
                found = f"{len(seen)} of {count} prompts"
                raise ValueError(f"{out}: {found}; {stale} answers in a row were no use: {problem}")
    return len(seen)


def plain(text: str) -> str:
    """The words alone. Prompts that differ in case, space or punctuation count as one."""
    return " ".join(re.findall(r"\w+", text.casefold()))
