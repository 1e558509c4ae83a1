"""Weights: safetensors files, read and written.

Reading is strict: the files hold exactly the tensors of a network, or one error names the file and the tensor.
"""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint.files import aside, read_json
from program.edges import short

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # types of weights, as safetensors calls them


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
    expression in `skip`, and finite values. Tensors are mapped from disk and placed one by one: at its peak, memory holds
    the module and one tensor. On the meta device, which holds no values, the files are only checked.
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
            raise ValueError(f"{index}: puts {name} into {short(file)}, which is no .safetensors file of its folder")

    wanted, found = module.state_dict(), {}  # {tensor: file name}, from the files
    for file_name in sorted(set(listed.values())) or [single.name]:
        path = directory / file_name
        with open_weights(path) as file:
            for name in file.keys():
                found[name] = file_name
                if any(re.fullmatch(pattern, name) for pattern in skip):
                    continue
                if name not in wanted:
                    raise ValueError(f"{path}: tensor {name} is unknown to {type(module).__name__}")
                shape, expected = list(file.get_slice(name).get_shape()), list(wanted[name].shape)
                if shape != expected:
                    raise ValueError(f"{path}: {name} has shape {shape}, but by the config {expected}")
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise ValueError(f"{path}: {name} has the type {kind}; one of {', '.join(FLOATS)} is expected")
    if listed and (wrong := listed.items() ^ found.items()):
        name = min(wrong)[0]
        raise ValueError(f"{index}: puts {name} into {listed.get(name)}, but it is in {found.get(name)}")
    if missing := wanted.keys() - found.keys():
        place = index if listed else single
        raise ValueError(f"{place}: tensor {min(missing)} is missing ({len(missing)} in all)")

    if torch.device(device).type == "meta":
        return
    for name in wanted:
        # Opened anew for each tensor: what was read of a mapped file counts as ours until it closes.
        path = directory / found[name]
        with open_weights(path) as file:
            tensor = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)  # a copy: the file may change
        if not finite(tensor):
            raise ValueError(f"{path}: {name} holds values that are not finite in {dtype}; the file is damaged")
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor) if is_parameter else tensor)


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite. By the extremes: that takes a tenth of the time of a copy, and no memory."""
    return not tensor.numel() or all(end.isfinite().item() for end in tensor.detach().aminmax())


def check_finite(tensors: dict[str, Tensor], what: str) -> None:
    """ValueError names the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise ValueError(f"{what}: {name} holds values that are not finite; nothing is written")


def open_weights(path: Path):
    """A safetensors file, mapped; ValueError where it is none or not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file, `notes` in its header, with the permissions of any other new file: the library's own
    are the owner's alone, whatever the umask. Its bytes are forced to the disk, or after a power cut a file that is
    renamed next could have its name without them. OSError names the file."""
    try:
        path.unlink(missing_ok=True)
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt", **(notes or {})})
        path.chmod(mode)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path}: cannot be written ({error})") from None


def save_weights(state: dict[str, Tensor], directory: str | Path, stem: str, dtype: torch.dtype) -> None:
    """Write {name: tensor} as `{stem}.safetensors`."""
    path = Path(directory) / f"{stem}.safetensors"
    with aside(path) as part:
        write_tensors(part, {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()})
