"""The paper's claims along one training, under three fake scores: `python -m plane --experiment claims`.

A claim says that one row of a table is better than another. Here it is asked at several times of ONE training, so that the
answer says when: early, late, always or never. Premises and claims were written down before any run, and so were the rules
below. A row is one recipe under one fake score, for all seeds: a file in OUT/rows, which a killed run does not make again.
"""

from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from checkpoint.files import read_json, write_json
from experiments.claims import E1, E2, E3, E4, EXPERIMENTS, FIRST_STEP, HALFWAY, SPECIALISTS, START, TEACHER, Above
from plane import panels
from plane.method import CATEGORIES, SIGMAS, TASKS, Setting, evaluate, train
from plane.rows import (
    AVERAGE,
    BASE,
    EDITS_BASE,
    EDITS_SPECIAL,
    ROWS,
    SPECIAL,
    STEPS,
    UNTRAINED,
    Scores,
    as_lines,
    average,
    cell,
    difference,
    ends,
    from_lines,
    heading,
    untrained,
)
from plane.small_panels import small_panels
from scores.rows import markdown
from scores.statistics import mean_over_seeds

PREMISES = {
    "Four plain steps lose at T2I.": Above(TEACHER, START),
    "Four plain steps lose at editing.": Above(TEACHER, START, task="edit"),
    "The specialist is better at text.": Above(SPECIALISTS, TEACHER, "text"),
    "The specialist is better at edits.": Above(SPECIALISTS, TEACHER, task="edit"),
    "It is narrower.": Above(SPECIALISTS, TEACHER, "text", measure="fidelity"),
}
CLAIMS = {claim: parts for table in EXPERIMENTS.values() for claim, parts in table.claims.items()}

# Claims along one training. These rules were written down before the runs.
SHARES = (1 / 40, 1 / 20, 1 / 10, 1 / 4, 1 / 2, 1)  # of the updates: when students are looked at; each half as well
WHEN = {"early": 1 / 10, "late": 1}
FAKES = {  # pooled: the paper's, as far as it says
    "pooled": {"below": False, "told": False},
    "below": {"below": True, "told": False},
    "told": {"below": False, "told": True},
}
BAND = 0.01  # an interval within [-BAND, BAND] excludes any larger effect
FIRST = {EDITS_BASE: "base alone", "5:5": "step-wise", EDITS_SPECIAL: "specialised alone"}  # 5:5: they show the drift
OTHERS = (BASE, STEPS, SPECIAL, E3, E1, E2, E4, FIRST_STEP, "9:1", "7:3", AVERAGE)


def trained(setting: Setting, fake: str, row: str) -> dict[str, dict]:
    """Trains a row under a fake score: updates -> category -> measure -> the values of all seeds, in one line."""
    looks_and_halves = {round(setting.updates * share / part) for share in SHARES for part in (1, 2)}
    by_look = {}
    for look, students, _ in train(replace(setting, **FAKES[fake]), ROWS[row], looks_and_halves):
        by_look[str(look)] = as_lines(evaluate(setting, students, SIGMAS))
    return by_look


def read_kept(path: Path, setting: Setting) -> dict[int, Scores]:
    """Updates -> scores, from a row's file. ValueError if it was made with another setting."""
    kept = read_json(path)
    if Setting(**kept["setting"]) != setting:
        raise ValueError(f"{path}: made with other settings; name another --out, or remove it")
    return {int(look): from_lines(lines) for look, lines in kept["looks"].items()}


def word(differences: list[tuple[float, float]]) -> str:
    """A claim's verdict, from (mean, half-width) of each of its parts. What is within the band counts as 0.

    disagree: one part is below 0. no effect: one is within the band, and none below. agree: all are above 0. cannot tell:
    everything else.
    """
    small = [abs(mean) + half <= BAND for mean, half in differences]
    if any(mean < -half and not within for (mean, half), within in zip(differences, small)):
        return "disagree"
    if any(small):
        return "no effect"
    return "agree" if all(mean > half for mean, half in differences) else "cannot tell"


Kept = dict[tuple[str, str], dict[int, Scores]]  # fake score, recipe's name -> updates -> scores
Pairs = list[tuple[float, float]]  # of a claim's parts: difference, half-width of its interval


def looks(setting: Setting) -> list[int]:
    return [round(setting.updates * share) for share in SHARES]


def claims(setting: Setting, out: Path) -> None:
    """Trains the rows that have no file in OUT/rows yet, and reports after each. Rows of another machine count."""
    (out / "rows").mkdir(parents=True, exist_ok=True)
    teachers, kept, missing = {row: untrained(setting, row) for row in UNTRAINED}, {}, []
    for fake, row in [(fake, row) for rows in (FIRST, OTHERS) for fake in FAKES for row in rows]:
        path = out / "rows" / f"{ROWS[row].name}-{fake}.json"
        if path.exists():
            kept[fake, ROWS[row].name] = read_kept(path, replace(setting, **FAKES[fake]))
        else:
            missing.append((fake, row, path))
    report(setting, teachers, kept, out)
    for fake, row, path in tqdm(missing, "claims"):
        made = replace(setting, **FAKES[fake])
        write_json(path, {"setting": asdict(made), "looks": trained(setting, fake, row)})
        kept[fake, ROWS[row].name] = read_kept(path, made)
        report(setting, teachers, kept, out)
    print(f"{(out / 'claims.md').read_text()}\nwritten to {out / 'claims.md'}")


