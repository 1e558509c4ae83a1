"""Tables inside a page: a command writes them between two marks, and leaves the text around them as it is."""

from pathlib import Path

START, END = "<!-- a command makes what follows -->", "<!-- up to here -->"


def fill(page: Path, tables: str) -> None:
    """Put tables between the marks of a Markdown page. ValueError if the page has not each mark once."""
    text = page.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page}: the lines {START} and {END} must stand there once; the tables go between them")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{tables}\n\n{END}{after}")


def open_page(page: Path) -> None:
    """Before the work begins: make the page if it is missing. ValueError, as of `fill`, if it has not each mark once."""
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"{START}\n\n{END}\n")
    tables = page.read_text().split(START)[-1].split(END)[0]
    fill(page, tables.strip())  # the same again
