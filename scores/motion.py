"""What an edit did to the parts that it should not touch: how far they moved, and how their colours changed.

Both pictures are cut into the same 7 x 7 windows, each a quarter of a side long. Phase correlation gives the displacement
of every window. If a window shows the same in both pictures, its displacement follows from one shift and one scale of the
whole picture; all other displacements are arbitrary. So `motion` looks for the shift and the scale that most windows agree
on. These windows are the UNCHANGED PARTS. A picture where fewer than LEAST agree has none, and is not measured.

Arrays are (H, W, 3) in sRGB, 0 to 1, or (H, W) of grey values. Vectors are (y, x) in pixels, down and to the right.
Phase correlation: Kuglin and Hines 1975. Scale from log-polar spectra: Reddy and Chatterji 1996.
"""

from dataclasses import dataclass

import numpy as np

from scores.colours import lab, mean_chroma

GRID = 7  # windows along a side
LEAST = 8  # windows that have to agree, of GRID x GRID; between unrelated pictures 3 or 4 do by chance
FLAT = 0.01  # a window whose grey values scatter by less shows nothing that could be followed
RECOLOURED = 20.0  # a window whose mean colour differs by more was changed by the edit
LARGEST_ZOOM = 0.15  # that single windows can follow; beyond it the scale of the whole picture is tried first
LOW_PASS = 0.15  # cycles a pixel: above it, interpolation and autoencoders distort phases


@dataclass
class Motion:
    """Of the unchanged parts, from the source to the edited picture."""

    shift: np.ndarray  # (2,) down and to the right, in pixels, at the picture's centre
    scale: float  # 1.02: enlarged by 2%
    windows: np.ndarray  # (N, 4) top, left, height, width of the unchanged windows, in the source


def motion(source: np.ndarray, edited: np.ndarray) -> Motion | None:
    """How the unchanged parts moved; None if there are none. Both pictures have one size."""
    a, b = source.mean(2), edited.mean(2)  # (H, W)
    best = agreed(a, b, 1.0, np.zeros(2))
    if best is None or len(best.windows) < GRID**2 / 2:  # it may have moved too far for single windows
        scale = whole_scale(a, b)
        shift = scale * phase_shift(a, resampled(b, scale, np.zeros(2)))
        other = agreed(a, b, scale, shift)
        if best is None or (other is not None and len(other.windows) > len(best.windows)):
            best = other
    if best is not None and abs(best.scale - 1) > 0.01:
        # Once more from there, because the zoom has to be small within each window, too.
        best = agreed(a, b, best.scale, best.shift)
    if best is None:
        return None
    before = window_colours(source, best.windows)
    after = window_colours(brought_back(edited, best), best.windows)
    unchanged = best.windows[np.linalg.norm(after - before, axis=1) < RECOLOURED]
    return Motion(best.shift, best.scale, unchanged) if len(unchanged) >= LEAST else None


