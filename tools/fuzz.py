"""Nonsense goes in, one clear error comes out: thousands of mutated inputs, by surface. A few of each are a test.

    python tools/fuzz.py                               some 11,000 inputs, 20 minutes of an idle core, and a table
    python tools/fuzz.py --first 100000                as many others: input number i follows from its surface and i alone
    python tools/fuzz.py --surface LoRA --first 431 --count 1        one again

An input may be accepted or refused. A refusal is a ValueError, an OSError or a FloatingPointError, which the programs
print as one line, or argparse's own exit. Anything else is a traceback, and counts as a fault. So does a call that takes
more than 30 seconds (time in which the fuzzer is stopped counts, too), and a wrong answer where only one is right
(PROPERTIES).
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reference  # noqa: E402

import eval as evaluation  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from checkpoint.layout import files_read, fingerprint  # noqa: E402
from checkpoint.lora import new_lora, read_lora, write_lora  # noqa: E402
from data.pictures import fit, fitted_size  # noqa: E402
from program import eval_options, sample_options  # noqa: E402
from recipe import read_prompts  # noqa: E402
from scores.rows import write_row  # noqa: E402

SECONDS = 30
COUNTS = {  # of the whole run
    "sample.py: arguments": 1500,
    "train.py: arguments": 1100,
    "eval.py: arguments, tables, pictures": 900,
    "configs, tokenizer, scheduler": 2000,
    "safetensors": 1250,
    "layout, shards, index": 300,
    "LoRA": 500,
    "JSON lines": 1500,
    "pictures": 1200,
    "--resume": 550,
    "fingerprints": 300,
    "list options": 400,
}
PROPERTIES = ("fingerprints", "list options")  # nothing is nonsense here, and only one answer is right

DEEP = "[" * 5000 + "]" * 5000
VALUES = [None, True, False]
VALUES += [-4, -1, 0, 1, 2, 3, 0.5, 1e300, 1e-300, float("inf"), float("nan")]
VALUES += [10**30, -(2**63), 2**63]
VALUES += ["", " ", "word", "x" * 10**5, "\ud83d", "\x00", "../x", "nan", [], [[1]], [1, 2], ["word"], {}, {"a": 1}]
VALUES.append([0.5] * 3)
WORDS = ["", " ", "word", "-1", "0", "1", "2", "0.5", "-0.0", "nan", "inf", "-inf", "1e300", "1e-300", "10000000"]
# At these absolute paths no folder can be made, so the fuzzer leaves none behind.
WORDS += ["x" * 10**5, str(2**63 - 1), str(2**63), "1:0", "1e400:1", "16:9", "/proc/nowhere", ".", "/proc", "meta"]
WORDS += ["\ud83d", "cat \ud83d", "a\x00b", "caf\udce9"]


@contextlib.contextmanager
def limited(seconds: float):
    """Raises TimeoutError within the block after so many seconds."""

    def late(*_):
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """ "accepted", "refused", "traceback" or "hang"; and what happened, for the last two."""
    began = time.monotonic()
    try:
        with limited(SECONDS), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call()
        word, why = "accepted", ""
    except TimeoutError as error:
        return "hang", str(error)
    except (ValueError, OSError, FloatingPointError) as error:
        # A UnicodeEncodeError is a ValueError by accident: nobody meant it as a message for the user.
        unmeant = isinstance(error, UnicodeError) or not str(error).strip()
        word, why = ("traceback", traceback.format_exc()) if unmeant else ("refused", "")
    except SystemExit as end:
        word, why = ("accepted" if end.code in (0, None) else "refused"), ""
    except BaseException:  # what would reach the user as a traceback
        word, why = "traceback", traceback.format_exc()
    return ("hang", "too slow") if time.monotonic() - began > SECONDS else (word, why)


def places(tree, path: tuple = ()) -> list[tuple]:
    """The paths of all values in nested dictionaries and lists."""
    paths = [path] if path else []
    items = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    for key, value in items[:40]:
        paths += places(value, (*path, key))
    return paths


def mutate_json(text: str, rng: random.Random) -> str:
    """A JSON text with one thing changed: a value, a key, a byte, a deep nest, a key that is there twice."""
    way = rng.randrange(8)
    if way == 0:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice(["", "{", "]", '"', "\x00", "9" * 500]) + text[at + rng.randrange(3) :]
    if way == 1:
        return rng.choice([DEEP, "", "null", "[]", "{}", text + text, text.replace("{", '{"a": 1, "a": 2, ', 1)])
    tree = json.loads(text)
    path = rng.choice(places(tree))
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    if way == 2:
        del holder[path[-1]]
    elif way == 3 and isinstance(holder, dict):
        holder[rng.choice(["", "word", "_note", "size"])] = rng.choice(VALUES)
    else:
        holder[path[-1]] = rng.choice(VALUES)
    return json.dumps(tree)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut off, doubled or added."""
    content = bytearray(content)
    way = rng.randrange(5)
    if way == 0:
        return bytes(content[: rng.randrange(len(content))])
    if way == 1:
        at = rng.randrange(len(content))
        return bytes(content[:at] + rng.randbytes(rng.randrange(1, 50)) + content[at:])
    head = min(len(content), 400) if way < 4 else len(content)  # headers decide more than pixels
    for _ in range(rng.choice([1, 2, 8, 40])):
        content[rng.randrange(head)] = rng.randrange(256)
    return bytes(content)


