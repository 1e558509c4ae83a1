"""What the frozen encoders make of every prompt, computed once: entries, the pool they are drawn from, and its cache.

    Entry         one encoded prompt: the states of its words, the latents of its sources (and of its target)
    Pool          entries by task and category, and the classes that a micro-batch is taken from
    encode_pool   prompts -> Pool, in memory
    cached_pool   the same through a folder of safetensors shards: what is there already is not encoded again, and
                  tensors are mapped from the files, not copied into every process

A BUCKET is what samples must have in common to be one tensor: the sizes of all sources and of the picture to draw. In
the cache the key of an entry is a hash of its CONTENT: the words, the pictures' bytes, the encoders' files and the
resolution. So a changed picture is encoded again.
"""

import gc
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from encoders.qwen3vl import Qwen3VL
from encoders.vae import VAE
from support import pictures
from support.checkpoint import files_fingerprint
from support.files import write_tensors
from support.prompts import Prompt
from support.ranks import rank, ranks, together

GROUP = 32  # prompts that are encoded at once, and kept in one shard
ENOUGH = 8  # entries that are worth a class of their own


@dataclass
class Entry:
    """One encoded prompt, in bf16 on the CPU. The toy's take about 30 KB, the 7B's about 1 MB for each 100 words or source."""

    task: str
    category: str
    states: Tensor  # (L, C) of the language model, without padding
    empty: Tensor | None  # (L0, C) of an empty prompt with the same sources, for guidance and text dropout
    slots: list[tuple[int, int]]  # of the sources in states, and in empty too: they stand before the words
    sources: list[Tensor]  # (64, h_i, w_i) each
    target: Tensor | None  # (64, h, w), for the flow objective
    size: tuple[int, int]  # (h, w) of what is to be drawn

    @property
    def bucket(self) -> tuple:
        return tuple(s.shape for s in self.sources), self.size