def differences(parts: list[Above], fake: str, look: int, teachers: dict[str, Scores], kept: Kept) -> Pairs:
    """Of a claim's parts after so many updates. KeyError if a row is not there yet."""

    def at(row: str) -> Scores:
        if row in UNTRAINED:
            return teachers[row]
        by_look = kept[fake, ROWS[row.removesuffix(HALFWAY)].name]
        return by_look[round(look / 2) if row.endswith(HALFWAY) else look]

    return [difference(at(part.row), at(part.other), part) for part in parts]


def report(setting: Setting, teachers: dict[str, Scores], kept: Kept, out: Path) -> None:
    """claims.md, claims.json, claims.png and drift.png, of the rows that are there."""
    by_claim = {claim: {} for claim in CLAIMS}  # claim -> fake score -> updates -> pairs
    for claim, parts in CLAIMS.items():
        for fake in FAKES:
            with suppress(KeyError):  # a row is not there yet
                by_look = {look: differences(parts, fake, look, teachers, kept) for look in looks(setting)}
                by_claim[claim][fake] = by_look
    when = {name: round(setting.updates * share) for name, share in WHEN.items()}

    result = {"seeds": setting.seeds, "updates": when, "claims": {}}
    for claim, by_fake in by_claim.items():
        verdicts = {}
        for fake, by_look in by_fake.items():
            verdicts[fake] = {name: word(by_look[look]) for name, look in when.items()}
            verdicts[fake]["differences"] = {str(look): pairs for look, pairs in by_look.items()}
        result["claims"][claim] = verdicts.pop("pooled", {}) | verdicts
    write_json(out / "claims.json", result)

    points = {  # claim -> fake score -> the weakest part at each look
        claim: {
            fake: [(look, *min(pairs), word(pairs)) for look, pairs in by_look.items()]
            for fake, by_look in by_fake.items()
        }
        for claim, by_fake in by_claim.items()
        if not claim.startswith("(Ours)")
    }
    small_panels(points).save(out / "claims.png", optimize=True)
    title = f"# claims\n\n{heading(setting)} Verdicts by precision; of a claim with several parts the weakest is shown."
    page = [title, "![claims over updates](claims.png)", markdown(claim_table(by_claim, when))]
    if any(ROWS[row].name == name for row in FIRST for _, name in kept):
        panels.stacked(drift_curves(setting, kept), "updates of the student").save(out / "drift.png", optimize=True)
        page += ["Students at 5:5. Distance and precision are means of all categories:", "![drift](drift.png)"]
        page += ["Precision at T2I / edits, in brackets the distance:", markdown(drift_table(setting, kept))]
    (out / "claims.md").write_text("\n\n".join([*page, markdown(premises(teachers))]) + "\n")


def claim_table(by_claim: dict[str, dict[str, dict[int, Pairs]]], when: dict[str, int]) -> list[list[str]]:
    lines = [["claim", *(f"{fake}, {name}" for fake in FAKES for name in when)]]
    for claim, by_fake in by_claim.items():
        cells = []
        for fake in FAKES:
            pairs_at = [by_fake[fake][look] for look in when.values()] if fake in by_fake else []
            cells += [f"**{word(pairs)}** {cell(min(pairs))}" for pairs in pairs_at] or ["not run"] * len(when)
        lines.append([claim, *cells])
    return lines


def drift_table(setting: Setting, kept: Kept) -> list[list[str]]:
    lines = [["teachers, at 5:5", "fake score", *(f"{look:,} updates" for look in looks(setting))]]
    for fake, row in [(fake, row) for row in FIRST for fake in FAKES if (fake, ROWS[row].name) in kept]:
        cells = []
        for look in looks(setting):
            scored = kept[fake, ROWS[row].name][look]
            by_task = {}  # measure -> "T2I / edits"
            for measure in ("precision", "distance"):
                by_task[measure] = " / ".join(f"{average(scored, c, measure).mean():.3f}" for c in CATEGORIES.values())
            cells.append(f"{by_task['precision']} ({by_task['distance']})")
        lines.append([FIRST[row], fake, *cells])
    return lines


def drift_curves(setting: Setting, kept: Kept) -> list[dict]:
    """For each measure: teachers -> fake score -> [(updates, interval)], of both tasks together."""
    charts = []
    for measure in ("distance", "precision"):
        panel = {}
        for row, teachers in FIRST.items():
            lines = panel[f"{measure} at 5:5, {teachers}"] = {}
            for fake in [fake for fake in FAKES if (fake, ROWS[row].name) in kept]:
                by_look = kept[fake, ROWS[row].name]
                values = {look: average(by_look[look], [*TASKS], measure).tolist() for look in looks(setting)}
                lines[fake] = [(look, ends(mean_over_seeds(by_seed))) for look, by_seed in values.items()]
        charts.append({title: lines for title, lines in panel.items() if lines})
    return charts


def premises(teachers: dict[str, Scores]) -> list[list[str]]:
    """What the paper takes for granted, of the teachers alone."""
    lines = [["premise", "difference"]]
    for premise, part in PREMISES.items():
        lines.append([premise, cell(difference(teachers[part.row], teachers[part.other], part))])
    return lines