def write_originals(home: Path) -> dict:
    """What is mutated, made in a folder: a tiny checkpoint, a LoRA, prompts with pictures, a run, an evaluated row.

    "home": the folder. "checkpoint": the folder of the checkpoint. "words": the arguments of the run, without its folder.
    """
    checkpoint = reference.write_checkpoint(home / "checkpoint", resolution=64)
    for i in range(3):
        reference.picture(48, 40, i).save(home / f"{i}.png")
    lines = [{"task": "t2i", "category": "text", "prompt": "a hat", "target": "0.png"}]
    lines += [{"task": "edit", "category": "scene", "prompt": "make it red", "images": ["1.png"], "target": "2.png"}]
    (home / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = train.Network(sample.MMDiT.from_pretrained(checkpoint / "transformer")).model
    lora = {name: (a, torch.randn_like(b), alpha) for name, (a, b, alpha) in new_lora(model, 2).items()}
    write_lora(home / "lora.safetensors", lora, [1.0, 0.5])
    words = ["--checkpoint", str(checkpoint), "--prompts", str(home / "prompts.jsonl")]
    words += "--batch 2 --micro-batch 1 --steps 1 --dtype float32".split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*words, "--out", str(home / "run"), "--student-steps", "2", "--recipe", "flash"])
    row = {"name": "a", "nfe": 4, "guidance": 1.0, "seconds_per_image": 0.1, "cases": {"t2i": 2}, "t2i_interval": 0.1}
    for part in ("t2i", "t2i_compliance", "t2i_attributes", "t2i_fidelity"):
        row[part] = {"landscape": 0.5, "portrait": 0.5, "text": 0.5, "average": 0.5}
    row["t2i_diversity"] = {"distance": {"average": 0.1}, "modes": {"average": 2.0}, "of": 8}
    write_row(home / "row.json", row)
    return {"home": home, "checkpoint": checkpoint, "words": words}


def arguments(flags: list[str], fixed: list[str], rng: random.Random) -> list[str]:
    """A command line: what is fixed, and one to three flags with nonsense behind them."""
    words = list(fixed)
    for flag in rng.sample(flags, rng.choice([1, 1, 2, 3])):
        words += [flag, *rng.choices(WORDS, k=rng.choice([1, 1, 1, 2]))]
    return words


SAMPLE = "prompt image prompt-file negative-prompt guidance steps sigmas height width aspect resolution seed num-images"
SAMPLE += " out checkpoint lora export base rank device dtype"
TRAIN = "objective checkpoint prompts pool recipe out cache teacher lora-rank guidance resolution student-steps steps"
TRAIN += " batch micro-batch seed save-every panel-every device dtype gpus renoise-times muon-lr lr"
TRAIN += " fake-muon-lr fake-lr fake-updates warmup decay clip ema time-shift text-dropout"
EVAL = "checkpoint json out steps guidance bench cases prompts pictures seed name judge judge-model judge-key parallel"
EVAL += " timeout table variety reference"


def flags(names: str) -> list[str]:
    return [f"--{name}" for name in names.split()]


