"""What several test files share."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from chat_server import Server
from PIL import Image
from random_networks import randomise
from torch import nn

from data.encode import How, encode_prompts
from data.pool import Pool
from data.prompts import read_prompts
from model import MMDiT, MMDiTConfig
from networks.vae import VAE, VAEConfig
from plane.forks import copy_sources
from toy.build import stages as build

# Two workers share the tests (pyproject.toml): one thread for each of them, and for the programs that they start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint like toy/checkpoint, made by the same code, with tiny random networks: it draws 128 x 128 nonsense."""
    folder = tmp_path_factory.mktemp("toy") / "checkpoint"
    build.build_language(folder)
    vae = VAE(VAEConfig(base_dim=4, decoder_base_dim=4, num_res_blocks=1))
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    mmdit = MMDiT(MMDiTConfig(context_in_dim=128, **sizes))
    randomise(nn.ModuleList([vae, mmdit]), 0)
    for name, parameter in mmdit.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            parameter.data *= 2  # sharp attention: words and places then matter
    vae.save_pretrained(folder / "vae")
    mmdit.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random checkpoint that diffusers and transformers wrote, with one specialised teacher, which the default
    recipe calls for edits. For all tests: whoever changes something takes a copy."""
    import reference  # here, because diffusers takes seconds to import

    folder = reference.write_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint", resolution=96)
    reference.write_transformer(folder / "teachers", seed=7)
    (folder / "teachers" / "transformer").rename(folder / "teachers" / "edit")
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """JSON lines of both tasks, two categories each; sources of odd sizes and modes, in two layouts."""
    import reference

    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for i in range(4):
        reference.picture(64, 64, i).save(folder / f"target{i}.png")
        size = (100, 40) if i == 3 else (41 + i, 43)
        reference.picture(*size, 10 + i, mode="RGBA" if i % 2 else "L").save(folder / f"source{i}.png")
        line = {"task": "t2i", "category": ["portrait", "text"][i % 2], "prompt": f"a wizard{' hat' * i}"}
        lines.append(line | {"target": f"target{i}.png"})
        line = {"task": "edit", "category": ["scene", "style"][i % 2], "prompt": f"make the sky red{', red' * i}"}
        lines.append(line | {"images": [f"source{i}.png"], "target": f"target{i}.png"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "prompts.jsonl"


@pytest.fixture(scope="session")
def pools(checkpoint, prompts, tmp_path_factory) -> dict[str, Pool]:
    folder, listed = tmp_path_factory.mktemp("pools"), read_prompts([prompts])
    return {o: encode_prompts(folder, listed, checkpoint, How(64, targets=o == "flow")) for o in ("flow", "dmd")}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    """What is said once in a program is said once in each test."""
    monkeypatch.setattr("program.edges._said", set())


@pytest.fixture
def forked(tmp_path, monkeypatch) -> Iterator[Callable[[str], Callable[[str], ModuleType]]]:
    """forked(NAME)(MODULE): a module of a copy that forks/NAME.patch has changed. Until the test ends the copy's modules
    stand in for this project's own."""

    def change(name: str) -> Callable[[str], ModuleType]:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        copy_sources(folder, name)
        for file in folder.rglob("*.py"):
            module = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
            if module in sys.modules and not module.startswith("tests"):
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.syspath_prepend(str(folder))

        def load(module: str) -> ModuleType:
            loaded = importlib.import_module(module)
            assert Path(loaded.__file__).is_relative_to(folder)
            return loaded

        return load

    yield change
    for module, loaded in list(sys.modules.items()):
        if (getattr(loaded, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[module]


@pytest.fixture
def small_run(toy_checkpoint, tmp_path) -> list[str]:
    """train.py's words for a small run with a prompt of each task."""
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    lines = [{"task": "t2i", "category": "portrait", "prompt": "A portrait."}]
    lines += [{"task": "edit", "category": "scene", "prompt": "Make it night.", "images": ["photo.png"]}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = f"--checkpoint {toy_checkpoint} --prompts {tmp_path / 'mine.jsonl'} --resolution 64 --guidance 2"
    return [*words.split(), *"--batch 6 --micro-batch 2 --dtype float32 --warmup 0".split()]


@pytest.fixture
def serve() -> Iterator[Callable[[Callable], Server]]:
    """serve(answer): a chat server that stops with the test."""
    servers = []

    def start(answer: Callable) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
