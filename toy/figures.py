"""The table of rows of the toy world, and the contact sheet of its pictures."""

from pathlib import Path

from data.sheets import Grid, write_sheet
from scores.measures import measures_table
from scores.rows import markdown
from toy import world
from toy.draw import Pictures


def table(rows: list[dict]) -> str:
    """Rows in Markdown, one model in a column. What a row does not have is "-" there."""
    lines = [["", *(row["name"] for row in rows)]]
    lines.append(["network evaluations", *(str(row["nfe"]) for row in rows)])
    for task, title in (("t2i", "T2I"), ("edit", "edit")):
        if any(task in row for row in rows):
            lines += task_lines(rows, task, title)
    lines.append(["seconds per image", *(f"{row['seconds_per_image']:.4f}" for row in rows)])
    lines.append(["measured on", *(row.get("machine", "-") for row in rows)])
    text = markdown(lines)
    if any("variety" in row for row in rows):
        text += f"\n\n{measures_table(rows)}"
    return text


def task_lines(rows: list[dict], task: str, title: str) -> list[list[str]]:
    """The table's lines for one task."""

    def means(key: str, name: str = "average") -> list[str]:
        return [f"{row[key][name]:.3f}" if name in row.get(key, ()) else "-" for row in rows]

    lines = [[f"{title} {category}", *means(task, category)] for category in world.BENCHES[task]]
    averages = []
    for row in rows:
        average = f"**{row[task]['average']:.3f}** ± {row[f'{task}_interval']:.3f}" if task in row else "-"
        averages.append(average)
    lines.append([f"**{title} average**", *averages])
    for half in ("compliance", "fidelity"):
        lines.append([f"{title} {half}", *means(f"{task}_{half}")])
    modes, distances = [], []
    for row in rows:
        diversity = row.get(f"{task}_diversity")
        modes.append(f"{diversity['modes']['average']:.1f} of {diversity['of']}" if diversity else "-")
        distances.append(f"{diversity['distance']['average']:.3f}" if diversity else "-")
    return [*lines, [f"{title} modes", *modes], [f"{title} distance", *distances]]


def contact_sheet(models: dict[str, Pictures], counts: dict[str, int], path: Path) -> None:
    """The same cases drawn by every model, one model in a row. T2I cases are above, edits below, under their sources. The
    last row of both is the truth.

    models: by name. counts: by task, cases of each category.
    """
    grids = []
    places = list(next(iter(models.values())))  # (task, category), the same for all models
    for task, count in counts.items():
        cases, titles = [], []  # of each column
        rows = {name: [] for name in models}
        for place in [place for place in places if place[0] == task]:
            fewest = min(len(pictures[place]) for pictures in models.values())
            shown = world.bench_cases(*place, min(count, fewest))
            cases += shown
            titles += [place[1]] * len(shown)
            for name, pictures in models.items():
                rows[name] += pictures[place][: len(shown)]
        if task == "edit":
            rows = {"source": [case.images[0] for case in cases]} | rows
        rows["one right answer"] = [case.answer() for case in cases]
        grids.append(Grid(rows, [case.prompt for case in cases], titles))
    write_sheet(grids, path)
