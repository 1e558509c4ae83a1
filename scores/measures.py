"""Measures of pictures that need no judge: what an edit did to the parts it should not touch, colours, variety.

    motion          how far the unchanged parts of an edit moved, and by how much they were enlarged
    colour_drift    how their colours changed
    colours         saturation and contrast of one picture
    mean_distance   how far several pictures of one prompt lie apart

UNCHANGED PARTS. Both pictures are cut into the same 7 x 7 windows, each a quarter of a side long. Phase correlation gives
the displacement of every window. One shift and one scale explain the displacements of the windows that show the same in
both pictures; those of all others are arbitrary. So the shift and the scale that most windows agree on are looked for, and
the windows that agree are the unchanged parts. A picture where fewer than LEAST agree has none, and is not measured.

Arrays are (H, W, 3) in sRGB, 0 to 1. Vectors are (y, x) in pixels, down and to the right. Colours are in CIELAB (D65).
Phase correlation: Kuglin and Hines 1975. Scale from log-polar spectra: Reddy and Chatterji 1996.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

from scores.rows import markdown
from scores.statistics import mean_over_cases, median_interval

GRID = 7  # windows along a side
LEAST = 8  # windows that have to agree, of GRID x GRID; between unrelated pictures 3 or 4 do by chance
FLAT = 0.01  # a window whose grey values scatter by less shows nothing that could be followed
RECOLOURED = 20.0  # a window whose mean colour differs by more was changed by the edit
LARGEST_ZOOM = 0.15  # that windows can follow by themselves; beyond, the scale of the whole picture is tried first
EDIT_NUMBERS = ("shift", "right", "down", "scale", "drift", "chroma")  # of one edit, see measure_edit
LOW_PASS = 0.15  # cycles a pixel: above it, interpolation and autoencoders distort phases


@dataclass
class Motion:
    """Of the unchanged parts, from the source to the edited picture."""

    shift: np.ndarray  # (2,) down and to the right, in pixels, at the picture's centre
    scale: float  # 1.02: enlarged by 2%
    windows: np.ndarray  # (N, 4) top, left, height, width of the unchanged windows, in the source


def pixels(picture: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3): the picture over white, resized to (width, height)."""
    rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if size and size != flat.size:
        flat = flat.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(flat, dtype=np.float64) / 255


# ---- motion ----------------------------------------------------------------------------------------------------------


def motion(source: np.ndarray, edited: np.ndarray) -> Motion | None:
    """How the unchanged parts moved. None: there are none. Both pictures have one size."""
    a, b = source.mean(2), edited.mean(2)  # (H, W)
    best = agreed(a, b, 1.0, np.zeros(2))
    if best is None or len(best.windows) < GRID**2 / 2:  # it may have moved too far for single windows
        scale = whole_scale(a, b)
        shift = scale * phase_shift(a, resampled(b, scale, np.zeros(2)))
        best = max(filter(None, [best, agreed(a, b, scale, shift)]), key=lambda m: len(m.windows), default=None)
    if best and abs(best.scale - 1) > 0.01:  # once more from there: within one window, too, the zoom has to be small
        best = agreed(a, b, best.scale, best.shift)
    if best:
        differ = np.linalg.norm(window_colours(edited, best) - window_colours(source, best, moved=False), axis=1)
        best.windows = best.windows[differ < RECOLOURED]
    return best if best and len(best.windows) >= LEAST else None


def agreed(a: np.ndarray, b: np.ndarray, scale: float, shift: np.ndarray) -> Motion | None:
    """The motion on which most windows of a and b, (H, W) each, agree, once b was brought back by this scale and shift."""
    boxes, moved = displacements(a, resampled(b, scale, shift))  # (N, 4), (N, 2)
    if len(boxes) < 2:
        return None
    centres = boxes[:, :2] + boxes[:, 2:] / 2 - np.array(a.shape) / 2  # (N, 2) from the picture's centre
    tolerance = max(0.5, min(a.shape) / 256)  # in pixels; ours
    i, j = np.triu_indices(len(boxes), 1)  # each pair of windows proposes a zoom and a shift
    apart = centres[j] - centres[i]  # (P, 2)
    zooms = ((moved[j] - moved[i]) * apart).sum(1) / np.square(apart).sum(1)  # (P,)
    shifts = moved[i] - zooms[:, None] * centres[i]  # (P, 2)
    errors = moved - shifts[:, None] - zooms[:, None, None] * centres  # (P, N, 2)
    votes = np.linalg.norm(errors, axis=2) < tolerance  # (P, N)
    agree = votes[(votes.sum(1) * (np.abs(zooms) < LARGEST_ZOOM)).argmax()]  # (N,)
    for _ in range(3):  # least squares over those that agree, and who agrees with that
        if agree.sum() < 2:
            return None
        middle, mean = centres[agree].mean(0), moved[agree].mean(0)
        spread = centres[agree] - middle
        zoom = (spread * (moved[agree] - mean)).sum() / np.square(spread).sum()
        rest = mean - zoom * middle
        agree = np.linalg.norm(moved - rest - zoom * centres, axis=1) < tolerance
    # What a has at c is at c + rest + zoom c in the picture that was brought back, whose place p is scale p + shift in b.
    return Motion(shift + scale * rest, scale * (1 + zoom), boxes[agree])


