"""The MMDiT of Qwen-Image-2.x: one network that is teacher, student and fake score.

(This file is being written; the network follows.)
"""

import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass
class MMDiTConfig:
    """The keys of transformer/config.json; the defaults are the published 7.1B network's."""

    patch_size: int = 1  # latent pixels per token and side; 2.x has no other value
    in_channels: int = 64  # channels of the VAE's latent
    out_channels: int = 64
    num_layers: int = 32
    attention_head_dim: int = 128
    num_attention_heads: int = 32
    context_in_dim: int = 4096  # width of the language model's states
    mlp_ratio: int = 3
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)  # head dims turned by frame, height and width
    eps: float = 1e-6
    causal_condition: bool = True  # text and sources are modulated as at t = 0, so their keys do not depend on t

    def __post_init__(self):
        if self.patch_size != 1:
            raise ValueError(f"patch_size {self.patch_size}: only 1 is known (one token per latent pixel)")
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(d % 2 for d in self.axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {list(self.axes_dims_rope)}: three even numbers that sum to attention_head_dim "
                f"({self.attention_head_dim}) are needed"
            )

    @classmethod
    def from_json(cls, path: str | Path) -> "MMDiTConfig":
        return config_from_json(cls, path)


# ----------------------------------------------------------------------------------------------------------------------
# Files: strict in both directions, and every error names the file and the key or tensor


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object. FileNotFoundError or ValueError name the file (and line)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def config_from_json(cls: type, path: str | Path):
    """Build the dataclass `cls` from a JSON file that has exactly its fields as keys.

    Keys that begin with "_" are the writing library's notes and are ignored; lists become tuples; a value must have
    the type of the field's default (an int may stand for a float). Otherwise ValueError names file and key.
    """
    content = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    known = {field.name: field.default for field in fields(cls)}
    for key in content:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}; {cls.__name__} knows {', '.join(known)}")
    for key, default in known.items():
        if key not in content:
            raise ValueError(f"{path}: key {key!r} is missing")
        value = content[key] = _tuples(content[key])
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if default is not MISSING and default is not None and not fits:
            raise ValueError(f"{path}: {key} is {value!r}, a {type(default).__name__} is expected")
    try:
        return cls(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def load_weights(
    module: nn.Module,
    directory: str | Path,
    stem: str,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: tuple[str, ...] = (),
) -> None:
    """Fill `module`, built on the meta device, with `{stem}.safetensors` or the shards of `{stem}.safetensors.index.json`.

    Strict: the files hold exactly the module's tensors, in its shapes. `skip`: regular expressions (full match) of
    tensors that are in the files and have no use here. Tensors are mapped from disk and placed one at a time, so the
    peak is the model itself. FileNotFoundError or ValueError name file and tensor.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder")
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(f"{directory}: holds both {single.name} and {index.name}; delete the stale one")
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{directory}: holds neither {single.name} nor {index.name}")

    listed = None  # {tensor: file name}, where an index says so
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index}: weight_map is missing or empty")
        for tensor, name in listed.items():
            # Compared as text, not resolved: download caches keep their shards as links that lead elsewhere.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {tensor} is said to be in {name!r}, which is no file of this folder")
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}: no such file, but {index.name} names it for {tensor}")
    paths = [single] if listed is None else [directory / name for name in sorted(set(listed.values()))]

    wanted = module.state_dict()
    found: dict[str, Path] = {}
    for path in paths:
        with _open(path) as file:
            for name in file.keys():
                if listed is not None and listed.get(name) != path.name:
                    raise ValueError(f"{path}: holds {name}, which {index.name} does not place there")
                if any(re.fullmatch(pattern, name) for pattern in skip):
                    continue
                if name not in wanted:
                    raise ValueError(f"{path}: unexpected tensor {name}; {type(module).__name__} has none of that name")
                shape, expected = tuple(file.get_slice(name).get_shape()), tuple(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{path}: {name} has shape {shape}, {expected} is expected from the config")
                found[name] = path
    for name in wanted:
        if name not in found:
            raise ValueError(f"{single if listed is None else index}: tensor {name} is missing")

    for path in paths:
        with _open(path) as file:
            for name in (name for name in found if found[name] == path):
                tensor = file.get_tensor(name)
                tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                owner, _, leaf = name.rpartition(".")
                owner = module.get_submodule(owner)
                old = getattr(owner, leaf)
                is_parameter = isinstance(old, nn.Parameter)
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); fetch or write it again") from None


def save_weights(
    state: dict[str, Tensor], directory: str | Path, stem: str, dtype: torch.dtype, shard_bytes: int = 5 * 10**9
) -> None:
    """Write `state` ({name: tensor}) as `{stem}.safetensors`, or as shards with an index when over `shard_bytes`.

    Files are written beside and renamed: a reader (or our own mapped weights) never sees half a file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        bytes_ = tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        if shards[-1] and size + bytes_ > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_
    width = len(shards)
    names = [f"{stem}.safetensors"] if width == 1 else [f"{stem}-{i + 1:05}-of-{width:05}.safetensors" for i in range(width)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {k: state[k].detach().to(dtype if state[k].is_floating_point() else state[k].dtype) for k in shard}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, directory / f"{name}.part", {"format": "pt"})
        os.replace(directory / f"{name}.part", directory / name)
    written = set(names)
    if width > 1:
        total = sum(t.numel() * (dtype.itemsize if t.is_floating_point() else t.itemsize) for t in state.values())
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        write_json(directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.add(f"{stem}.safetensors.index.json")
    for old in directory.glob(f"{stem}*.safetensors*"):  # an earlier save in another number of files
        if old.name not in written:
            old.unlink()


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def save_config(config, path: str | Path, class_name: str) -> None:
    """Write a config dataclass as the published config.json; `class_name` is the diffusers class that reads it."""
    write_json(path, {"_class_name": class_name, **asdict(config)})
