"""Prompts and pictures, encoded once by the frozen encoders and saved in a folder.

    How              what is encoded of a prompt, and at which size
    encode_prompts   prompts -> Pool, by way of a folder of safetensors shards. Prompts that are in the folder are not
                     encoded again, and tensors are mapped from the files, not copied into every process

The PARTS of an entry are what the encoders compute: all but task, category, size and words. Their key in the folder
is a hash of the words, the pictures' bytes, the encoders' files and How. So a changed picture is encoded again.
"""

import gc
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from checkpoint.files import KEPT, aside, digest
from checkpoint.layout import fingerprint
from checkpoint.weights import write_tensors
from data import pictures
from data.pool import Entry, Pool
from data.prompts import Prompt
from networks.qwen3vl import PixelSettings, Qwen3VL
from networks.vae import VAE
from program.ranks import all_gather, on_rank0, raise_on_all_ranks, rank, ranks, say

GROUP = 32  # prompts that are encoded at once and saved in one shard
THREADS = 8  # of a process, which open, resize and hash pictures
ENCODERS = ("processor", "text_encoder", "vae")  # the parts of a checkpoint on which the entries depend
ASPECTS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))  # of T2I, as the published networks draw


@dataclass(frozen=True)
class How:
    """What is encoded of each prompt, and at which size. All but `aspects` belongs to the key of its parts."""

    resolution: int  # pictures get about the area of a square of this side, in pixels
    empty: bool = True  # also encode an empty prompt with the same sources, for guidance and text dropout
    targets: bool = False  # also encode the target pictures, for the flow objective
    fit: str = "stretch"  # how pictures get their sizes: stretch, crop or pad (pictures.fit)
    aspects: bool = False  # T2I without a target gets one of ASPECTS instead of a square


def encode_prompts(folder: Path, prompts: list[Prompt], checkpoint: Path, how: How, device: str = "cpu") -> Pool:
    """Encode the prompts that `folder` does not have yet, save them there, and map the tensors of all from its files.

    The pool has the prompts' order. The encoders are opened on the device only if something is missing, in bf16 on a
    GPU and in fp32 on a CPU, and are freed at the end. The ranks share the work. Batches depend on what is missing
    but not on the number of ranks, which would change the last bits of the states.

    ValueError or OSError name the picture that cannot be read, or the prompt whose target is missing.
    """
    on_rank0(lambda: folder.mkdir(parents=True, exist_ok=True))
    folders = [checkpoint / part for part in ENCODERS]
    encoders = on_rank0(lambda: fingerprint(*folders, kept=folder / KEPT))
    keys = content_keys(prompts, encoders, how)
    known = on_rank0(lambda: set(read_shards(folder)))
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    with raise_on_all_ranks():
        mine = groups(missing, how, checkpoint)[rank() :: ranks()]
        if mine:
            encode_groups(mine, folder, checkpoint, how, device)
            gc.collect()  # frees the encoders' memory
            torch.cuda.empty_cache()
    shards = read_shards(folder)
    entries = []
    for prompt, key in zip(prompts, keys, strict=True):
        parts = shards[key]
        size = drawn_size(prompt.prompt, parts, how)
        entries.append(Entry(prompt.task, prompt.category, **parts, size=size, words=prompt.prompt))
    return Pool(entries)


def drawn_size(words: str, parts: dict, how: How) -> tuple[int, int]:
    """(h, w) of the latents to draw. An edit has its last source's size; T2I has its target's, if that was encoded.
    Otherwise it is a square or, with how.aspects, the one of ASPECTS that a hash of the words picks: a prompt keeps its
    aspect in every run."""
    if parts["sources"]:
        return tuple(parts["sources"][-1].shape[1:])
    if parts["target"] is not None:
        return tuple(parts["target"].shape[1:])
    pick = hashlib.blake2b(words.encode()).digest()[0] % len(ASPECTS) if how.aspects else 0
    side = how.resolution // pictures.MULTIPLE * pictures.MULTIPLE
    width, height = pictures.sides(*ASPECTS[pick], side)
    return height // 16, width // 16