def displacements(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a, (N, 4), that are not flat, and how far each has moved in b, (N, 2)."""
    (height, width), boxes, moved = a.shape, [], []
    h, w = height // 4, width // 4
    for top in np.linspace(0, height - h, GRID).round().astype(int):
        for left in np.linspace(0, width - w, GRID).round().astype(int):
            here, there = a[top : top + h, left : left + w], b[top : top + h, left : left + w]
            if min(here.std(), there.std()) < FLAT:
                continue
            step = phase_shift(here, there)
            y, x = np.clip(step.round().astype(int) + (top, left), 0, (height - h, width - w))
            # Once more at the place it moved to: there the two windows have more in common.
            step = phase_shift(here, b[y : y + h, x : x + w]) + (y - top, x - left)
            boxes.append((top, left, h, w))
            moved.append(step)
    return np.array(boxes).reshape(-1, 4), np.array(moved).reshape(-1, 2)


def phase_shift(a: np.ndarray, b: np.ndarray, low_pass: float = LOW_PASS) -> np.ndarray:
    """(2,): by how much b shows the content of a further down and to the right, to 0.01 pixels."""
    window = np.outer(np.hanning(a.shape[0]), np.hanning(a.shape[1]))
    spectra = [np.fft.fft2((x - (x * window).sum() / window.sum()) * window) for x in (a, b)]
    cross = spectra[0].conj() * spectra[1]
    fy, fx = np.fft.fftfreq(a.shape[0]), np.fft.fftfreq(a.shape[1])
    weight = np.exp(-np.add.outer(fy**2, fx**2) / (2 * low_pass**2))
    cross *= weight / (np.abs(cross) + 1e-9 * np.abs(cross).max() + 1e-300)  # the phases alone
    peak = np.unravel_index(np.fft.ifft2(cross).real.argmax(), cross.shape)
    shift = np.array([place - size if place > size // 2 else place for place, size in zip(peak, a.shape)], float)
    for step in (0.1, 0.01):  # the same sum of waves, between the pixels
        offsets = np.arange(-10, 11) * step
        rows = np.exp(2j * np.pi * np.outer(shift[0] + offsets, fy))
        columns = np.exp(2j * np.pi * np.outer(fx, shift[1] + offsets))
        fine = (rows @ cross @ columns).real  # (21, 21)
        shift += offsets[list(np.unravel_index(fine.argmax(), fine.shape))]
    return shift


def whole_scale(a: np.ndarray, b: np.ndarray) -> float:
    """By how much b is enlarged. A spectrum's magnitude does not see shifts; over log-radius and angle a zoom shifts it."""
    size = 2 * max(a.shape)
    radii = np.exp(np.linspace(np.log(size / 32), np.log(0.4 * size), 256))
    angles = np.linspace(0, np.pi, 180, endpoint=False)
    y, x = size / 2 + np.outer(radii, np.sin(angles)), size / 2 + np.outer(radii, np.cos(angles))
    window, polar = np.outer(np.hanning(a.shape[0]), np.hanning(a.shape[1])), []
    for image in (a, b):
        centred = (image - (image * window).sum() / window.sum()) * window
        magnitude = np.abs(np.fft.fftshift(np.fft.fft2(centred, (size, size))))
        logarithm = np.log(magnitude + 1e-3 * magnitude.max() + 1e-300)
        sampled = bilinear(logarithm, y, x)  # (256, 180)
        polar.append(sampled - sampled.mean(0))  # each angle has its own brightness
    step = np.log(radii[1] / radii[0])
    return float(np.exp(-step * phase_shift(*polar, low_pass=0.1)[0]))


def resampled(image: np.ndarray, scale: float, shift: np.ndarray) -> np.ndarray:
    """The picture (H, W) brought back: what was enlarged by `scale` and moved by `shift` is where it was."""
    if scale == 1 and not shift.any():
        return image
    (height, width) = image.shape
    y, x = np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2
    rows = np.repeat((scale * y + shift[0] + (height - 1) / 2)[:, None], width, axis=1)
    columns = np.repeat((scale * x + shift[1] + (width - 1) / 2)[None], height, axis=0)
    return bilinear(image, rows, columns)


def bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The values of (H, W) between its pixels; beyond its edges those of the edge."""
    y, x = np.clip(y, 0, image.shape[0] - 1), np.clip(x, 0, image.shape[1] - 1)
    top, left = np.minimum(y.astype(int), image.shape[0] - 2), np.minimum(x.astype(int), image.shape[1] - 2)
    v, u = y - top, x - left
    upper = (1 - u) * image[top, left] + u * image[top, left + 1]
    lower = (1 - u) * image[top + 1, left] + u * image[top + 1, left + 1]
    return (1 - v) * upper + v * lower


# ---- colours and variety ---------------------------------------------------------------------------------------------


def lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) in sRGB -> (..., 3) in CIELAB: lightness L from 0 to 100, a from green to red, b from blue to yellow."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # IEC 61966-2-1
    relative = linear @ to_xyz.T / to_xyz.sum(1)  # to white
    root = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def window_colours(picture: np.ndarray, motion: Motion, moved: bool = True) -> np.ndarray:
    """(N, 3): the mean colour of each unchanged window, in CIELAB. moved: where the motion has brought it."""
    if moved:
        channels = [resampled(channel, motion.scale, motion.shift) for channel in np.moveaxis(picture, 2, 0)]
        picture = np.stack(channels, axis=2)
    colours = lab(picture)
    return np.array([colours[y : y + h, x : x + w].mean((0, 1)) for y, x, h, w in motion.windows]).reshape(-1, 3)


def colour_drift(source: np.ndarray, edited: np.ndarray, motion: Motion) -> tuple[float, float]:
    """Of the unchanged windows: the mean distance of their mean colours in CIELAB, and the change of chroma in percent."""
    before, after = window_colours(source, motion, moved=False), window_colours(edited, motion)
    chroma = [np.linalg.norm(colours[:, 1:], axis=1).mean() for colours in (before, after)]
    distance = np.linalg.norm(after - before, axis=1).mean()
    return float(distance), float(100 * (chroma[1] - chroma[0]) / max(chroma[0], 1.0))  # grey has no chroma to lose


def colours(picture: np.ndarray) -> tuple[float, float]:
    """Saturation, the mean chroma, and contrast, the standard deviation of lightness; both in CIELAB."""
    values = lab(picture)
    return float(np.linalg.norm(values[..., 1:], axis=-1).mean()), float(values[..., 0].std())


def mean_distance(pictures: list[np.ndarray]) -> float:
    """The root mean square between two pictures, 0 to 1, averaged over all pairs."""
    return float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in combinations(pictures, 2)]))


# ---- a row's part ----------------------------------------------------------------------------------------------------


def measure_edit(source: np.ndarray, edited: np.ndarray) -> dict[str, float] | None:
    """The numbers of one edit: shift, right and down in pixels, scale and chroma in percent, drift in CIELAB. None: it has
    no unchanged parts. Both pictures have one size."""
    moved = motion(source, edited)
    if moved is None:
        return None
    down, right = (float(pixels) for pixels in moved.shift)
    drift, chroma = colour_drift(source, edited, moved)
    scale = 100 * (moved.scale - 1)
    shift = float(np.hypot(down, right))
    return {"shift": shift, "right": right, "down": down, "scale": scale, "drift": drift, "chroma": chroma}


def edit_measures(edits: Iterable[tuple[np.ndarray, np.ndarray]], left_out: int = 0) -> dict:
    """A row's keys for edits, each (source, edited picture) of one size. left_out: see summary_of_edits."""
    return summary_of_edits([measure_edit(source, edited) for source, edited in edits], left_out)


def summary_of_edits(edits: list[dict[str, float] | None], left_out: int = 0) -> dict:
    """A row's keys, from what measure_edit gives for each edit. Medians over the cases with unchanged parts, and the ends of
    their 95% intervals; None where there is no such case. left_out: further cases, known to have no such parts."""
    measured = [edit for edit in edits if edit is not None]

    def numbers(name: str) -> list[float]:
        return [edit[name] for edit in measured]

    shifts, zooms, distances, chroma = (numbers(name) for name in ("shift", "scale", "drift", "chroma"))
    shift = {"median_px": middle(shifts), "interval_px": median_interval(shifts)}
    shift |= {"median_xy": [middle(numbers("right")), middle(numbers("down"))]}
    shift |= {"over_16px": float(np.mean(np.array(shifts) > 16)) if shifts else None}
    shift |= {"measured": len(measured), "of": left_out + len(edits)}
    colour = {"median_lab": middle(distances), "interval_lab": median_interval(distances)}
    colour |= {"chroma_percent": middle(chroma), "interval_chroma": median_interval(chroma)}
    scale = {"median_percent": middle(zooms), "interval_percent": median_interval(zooms)}
    return {"edit_shift": shift, "edit_scale": scale, "edit_colour": colour}


def middle(numbers: list[float]) -> float | None:
    return float(np.median(numbers)) if numbers else None


def colour_measures(pictures: Iterable[np.ndarray], reference: Iterable[np.ndarray] = ()) -> dict:
    """A row's key for T2I pictures: mean saturation and contrast; and, with another model's pictures of the same cases, by
    how much they are higher than that model's, with half the width of the interval."""
    own = np.array([colours(picture) for picture in pictures]).reshape(-1, 2)  # (N, 2)
    other = np.array([colours(picture) for picture in reference]).reshape(-1, 2)
    row = {}
    for column, name in enumerate(("saturation", "contrast")):
        row[name], row[f"{name}_half"] = mean_over_cases(own[:, column])
        if len(other):
            difference, half = mean_over_cases(own[:, column] - other[:, column])
            row |= {f"{name}_above_reference": difference, f"{name}_above_reference_half": half}
    return {"t2i_colour": row}


def measures_table(rows: list[dict]) -> str:
    """Markdown, a model in a column: what its row has of these measures."""

    def numbers(key: str, name: str, interval: str, digits: int) -> list[str]:
        cells = []
        for row in rows:
            value, ends = row.get(key, {}).get(name), row.get(key, {}).get(interval)
            cell = "-" if value is None else f"{value:.{digits}f}"
            if value is not None and isinstance(ends, list):
                cell += f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
            elif value is not None and isinstance(ends, float):
                cell += f" ± {ends:.{digits}f}"
            cells.append(cell)
        return cells

    lines = [["", *(row["name"] for row in rows)]]
    for title, *place in (
        ("edits: shift, pixels", "edit_shift", "median_px", "interval_px", 2),
        ("edits: share above 16 pixels", "edit_shift", "over_16px", "", 3),
        ("edits: scale, %", "edit_scale", "median_percent", "interval_percent", 2),
        ("edits: colour drift, CIELAB", "edit_colour", "median_lab", "interval_lab", 1),
        ("edits: change of chroma, %", "edit_colour", "chroma_percent", "interval_chroma", 1),
        ("T2I: saturation, CIELAB", "t2i_colour", "saturation", "saturation_half", 1),
        ("T2I: contrast, CIELAB", "t2i_colour", "contrast", "contrast_half", 1),
        (
            "... saturation above the reference",
            "t2i_colour",
            "saturation_above_reference",
            "saturation_above_reference_half",
            1,
        ),
        (
            "... contrast above the reference",
            "t2i_colour",
            "contrast_above_reference",
            "contrast_above_reference_half",
            1,
        ),
        ("T2I: distance of pictures of one prompt", "variety", "distance", "distance_half", 3),
        ("edits: distance of pictures of one case", "variety", "edit_distance", "edit_distance_half", 3),
    ):
        cells = numbers(*place)
        if any(cell != "-" for cell in cells):
            lines.append([title, *cells])
    counts = [row.get("edit_shift", {}) for row in rows]
    lines.append(["edits with unchanged parts", *(f"{c['measured']} of {c['of']}" if c else "-" for c in counts)])
    return markdown(lines)