class Pool:
    """Entries by task and category. `Pool(a.entries + b.entries)` joins two."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        self.places: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for entry in entries:
            self.places[entry.task, entry.category].append(entry)
        self.classes = {place: classes(found) for place, found in self.places.items()}


def classes(entries: list[Entry]) -> list[list[Entry]]:
    """One category's entries, divided into those that may come in one micro-batch: of one bucket and one text length.

    Padding is masked, but it counts: the target's rotary position is behind the batch's longest text, and a network
    trained there is asked to draw elsewhere when the prompt comes alone. So the texts of a class are equally long where
    ENOUGH entries have this length (always, in the toy). The others are put together by length, ENOUGH at a time, and
    padded to the longest: a few positions off, but no micro-batch has the same prompt many times.
    """
    buckets: dict[tuple, dict[int, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        buckets[entry.bucket][len(entry.states)].append(entry)
    found = []
    for lengths in buckets.values():
        found += [equal for equal in lengths.values() if len(equal) >= ENOUGH]
        rare = [entry for length in sorted(lengths) if len(lengths[length]) < ENOUGH for entry in lengths[length]]
        parts = max(1, len(rare) // ENOUGH)  # the last one has the rest, too
        cuts = [i * ENOUGH for i in range(parts)] + [len(rare)]
        found += [rare[start:stop] for start, stop in pairwise(cuts) if start < stop]
    return found


# ---- encoding --------------------------------------------------------------------------------------------------------


@dataclass
class Encoders:
    encoder: Qwen3VL
    vae: VAE

    @classmethod
    def from_pretrained(cls, checkpoint: Path, dtype: torch.dtype, device: str) -> "Encoders":
        vae = VAE.from_pretrained(checkpoint / "vae", dtype, device)
        return cls(Qwen3VL.from_pretrained(checkpoint, dtype, device), vae)


def encode_pool(
    encoders: "Encoders",
    prompts: Iterable[Prompt],
    resolution: int,
    empty: bool = True,
    targets: bool = False,
    how: str = "stretch",
) -> Pool:
    """Encode every prompt once, with `encoders.encoder` and `encoders.vae`. The pool keeps the prompts' order.

    empty: encode also an empty prompt with the same sources, for guidance and text dropout. targets: encode also the
    target pictures; a missing one is a ValueError. how: the way pictures get their sizes, see pictures.fit.
    """
    done, bar = {}, tqdm(prompts, desc="encode", unit="prompt", leave=False)
    for group in groups(bar, resolution, targets):
        entries = encode(encoders, [prompt for _, prompt in group], resolution, empty, targets, how)
        done |= {number: entry for (number, _), entry in zip(group, entries, strict=True)}
    return Pool([done[number] for number in sorted(done)])


def groups(prompts: Iterable[Prompt], resolution: int, targets: bool) -> Iterator[list[tuple[int, Prompt]]]:
    """Numbered prompts whose pictures get equal sizes, GROUP at a time; at the end the smaller groups that are left."""
    waiting = defaultdict(list)
    for number, prompt in enumerate(prompts):
        if targets and prompt.target is None:
            raise ValueError(f"the flow objective learns pictures, and the prompt {prompt.prompt!r} has no target")
        shown = prompt.images or ([prompt.target] if targets else [])
        group = waiting[len(prompt.images), *(pictures.fitted_size(picture, resolution) for picture in shown)]
        group.append((number, prompt))
        if len(group) == GROUP:
            yield group.copy()
            group.clear()
    yield from filter(None, waiting.values())


@torch.no_grad()
def encode(
    encoders: "Encoders", prompts: list[Prompt], resolution: int, empty: bool, targets: bool, how: str
) -> list[Entry]:
    """The entries of one group of prompts, whose sources (and targets) are of equal sizes."""

    def states(words: list[str], images: list) -> tuple[list[Tensor], list]:
        padded, mask, slots = encoders.encoder.encode(words, images)
        lengths = mask.sum(1).tolist()
        return [s[:n].to("cpu", torch.bfloat16).clone() for s, n in zip(padded, lengths, strict=True)], slots

    def latents(images: Iterable[Image.Image]) -> list[Tensor]:
        like = encoders.vae.quant_conv.weight
        pixels = pictures.to_tensor(list(images)).to(like.device, like.dtype)  # (B, 4, H, W)
        return [z.clone() for z in encoders.vae.encode(pixels).to("cpu", torch.bfloat16)]  # B of (64, h, w)

    images = [[pictures.fit(image, resolution, how) for image in prompt.images] for prompt in prompts]
    read, slots = states([prompt.prompt for prompt in prompts], images)
    twins = [None] * len(prompts)
    if empty and images[0]:
        twins = states([""] * len(prompts), images)[0]
    elif empty:  # without sources one twin serves all
        twins = states([""], [[]])[0] * len(prompts)
    sources = [latents(column) for column in zip(*images, strict=True)]  # sources x B of (64, h_i, w_i)
    ends = [None] * len(prompts)
    if targets:
        sizes = [row[-1].size if row else None for row in images]  # an edit is drawn at the size of its last source
        goals = zip(prompts, sizes, strict=True)
        ends = latents(pictures.fit(prompt.target, resolution, how, size) for prompt, size in goals)
    entries = []
    for i, prompt in enumerate(prompts):
        own = [column[i] for column in sources]
        # Text to image has the target's size, or else is a square.
        h, w = own[-1].shape[1:] if own else ends[i].shape[1:] if targets else [resolution // 32 * 2] * 2
        entries.append(Entry(prompt.task, prompt.category, read[i], twins[i], slots, own, ends[i], (h, w)))
    return entries


# ---- the cache -------------------------------------------------------------------------------------------------------


def cached_pool(
    folder: Path,
    prompts: list[Prompt],
    checkpoint: Path,
    dtype: torch.dtype,
    device: str,
    resolution: int,
    empty: bool = True,
    targets: bool = False,
    how: str = "stretch",
) -> Pool:
    """Encode the prompts that `folder` does not have yet, keep them there, and map the tensors of all from its files.

    All ranks divide the work. The encoders are opened in dtype on the device, only if there is something to encode, and
    are freed at the end. Which prompts are encoded in one batch depends on what is missing, not on the number of ranks:
    that would change the last bits of the states.
    """
    with together():
        shards(folder)  # its errors come before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    files = fingerprint(checkpoint)
    keys = [content_key(prompt, files, resolution, empty, targets, how) for prompt in prompts]
    with together():
        for shard in shards(folder)[rank() :: ranks()]:
            if not read_shard(shard, check=True):
                print(f"{shard}: damaged; its prompts are encoded again")
                shard.unlink()
    with together():  # nobody may add a shard while others still look
        known = {key for shard in shards(folder) for key in read_shard(shard)}
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    with together():
        work = list(groups(missing.values(), resolution, targets))[rank() :: ranks()]
        names, total = list(missing), sum(map(len, work))
        encoders = Encoders.from_pretrained(checkpoint, dtype, device) if total else None
        with tqdm(total=total, desc="encode", unit="prompt", leave=False, disable=rank() > 0 or not total) as bar:
            for group in work:
                entries = encode(encoders, [prompt for _, prompt in group], resolution, empty, targets, how)
                write_shard(folder, {names[number]: entry for (number, _), entry in zip(group, entries, strict=True)})
                bar.update(len(group))
        del encoders
        gc.collect()
        torch.cuda.empty_cache()
    found = {key: parts for shard in shards(folder) for key, parts in read_shard(shard).items()}
    return Pool([Entry(prompt.task, prompt.category, **found[key]) for key, prompt in zip(keys, prompts, strict=True)])


def fingerprint(checkpoint: Path) -> str:
    """A hash of the encoders' files, on which the entries depend."""
    return files_fingerprint(p for name in ("processor", "text_encoder", "vae") for p in (checkpoint / name).rglob("*"))


