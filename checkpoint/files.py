"""Files: where a program may write, which files of a folder count, hashes, and strict reading of JSON and configs.

Writing has two steps. `may_write` checks before the work begins. `aside` writes a file or folder completely or not at
all. Torch is not imported here.
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

# ---- Writing ---------------------------------------------------------------------------------------------------------


def may_write(path: str | Path, overwrite: bool = False, folder: bool = False) -> None:
    """Check that `path` may be written, and that it can be. Folders above it are created.

    found there                    may it be replaced?
    nothing, or an empty folder    yes
    a file                         with `overwrite`
    a folder with anything in it   never

    folder: `path` will be a folder. ValueError or OSError name the obstacle.
    """
    path = Path(path)
    if path.is_dir() and (not folder or any(path.iterdir())):
        raise ValueError(f"{path}: is a folder with something in it; name another place")
    if path.is_file() and (folder or not overwrite):
        raise ValueError(f"{path}: exists; name another{'' if folder else ', or give --overwrite'}")
    with aside(path) as trial:  # removed before `aside` would rename it
        trial.touch()
        trial.unlink()


PART = ".qwen-image-flash.part"  # the end of the names that `aside` uses


@contextmanager
def aside(path: str | Path, writer: str = "") -> Iterator[Path]:
    """Within, write a file or a folder at the yielded path. Afterwards it replaces `path`, which must not be a folder
    with anything in it.

    After an error, Ctrl-C or a full disk nothing of it is left, and `path` is unchanged. An OSError names `path`. The
    next run that writes to `path` removes what a killed run left. writer: a name for this process, if several may
    write to `path` at once.
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
        with suppress(OSError):  # the first error is the one to report
            remove(part)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- What a folder and a file contain --------------------------------------------------------------------------------

KEPT = ".digests.json"  # the usual name of the file with the results of `file_digests`
SETTLED = 2  # seconds after a change, from which on another change gets another time stamp


def visible(folder: Path) -> list[Path]:
    """The contents of a folder, sorted; empty if it does not exist. Files that other programs leave everywhere are
    excluded: names that begin with a dot (downloaders, notebooks, macOS), and those of Windows."""
    return sorted(path for path in folder.glob("[!.]*") if path.name.lower() not in ("thumbs.db", "desktop.ini"))


def digest(content: bytes | str) -> str:
    """SHA-256 of the content, 64 letters. It is fast, because processors have instructions for it."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def file_digests(files: list[Path], kept: Path | None = None) -> list[str]:
    """The `digest` of each file's whole content.

    kept: a JSON file for the results. A file is not read again as long as its size, both time stamps and its inode are
    the same. A `kept` that is damaged, missing or read-only only costs time.
    """
    known = read_kept(kept) if kept else {}  # path -> "MARK DIGEST"
    now = dict(known)

    def digest_of(file: Path) -> str:
        started = time.time()
        stat, place = file.stat(), str(file.resolve())
        mark = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        known_mark, _, content = known.get(place, "").rpartition(" ")
        if known_mark != mark:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        if max(stat.st_mtime, stat.st_ctime) < started - SETTLED:
            now[place] = f"{mark} {content}"
        return content

    with ThreadPoolExecutor(8) as threads:
        digests = list(threads.map(digest_of, files))
    if kept and now != known:
        with suppress(OSError):
            write_json(kept, {"files": now, "checksum": digest(json.dumps(now))})
    return digests


def read_kept(kept: Path) -> dict[str, str]:
    """The saved results of `file_digests`; empty if the file is missing or damaged."""
    with suppress(OSError, ValueError):
        content = read_json(kept)
        if content.get("checksum") == digest(json.dumps(content.get("files"))):
            return content["files"]
    return {}


# ---- JSON and configs ------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object; else FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def write_json(path: str | Path, content: dict) -> None:
    """Write one JSON object, completely or not at all."""
    with aside(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def config_from_json(cls: type, path: str | Path):
    """Build the dataclass `cls` from a JSON file that has exactly its fields as keys, else ValueError. Keys that begin
    with "_" are ignored, because they are notes of the library that wrote the file."""
    content = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
    names = [entry.name for entry in fields(cls)]
    for key in content:
        if key not in names:
            raise ValueError(f"{path}: unknown key {key!r}; {cls.__name__} has {', '.join(names)}")
    return build_config(cls, content, f"{path}: ")


def build_config(cls: type, content: dict, where: str):
    """Build the dataclass `cls` from a dictionary that has at least its fields. Lists become tuples.

    ValueError, beginning with `where`: a field is missing, has another type, or a value that the class rejects.
    """
    values = {}
    for entry in fields(cls):
        if entry.name not in content:
            raise ValueError(f"{where}{entry.name!r} is missing")
        value = content[entry.name]
        if not has_type(value, entry.type):
            kind = entry.type if get_args(entry.type) else entry.type.__name__
            raise ValueError(f"{where}{entry.name} is {short(value)}; {kind} is expected")
        values[entry.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def has_type(value: object, kind: type) -> bool:
    """Whether a JSON value has the type of a field: int, float (an int will do), bool, str, tuple[...], A | None."""
    if isinstance(kind, UnionType):
        return any(has_type(value, member) for member in get_args(kind))
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            return False
        kinds = get_args(kind)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        return len(value) == len(kinds) and all(map(has_type, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def save_config(config, path: str | Path, class_name: str) -> None:
    """Write a config dataclass as config.json of the published layout, for the diffusers class `class_name`."""
    write_json(path, {"_class_name": class_name, **asdict(config)})
