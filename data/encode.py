"""What the frozen encoders make of every prompt, computed once: entries, the pool they are drawn from, and its cache.

    Entry         one encoded prompt: the states of its words, the latents of its sources (and of its target)
    Pool          entries by task and category, and the classes that a micro-batch is taken from
    encode_pool   prompts -> Pool, in memory
    cached_pool   the same through a folder of safetensors shards: what is there already is not encoded again, and
                  tensors are mapped from the files, not copied into every process

A BUCKET is what samples must have in common to be one tensor: the sizes of all sources and of the picture to draw. The
PARTS of an entry are what the encoders make: all but task, category and size. In the cache their key is a hash of the
CONTENT: the words, the pictures' bytes, the encoders' files and the resolution. So a changed picture is encoded again.
"""

import gc
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from checkpoint.files import KEPT, aside, digest
from checkpoint.layout import fingerprint
from checkpoint.weights import write_tensors
from data import pictures
from data.pool import Entry, Pool
from data.prompts import Prompt
from networks.qwen3vl import Qwen3VL
from networks.vae import VAE
from program.ranks import all_gather, on_rank0, raise_on_all_ranks, rank, ranks, say

GROUP = 32  # prompts that are encoded at once, and kept in one shard
THREADS = 8  # of a process, for pictures: to open and resize them, to hash them
ENCODERS = ("processor", "text_encoder", "vae")  # the parts of a checkpoint on which the entries depend
ASPECTS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))  # of T2I, as the published networks draw


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
    encoders: Encoders,
    prompts: Iterable[Prompt],
    resolution: int,
    empty: bool = True,
    targets: bool = False,
    how: str = "stretch",
    aspects: bool = False,
) -> Pool:
    """Encode every prompt once, with `encoders.encoder` and `encoders.vae`. The pool keeps the prompts' order.

    empty: encode also an empty prompt with the same sources, for guidance and text dropout. targets: encode also the
    target pictures; a missing one is a ValueError. how: the way pictures get their sizes, see pictures.fit. aspects: T2I
    without a target gets one of ASPECTS, else it is a square.
    """
    prompts, found = dict(enumerate(prompts)), {}
    work = groups(prompts, resolution, targets)
    for parts in encoded(encoders, work, resolution, empty, targets, how):
        found |= parts
    return make_pool(prompts.values(), [found[number] for number in prompts], resolution, aspects)


def make_pool(prompts: Iterable[Prompt], found: list[dict], resolution: int, aspects: bool) -> Pool:
    entries = []
    for prompt, parts in zip(prompts, found, strict=True):
        size = drawn_size(prompt.prompt, parts, resolution, aspects)
        entries.append(Entry(prompt.task, prompt.category, **parts, size=size, words=prompt.prompt))
    return Pool(entries)


