"""A vision-language model as the judge: its questions, the form of its answers, and the table of its scores.

The rubrics are the paper's (appendix A of Qwen-Image-Flash, arXiv 2606.03746) in our words: rubrics.toml. Scores go
from 1 to 5.

Every answer is saved in a file. Its name has a hash of the whole question: model, texts, and the bytes of every
picture. So a changed picture is judged again, no question is paid for twice, and a stopped run resumes.
"""

import json
import tomllib
from pathlib import Path

import numpy as np

from checkpoint.files import digest, read_json, write_json
from data.prompts import TASKS, Prompt
from judges.chat import Chat, Unanswered, image_part, in_parallel, text_part
from program.edges import short
from scores.rows import markdown
from scores.statistics import averages, interval_over_cases

RUBRICS = tomllib.loads(Path(__file__).with_name("rubrics.toml").read_text(encoding="utf-8"))
FAMILIES = RUBRICS["families"]  # of edits: category -> its rubric

# ---- One question ----------------------------------------------------------------------------------------------------


def form_of(case: Prompt) -> dict:
    """An example of the JSON object that the judge answers with."""
    form = {"score": 3.42, "reason": "one sentence"}
    if case.task == "edit":
        form |= {"sub_scores": dict.fromkeys(FAMILIES[case.category]["sub_scores"], 3.42), "failures": ["..."]}
    return form


def system_text(case: Prompt) -> str:
    """The system message: the rubric for this case's task and category, and the form of the answer."""
    scale = RUBRICS["scale"].format(form=json.dumps(form_of(case)))
    if case.task == "t2i":
        return f"{RUBRICS['t2i']}\n{scale}"
    family, count = FAMILIES[case.category], len(case.images)
    sources = "the source picture" if count == 1 else f"{count} source pictures in their order"
    parts = "\n".join(f"- {name}: {RUBRICS['sub_scores'][name]}" for name in family["sub_scores"])
    return f"{RUBRICS['edit'].format(sources=sources, parts=parts, **family)}\n{scale}"


def user_content(case: Prompt, picture: Path) -> list[dict]:
    """The user message: sources, prompt and result."""
    content = []
    for number, image in enumerate(case.images, 1):
        content += [text_part(f"Source picture {number}:"), image_part(Path(image))]
    title = "Instruction" if case.task == "edit" else "Prompt"
    return [*content, text_part(f"{title}: {case.prompt}"), text_part("Result:"), image_part(picture)]


def check_answer(answer: object, form: object, name: str = "the answer") -> None:
    """ValueError unless the answer has the form of `form`: its keys, scores for its numbers, texts for its texts."""
    if isinstance(form, dict):
        if type(answer) is not dict or answer.keys() != form.keys():
            raise ValueError(f"{name} is {short(answer)}; the keys {', '.join(form)} are expected")
        for key in form:
            check_answer(answer[key], form[key], key)
    elif isinstance(form, float):
        if type(answer) not in (int, float) or not 1 <= answer <= 5 or round(answer, 2) != answer:
            raise ValueError(f"{name} is {short(answer)}, not a number from 1 to 5 with at most two decimals")
    elif isinstance(form, list):
        if type(answer) is not list or not all(isinstance(text, str) for text in answer):
            raise ValueError(f"{name} is {short(answer)}, not a list of texts")
    elif not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name} is {short(answer)}, not a sentence")


# ---- All pictures of a folder ----------------------------------------------------------------------------------------


def judge(chat: Chat, cases: dict[str, Prompt], folder: Path, saved: Path, parallel: int) -> tuple[dict, dict]:
    """Ask about every picture in `folder` that has no answer in the folder `saved` yet.

    Returns {name: answer} and {name: why there is none}. ValueError if the endpoint is unusable. After Ctrl-C pending
    questions end first. All answers until then are saved in any case.
    """
    answers, missing = {}, {}
    for name, case in cases.items():
        file = saved / f"{Path(name).stem}-{question_hash(chat.model, case, folder / name)}.json"
        if file.exists():
            answers[name] = read_answer(file, case)
        else:
            missing[name] = file

    def ask(name: str) -> dict:
        case = cases[name]
        content = user_content(case, folder / name)
        form = form_of(case)
        answer = chat.ask(system_text(case), content, lambda answer: check_answer(answer, form))
        write_json(missing[name], answer)  # in this thread, which Ctrl-C does not interrupt
        return answer

    unscored = {}
    for name, result in in_parallel(chat, ask, list(missing), parallel, f"ask {chat.model or 'the judge'}"):
        if isinstance(result, Unanswered):
            unscored[name] = str(result)
        else:
            answers[name] = result
    return answers, unscored


