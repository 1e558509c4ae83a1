"""Files of the published layout: JSON objects, configs, and weights as safetensors.

Reading is strict both ways: a file holds exactly what the network needs, or it is one error that names file and key.
Writing is whole or not at all: a file is written beside its place and renamed.
"""

import json
import os
import re
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object; FileNotFoundError or ValueError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")  # noqa: TRY004
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def config_from_json(cls: type, path: str | Path):
    """Build the dataclass `cls` from a JSON file with exactly its fields as keys, else ValueError. Keys that begin with
    "_" are notes of the library that wrote it; lists become tuples; a value has the type of the field's default."""
    content = {key: _tuples(value) for key, value in read_json(path).items() if not key.startswith("_")}
    defaults = {field.name: field.default for field in fields(cls)}
    for key in content:
        if key not in defaults:
            raise ValueError(f"{path}: unknown key {key!r}; {cls.__name__} has {', '.join(defaults)}")
    for key, default in defaults.items():
        if key not in content:
            raise ValueError(f"{path}: key {key!r} is missing")
        kinds = (int, float) if type(default) is float else (type(default),)
        if default is not MISSING and default is not None and type(content[key]) not in kinds:
            raise ValueError(f"{path}: {key} is {content[key]!r}, {kinds[-1].__name__} is expected")
    try:
        return cls(**content)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def save_config(config, path: str | Path, class_name: str) -> None:
    """Write a config dataclass as config.json of the published layout, for the diffusers class `class_name`."""
    write_json(path, {"_class_name": class_name, **asdict(config)})


def load_weights(
    module: nn.Module,
    directory: str | Path,
    stem: str,
    dtype: torch.dtype,
    device: str | torch.device,
    skip: tuple[str, ...] = (),
) -> None:
    """Fill `module`, built on the meta device, from `{stem}.safetensors` or the shards in `{stem}.safetensors.index.json`.

    The files must hold exactly the module's tensors in its shapes, but for those whose whole name matches a regular
    expression in `skip`. Tensors are mapped from disk and placed one by one: at its peak, memory holds the module and one
    tensor.
    """
    directory = Path(directory)
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file() == index.is_file():
        raise FileNotFoundError(f"{directory}: one of {single.name} and {index.name} is expected, not both or neither")
    listed = {}  # {tensor: file name}, from the index
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{index}: weight_map is missing or empty")
    for name, file in listed.items():
        # As text, without resolving links: download caches keep shards as links that lead elsewhere.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: puts {name} into {file!r}, which is no .safetensors file of its folder")
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / file}: no such file, but {index.name} puts {name} into it")

    wanted, places = module.state_dict(), {}  # {tensor: path}
    for path in [directory / file for file in sorted(set(listed.values()))] or [single]:
        with open_weights(path) as file:
            for name in list(file.keys()):
                if listed and listed.get(name) != path.name:
                    raise ValueError(f"{path}: holds {name}, which {index.name} does not put there")
                if any(re.fullmatch(pattern, name) for pattern in skip):
                    continue
                if name not in wanted:
                    raise ValueError(f"{path}: tensor {name} is unknown to {type(module).__name__}")
                shape, expected = list(file.get_slice(name).get_shape()), list(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{path}: {name} has shape {shape}, but by the config {expected}")
                places[name] = path
    if missing := wanted.keys() - places.keys():
        where = directory / listed.get(min(missing), index.name if listed else single.name)
        raise ValueError(f"{where}: tensor {min(missing)} is missing ({len(missing)} in all)")

    for name, path in places.items():
        with open_weights(
            path
        ) as file:  # anew for each tensor: what was read of a mapped file counts as ours until it closes
            tensor = file.get_tensor(name)
            dtype_here = dtype if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(device=device, dtype=dtype_here, copy=True)  # off the file, which may be written over
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor) if is_parameter else tensor)


def open_weights(path: Path):
    """A safetensors file, mapped; ValueError where it is none or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file, `notes` in its header, with the permissions of any other new file: the library's own
    are the owner's alone, whatever the umask. OSError names the file."""
    try:
        path.unlink(missing_ok=True)
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt", **(notes or {})})
        path.chmod(mode)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path}: cannot be written ({error})") from None


def save_weights(
    state: dict[str, Tensor], directory: str | Path, stem: str, dtype: torch.dtype, shard_bytes: int = 5 * 10**9
) -> None:
    """Write {name: tensor} as `{stem}.safetensors`, or in shards with an index where it is larger than `shard_bytes`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shards, size, total = [[]], 0, 0
    for name, tensor in state.items():
        length = tensor.numel() * dtype.itemsize
        if shards[-1] and size + length > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + length, total + length
    shards = {f"{stem}-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}
    if len(shards) == 1:
        shards = {f"{stem}.safetensors": list(state)}
    for file, names in shards.items():
        # Written beside and renamed, so that no reader ever sees half a file.
        tensors = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        write_tensors(directory / f"{file}.part", tensors)
        os.replace(directory / f"{file}.part", directory / file)
    index = f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        write_json(directory / index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for old in directory.glob(f"{stem}*"):  # an earlier save, in another number of files
        stale = old.name not in shards and (old.name != index or len(shards) == 1)
        if stale and re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