def drawn_size(words: str, parts: dict, resolution: int, aspects: bool) -> tuple[int, int]:
    """(h, w) of the latents to draw: an edit has its last source's, T2I its target's if that was encoded. Else the words
    decide: with `aspects` their hash picks one of ASPECTS, so a prompt keeps its own in every run."""
    if parts["sources"] or parts["target"] is not None:
        return tuple([parts["target"], *parts["sources"]][-1].shape[1:])
    pick = hashlib.blake2b(words.encode()).digest()[0] % len(ASPECTS) if aspects else 0
    width, height = pictures.sides(*ASPECTS[pick], resolution // pictures.MULTIPLE * pictures.MULTIPLE)
    return height // 16, width // 16


def groups(prompts: dict, resolution: int, targets: bool) -> list[dict]:
    """The prompts, by any keys, in groups of at most GROUP whose pictures get equal sizes."""
    alike = defaultdict(list)
    for key, prompt in prompts.items():
        if targets and prompt.target is None:
            raise ValueError(f"the flow objective learns pictures, and the prompt {prompt.prompt!r} has no target")
        shown = prompt.images or ([prompt.target] if targets else [])
        sizes = [pictures.fitted_size(picture, resolution) for picture in shown]
        alike[len(prompt.images), *sizes].append(key)
    cut = [keys[i : i + GROUP] for keys in alike.values() for i in range(0, len(keys), GROUP)]
    return [{key: prompts[key] for key in keys} for keys in cut]


def encoded(
    encoders: Encoders, work: list[dict], resolution: int, empty: bool, targets: bool, how: str
) -> Iterator[dict]:
    """Each group's parts, by its keys. Meanwhile several threads open and fit the next group's pictures."""

    def opened(prompt: Prompt) -> tuple[list[Image.Image], Image.Image | None]:
        images = [pictures.fit(image, resolution, how) for image in prompt.images]
        size = images[-1].size if images else None  # an edit is drawn at the size of its last source
        return images, pictures.fit(prompt.target, resolution, how, size) if targets else None

    bar = tqdm(total=sum(map(len, work)), desc="encode", unit="prompt", leave=False, disable=rank() > 0 or not work)
    with ThreadPoolExecutor(THREADS) as threads, bar:
        ahead = [threads.map(opened, group.values()) for group in work[:1]]
        for number, group in enumerate(work, start=1):
            ahead += [threads.map(opened, following.values()) for following in work[number : number + 1]]
            images, goals = zip(*ahead.pop(0), strict=True)
            yield dict(zip(group, encode(encoders, list(group.values()), images, goals, empty), strict=True))
            bar.update(len(group))


@torch.no_grad()
def encode(
    encoders: Encoders,
    prompts: list[Prompt],
    images: list[list[Image.Image]],
    goals: list[Image.Image | None],
    empty: bool,
) -> list[dict]:
    """The parts of one group's entries. images: the fitted sources of each, of equal sizes; goals: the targets, or None."""
    seen = encoders.encoder.look(images)  # (1 + J, B, T, C), for both texts

    def read(words: list[str]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        n = len(words)
        states, mask, slots = encoders.encoder.encode(words, images[:n], seen[:, :n])  # (B, L, C), (B, L)
        for start, stop in slots:
            mask[:, start:stop] = False  # the MMDiT has the source's latents there instead
        return [s[kept].to("cpu", torch.bfloat16) for s, kept in zip(states, mask, strict=True)], slots

    def latents(shown: Iterable[Image.Image]) -> list[Tensor]:
        like = encoders.vae.quant_conv.weight
        pixels = pictures.to_tensor(list(shown)).to(like.device, like.dtype)  # (B, 4, H, W)
        return list(encoders.vae.encode(pixels).to("cpu", torch.bfloat16))  # B of (64, h, w)

    states, slots = read([prompt.prompt for prompt in prompts])
    twins = targets = [None] * len(prompts)
    if empty:  # without sources one twin serves all
        twins = read([""] * len(prompts))[0] if slots else read([""])[0] * len(prompts)
    if goals[0] is not None:
        targets = latents(goals)
    columns = [latents(column) for column in zip(*images, strict=True)]  # sources x B of (64, h_i, w_i)
    return [
        dict(states=states[i], empty=twins[i], slots=slots, sources=[c[i] for c in columns], target=targets[i])
        for i in range(len(prompts))
    ]


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
    aspects: bool = False,
) -> Pool:
    """Encode the prompts that `folder` does not have yet, keep them there, and map the tensors of all from its files.

    All ranks divide the work. The encoders are opened in dtype on the device, only if there is something to encode, and
    are freed at the end. Which prompts are encoded in one batch depends on what is missing, not on the number of ranks:
    that would change the last bits of the states.
    """
    on_rank0(lambda: folder.mkdir(parents=True, exist_ok=True))
    files = on_rank0(lambda: fingerprint(*(checkpoint / part for part in ENCODERS), kept=folder / KEPT))
    keys = divided(lambda prompt: content_key(prompt, files, resolution, empty, targets, how), prompts)
    known = on_rank0(lambda: set(read_shards(folder)))
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    with raise_on_all_ranks():
        if work := groups(missing, resolution, targets)[rank() :: ranks()]:
            encoders = Encoders.from_pretrained(checkpoint, dtype, device)
            for parts in encoded(encoders, work, resolution, empty, targets, how):
                write_shard(folder, parts)
            del encoders
            gc.collect()
            torch.cuda.empty_cache()
    found = read_shards(folder)
    return make_pool(prompts, [found[key] for key in keys], resolution, aspects)


def divided(work: Callable, items: list) -> list:
    """work(item) for every item, in order. Each rank does a part, by several threads, and has the results of all."""
    with raise_on_all_ranks(), ThreadPoolExecutor(THREADS) as threads:
        mine = list(threads.map(work, items[rank() :: ranks()]))
    parts = all_gather(mine)
    return [parts[i % ranks()][i // ranks()] for i in range(len(items))]


def content_key(prompt: Prompt, encoders: str, resolution: int, empty: bool, targets: bool, how: str) -> str:
    contents = []
    for picture in [*prompt.images, prompt.target] if targets and prompt.target else prompt.images:
        if isinstance(picture, Image.Image):
            contents.append([picture.mode, picture.size, digest(picture.tobytes())])
        else:
            contents.append(digest(Path(picture).read_bytes()))
    return digest(json.dumps([encoders, resolution, empty, targets, how, prompt.prompt, contents]))[:32]


def write_shard(folder: Path, found: dict[str, dict]) -> None:
    """Write parts by key as one file, whole or not at all: it has no name before its bytes are on the disk."""
    tensors = {}
    for key, parts in found.items():
        named = {name: parts[name] for name in ("states", "empty", "target")} | dict(enumerate(parts["sources"]))
        for name, tensor in named.items():
            if tensor is not None:  # each tensor of a file needs memory of its own
                tensors[f"{key}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
    slots = {key: parts["slots"] for key, parts in found.items()}
    path = folder / f"{digest(''.join(found))[:32]}.safetensors"
    with aside(path, writer=f".{os.getpid()}") as part:  # another run may write the same
        write_tensors(part, tensors, {"slots": json.dumps(slots)})


def read_shards(folder: Path) -> dict[str, dict]:
    """The parts of all entries in a folder, by key. Tensors are mapped: nothing is read before it is used.

    A shard that is damaged, or that an earlier version wrote with all states, is passed over. It stays until one of the
    same prompts replaces it. Other files are not looked at.
    """
    found = {}
    for path in sorted(folder.glob("[0-9a-f]" * 32 + ".safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                layouts = json.loads((file.metadata() or {}).get("slots", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError):
            say(f"{path}: damaged or of an earlier version, and not used")
            continue
        for key, slots in layouts.items():
            found[key] = {name: tensors.get(f"{key}.{name}") for name in ("states", "empty", "target")}
            found[key]["sources"] = [tensors[f"{key}.{i}"] for i in range(len(slots))]
            found[key]["slots"] = [tuple(slot) for slot in slots]
    return found