def question_hash(model: str | None, case: Prompt, picture: Path) -> str:
    pictures = [digest(Path(path).read_bytes()) for path in (*case.images, picture)]
    question = [model, picture.name, case.prompt, system_text(case), pictures]
    return digest(json.dumps(question))[:32]


def read_answer(file: Path, case: Prompt) -> dict:
    try:
        answer = read_json(file)
        check_answer(answer, form_of(case))
    except ValueError as error:
        raise ValueError(f"{file}: not an answer of a judge ({error}); remove the file to ask again") from None
    return answer


# ---- Scores and tables -----------------------------------------------------------------------------------------------


def summary(cases: dict[str, Prompt], answers: dict[str, dict], unscored: dict[str, str]) -> dict:
    """One judge's part of a row: for each task the categories' means, their average and the half-width of its 95%
    interval; and the pictures without a score. Without scores in a category its mean and the average are None."""
    result = {}
    for task in TASKS:
        scores = {case.category: [] for case in cases.values() if case.task == task}
        for name, case in cases.items():
            if case.task == task and name in answers:
                scores[case.category].append(answers[name]["score"])
        if scores:
            result[task] = averages(dict(sorted(scores.items())))
            if all(len(numbers) > 1 for numbers in scores.values()):
                result[f"{task}_interval"] = interval_over_cases(scores)
    return result | {"scored": len(answers), "unscored": unscored}


def table(rows: list[dict]) -> str:
    """The paper's tables, one for each task, with a line for each judge of each model, and the model's rank.

    ValueError for rows that were scored on different cases.
    """
    if len({row["bench"] for row in rows}) > 1:
        raise ValueError("rows of different cases cannot share a table: " + ", ".join(row["name"] for row in rows))
    first = next(iter(rows[0]["judges"].values()))
    return "\n\n".join(table_of_task(rows, task, list(first[task])) for task in TASKS if task in first)


def table_of_task(rows: list[dict], task: str, columns: list[str]) -> str:
    """One of these tables. columns: the categories, then "average"."""
    lines = [[task, "NFE", "judge", *columns, "rank", "scored"]]
    for row, rank in zip(rows, ranks(rows, task), strict=True):
        model = [row["name"], str(row["nfe"] or "-")]
        for name, judge in row["judges"].items():
            means = [judge[task][column] for column in columns]
            scores = ["-" if mean is None else f"{mean:.2f}" for mean in means]
            if f"{task}_interval" in judge:
                scores[-1] += f" ± {judge[f'{task}_interval']:.2f}"
            scored = f"{judge['scored']} of {judge['scored'] + len(judge['unscored'])}"
            lines.append([*model, name, *scores, rank, scored])
            model, rank = ["", ""], ""  # they stand in the model's first line only
    return markdown(lines)


def ranks(rows: list[dict], task: str) -> list[str]:
    """The rank of each model by the mean of its judges' averages: "-" where one is missing; equal means share a rank.

    The paper does not say how it ranks. This rule gives the ranks that it prints.
    """
    means = []  # of each model
    for row in rows:
        averages_of_judges = [judge[task]["average"] for judge in row["judges"].values()]
        missing = None in averages_of_judges
        means.append(None if missing else round(float(np.mean(averages_of_judges)), 6))
    known = [mean for mean in means if mean is not None]
    better = {mean: sum(other > mean for other in known) for mean in known}
    return ["-" if mean is None else str(1 + better[mean]) for mean in means]
