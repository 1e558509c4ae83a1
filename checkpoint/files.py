"""Files: what may be written where, which files count, what they hold; and JSON objects and configs, read strictly. Torch
is not imported here.

Writing has two steps. `may_write` decides before the work begins. `aside` writes a file or folder whole or not at all.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from program.edges import parse_json, short

# ---- What may be written where ---------------------------------------------------------------------------------------


def may_write(path: str | Path, overwrite: bool = False, folder: bool = False) -> None:
    """Decide whether `path` may be written, and try whether it can be. Folders above it are created.

    what stands there              it is replaced
    nothing, or an empty folder    yes
    a file                         with `overwrite`
    a folder with anything in it   never

    ValueError or OSError say what is in the way.
    """
    path = Path(path)
    if path.is_dir() and (not folder or any(path.iterdir())):
        raise ValueError(f"{path}: is a folder with something in it; name another place")
    if path.is_file() and (folder or not overwrite):
        raise ValueError(f"{path}: exists; name another{'' if folder else ', or give --overwrite'}")
    with aside(path) as part:  # a trial: nothing is written, so nothing is renamed
        part.touch()
        part.unlink()


PART = ".qwen-image-flash.part"  # how the names end that `aside` uses


@contextmanager
def aside(path: str | Path, writer: str = "") -> Iterator[Path]:
    """Within, write a file or a folder at the path that is given. Afterwards it takes the place of `path`, which is no
    folder with anything in it.

    After an error, Ctrl-C or a full disk nothing of it is left and `path` is as before. OSError names `path`. The name
    used beside it is ours alone; a killed run's leftovers are removed by the next one that writes to `path`. writer: a
    name of its own for each process, where several may write to `path` at once.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}{writer}{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(part)
        yield part
        if os.path.lexists(part):
            os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error})") from None
    finally:
        with suppress(OSError):  # the first error is the one to be told
            remove(part)


def remove(path: Path) -> None:
    """A file, a link or a whole folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- What a folder and a file hold -----------------------------------------------------------------------------------

KEPT = ".digests.json"  # the usual name of the file that `file_digests` keeps
SETTLED = 2  # seconds after which another change surely gets another time stamp


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted; nothing where there is none. Passed over is what other programs leave everywhere: names
    that begin with a dot (downloaders, notebooks, macOS), and those of Windows."""
    return sorted(path for path in folder.glob("[!.]*") if path.name.lower() not in ("thumbs.db", "desktop.ini"))


def digest(content: bytes | str) -> str:
    """A hash of the content, 64 letters. It is SHA-256, for which processors have instructions."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_digests(files: list[Path], kept: Path | None = None) -> list[str]:
    """The `digest` of each file's whole content.

    kept: a JSON file for the digests. A file that has not changed since is not read again: its size, both time stamps and
    inode are as they were. A damaged or missing `kept`, or one that cannot be written, only costs time.
    """
    known = read_kept(kept) if kept else {}

    def look(file: Path) -> tuple[str, str, bool]:
        stat, now = file.stat(), time.time()
        mark = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        before, _, content = known.get(str(file.resolve()), "").rpartition(" ")
        if before != mark:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        return mark, content, max(stat.st_mtime, stat.st_ctime) < now - SETTLED

    with ThreadPoolExecutor(8) as threads:
        looks = list(threads.map(look, files))
    now = known | {str(file.resolve()): f"{mark} {content}" for file, (mark, content, old) in zip(files, looks) if old}
    if kept and now != known:
        with suppress(OSError):
            write_json(kept, {"files": now, "checksum": digest(json.dumps(now))})
    return [content for _, content, _ in looks]


def read_kept(kept: Path) -> dict[str, str]:
    """What `file_digests` kept; empty where there is nothing, or where it is damaged."""
    with suppress(OSError, ValueError):
        content = read_json(kept)
        if content.get("checksum") == digest(json.dumps(content.get("files"))):
            return content["files"]
    return {}


# ---- JSON and configs ------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object; FileNotFoundError or ValueError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")  # noqa: TRY004
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object, whole or not at all."""
    with aside(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_from_json(cls: type, path: str | Path):
    """Build the dataclass `cls` from a JSON file with exactly its fields as keys, else ValueError. Keys that begin with
    "_" are notes of the library that wrote it."""
    content = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    for key in content:
        if key not in cls.__dataclass_fields__:
            raise ValueError(f"{path}: unknown key {key!r}; {cls.__name__} has {', '.join(cls.__dataclass_fields__)}")
    return build_config(cls, content, f"{path}: ")


def build_config(cls: type, content: dict, where: str):
    """The dataclass `cls` from a dictionary that holds at least its fields; lists become tuples.

    Every value must have its field's type, and be what the class allows; `where` begins the message of a ValueError.
    """
    values = {}
    for entry in fields(cls):
        if entry.name not in content:
            raise ValueError(f"{where}{entry.name!r} is missing")
        value = content[entry.name]
        if not has_type(value, entry.type):
            kind = getattr(entry.type, "__name__", entry.type) if not get_args(entry.type) else entry.type
            raise ValueError(f"{where}{entry.name} is {short(value)}; {kind} is expected")
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def has_type(value: object, kind: type) -> bool:
    """Whether a JSON value has the type of a field: int, float (an int will do), bool, str, tuple[...], A | None."""
    if isinstance(kind, UnionType):
        return any(has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is ... and isinstance(value, list) else kinds
        return isinstance(value, list) and len(value) == len(kinds) and all(map(has_type, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def save_config(config, path: str | Path, class_name: str) -> None:
    """Write a config dataclass as config.json of the published layout, for the diffusers class `class_name`."""
    write_json(path, {"_class_name": class_name, **asdict(config)})