# ---- encoding --------------------------------------------------------------------------------------------------------


def groups(prompts: dict[str, Prompt], how: How, checkpoint: Path) -> list[dict[str, Prompt]]:
    """The prompts, by their keys, in groups of at most GROUP whose pictures get equal sizes.

    ValueError: a prompt lacks its target, or a source is too small or too large for the checkpoint's encoder.
    """
    keys_of_layout = defaultdict(list)
    sources, source_sizes = [], []
    for key, prompt in prompts.items():
        if how.targets and prompt.target is None:
            raise ValueError(f"the flow objective learns pictures, and the prompt {prompt.prompt!r} has no target")
        shown = prompt.images
        if how.targets and not shown:
            shown = [prompt.target]
        sizes = [pictures.fitted_size(picture, how.resolution) for picture in shown]
        keys_of_layout[len(prompt.images), *sizes].append(key)
        sources += prompt.images
        source_sizes += sizes[: len(prompt.images)]
    if sources:
        limits = PixelSettings.from_pretrained(checkpoint / "processor")
        pictures.check_areas(sources, source_sizes, how.resolution, limits.shortest_edge, limits.longest_edge)
    result = []
    for keys in keys_of_layout.values():
        for start in range(0, len(keys), GROUP):
            result.append({key: prompts[key] for key in keys[start : start + GROUP]})
    return result


def encode_groups(work: list[dict[str, Prompt]], folder: Path, checkpoint: Path, how: How, device: str) -> None:
    """Open the encoders, encode one group after the other, and write each as a shard. While one group is encoded,
    threads open and fit the pictures of the next."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    vae = VAE.from_pretrained(checkpoint / "vae", dtype, device)
    encoder = Qwen3VL.from_pretrained(checkpoint, dtype, device)
    bar = tqdm(total=sum(map(len, work)), desc="encode", unit="prompt", leave=False, disable=rank() > 0)
    with ThreadPoolExecutor(THREADS) as threads, bar:

        def open_all(group: dict[str, Prompt]):
            return threads.map(lambda prompt: open_pictures(prompt, how), group.values())

        following = open_all(work[0])
        for number, group in enumerate(work, start=1):
            opened = following
            if number < len(work):
                following = open_all(work[number])
            images, targets = zip(*opened, strict=True)
            parts = encode_group(encoder, vae, list(group.values()), images, targets, how.empty)
            write_shard(folder, dict(zip(group, parts, strict=True)))
            bar.update(len(group))


def open_pictures(prompt: Prompt, how: How) -> tuple[list[Image.Image], Image.Image | None]:
    """A prompt's sources and its target, fitted."""
    images = [pictures.fit(image, how.resolution, how.fit) for image in prompt.images]
    if not how.targets:
        return images, None
    size = images[-1].size if images else None  # an edit is drawn at the size of its last source
    return images, pictures.fit(prompt.target, how.resolution, how.fit, size)