def job(surface: str, rng: random.Random, folder: Path, originals: dict) -> Callable[[], object]:
    """One call of a surface, with its input written into `folder`."""
    home, checkpoint = originals["home"], originals["checkpoint"]
    drawing = ["--checkpoint", str(checkpoint), "--prompt", "a hat", "--steps", "1", "--out", str(folder / "out.png")]
    if surface == "sample.py: arguments":
        words = arguments(flags(SAMPLE), drawing, rng)
        return lambda: sample.main(words)
    if surface == "train.py: arguments":
        words = arguments(flags(TRAIN), [*originals["words"], "--out", str(folder / "run")], rng)
        return lambda: train.main(words)
    if surface == "eval.py: arguments, tables, pictures":
        return eval_job(rng, folder, originals)
    if surface == "JSON lines":
        lines = (home / "prompts.jsonl").read_text().splitlines()
        lines[rng.randrange(2)] = mutate_json(rng.choice(lines), rng)
        for i in range(3):
            shutil.copy(home / f"{i}.png", folder)
        (folder / "prompts.jsonl").write_text("\n".join(lines), "utf-8", "surrogatepass")
        return lambda: read_prompts([folder / "prompts.jsonl"])
    if surface == "pictures":
        return picture_job(rng, folder)
    if surface == "fingerprints":
        return fingerprint_job(rng, folder, originals)
    if surface == "list options":
        return list_job(rng)
    if surface == "LoRA":
        lora_file(home / "lora.safetensors", folder / "lora.safetensors", rng)
        model = sample.MMDiT.from_pretrained(checkpoint / "transformer", device="meta")
        return lambda: read_lora(folder / "lora.safetensors", model)
    if surface == "--resume":
        shutil.copytree(home / "run", folder / "run")
        files = [file for file in (folder / "run").rglob("*") if "student/" not in str(file)]
        spoil(rng.choice(with_ending(files, ".json", ".jsonl", ".safetensors")), rng)
        words = [*originals["words"], "--steps", "2", "--student-steps", "2", "--recipe", "flash"]
        words += ["--resume", "--out", str(folder / "run")]
        return lambda: train.main(words)
    shutil.copytree(checkpoint, folder / "checkpoint")
    files = sorted(file for file in (folder / "checkpoint").rglob("*") if file.is_file())
    if surface == "configs, tokenizer, scheduler":
        file = rng.choice(with_ending(files, ".json"))
        file.write_text(mutate_json(file.read_text(), rng), "utf-8", "surrogatepass")
    elif surface == "safetensors":
        spoil(rng.choice(with_ending(files, ".safetensors")), rng)
    else:
        mislay(files, rng)
    words = [*drawing[2:], "--checkpoint", str(folder / "checkpoint"), "--image", str(home / "0.png")]
    return lambda: sample.main(words)


def with_ending(files: list[Path], *endings: str) -> list[Path]:
    return [file for file in files if file.suffix in endings]


def eval_job(rng: random.Random, folder: Path, originals: dict) -> Callable[[], object]:
    home = originals["home"]
    way = rng.randrange(3)
    if way == 0:
        fixed = ["--checkpoint", str(originals["checkpoint"]), "--out", str(folder / "out")]
        words = arguments(flags(EVAL), fixed, rng)
    elif way == 1:
        row = (home / "row.json").read_text()
        row = mutate_json(row, rng) if rng.random() < 0.9 else row
        (folder / "row.json").write_text(row, "utf-8", "surrogatepass")
        words = ["--table", str(home / "row.json"), str(folder / "row.json")]
    else:
        (folder / "pictures").mkdir()
        words = ["--prompts", str(home / "prompts.jsonl"), "--out", str(folder / "out")]
        with contextlib.redirect_stdout(io.StringIO()) as listed:
            evaluation.main([*words[:2], "--list"])
        for line in listed.getvalue().splitlines():
            file = folder / "pictures" / json.loads(line)["picture"]
            picture = (home / "0.png").read_bytes()
            file.write_bytes(mutate_bytes(picture, rng) if rng.random() < 0.8 else picture)
        words += ["--pictures", str(folder / "pictures")]
    return lambda: evaluation.main(words)


