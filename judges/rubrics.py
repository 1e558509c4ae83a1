"""A vision-language model as the judge: the questions, what counts as an answer, and the means of the answers.

The rubrics are data, rubrics.toml: the paper's (appendix A of Qwen-Image-Flash, arXiv 2606.03746) in our words. Scores go
from 1 to 5. An answer in another form than the rubric's does not count.

Every answer is a file, named by a hash of ALL that led to it: model, words, and the bytes of every picture. So a picture
that has changed is judged again, no question is paid for twice, and a run that ended early asks only the rest.
"""

import json
import tomllib
from pathlib import Path

import numpy as np

from checkpoint.files import digest, read_json, write_json
from judges.chat import Chat, Unanswered, image_part, in_parallel, text_part
from recipe import TASKS, Prompt
from scores.rows import averages, interval, markdown

RUBRICS = tomllib.loads(Path(__file__).with_name("rubrics.toml").read_text(encoding="utf-8"))
FAMILIES = RUBRICS["families"]  # of edits: category -> its rubric

# ---- one picture -----------------------------------------------------------------------------------------------------


def form_of(case: Prompt) -> dict:
    """An example of the JSON that answers."""
    form = {"score": 3.42, "reason": "one sentence"}
    if case.task == "edit":
        form |= {"sub_scores": dict.fromkeys(FAMILIES[case.category]["sub_scores"], 3.42), "failures": ["..."]}
    return form


def system_text(case: Prompt) -> str:
    """The rubric for this case's task and category."""
    scale = RUBRICS["scale"].format(form=json.dumps(form_of(case)))
    if case.task == "t2i":
        return f"{RUBRICS['t2i']}\n{scale}"
    family, count = FAMILIES[case.category], len(case.images)
    sources = "the source picture" if count == 1 else f"{count} source pictures in their order"
    parts = "\n".join(f"- {name}: {RUBRICS['sub_scores'][name]}" for name in family["sub_scores"])
    return f"{RUBRICS['edit'].format(sources=sources, parts=parts, **family)}\n{scale}"


def check_answer(answer: object, form: object, name: str = "the answer") -> None:
    """ValueError unless the answer has the form: its keys, a score for a number, words for words."""
    if isinstance(form, dict):
        if type(answer) is not dict or answer.keys() != form.keys():
            raise ValueError(f"{name}: the keys {', '.join(form)} are expected: {json.dumps(answer)[:200]}")
        for key in form:
            check_answer(answer[key], form[key], key)
    elif isinstance(form, float):
        if type(answer) not in (int, float) or not 1 <= answer <= 5 or round(answer, 2) != answer:
            raise ValueError(f"{name} is {answer!r}, not a number from 1 to 5 with at most two decimals")
    elif isinstance(form, list):
        if type(answer) is not list or not all(isinstance(words, str) for words in answer):
            raise ValueError(f"{name} is no list of texts")
    elif not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name} is no sentence")


# ---- a folder of pictures --------------------------------------------------------------------------------------------


def judge(chat: Chat, cases: dict[str, Prompt], folder: Path, kept: Path, parallel: int) -> tuple[dict, dict]:
    """Ask about every picture that has no answer in the folder `kept`.

    Returns {name: answer} and {name: why there is none}. ValueError when the endpoint is no use; KeyboardInterrupt after the
    questions under way have ended. The answers until then are kept either way.
    """
    answers, waiting = {}, {}
    for name, case in cases.items():
        seen = [digest(Path(path).read_bytes()) for path in (*case.images, folder / name)]
        key = digest(json.dumps([chat.model, name, case.prompt, system_text(case), seen]))
        file = kept / f"{Path(name).stem}-{key[:32]}.json"
        if not file.exists():
            waiting[name] = file
            continue
        try:
            answers[name] = read_json(file)
            check_answer(answers[name], form_of(case))
        except ValueError as error:
            raise ValueError(f"{file}: not a kept answer ({error}); take the file away") from None

    def ask(name: str) -> dict:
        case, content = cases[name], []
        for number, image in enumerate(case.images, 1):
            content += [text_part(f"Source picture {number}:"), image_part(Path(image))]
        words = "Instruction" if case.task == "edit" else "Prompt"
        content += [text_part(f"{words}: {case.prompt}"), text_part("Result:"), image_part(folder / name)]
        answer = chat.ask(system_text(case), content, lambda answer: check_answer(answer, form_of(case)))
        write_json(waiting[name], answer)  # in the thread itself, so that no interrupt comes in between
        return answer

    unscored = {}
    for name, result in in_parallel(chat, ask, list(waiting), parallel, f"ask {chat.model or 'the judge'}"):
        (unscored if isinstance(result, Unanswered) else answers)[name] = result
    return answers, {name: str(reason) for name, reason in unscored.items()}


# ---- what comes out --------------------------------------------------------------------------------------------------


def summary(cases: dict[str, Prompt], answers: dict[str, dict], unscored: dict[str, str]) -> dict:
    """One judge's part of a row: the means for each task, the half-width of the average's 95% interval, and which pictures
    have no score. Where a category has none, its mean and the average are None."""
    out = {}
    for task in TASKS:
        scores = {case.category: [] for case in cases.values() if case.task == task}
        for name, case in cases.items():
            if case.task == task and name in answers:
                scores[case.category].append(answers[name]["score"])
        if scores:
            out[task] = averages(dict(sorted(scores.items())))
            if all(len(some) > 1 for some in scores.values()):
                out[f"{task}_interval"] = interval(scores)
    return out | {"scored": len(answers), "unscored": unscored}


def table(rows: list[dict]) -> str:
    """The paper's form: a line for each judge of each model, and the model's rank in the mean of its judges' averages. The
    paper does not say how it ranks; this rule gives its ranks. ValueError for rows that were scored on different cases."""
    if len({row["bench"] for row in rows}) > 1:
        raise ValueError("rows of different cases cannot share a table: " + ", ".join(row["name"] for row in rows))
    tables, first = [], next(iter(rows[0]["judges"].values()))
    for task in [task for task in TASKS if task in first]:
        results = [[judge[task]["average"] for judge in row["judges"].values()] for row in rows]
        merits = [None if None in some else round(float(np.mean(some)), 6) for some in results]
        columns = list(first[task])  # the categories, then "average"
        lines = [[task, "NFE", "judge", *columns, "rank", "scored"]]
        for row, merit in zip(rows, merits, strict=True):
            rank = "-" if merit is None else str(1 + sum(other is not None and other > merit for other in merits))
            model = [row["name"], str(row["nfe"] or "-")]
            for name, judge in row["judges"].items():
                scores = ["-" if judge[task][c] is None else f"{judge[task][c]:.2f}" for c in columns]
                if f"{task}_interval" in judge:
                    scores[-1] += f" ± {judge[f'{task}_interval']:.2f}"
                scored = f"{judge['scored']} of {judge['scored'] + len(judge['unscored'])}"
                lines.append([*model, name, *scores, rank, scored])
                model, rank = ["", ""], ""  # said once
        tables.append(markdown(lines))
    return "\n\n".join(tables)