def content_key(prompt: Prompt, encoders: str, resolution: int, empty: bool, targets: bool, how: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    shown = [*prompt.images, prompt.target] if targets and prompt.target else prompt.images
    digest.update(json.dumps([encoders, resolution, empty, targets, how, prompt.prompt, len(shown)]).encode())
    for picture in shown:
        if isinstance(picture, Image.Image):
            content = f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
        else:
            content = Path(picture).read_bytes()
        digest.update(hashlib.blake2b(content).digest())
    return digest.hexdigest()


def shards(folder: Path) -> list[Path]:
    """The files of entries in a cache folder, in order; none where it does not exist yet.

    ValueError if the folder holds anything that `write_shard` did not write: damaged shards are deleted, so a folder with
    other files is not used at all. A shard is known by its name and its header. A `.part` file is a shard that is being
    written, perhaps by another run.
    """
    if not folder.exists():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        header = read_header(path) if re.fullmatch(r"[0-9a-f]{32}\.safetensors", path.name) else {}
        if {"entries", "checksum"} <= header.keys():
            found.append(path)
        elif not re.fullmatch(r"[0-9a-f]{32}\.\d+\.part", path.name):
            raise ValueError(f"{path}: not a file of encoded prompts; --cache takes a folder that holds nothing else")
    return found


def read_header(path: Path) -> dict:
    """The notes in a safetensors file's header, even if the rest is cut off; {} where there are none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(length) if length < path.stat().st_size else b"{}").get("__metadata__", {})
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def write_shard(folder: Path, entries: dict[str, Entry]) -> None:
    """Write entries by key as one file, whole or not at all. Its header has what is no tensor, and a checksum."""
    tensors, notes = {}, {}
    for key, entry in entries.items():
        tensors |= {f"{key}.states": entry.states} | {f"{key}.{i}": z for i, z in enumerate(entry.sources)}
        tensors |= {f"{key}.{n}": t for n in ("empty", "target") if (t := getattr(entry, n)) is not None}
        notes[key] = {"slots": entry.slots, "size": entry.size, "sources": len(entry.sources)}
    tensors = {
        name: t.contiguous().clone() for name, t in tensors.items()
    }  # each tensor of a file needs memory of its own
    path = folder / f"{hashlib.blake2b(''.join(entries).encode(), digest_size=16).hexdigest()}.safetensors"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        write_tensors(part, tensors, {"entries": json.dumps(notes), "checksum": checksum(tensors)})
    except OSError:  # a full disk, most likely
        part.unlink(missing_ok=True)
        raise
    os.replace(part, path)


def read_shard(path: Path, check: bool = False) -> dict[str, dict]:
    """The fields of a shard's entries, by key; {} if it is damaged.

    Tensors are mapped: nothing is read before it is used. The header must fit the file's length; `check` also reads every
    byte.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        notes = json.loads(header["entries"])
        if check and header["checksum"] != checksum(tensors):
            return {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return {}
    found = {}
    for key, note in notes.items():
        found[key] = {
            "states": tensors[f"{key}.states"],
            "empty": tensors.get(f"{key}.empty"),
            "slots": [tuple(slot) for slot in note["slots"]],
            "sources": [tensors[f"{key}.{i}"] for i in range(note["sources"])],
            "target": tensors.get(f"{key}.target"),
            "size": tuple(note["size"]),
        }
    return found


def checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