@torch.no_grad()
def encode_group(
    encoder: Qwen3VL,
    vae: VAE,
    prompts: list[Prompt],
    images: list[list[Image.Image]],
    targets: list[Image.Image | None],
    empty: bool,
) -> list[dict]:
    """The parts of one group's entries. images: the fitted sources, of equal sizes. targets: fitted, or None."""
    seen = encoder.look(images)  # (1 + J, B, T, C), for both texts

    def read(words: list[str]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        n = len(words)
        states, mask, slots = encoder.encode(words, images[:n], seen[:, :n])  # (B, L, C), (B, L)
        for start, stop in slots:
            mask[:, start:stop] = False  # the MMDiT has the source's latents there instead
        rows = zip(states, mask, strict=True)
        return [row[is_read].to("cpu", torch.bfloat16) for row, is_read in rows], slots  # each (L_i, C)

    def latents(shown: Iterable[Image.Image]) -> list[Tensor]:
        weight = vae.quant_conv.weight
        pixels = pictures.to_tensor(list(shown)).to(weight.device, weight.dtype)  # (B, 4, H, W)
        return list(vae.encode(pixels).to("cpu", torch.bfloat16))  # B of (64, h, w)

    count = len(prompts)
    states, slots = read([prompt.prompt for prompt in prompts])
    wordless = [None] * count
    if empty and slots:
        wordless, _ = read([""] * count)
    elif empty:  # the same for all, because there are no sources
        wordless = read([""])[0] * count
    target_latents = [None] * count if targets[0] is None else latents(targets)
    columns = [latents(column) for column in zip(*images, strict=True)]  # sources x B of (64, h_i, w_i)
    parts = []
    for i in range(count):
        entry = {"states": states[i], "empty": wordless[i], "target": target_latents[i], "slots": slots}
        entry["sources"] = [column[i] for column in columns]
        parts.append(entry)
    return parts


# ---- the folder ------------------------------------------------------------------------------------------------------


def content_keys(prompts: list[Prompt], encoders: str, how: How) -> list[str]:
    """The key of every prompt, in order. Each rank reads a part of the pictures. encoders: their fingerprint."""
    with raise_on_all_ranks(), ThreadPoolExecutor(THREADS) as threads:
        mine = list(threads.map(lambda prompt: content_key(prompt, encoders, how), prompts[rank() :: ranks()]))
    shares = all_gather(mine)
    return [shares[i % ranks()][i // ranks()] for i in range(len(prompts))]


def content_key(prompt: Prompt, encoders: str, how: How) -> str:
    shown = list(prompt.images)
    if how.targets and prompt.target:
        shown.append(prompt.target)
    contents = []
    for picture in shown:
        if isinstance(picture, Image.Image):
            contents.append([picture.mode, picture.size, digest(picture.tobytes())])
        else:
            contents.append(digest(Path(picture).read_bytes()))
    settings = [encoders, how.resolution, how.empty, how.targets, how.fit]
    return digest(json.dumps([*settings, prompt.prompt, contents]))[:32]


def write_shard(folder: Path, group: dict[str, dict]) -> None:
    """Write a group's parts, by key, as one file. It gets its name only when all its bytes are on the disk."""
    tensors = {}
    for key, parts in group.items():
        named = {"states": parts["states"], "empty": parts["empty"], "target": parts["target"]}
        named |= dict(enumerate(parts["sources"]))
        for name, tensor in named.items():
            if tensor is not None:  # a copy: each tensor of a file needs memory of its own
                tensors[f"{key}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
    slots = {key: parts["slots"] for key, parts in group.items()}
    path = folder / f"{digest(''.join(group))[:32]}.safetensors"
    with aside(path, writer=f".{os.getpid()}") as part:  # another run may write the same
        write_tensors(part, tensors, {"slots": json.dumps(slots)})


def read_shards(folder: Path) -> dict[str, dict]:
    """The parts of all entries in a folder, by key. Tensors are mapped: nothing is read before it is used.

    A shard that is damaged, or that an earlier version wrote, is skipped with a message. It stays until a shard of
    the same prompts replaces it. Other files are ignored.
    """
    entries = {}
    for path in sorted(folder.glob("[0-9a-f]" * 32 + ".safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                layouts = json.loads((file.metadata() or {}).get("slots", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            entries |= {key: entry_parts(key, slots, tensors) for key, slots in layouts.items()}
        except Exception as error:  # a damaged header may hold any JSON, so nearly everything can fail
            say(f"{path}: damaged or of an earlier version, and not used ({type(error).__name__}: {error})")
    return entries


def entry_parts(key: str, slots: list, tensors: dict[str, Tensor]) -> dict:
    """One entry of a shard. KeyError: its states or one of its sources are missing."""
    return {
        "states": tensors[f"{key}.states"],
        "empty": tensors.get(f"{key}.empty"),
        "target": tensors.get(f"{key}.target"),
        "sources": [tensors[f"{key}.{i}"] for i in range(len(slots))],
        "slots": [tuple(slot) for slot in slots],
    }