def fingerprint_job(rng: random.Random, folder: Path, originals: dict) -> Callable[[], object]:
    """Any other byte in a file that is read makes another fingerprint. Other files and new time stamps do not."""
    place = folder / "checkpoint"
    shutil.copytree(originals["checkpoint"], place)
    if rng.random() < 0.3:
        place = place / rng.choice(["transformer", "vae", "text_encoder", "processor"])
    before = fingerprint(place, kept=folder / "kept.json")
    file, kept = rng.choice(files_read(place)), rng.choice([None, folder / "kept.json"])
    change = rng.choice(["byte", "byte", "byte", "longer", "shorter", "touched", "foreign"])
    content, at = bytearray(file.read_bytes()), rng.randrange(file.stat().st_size)
    content[at] ^= rng.randrange(1, 256)
    texts = {"byte": content, "longer": content + b" ", "shorter": content[:-1]}
    if change in texts:
        file.write_bytes(texts[change])
    elif change == "touched":
        file.touch()
    else:
        (file.parent / rng.choice([".DS_Store", "._config.json", "Thumbs.db", "notes.txt", "model.bin"])).touch()
    if rng.random() < 0.2:
        (folder / "kept.json").write_bytes(mutate_bytes(b'{"files": {}, "checksum": ""}', rng))

    def compare() -> None:
        assert (fingerprint(place, kept=kept) != before) == (change in texts), f"{change}: {file}, byte {at}"

    return compare


def list_job(rng: random.Random) -> Callable[[], object]:
    """A list is the same, however it is divided over repeated flags."""
    parse, fixed, name = rng.choice(
        [
            (train.parse, [], "prompts"),
            (train.parse, [], "teacher"),
            (eval_options.parse, ["--out", "o", "--prompts", "p"], "judge"),
            (eval_options.parse, [], "table"),
            (sample_options.parse, ["--prompt", "p"], "image"),
            (sample_options.parse, ["--prompt", "p"], "lora"),
        ]
    )
    values = [f"name{i}" for i in range(rng.randrange(1, 6))]
    words = list(fixed)
    for i, value in enumerate(values):
        words += [f"--{name}", value] if i == 0 or rng.random() < 0.5 else [value]

    def compare() -> None:
        assert [str(value) for value in getattr(parse(words), name)] == values, words

    return compare


def picture_job(rng: random.Random, folder: Path) -> Callable[[], object]:
    kind = rng.choice("png jpg webp tiff gif bmp avif ppm tga ico jp2 pcx dds sgi".split())
    mode = rng.choice(["RGB", "RGB", "RGBA", "L", "P", "CMYK", "1", "I;16"])
    picture, extra = reference.picture(rng.choice([1, 33, 64]), rng.choice([1, 40, 64]), 5), {}
    if kind in ("jpg", "png", "webp", "tiff", "avif") and rng.random() < 0.5:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 65535, "left"])
        extra["exif"] = exif
    file, content = folder / f"picture.{kind}", io.BytesIO()
    try:
        picture.convert(mode).save(content, Image.registered_extensions()[f".{kind}"], **extra)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SystemError, struct.error):  # a mode it lacks
        content = io.BytesIO()
        picture.save(content, "PNG")
    file.write_bytes(mutate_bytes(content.getvalue(), rng) if rng.random() < 0.9 else content.getvalue())

    def both() -> None:
        assert fit(file, 64).size == fitted_size(file, 64)  # an AssertionError is a fault, too

    return both


def spoil(file: Path, rng: random.Random) -> None:
    """Mutate a file of a run or of a checkpoint by what it is."""
    if file.suffix == ".json":
        file.write_text(mutate_json(file.read_text(), rng), "utf-8", "surrogatepass")
        return
    way = rng.randrange(4)
    if file.suffix != ".safetensors" or way == 0:
        file.write_bytes(mutate_bytes(file.read_bytes() or b"{}\n", rng))
    elif way == 1:
        change = rng.choice(["missing", "renamed", "empty"])
        if change == "missing":
            file.unlink()
        elif change == "renamed":
            file.rename(file.with_name("stray.safetensors"))
        else:
            file.write_bytes(b"")
    else:
        tensors = load_file(file)
        name = rng.choice(sorted(tensors))
        change = rng.randrange(6)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[rng.choice(["", "word", name + ".x"])] = torch.zeros(2)
        elif change == 2:
            tensors[name] = tensors[name].to(rng.choice([torch.int64, torch.bool, torch.int8, torch.float64]))
        elif change == 3:
            tensors[name] = tensors[name][None].contiguous()
        elif change == 4:
            tensors[name] = torch.full_like(tensors[name].float(), rng.choice([torch.nan, torch.inf, 1e38]))
        else:
            tensors[name] = torch.zeros(rng.choice([(0,), (1,), (3, 0, 2)]))
        save_file(tensors, file, rng.choice([None, {"format": "pt"}, {"sample_sigmas": "[1]"}]))


