"""Prompts to train on, written by a language model like the paper's 3 x 20,000 (section 3)."""

import json
import math
import random
import re
from pathlib import Path

from tqdm import tqdm

from program import edges
from program.writing_options import WritingOptions, parse

if __name__ == "__main__":  # here, so that --help and a mistyped flag do not wait for torch
    edges.run("judges.writing", parse)  # imports the rest, and calls run(options)

from checkpoint.files import aside, may_write
from data.prompts import read_prompts
from judges.chat import Chat, Unanswered, in_parallel, open_chats, text_part
from program.edges import short

AT_ONCE = 20  # prompts in one answer
PATIENCE = 20  # answers in a row without a new prompt

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
# A question asks for one entry of each line. Otherwise models give nearly the same answer each time.
VARIETY = (
    "at dawn, at noon, in the evening, at night, in fog, in rain, in snow, in a storm, in harsh sun",
    "photographs, oil paintings, drawings, illustrations, prints, film stills, any medium",
    "Africa, the Arctic, Central Asia, East Asia, Europe, India, an island, Latin America, an imagined place",
    "today, a hundred years ago, the Middle Ages, antiquity, the near future",
    "quiet, joyful, solemn, odd, tense, tender",
    "at most 15 words each, about 30 words each, about 60 words each",
)


def write_prompts(chat: Chat, category: str, count: int, out: Path, parallel: int) -> int:
    """Write T2I prompts to a file of JSON lines until it has `count` different ones. Returns their number.

    The whole file is written after each answer, so a killed run resumes. ValueError if it holds prompts of another
    category, or if the model has no more ideas.
    """
    may_write(out, overwrite=True)  # before the first question, which costs money
    content, known = read_written(out, category)
    rng = random.Random(len(known))
    useless = 0  # answers in a row without a new prompt

    def ask(question: str) -> dict:
        return chat.ask(WRITER, [text_part(question)], check_answer)

    with tqdm(total=count, initial=len(known), desc=category, unit="prompt") as bar:
        while len(known) < count:
            number = min(parallel, math.ceil((count - len(known)) / AT_ONCE))
            questions = [question_for(category, rng) for _ in range(number)]
            for _, answer in in_parallel(chat, ask, questions, parallel, "ask"):
                before = len(known)
                if isinstance(answer, Unanswered):
                    texts, problem = [], str(answer)
                else:
                    texts, problem = answer["prompts"], "only prompts that it has already"
                for text in texts:
                    if plain(text) not in known and len(known) < count:
                        known.add(plain(text))
                        line = {"task": "t2i", "category": category, "prompt": " ".join(text.split())}
                        content += json.dumps(line, ensure_ascii=False).encode() + b"\n"
                with aside(out) as part:
                    part.write_bytes(content)
                bar.update(len(known) - before)
                useless = 0 if len(known) > before else useless + 1
            if useless >= PATIENCE and len(known) < count:
                reached = f"{len(known)} of {count} prompts"
                raise ValueError(f"{out}: {reached}; the last {useless} answers were of no use: {problem}")
    return len(known)


def read_written(out: Path, category: str) -> tuple[bytes, set[str]]:
    """The file's content and its prompts in plain form. ValueError unless all are T2I prompts of this category."""
    content = out.read_bytes() if out.exists() else b""
    prompts = read_prompts([out]) if content else []
    for prompt in prompts:
        if (prompt.task, prompt.category) != ("t2i", category):
            other = f"a {prompt.task} prompt of category {prompt.category!r}"
            raise ValueError(f"{out}: has {other}; T2I prompts of category {category!r} are expected")
    if content and not content.endswith(b"\n"):
        content += b"\n"
    return content, {plain(prompt.prompt) for prompt in prompts}


def question_for(category: str, rng: random.Random) -> str:
    brief = BRIEFS.get(category, f"pictures of the kind: {category}")
    choices = [rng.choice(line.split(", ")) for line in VARIETY]
    return f"{AT_ONCE} prompts for {brief}. This time: {'; '.join(choices)}"


def check_answer(answer: dict) -> None:
    """ValueError unless the answer is {"prompts": [text, ...]}."""
    texts = answer.get("prompts")
    if answer.keys() != {"prompts"} or type(texts) is not list or not texts:
        raise ValueError(f"a list 'prompts' and nothing else is expected: {short(answer)}")
    if not all(isinstance(text, str) and plain(text) and len(text.encode()) <= 4000 for text in texts):
        raise ValueError("every prompt must be a text of at most 4,000 bytes")


def plain(text: str) -> str:
    """The words alone. Prompts that differ only in case, space or punctuation count as the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def run(options: WritingOptions) -> None:
    models = [options.model] if options.model else []
    keys = [options.key] if options.key else []
    (chat,) = open_chats([options.endpoint], models, keys, options.timeout)
    count = write_prompts(chat, options.category, options.count, options.out, options.parallel)
    print(f"{options.out}: {count} prompts")


def main(argv: list[str] | None = None) -> None:
    """The command line, for a caller in Python."""
    run(parse(argv))