def agreed(a: np.ndarray, b: np.ndarray, scale: float, shift: np.ndarray) -> Motion | None:
    """The motion on which most windows of a and b, (H, W) each, agree; None if no two windows do.

    First b is brought back by this scale and shift, a guess; the rest of the motion has to be small. Then every pair of
    windows proposes a zoom and a shift. The proposal with most votes wins, and least squares over its voters refines it.
    """
    windows, moved = displacements(a, resampled(b, scale, shift))  # (N, 4), (N, 2)
    if len(windows) < 2:
        return None
    centres = windows[:, :2] + windows[:, 2:] / 2 - np.array(a.shape) / 2  # (N, 2) from the picture's centre
    tolerance = max(0.5, min(a.shape) / 256)  # in pixels; ours

    def agree_with(zoom: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """Which windows (..., N) moved by rest + zoom * centre; zoom (..., 1, 1), rest (..., 1, 2)."""
        return np.linalg.norm(moved - rest - zoom * centres, axis=-1) < tolerance

    first, second = np.triu_indices(len(windows), 1)  # the P pairs of windows
    apart = centres[second] - centres[first]  # (P, 2)
    zooms = ((moved[second] - moved[first]) * apart).sum(1) / np.square(apart).sum(1)  # (P,)
    rests = moved[first] - zooms[:, None] * centres[first]  # (P, 2)
    votes = agree_with(zooms[:, None, None], rests[:, None])  # (P, N)
    counts = votes.sum(1) * (np.abs(zooms) < LARGEST_ZOOM)  # (P,)
    voters = votes[counts.argmax()]  # (N,)
    for _ in range(3):  # refine, then ask again which windows agree
        if voters.sum() < 2:
            return None
        zoom, rest = least_squares(centres[voters], moved[voters])
        voters = agree_with(zoom, rest)
    # What a has at c is at c + rest + zoom c in the picture that was brought back, whose place p is scale p + shift in b.
    return Motion(shift + scale * rest, scale * (1 + zoom), windows[voters])


def least_squares(centres: np.ndarray, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The zoom, a number, and the rest (2,) for which moved (N, 2) is nearest to rest + zoom * centres (N, 2)."""
    middle, mean = centres.mean(0), moved.mean(0)
    spread = centres - middle
    zoom = (spread * (moved - mean)).sum() / np.square(spread).sum()
    return zoom, mean - zoom * middle


def displacements(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a, (N, 4), that are not flat, and how far each has moved in b, (N, 2)."""
    height, width = a.shape
    h, w = height // 4, width // 4
    windows, moved = [], []
    for top in np.linspace(0, height - h, GRID).round().astype(int):
        for left in np.linspace(0, width - w, GRID).round().astype(int):
            here, there = a[top : top + h, left : left + w], b[top : top + h, left : left + w]
            if min(here.std(), there.std()) < FLAT:
                continue
            step = phase_shift(here, there)
            # Once more at the place it moved to: there the two windows have more in common.
            y, x = np.clip(step.round().astype(int) + (top, left), 0, (height - h, width - w))
            step = phase_shift(here, b[y : y + h, x : x + w]) + (y - top, x - left)
            windows.append((top, left, h, w))
            moved.append(step)
    return np.array(windows).reshape(-1, 4), np.array(moved).reshape(-1, 2)


def phase_shift(a: np.ndarray, b: np.ndarray, low_pass: float = LOW_PASS) -> np.ndarray:
    """(2,): by how much b shows the content of a further down and to the right, to 0.01 pixels. a, b (H, W)."""
    height, width = a.shape
    fy, fx = np.fft.fftfreq(height), np.fft.fftfreq(width)
    cross = np.fft.fft2(faded(a)).conj() * np.fft.fft2(faded(b))
    weight = np.exp(-np.add.outer(fy**2, fx**2) / (2 * low_pass**2))
    cross *= weight / (np.abs(cross) + 1e-9 * np.abs(cross).max() + 1e-300)  # the phases alone
    y, x = np.unravel_index(np.fft.ifft2(cross).real.argmax(), cross.shape)
    if y > height // 2:  # the second half is negative
        y -= height
    if x > width // 2:
        x -= width
    shift = np.array([y, x], float)
    for step in (0.1, 0.01):  # the same sum of waves, between the pixels
        offsets = np.arange(-10, 11) * step
        rows = np.exp(2j * np.pi * np.outer(shift[0] + offsets, fy))
        columns = np.exp(2j * np.pi * np.outer(fx, shift[1] + offsets))
        fine = (rows @ cross @ columns).real  # (21, 21)
        shift += offsets[list(np.unravel_index(fine.argmax(), fine.shape))]
    return shift


def faded(image: np.ndarray) -> np.ndarray:
    """The picture (H, W) without its mean, fading to 0 at the edges, where a spectrum would see a jump."""
    window = np.outer(np.hanning(image.shape[0]), np.hanning(image.shape[1]))
    return (image - (image * window).sum() / window.sum()) * window


def whole_scale(a: np.ndarray, b: np.ndarray) -> float:
    """By how much b is enlarged. A spectrum's magnitude does not see shifts; over log-radius and angle a zoom shifts it."""
    size = 2 * max(a.shape)
    radii = np.exp(np.linspace(np.log(size / 32), np.log(0.4 * size), 256))
    angles = np.linspace(0, np.pi, 180, endpoint=False)
    y, x = size / 2 + np.outer(radii, np.sin(angles)), size / 2 + np.outer(radii, np.cos(angles))

    def polar(image: np.ndarray) -> np.ndarray:
        """The logarithm of the spectrum, (256 radii, 180 angles)."""
        magnitude = np.abs(np.fft.fftshift(np.fft.fft2(faded(image), (size, size))))
        sampled = bilinear(np.log(magnitude + 1e-3 * magnitude.max() + 1e-300), y, x)
        return sampled - sampled.mean(0)  # each angle has its own brightness

    shift = phase_shift(polar(a), polar(b), low_pass=0.1)  # along the radii, and the angles
    return float(np.exp(-np.log(radii[1] / radii[0]) * shift[0]))


def resampled(image: np.ndarray, scale: float, shift: np.ndarray) -> np.ndarray:
    """The picture (H, W) brought back: whatever was enlarged by `scale` and moved by `shift` is where it was before."""
    if scale == 1 and not shift.any():
        return image
    height, width = image.shape
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


# ---- colours of the unchanged parts ----------------------------------------------------------------------------------


def brought_back(picture: np.ndarray, motion: Motion) -> np.ndarray:
    """The edited picture (H, W, 3), its unchanged parts where the source has them."""
    channels = [resampled(picture[..., channel], motion.scale, motion.shift) for channel in range(3)]
    return np.stack(channels, axis=2)


def window_colours(picture: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """(N, 3): the mean colour in each of the windows (N, 4), in CIELAB."""
    values = lab(picture)
    means = [values[top : top + h, left : left + w].mean((0, 1)) for top, left, h, w in windows]
    return np.array(means).reshape(-1, 3)


def colour_drift(source: np.ndarray, edited: np.ndarray, motion: Motion) -> tuple[float, float]:
    """Of the unchanged windows: the mean distance of their mean colours in CIELAB, and the change of chroma in percent."""
    before = window_colours(source, motion.windows)
    after = window_colours(brought_back(edited, motion), motion.windows)
    distance = np.linalg.norm(after - before, axis=1).mean()
    chroma = mean_chroma(before)
    change = 100 * (mean_chroma(after) - chroma) / max(chroma, 1.0)  # grey has no chroma to lose
    return float(distance), float(change)