def lora_file(original: Path, file: Path, rng: random.Random) -> None:
    """Write a LoRA with one thing changed: a tensor, a name, or the header."""
    tensors, header = load_file(original), {}
    name = rng.choice(sorted(tensors))
    way = rng.randrange(8)
    if way == 0:
        tensors[rng.choice(["lora_unet_" + name.replace(".", "_", 3), "transformer." + name, "word"])] = tensors[name]
    elif way == 1:
        tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.bool, torch.float64]))
    elif way == 2:
        shape = rng.choice([(), (0,), (2, 2), (1, 1, 1)])
        tensors[name] = torch.full(shape, rng.choice([0.0, torch.nan, 1e39]), dtype=torch.float64)
    elif way == 3:
        del tensors[name]
    elif way == 4:
        settings = VALUES + [{"transformer.lora_alpha": value} for value in VALUES] + [int("9" * 400)]
        header["lora_adapter_metadata"] = rng.choice([json.dumps(rng.choice(settings)), DEEP, "{"])
    elif way == 5:
        header["sample_sigmas"] = rng.choice([json.dumps(rng.choice(VALUES)), "[1, 0.5", DEEP, "[0.5, 1]", "[1e400]"])
    else:
        for key in sorted(tensors)[: rng.randrange(1, 4)]:
            tensors[rng.choice(["dora_scale", key + "_x", key.replace(".", "..")])] = tensors.pop(key)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file, header)
    if rng.random() < 0.3:
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))


def mislay(files: list[Path], rng: random.Random) -> None:
    """Move, remove, split or replace a checkpoint's files."""
    file, way = rng.choice(files), rng.randrange(5)
    if way == 0:
        file.unlink()
    elif way == 1:
        shutil.rmtree(file.parent)
    elif way == 2:
        file.unlink()
        file.mkdir()
    elif way == 3:
        file.write_bytes(rng.choice([b"", b"version https://git-lfs.github.com/spec/v1\n", rng.randbytes(300)]))
    else:  # in shards, with an index that may be wrong
        file = rng.choice(with_ending(files, ".safetensors"))
        tensors = load_file(file)
        names = sorted(tensors)
        weight_map = {}
        for i in range(2):
            shard = file.with_name(f"{file.stem}-0000{i + 1}-of-00002.safetensors")
            weight_map |= dict.fromkeys(names[i::2], shard.name)
            save_file({name: tensors[name] for name in names[i::2]}, shard)
        file.unlink()
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        text = rng.choice([text, mutate_json(text, rng), text.replace(names[0], "word.weight", 1)])
        file.with_name(f"{file.stem}.safetensors.index.json").write_text(text, "utf-8", "surrogatepass")


def try_inputs(surface: str, first: int, count: int, originals: dict, folder: Path) -> tuple[Counter, list[str]]:
    """Try `count` inputs of a surface, from number `first` on: how they ended, and the faults."""
    words, faults = Counter(), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(originals["home"]))
        if surface != "--resume":  # the others end where the training begins
            stack.enter_context(mock.patch.object(train, "train", lambda *_: originals["home"] / "run" / "student"))
        for i in range(first, first + count):
            rng, place = random.Random(f"{surface} {i}"), folder / str(i)
            place.mkdir()
            word, why = outcome(job(surface, rng, place, originals))
            words[word] += 1
            if why:
                faults.append(f"{surface}, input {i}: {word}\n{why}")
            shutil.rmtree(place, ignore_errors=True)
    return words, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each surface [0]")
    parser.add_argument("--count", type=int, help="inputs of each surface; default: some 11,000 of all together")
    parser.add_argument("--surface", nargs="+", choices=COUNTS, default=list(COUNTS), help="default: all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("accepted", "refused", "traceback", "hang")
    failed = False
    print(f"| surface | inputs | {' | '.join(columns)} |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryDirectory() as folder:
        originals = write_originals(Path(home))
        for surface in args.surface:
            count = args.count or COUNTS[surface]
            words, faults = try_inputs(surface, args.first, count, originals, Path(folder))
            print(f"| {surface} | {count} | {' | '.join(str(words[word]) for word in columns)} |", flush=True)
            for fault in faults:
                print(fault.rstrip(), file=sys.stderr, flush=True)
            failed = failed or bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
