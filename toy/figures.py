"""The contact sheet: every model on the same cases."""

from pathlib import Path

from PIL import Image

from data.sheets import Grid, write_sheet
from toy import world
from toy.world import Case


def contact_sheet(models: dict[str, dict[str, list[Image.Image]]], each: dict[str, int], path: Path) -> None:
    """The same cases under every model, one model in a row. Above, each["t2i"] cases of the three categories, with their
    prompts; below, each["edit"] cases of the six families of edits, under their sources. The last row is the truth.

    models: {name: {"t2i portrait": pictures, "edit scene": pictures, ...}}, pictures in the order of the bench
    """
    grids = []
    for bench, count in each.items():
        cases, titles = [], []  # of each column
        rows = {name: [] for name in models}
        for key in next(iter(models.values())):
            task, category = key.split()
            if task == bench:
                fewest = min(len(pictures[key]) for pictures in models.values())
                chosen = world.bench(bench, category, min(count, fewest))
                cases += chosen
                titles += [category] * len(chosen)
                for name, pictures in models.items():
                    rows[name] += pictures[key][: len(chosen)]
        if bench == "edit":
            rows = {"source": [case.images[0] for case in cases]} | rows
        rows["one right answer"] = [answer(case) for case in cases]
        grids.append(Grid(rows, [case.prompt for case in cases], titles))
    write_sheet(grids, path)


def answer(case: Case) -> Image.Image:
    """The picture that the case was made from. For a T2I case it is one of many right ones."""
    return world.enlarge(world.render(case.target))
