"""Weights: safetensors files, read and written.

Reading is strict: if the files do not hold exactly the tensors of the network, an error names the file and the tensor.
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
    """Fill `module`, built on the meta device, from `{stem}.safetensors` or the shards in
    `{stem}.safetensors.index.json`.

    The files must hold exactly the module's tensors, in its shapes and with finite values. Tensors whose whole name
    matches a regular expression in `skip` are ignored. Tensors are mapped from disk and placed one by one, so memory
    holds at most the module and one more tensor. On the meta device, which has no values, the files are only checked.
    """
    files = files_of_tensors(module, Path(directory), stem, skip)
    if torch.device(device).type == "meta":
        return
    for name in module.state_dict():
        # Opened again for each tensor: pages of a mapped file count as our memory until it is closed.
        with open_weights(files[name]) as file:
            # A copy, because the file may change.
            tensor = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
        if not finite(tensor):
            raise ValueError(f"{files[name]}: {name} holds values that are not finite in {dtype}; the file is damaged")
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(tensor) if is_parameter else tensor)


def files_of_tensors(module: nn.Module, directory: Path, stem: str, skip: tuple[str, ...]) -> dict[str, Path]:
    """The file of each tensor, by its name. ValueError or FileNotFoundError: see `load_weights`."""
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file() == index.is_file():
        raise FileNotFoundError(f"{directory}: one of {single.name} and {index.name} is expected, not both or neither")
    listed = read_weight_map(index) if index.is_file() else {}  # tensor -> file name, according to the index
    stored = {}  # tensor -> file name, according to the files
    expected = module.state_dict()
    for file_name in sorted(set(listed.values())) or [single.name]:
        path = directory / file_name
        with open_weights(path) as file:
            for name in file.keys():
                stored[name] = file_name
                if any(re.fullmatch(pattern, name) for pattern in skip):
                    continue
                if name not in expected:
                    raise ValueError(f"{path}: tensor {name} is unknown to {type(module).__name__}")
                tensor = file.get_slice(name)
                shape, dtype = list(tensor.get_shape()), tensor.get_dtype()
                by_config = list(expected[name].shape)
                if shape != by_config:
                    raise ValueError(f"{path}: {name} has shape {shape}, but by the config {by_config}")
                if dtype not in FLOATS:
                    raise ValueError(f"{path}: {name} has the type {dtype}; one of {', '.join(FLOATS)} is expected")
    wrong = listed.items() ^ stored.items() if listed else ()
    if wrong:
        name = min(wrong)[0]
        raise ValueError(f"{index}: puts {name} into {listed.get(name)}, but it is in {stored.get(name)}")
    missing = expected.keys() - stored.keys()
    if missing:
        place = index if listed else single
        raise ValueError(f"{place}: tensor {min(missing)} is missing ({len(missing)} in all)")
    return {name: directory / file_name for name, file_name in stored.items()}


def read_weight_map(index: Path) -> dict[str, str]:
    """The index of a network in shards: tensor -> file name. ValueError if it is damaged."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index}: weight_map is missing or empty")
    for name, file in listed.items():
        # Links are not resolved: in download caches the shards are links to other folders.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: puts {name} into {short(file)}, which is no .safetensors file of its folder")
    return listed


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite. Testing both extremes takes a tenth of isfinite's time, and no memory."""
    return not tensor.numel() or all(end.isfinite().item() for end in tensor.detach().aminmax())


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """ValueError, beginning with `where`, names the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise ValueError(f"{where}: {name} holds values that are not finite; nothing is written")


def open_weights(path: Path):
    """Open a safetensors file, mapped into memory. ValueError if it is damaged or of another kind."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write a safetensors file with `notes` in its header. OSError names the file.

    It has the permissions of any other new file, while the library would make it private. Its bytes are forced to the
    disk. Otherwise a file that is then renamed could have its new name but no content after a power cut.
    """
    try:
        path.unlink(missing_ok=True)
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"format": "pt", **(notes or {})})
        path.chmod(mode)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:  # most likely a full disk
        raise OSError(f"{path}: cannot be written ({error})") from None


def save_weights(state: dict[str, Tensor], directory: str | Path, stem: str, dtype: torch.dtype) -> None:
    """Write {name: tensor} as `{stem}.safetensors`."""
    path = Path(directory) / f"{stem}.safetensors"
    with aside(path) as part:
        write_tensors(part, {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()})
