"""Bad input is one clear error: a table of rows (surface, damage, the words expected).

A surface is a function that gets the damage to something that is otherwise in order, and meets it as a user would. Its
error is a ValueError or an OSError in one line, which says what it is about; no command has written anything by then.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from test_recipe import rule

import eval as evaluation
import recipe
import sample
import train
from checkpoint.files import build_config
from checkpoint.layout import Drawing, Scheduler
from checkpoint.lora import new_lora, read_lora, write_lora
from data.encode import How, encode_prompts
from data.prompts import Prompt, read_prompts
from experiments.options import LongOptions, RecordOptions, TableOptions
from judges import rubrics
from judges.chat import Chat
from model import Condition, MMDiT, MMDiTConfig
from networks.qwen3vl import PixelSettings, Qwen3VL, TextConfig, VisionConfig
from networks.vae import VAE, VAEConfig
from program import options
from program.eval_options import EvalOptions
from program.sample_options import SampleOptions
from program.writing_options import WritingOptions
from recipe import Recipe
from sample import Pipeline
from training.options import TrainOptions

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory) -> Path:
    """A student of two steps, as a LoRA."""
    file = tmp_path_factory.mktemp("lora") / "two.safetensors"
    write_lora(file, new_lora(MMDiT.from_pretrained(checkpoint / "transformer"), 2), [1.0, 0.5])
    return file


@pytest.fixture
def given(checkpoint, toy_checkpoint, prompts, lora, tmp_path, monkeypatch) -> SimpleNamespace:
    """What the surfaces start from: two checkpoints to read, a LoRA, a folder to write to, and a copy of a checkpoint's
    part in that folder, or of the whole."""

    def copied(part: str = ".") -> Path:
        return shutil.copytree(checkpoint / part, tmp_path / "copy" / part)

    monkeypatch.chdir(tmp_path)
    places = dict(checkpoint=checkpoint, toy=toy_checkpoint, prompts=prompts, lora=lora, folder=tmp_path)
    return SimpleNamespace(**places, copied=copied)


def edit_json(path: Path, key: str, value: object) -> None:
    """Set `section.key` of a JSON file; `...` takes it out."""
    content = section = json.loads(path.read_text())
    *outer, last = key.split(".")
    for name in outer:
        section = section[name]
    section[last] = value
    if value is ...:
        del section[last]
    path.write_text(json.dumps(content))


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of a file, with __ for the dots of their names; None takes one out."""
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


# ---- prompts ---------------------------------------------------------------------------------------------------------

T2I = {"task": "t2i", "category": "portrait", "prompt": "a face"}
EDIT = {"task": "edit", "category": "scene", "prompt": "at night", "images": ["pictures/a.png"]}


def prompt_line(given, line: dict | str | bytes) -> None:
    """The third line of a file of prompts."""
    (given.folder / "pictures").mkdir()
    reference.picture(4, 4).save(given.folder / "pictures" / "a.png")
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    (given.folder / "bad.jsonl").write_bytes(json.dumps(T2I).encode() + b"\n\n" + line)
    with named(r"bad\.jsonl, line 3: "):
        read_prompts([given.folder / "bad.jsonl"])


PROMPT_LINES = [
    ('{"task": "t2i", ', "not valid JSON"),
    (b'{"task": "\xff"}', "not valid JSON"),
    ('["t2i"]', "must be a JSON object"),
    (T2I | {"negative": ""}, r"unknown key \['negative'\]"),
    ({"task": "t2i", "prompt": "a face"}, "'category' is missing"),
    (T2I | {"prompt": 3}, "'prompt' must be a text"),
    (T2I | {"prompt": " "}, "'prompt' must be a text that is not empty"),
    (T2I | {"target": ["pictures/a.png"]}, "'target' must be a text"),
    (T2I | {"task": "video"}, "'task' must be one of.*'video'"),
    (T2I | {"images": ["pictures/a.png"]}, "t2i takes no 'images'"),
    (EDIT | {"images": []}, "an edit needs its source"),
    (EDIT | {"images": "x" * 3000}, r"'images' must be a list of paths, not .*\.\.\.$"),
    (EDIT | {"images": [1]}, "'images' must be a list"),
    (EDIT | {"images": ["pictures/a.png", "pictures/c.png"]}, r"no picture at .*pictures/c.png"),
    (EDIT | {"target": "pictures"}, "no picture at .*pictures"),
    (EDIT | {"images": ["x" * 300]}, "no picture at 'x{59}...: File name too long"),
    (EDIT | {"images": ["x/" * 1500]}, r"no picture at '(x/){29}x\.\.\.$"),
    (EDIT | {"images": ["x" * 200]}, "no picture at /.*/x{200}$"),  # a path of the usual length is not cut
    (T2I | {"x" * 3000: 1}, r"unknown key .*\.\.\.; known are"),
    ('{"%s": 1, "%s": 2}' % (("x" * 3000,) * 2), r"key 'x*\.\.\. is given twice"),
    (EDIT | {"images": ["a\0b.png"]}, "no picture at"),
    (EDIT | {"images": ["pictures/a.png"] * 11}, "11 pictures in 'images'"),
    (r'{"task": "t2i", "category": "a", "prompt": "cat \ud83d"}', "'prompt' has half of a character"),
    (r'{"task": "edit", "category": "a", "prompt": "b", "images": ["\ud83d.png"]}', "'images' has half of a char"),
    (T2I | {"prompt": "cat" * 10_000}, "'prompt' has 30,000 characters"),
    (T2I | {"prompt": "a <|image_pad|>"}, "which stands for a picture"),
    ('{"task": "t2i", "category": "a", "prompt": "b", "prompt": "c"}', "is given twice"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
]


def prompt_file(given, content: bytes | None) -> None:
    """A whole file of prompts. None: a folder in its place."""
    file = given.folder / "prompts.jsonl"
    file.mkdir() if content is None else file.write_bytes(content)
    with named("prompts.jsonl"):
        read_prompts([file])


LINE = json.dumps(T2I)
PROMPT_FILES = [
    (b"\n", "no prompts"),
    (None, "no such file"),
    (LINE.encode("utf-16") + b"\n", "begins as UTF-16 but is not"),
    (LINE.encode("utf-16-le"), "zero bytes, like UTF-16 without its mark"),
]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def config(given, damage: tuple[str, str, object]) -> None:
    """A key of a config file, through the whole checkpoint: (file, section.key, value); `...` takes the key out."""
    file, key, value = damage
    folder = given.copied()
    edit_json(folder / file, key, value)
    with named(re.escape(file)):
        Pipeline.from_pretrained(folder)


ENCODER, NETWORK, AUTOENCODER = (f"{folder}/config.json" for folder in ("text_encoder", "transformer", "vae"))
SCHEDULER, PICTURES = "scheduler/scheduler_config.json", "processor/preprocessor_config.json"
CONFIGS = [  # file, key, values that are refused, words (left out: the key itself)
    (ENCODER, "text_config.num_attention_heads", [3], "num_key_value_heads is 2"),
    (ENCODER, "text_config.num_hidden_layers", [...]),
    (ENCODER, "text_config.rms_norm_eps", [NAN]),
    (ENCODER, "text_config.rope_parameters", ["word"]),
    (ENCODER, "text_config.rope_parameters.rope_type", ["yarn"]),
    (ENCODER, "text_config.rope_parameters.mrope_section", [[12, 2, 3]]),
    (ENCODER, "text_config.hidden_act", ["gelu"]),
    (ENCODER, "text_config.attention_bias", [True]),
    (ENCODER, "vision_config.num_position_embeddings", [35]),
    (ENCODER, "vision_config.deepstack_visual_indexes", [[0, 4], [1, 1]]),
    (ENCODER, "vision_config.num_heads", [3, 16]),
    (ENCODER, "vision_config.hidden_act", ["silu"]),
    (ENCODER, "vision_config.out_hidden_size", [32]),
    (ENCODER, "image_token_id", ["1", 10**6, -1, None]),
    (NETWORK, "shift", [1], "unknown key 'shift'"),
    (NETWORK, "num_layers", ["2"], "num_layers.*'2'"),
    (NETWORK, "axes_dims_rope", [[8, 12, 14]], r"axes_dims_rope is \(8, 12, 14\)"),
    (NETWORK, "patch_size", [2], "patch_size is 2"),
    (AUTOENCODER, "z_dim", [32], "latents_mean has 64 values"),
    (AUTOENCODER, "dim_mult", [[], [1] * 40, [1, 2, 3, 4, 5]]),  # no whole groups from 4 to 5
    (AUTOENCODER, "temperal_downsample", [[True, True]]),
    (AUTOENCODER, "latents_std", [[1.0] * 63, [1.0] * 63 + [0.0]]),
    (AUTOENCODER, "temporal_downsample", [[True]], "unknown key 'temporal_downsample'"),
    (SCHEDULER, "max_image_seq_len", [256], "base_image_seq_len is 256"),
    (SCHEDULER, "extra", [True]),
    (PICTURES, "image_std", [[0.0] * 3]),
    (PICTURES, "size", [5, {"shortest_edge": -1, "longest_edge": 5}], "size|edge"),
    ("model_index.json", "_class_name", ["FluxPipeline"], "FluxPipeline"),
    ("model_index.json", "sample_sigmas", [[0.5, 1.0]]),
    ("model_index.json", "resolution", ["big"]),
    ("model_index.json", "boundary", [1], "unknown key 'boundary'"),
]


def config_text(given, text: str) -> None:
    """A config file that is no config."""
    file = given.copied() / NETWORK
    file.write_text(text)
    with named(re.escape(str(file))):
        Pipeline.from_pretrained(file.parents[1])


CONFIG_TEXTS = [
    ("[" * 10_000 + "]" * 10_000, "config.json"),
    ('{"a":' * 10_000 + "1" + "}" * 10_000, "config.json"),
    ("1" * 5000, "config.json"),
    ('{"eps": 1, "eps": 2}', "config.json"),
    ('{"axes_dims_rope": ' + "[" * 900 + "8" + "]" * 900 + "}", "config.json"),
    ("", "config.json"),
    ("\ufeff{}", "config.json"),
    ("null", "config.json"),
    ("[]", "object"),
    ('{\n"eps": 1e', "line 2"),
]


def missing(given, name: str) -> None:
    """A part of a checkpoint that is not there, or the whole."""
    path = given.copied() / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Pipeline.from_pretrained(given.folder / "copy")


PLACES = ("model_index.json", SCHEDULER, AUTOENCODER, "text_encoder", "transformer", "vae", "processor", ".")
MISSING = [(name, name) for name in PLACES]


def tokenizer(given, change: Callable[[dict], object]) -> None:
    """processor/tokenizer.json."""
    file = given.copied() / "processor" / "tokenizer.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with named("tokenizer.json"):
        encoder = Qwen3VL.from_pretrained(file.parents[1])
        encoder.encode(["a"], None)
        encoder.encode(["a"], [[reference.picture(64, 64)]])


def without(token: str) -> Callable[[dict], object]:
    return lambda whole: whole | {"added_tokens": [e for e in whole["added_tokens"] if e["content"] != token]}


def split_slots(whole: dict) -> dict:
    """The vocabulary still has the token of a picture, but the template's text is cut into other ones."""
    tokens = [token | {"normalized": True} for token in whole["added_tokens"]]
    return whole | {"normalizer": {"type": "Prepend", "prepend": "x"}, "added_tokens": tokens}


TOKENIZERS = [
    *((without(token), re.escape(token)) for token in ("<|im_end|>", "<|im_start|>", "<|vision_end|>")),
    (lambda whole: whole | {"model": 5}, "tokenizer.json"),
    (lambda whole: whole | {"added_tokens": 5}, "tokenizer.json"),
    (lambda whole: {}, "tokenizer.json"),
    (lambda whole: [], "tokenizer.json"),
    (split_slots, r"makes \[0\] tokens <\|image_pad\|> of prompts with 4 each"),
]


def weights(given, damage: tuple[str, str, float | torch.dtype]) -> None:
    """One value of one tensor, or its type: (folder, tensor, value or type)."""
    folder, name, value = damage
    (file,) = given.copied().glob(f"{folder}/*.safetensors")
    tensor = load_file(file)[name]
    if isinstance(value, torch.dtype):
        tensor = tensor.to(value)
    else:
        tensor.view(-1)[3] = value
    edit_weights(file, **{name: tensor})
    with named(f"{file}: {name}"):
        Pipeline.from_pretrained(given.folder / "copy")(reference.PROMPT, steps=1)


WEIGHTS = [
    (("vae", "decoder.conv_out.bias", NAN), "not finite"),
    (("text_encoder", "model.language_model.layers.1.mlp.up_proj.weight", INF), "not finite"),
    (("transformer", "proj_out.weight", NAN), "not finite"),
    (("transformer", "proj_out.weight", torch.int32), "has the type I32"),
]


def vae_weights(given, changes: dict[str, torch.Tensor | None]) -> None:
    folder = given.copied("vae")
    edit_weights(folder / FILE, **changes)
    VAE.from_pretrained(folder)


VIDEO = "encoder.down_blocks.0.downsampler.time_conv.weight"  # of a level that halves space alone
VAE_WEIGHTS = [({VIDEO: torch.zeros(8, 8, 1, 1)}, f"safetensors.*{VIDEO}")]


def network_folder(given, damage: tuple[bool, Callable[[Path], object]]) -> None:
    """The MMDiT's folder: (in shards?, what is done to it)."""
    sharded, change = damage
    folder = given.copied("transformer")
    if sharded:
        folder = given.folder / "sharded" / "transformer"
        reference.write_transformer(folder.parent, shard_size="200KB")
    change(folder)
    with named(str(folder)):
        MMDiT.from_pretrained(folder)


def move_in_index(folder: Path, **changes: object) -> None:
    """Set the files of tensors; None takes a tensor out."""
    content = json.loads((folder / INDEX).read_text())
    files = content["weight_map"] | {name.replace("__", "."): file for name, file in changes.items()}
    content["weight_map"] = {name: file for name, file in files.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(content))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*-00001-of-*.safetensors"))[0]


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


NETWORK_FOLDERS = [
    ((False, shutil.rmtree), r"config\.json"),
    ((False, lambda d: (d / "config.json").unlink()), r"config\.json"),
    ((False, lambda d: (d / FILE).unlink()), rf"{FILE}.*{INDEX}"),
    ((True, lambda d: (d / FILE).touch()), rf"{FILE}.*{INDEX}"),
    ((False, lambda d: cut_off(d / FILE)), rf"{FILE}: not a whole"),
    ((False, lambda d: (d / FILE).write_bytes(b"PK" * 99)), rf"{FILE}: not a whole"),
    ((False, lambda d: edit_weights(d / FILE, img_in__bias=torch.ones(1))), rf"{FILE}: tensor img_in\.bias"),
    ((False, lambda d: edit_weights(d / FILE, img_in__weight=None)), rf"{FILE}: tensor img_in\.weight is missing"),
    ((False, lambda d: edit_json(d / "config.json", "in_channels", 9)), r"img_in\.weight has shape \[64, 64\].*\[64, 9\]"),
    ((False, lambda d: edit_json(d / "config.json", "num_layers", 1)), r"transformer_blocks\.1"),
    ((False, lambda d: edit_json(d / "config.json", "num_layers", 3)), r"transformer_blocks\.2"),
    ((True, lambda d: edit_json(d / INDEX, "weight_map", ...)), rf"{INDEX}: weight_map"),
    ((True, lambda d: first_shard(d).unlink()), r"model-00001-of-\d+\.safetensors: not a whole.*No such file"),
    ((True, lambda d: move_in_index(d, img_in__weight="../x.safetensors")), rf"{INDEX}.*img_in.*\.\./x"),
    ((True, lambda d: move_in_index(d, img_in__weight="/x.safetensors")), rf"{INDEX}.*img_in.*'/x"),
    ((True, lambda d: move_in_index(d, img_in__weight=3)), rf"{INDEX}.*img_in\.weight.*3"),
    ((True, lambda d: move_in_index(d, proj_out__weight=first_shard(d).name)), rf"{INDEX}: puts proj_out\.weight into"),
    ((True, lambda d: move_in_index(d, img_in__weight=None)), rf"{INDEX}: puts img_in\.weight into"),
]  # fmt: skip


# ---- LoRA files ------------------------------------------------------------------------------------------------------


def lora_file(given, damage: tuple[dict, dict]) -> None:
    """A file of these tensors, with this header."""
    tensors, header = damage
    file = given.folder / "other.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, file, header or None)
    with named(str(file)):
        read_lora(file, MMDiT.from_pretrained(given.checkpoint / "transformer"))


def lora_bytes(given, content: bytes | None) -> None:
    """A file that is none. None: no file."""
    file = given.folder / "none.safetensors"
    if content is not None:
        file.write_bytes(content)
    with named(str(file)):
        read_lora(file, MMDiT.from_pretrained(given.checkpoint / "transformer"))


LAYER = "transformer_blocks.0.attn.to_q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(4, 64), f"{LAYER}.lora_B.weight": torch.ones(64, 4)}
WHOLE = PAIR | {f"{LAYER}.alpha": torch.tensor(3.0)}


def fun_acc(layer: str) -> dict[str, torch.Tensor]:
    """As slmonker/ComfyUI-QwenImage21-Fun-PDD lists the keys of PAI's Qwen-Image-2.1-Fun-Acc-4Step."""
    return {
        f"{layer}.lora_down": torch.ones(4, 64),
        f"{layer}.lora_up": torch.ones(64, 4),
        "transformer_blocks.0.attn.norm_q.weight": torch.ones(32),
        "proj_out.weight": torch.ones(4, 64, 64),
    }


WEIGHT, ONE = f"{LAYER}.weight", torch.tensor(1.0)
EIGHT_BITS, BYTES = torch.ones(64, 64).to(torch.float8_e4m3fn), torch.ones(64, 32, dtype=torch.uint8)
LORA_FILES = [  # what other programs wrote, with the keys as public sources show them
    ((fun_acc(LAYER), {"format": "qwenimage21_extracted_prefused_v1"}),
     "a PDD student .Fun-Acc., which has an output layer for each of its steps; 2 of its 4 keys are unknown: proj_out"),
    ((fun_acc(LAYER), {}), "it replaces whole layers; 2 of its 4 keys are unknown: proj_out.weight"),
    ((PAIR | {f"{LAYER}.dora_scale": torch.ones(64, 1)}, {}), f"a DoRA, .*: {LAYER}.dora_scale"),  # ComfyUI
    ((PAIR | {f"{LAYER}.lora_magnitude_vector.weight": torch.ones(64)}, {}), "a DoRA"),  # peft
    (({WEIGHT: EIGHT_BITS, f"{WEIGHT}_scale": ONE}, {}),  # ComfyUI
     f"a network in scaled fp8 .*; 2 of its 2 keys are unknown: {WEIGHT}, {WEIGHT}_scale"),
    (({WEIGHT: EIGHT_BITS, f"{LAYER}.scale_weight": ONE, "scaled_fp8": EIGHT_BITS}, {}),  # ComfyUI's earlier
     "a network in scaled fp8"),
    (({WEIGHT: BYTES, f"{WEIGHT}.absmax": ONE, f"{WEIGHT}.quant_state.bitsandbytes__nf4": BYTES}, {}),
     "a network quantised by bitsandbytes"),
    (({f"{LAYER[:-4]}add_q_proj.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, {}),  # a LoRA for Qwen-Image
     "made for another network: transformer_blocks.0.attn.add_q_proj is no linear layer"),
]  # fmt: skip
LORA_CHANGES = [  # of a good file's tensors
    ({f"{LAYER}.lora_B.weight": None}, f"{LAYER} has only a, alpha"),
    ({f"{LAYER}.lora_B.weight": torch.ones(64, 5)}, rf"{LAYER} has A \[4, 64\] and B \[64, 5\], which make no product"),
    (dict(zip(PAIR, (torch.ones(0, 64), torch.ones(64, 0)))), f"{LAYER}.lora_A.* empty"),
    ({f"{LAYER}.lora_B.weight": torch.full((64, 4), torch.nan)}, f"{LAYER}.lora_B.* not finite"),
    ({f"{LAYER}.alpha": torch.ones(2)}, rf"{LAYER}.alpha has shape \[2\]; one number"),
    ({f"{LAYER}.lokr_w1": torch.ones(64)}, f"a LoKr or LoHa.*: {LAYER}.lokr_w1"),
    ({f"{LAYER}.hada_w1_a": torch.ones(64)}, "a LoKr or LoHa"),
    ({f"{LAYER}.lora_A.weight": torch.ones(4, 64, dtype=torch.int32)}, f"{LAYER}.lora_A.weight has the type I32"),
    ({f"transformer.{LAYER}.lora_A.weight": torch.ones(4, 64)}, f"gives the a of {LAYER} a second time"),
    ({"lora_unet_transformer_blocks_0_attn_to_q.alpha": ONE}, f"gives the alpha of {LAYER} a second time"),
    ({"some.lora_A.weight": torch.ones(2, 2), "some.lora_B.weight": torch.ones(2, 2)}, "some is no linear layer"),
    (dict.fromkeys([*PAIR, f"{LAYER}.alpha"]), "holds no LoRA"),
]
LORA_HEADERS = [  # of a good file
    ({"sample_sigmas": "[0.5, 1.0]"}, "sample_sigmas"),
    ({"sample_sigmas": "[0.5,"}, "header"),
    ({"lora_adapter_metadata": '{"transformer.use_dora": true}'}, "DoRA"),
    ({"lora_adapter_metadata": '{"transformer.lora_alpha": "rank"}'}, "no number as lora_alpha"),
    ({"lora_adapter_metadata": "[]"}, "no JSON object"),
    ({"lora_adapter_metadata": '{"transformer.lora_alpha": NaN}'}, "no number as lora_alpha"),
    ({"lora_adapter_metadata": "[" * 10_000}, "header"),
]
LORA_FILES += [((WHOLE | change, {}), words) for change, words in LORA_CHANGES]
LORA_FILES += [((WHOLE, header), words) for header, words in LORA_HEADERS]
LORA_BYTES = [(None, "none.safetensors"), (b"PK" * 99, "not a whole safetensors file")]


# ---- calls -----------------------------------------------------------------------------------------------------------

WIDE = reference.picture(101, 47, 1)


def call(given, settings: dict) -> None:
    """Of a pipeline."""
    Pipeline.from_pretrained(given.checkpoint)(**{"prompt": reference.PROMPT} | settings)


CALLS = [
    ({"steps": 0}, "steps 0"),
    ({"seed": -1}, "seed -1"),
    ({"height": 31}, "96 x 31 pixels"),
    ({"resolution": 16}, "resolution 16: at least 32"),
    ({"images": [WIDE] * 11}, "11 source pictures for one prompt: at most 10"),
    ({"guidance": 0.99}, "guidance 0.99: a number from 1"),
    ({"guidance": float("nan")}, "guidance nan"),
    ({"negative_prompt": "a dog"}, "negative prompt 'a dog': guidance is 1"),
    ({"prompt": []}, "no prompt"),
    ({"negative_prompt": ["a", "b"], "guidance": 2.0}, "2 prompts and 1 lists"),
    ({"prompt": "a", "images": [[WIDE], [WIDE]]}, "1 prompts and 2 lists"),
]


def encoder_call(given, damage: tuple[list[str], list | None]) -> None:
    """Of the text encoder: prompts and their pictures."""
    Qwen3VL.from_pretrained(given.checkpoint).encode(*damage)


ENCODER_CALLS = [
    ((["<|image_pad|>"], None), "kept for pictures"),
    ((["a", "b"], [[reference.picture(64, 64)]]), "one list per prompt"),
    ((["a", "b"], [[reference.picture(64, 64)], []]), "equally many"),
    ((["a", "b"], [[reference.picture(64, 32)], [reference.picture(32, 64)]]), "equal sizes"),
    ((["a"], [[reference.picture(64, 48)]]), "multiples of 32"),
    (([], None), "0 prompts"),
]


def decoder_call(given, shape: tuple[int, ...]) -> None:
    """Of the autoencoder: a batch of pictures."""
    VAE.from_pretrained(given.checkpoint / "vae").encode(torch.zeros(shape))


DECODER_CALLS = [(shape, "multiples of 16") for shape in ((1, 4, 40, 32), (1, 3, 32, 32), (4, 32, 32))]


def condition(given, fields: tuple) -> None:
    Condition(*fields)


STATES, MASK, SOURCE = torch.randn(2, 9, 24), torch.ones(2, 9, dtype=torch.bool), torch.randn(2, 8, 4, 4)
CONDITIONS = [
    ((STATES, MASK[:, :8], [], []), "mask"),
    ((STATES, MASK.float(), [], []), "mask"),
    ((STATES, MASK.clone().index_fill_(1, torch.tensor([3]), False), [], []), "padding before"),
    ((STATES, torch.arange(9) < torch.tensor([[9], [4]]), [SOURCE], [(1, 5)]), r"\[1, 5\) of 4"),
    ((STATES, MASK, [SOURCE], []), "1 sources"),
    ((STATES, MASK, [SOURCE], [(2, 5)]), r"\[2, 5\) of 9"),
    ((STATES, MASK, [SOURCE, SOURCE], [(4, 8), (1, 5)]), r"\[1, 5\) of 9"),
]


# ---- recipes and judges ----------------------------------------------------------------------------------------------


def new_recipe(given, change: dict) -> None:
    with named("recipe 'mine': "):
        Recipe(**{"name": "mine", "ratio": (5, 5)} | change)


NEW_RECIPES = [
    ({"ratio": (7, 4)}, r"ratio \(7, 4\).*add up to 10"),
    ({"ratio": (10,)}, "add up to 10"),
    ({"ratio": (5.0, 5.0)}, "whole parts"),
    ({"edit": {"a": 1, "b": 0}}, "whole parts from 1 on"),
    ({"first_step_weight": float("nan")}, "first_step_weight nan"),
    ({"rules": (rule(0, 0, 0.5, 1.2),)}, "category text, quarter 3.*sum of 1"),
    ({"rules": (rule(0, -0.5, 0.5, 1),)}, "category text, quarter 1.*>= 0"),
    ({"rules": (rule(0, 0, 0.5), rule(0, 0, 0.5, 1))}, "four lambdas"),
    ({"rules": (rule(0, 0, 0, 1, teacher="base"),)}, "not 'base'"),
    ({"rules": (rule(0, 0, 0, 1, task="video"),)}, "'video'.*the task is t2i or edit"),
    # Each is right on its own; under the one condition that both have, they sum to 1.2.
    ({"rules": (rule(0, 0.6, 0, 0), rule(0, 0.6, 0, 0, teacher="b"))}, "quarter 1.*base': -0.2"),
]


def recipe_for(given, damage: tuple[str, list[str], list[str]]) -> None:
    """A recipe by name, for prompts of these categories."""
    name, t2i, edit = damage
    recipe.find(name).resolve({"t2i": t2i, "edit": edit}, ["text", "edit"])


RECIPES_FOR = [
    (("flush", [], []), r"unknown recipe 'flush'.*e1-landscape.*flash"),
    (("flash", ["cats"], []), r"'flash' takes 5 of 10 .*from edit prompts, but there are none"),
    (("mix-9-1", [], ["scene"]), r"'mix-9-1' takes 9 of 10 .*from t2i prompts, but there are none"),
    (
        ("e4-landscape-portrait", ["portrait", "cats"], []),
        r"t2i prompts of the categories \['landscape', 'portrait'\].*are \['cats', 'portrait'\]",
    ),
]


def answer(given, changes: dict) -> None:
    """Of a judge that is asked about a style edit."""
    form = rubrics.form_of(Prompt("edit", "style", "do it", ["source.png"]))
    rubrics.check_answer(form | changes, form)


SUB_SCORES = rubrics.FAMILIES["style"]["sub_scores"]
ANSWERS = [
    ({"score": 5.01}, "score is 5.01, not a number from 1 to 5"),
    ({"score": 10**400}, "score is 10+..., not a number from 1 to 5"),
    ({"score": True}, "score is True, not a number"),
    ({"reason": " "}, "reason is ' ', not a sentence"),
    ({"failures": "none"}, "failures is 'none', not a list of texts"),
    ({"failures": [1]}, "failures is .1., not a list of texts"),
    ({"beauty": 5}, "the answer is .*; the keys score, reason, sub_scores, failures are expected"),
    ({"sub_scores": [5, 5, 5]}, "sub_scores is .5, 5, 5.; the keys instruction_following, .* are expected"),
    ({"sub_scores": dict.fromkeys(SUB_SCORES[1:], 5)}, "sub_scores is .*; the keys instruction_following"),
    ({"sub_scores": dict.fromkeys([*SUB_SCORES, "beauty"], 5)}, "sub_scores is .*; the keys instruction_following"),
    ({"sub_scores": dict.fromkeys(SUB_SCORES, 0)}, "instruction_following is 0, not a number from 1 to 5"),
]  # fmt: skip


def endpoint(given, damage: tuple[str, str | None]) -> None:
    """A judge's address and the key for it, which is not told."""
    url, key = damage
    Chat(url, key=key)


ENDPOINTS = [
    (("localhost:8000", None), "no address"),
    (("http://a b/v1", None), "no address"),
    (("http://[::1", None), "no address"),
    (("http://a:99999", None), "no address"),
    (("file:///etc", None), "no address"),
    (("http://a/v1", "secret\nkey"), "http://a/v1: the key for it has letters"),
]


# ---- commands: nothing is written ------------------------------------------------------------------------------------


def untouched(given, command: Callable[[], object]) -> None:
    """Run a command, which must write nothing, whatever becomes of it."""
    before = {path: path.read_bytes() for path in given.folder.rglob("*") if path.is_file()}
    try:
        command()
    finally:
        assert {path: path.read_bytes() for path in given.folder.rglob("*") if path.is_file()} == before


def filled(given, words: str | list[str]) -> list[str]:
    """A command's words, with the places of `given` in {braces}."""
    words = shlex.split(words) if isinstance(words, str) else words
    return [word.format(**vars(given)) if "{" in word else word for word in words]


def drawing(given, words: str | list[str]) -> None:
    """sample.py with a prompt."""
    exporting(given, ["--prompt", reference.PROMPT, *filled(given, words)])


def exporting(given, words: str | list[str]) -> None:
    """sample.py without one."""
    untouched(given, lambda: sample.main(["--checkpoint", str(given.checkpoint), *filled(given, words)]))


DRAWINGS = [
    ("--out out.jpg", "out.jpg"),
    ("--out {lora}/out.png", "/out.png: cannot be written"),
    ("--out {folder}/a.png --device meta", "--device meta: torch cannot use it"),
    ("--num-images 0", "--num-images 0"),
    ("--prompt-file x", "either --prompt"),
    ("--device abacus", "--device abacus: torch cannot use it"),
    ("--image {folder}/none.png", "none.png: no such picture"),
    ("--lora {folder}/none.safetensors:0.5", "none.safetensors: no such LoRA file"),
    ("--aspect 16/9", "--aspect 16/9: W:H"),
    ("--aspect 1:1 --width 64", "leave out --height and --width"),
    ("--sigmas 0.5 1", "sigmas"),
    ("--sigmas 1 0.5 --shift static", "--shift static: expected is none, dynamic or a number"),
    ("--sigmas 1 0.5 --shift 0", r"--shift 0.0: a number in \(0, 100\]"),
    ("--shift dynamic", "--shift dynamic: it bends --sigmas, and none are given"),
    (["--seed", str(2**63 - 1), "--num-images", "2"], "--seed 9223372036854775807: 2 pictures need as many seeds"),
    ("--negative-prompt 'a dog'", "negative prompt 'a dog'"),
    (["--image", *["{folder}/a.png"] * 11], "11 source pictures"),
    ("--lora {lora}:1e39", r"the scale 1e\+39: a number in"),
    ("--width 16384 --height 16384", "at most 16777216 are drawn.* 4 GiB"),
    (["--aspect", "9" * 400 + ":1"], "--aspect 999"),
    ("--aspect 1000:1", "--aspect 1000:1"),
    (["--prompt", "a" * 100_000], "100000 letters; at most 8000"),
    (["--prompt", "cat \ud83d"], "--prompt: 'cat .*half a letter"),
    ("--fit squeeze", "--fit squeeze: expected is stretch or crop or pad"),
    ("--lora {lora} --steps 40", r"40 steps: .* a LoRA file .* fix them to 2, at \[1.0, 0.5\]"),
    ("--link", "--link is for --export of a folder"),
    ("--rank 2", "--rank is for --export OUT.safetensors"),
    ("--export {folder}/student", "--prompt is for drawing"),
]
EXPORTS = [
    ("--export {folder}/student", "no few-step student"),
    ("--export {folder}/s.safetensors --sigmas 1 0.5", "--base"),
    ("--export {checkpoint} --sigmas 1 0.5", "is a folder with something in it"),
    ("--export {folder}/student --base {checkpoint}", "--base is for --export OUT.safetensors"),
    ("--export {folder}/s.safetensors --base {checkpoint} --link", "--link is for"),
    ("--export {folder}/student --image a.png", "--image is for drawing, not for --export of a folder"),
    ("--export {folder}/student --num-images 2", "--num-images is for drawing"),
    ("--export {folder}/student --exact img_in", "--exact is for --export OUT.safetensors"),
    ("--export {folder}/s.safetensors --base {checkpoint} --sigmas 1 --exact img_ni", "--exact img_ni: no layer"),
    ("--export {folder}/s.safetensors --base {checkpoint} --sigmas 1 --shift dynamic", "no place for a dynamic shift"),
    ("--prompt-file {folder}/none.jsonl", "none.jsonl: no such file; prompts are expected"),
]


def eval_command(given, words: str | list[str]) -> None:
    (given.folder / "file").write_text("mine")
    plain = [] if "--prompts" in words else ["--checkpoint", str(given.toy), "--cases", "2"]
    untouched(given, lambda: evaluation.main([*plain, *filled(given, words)]))


EVAL_COMMANDS = [
    ("--cases 1", "--cases 1: a number in"),
    ("--cases many", "invalid int value"),
    ("--case 2", "unrecognized arguments: --case"),  # no abbreviations: a later flag would change their meaning
    ("--bench video", "--bench video: expected is t2i or edit or all"),
    ("--out ''", "--out: '' is empty"),
    ("--prompts cases.jsonl --out out --judge ''", "--judge: '' is empty"),
    (["--json", "a\x07.json"], "letters that cannot be shown"),
    ("--judge http://a", "--judge is for --.*, not for the toy world's benches"),
    ("--table row.json", "--checkpoint is for the toy world's benches and --prompts, not for --table"),
    ("--json {folder}", "is a folder"),
    ("--out {folder}/file", "file"),
    ("--json {folder}/file/row.json", "file"),
    ("--checkpoint {folder}/nowhere", "nowhere"),
    ("--checkpoint {checkpoint}", "96 x 96.*128 x 128"),  # not the toy's size: said before weights are loaded
]


def train_missing(given, part: str) -> None:
    """A run on a checkpoint without this part."""
    shutil.rmtree(given.copied() / part)
    words = "--checkpoint {folder}/copy --prompts {prompts} --out {folder}/run"
    untouched(given, lambda: train.main(filled(given, words)))


TRAIN_MISSING = [(part, f"copy/{part}") for part in ("scheduler", "processor", "text_encoder", "vae", "transformer")]


def toy_prompts(given, words: str | list[str]) -> None:
    """The toy's own prompts, for a checkpoint of another size."""
    plain = ["--checkpoint", str(given.checkpoint), "--out", str(given.folder / "run")]
    untouched(given, lambda: train.main([*plain, *filled(given, words)]))


def target(given, line: dict) -> None:
    """A prompt that the flow objective cannot learn from."""
    (given.folder / "bad.jsonl").write_text(json.dumps(line))
    prompts = read_prompts([given.folder / "bad.jsonl"])
    encode_prompts(given.folder / "kept", prompts, given.checkpoint, How(64, targets=True))


def train_command(given, words: str | list[str]) -> None:
    """And --plan refuses the same."""
    plain = ["--checkpoint", str(given.checkpoint), "--out", str(given.folder / "run"), *filled(given, words)]
    for more in ([], ["--plan"]):
        with pytest.raises((ValueError, OSError)) as error:
            untouched(given, lambda more=more: train.main([*plain, *more]))
    raise error.value


TRAIN_COMMANDS = [
    ("--dtype float16", "--dtype float16: expected is bfloat16 or float32"),
    ("--objective dmd2", "--objective dmd2: expected is dmd or flow"),
    ("--device meta", "--device meta: torch cannot use it"),
    ("--device cuda:99", "--device cuda:99: torch cannot use it"),
    ("--resolution 16", "--resolution 16: a number in"),
    ("--teacher edit", "--teacher edit: NAME="),
    ("--teacher base=toy", "--teacher base=toy: NAME="),
    ("--teacher edit=tests", "--teacher edit=tests: no transformer folder"),
    ("--recipe flush", "unknown recipe 'flush'"),
    ("--stepz 3", "unrecognized arguments: --stepz 3"),
    ("--prompts", "--prompts: expected at least one"),
]


def flags(given, words: str | list[str]) -> None:
    """Of any program."""
    options.parse(filled(given, words), TrainOptions, "A program.")


FLAGS = [
    *(([flag, given], f"{flag}: .*holds {what}") for flag in ("--out", "--teacher")
      for given, what in (("a\ud83d", "half a letter"), ("a\0b", "a null character"))),
    ("--lora-rank 5000", r"^--lora-rank 5000: a number in \[0, 4096\] is expected$"),
    ("--objective rl", "^--objective rl: expected is dmd or flow$"),
]  # fmt: skip
# ---- the table -------------------------------------------------------------------------------------------------------


@contextmanager
def named(pattern: str) -> Iterator[None]:
    """An error within says this, too."""
    with pytest.raises((ValueError, OSError), match=pattern) as error:
        yield
    raise error.value


TABLE = {
    prompt_line: PROMPT_LINES,
    prompt_file: PROMPT_FILES,
    config: [((file, key, value), *(words or [key.split(".")[-1]]))
             for file, key, values, *words in CONFIGS for value in values],
    config_text: CONFIG_TEXTS,
    missing: MISSING,
    tokenizer: TOKENIZERS,
    weights: WEIGHTS,
    vae_weights: VAE_WEIGHTS,
    network_folder: NETWORK_FOLDERS,
    lora_file: LORA_FILES,
    lora_bytes: LORA_BYTES,
    call: CALLS,
    encoder_call: ENCODER_CALLS,
    decoder_call: DECODER_CALLS,
    condition: CONDITIONS,
    new_recipe: NEW_RECIPES,
    recipe_for: RECIPES_FOR,
    answer: ANSWERS,
    endpoint: ENDPOINTS,
    drawing: DRAWINGS,
    exporting: EXPORTS,
    eval_command: EVAL_COMMANDS,
    train_missing: TRAIN_MISSING,
    toy_prompts: [("", "--resolution 96: the toy's own prompts have 128")],
    target: [(T2I, "has no target")],
    train_command: TRAIN_COMMANDS,
    flags: FLAGS,
}  # fmt: skip
ROWS = [(surface, damage, words) for surface, rows in TABLE.items() for damage, words in rows]


@pytest.mark.parametrize(
    "surface, damage, words", ROWS, ids=[f"{surface.__name__}-{words[:40]}" for surface, _, words in ROWS]
)
def test_bad_input_is_one_clear_error(given, surface, damage, words):
    with pytest.raises((ValueError, OSError), match=words) as error:
        surface(given, damage)
    message = str(error.value)
    assert len(message) < 600 and "\n" not in message and "secret" not in message


# ---- all numbers of all programs, and all keys of all configs --------------------------------------------------------


def outside(interval: str, whole: bool) -> list[float]:
    """Numbers just outside of an interval, and far outside of it."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    below, above = (int(low) - 1, int(high) * 2) if whole else (low - 1e-3, high * 1.001)
    ends = [low] * interval.startswith("(") + [high] * interval.endswith(")")
    return [below, above, *ends, 10**400, -(10**400)]


PROGRAMS = (TrainOptions, SampleOptions, EvalOptions, WritingOptions, TableOptions, RecordOptions, LongOptions)
FLAGS_OF_NUMBERS = [(kind, f) for kind in PROGRAMS for f in fields(kind) if re.search("int|float", str(f.type))]


@pytest.mark.parametrize("kind, f", FLAGS_OF_NUMBERS, ids=[f"{kind.__name__}-{f.name}" for kind, f in FLAGS_OF_NUMBERS])
def test_every_number_of_every_program_has_a_range_and_refuses_all_else(kind, f):
    """Each program parses its flags this way, as the rows above show."""
    flag = options.flag(f.name)
    numbers = outside(f.metadata["within"], "int" in str(f.type))
    for word in [*map(str, numbers), "nan", "inf", "-inf", "x", ""]:
        with pytest.raises(ValueError, match=f"^{flag}[ :]") as error:
            options.parse([f"{flag}={word}"], kind, "A program.")
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)


CONFIG_KINDS = (Drawing, MMDiTConfig, PixelSettings, Scheduler, TextConfig, VAEConfig, VisionConfig)
KEYS = [(kind, f) for kind in CONFIG_KINDS for f in fields(kind)]
WITHOUT_RANGE = {
    "patch_size",
    "attn_scales",
    "dropout",
    "mrope_section",
    "deepstack_visual_indexes",
}  # checked otherwise
WITHOUT_RANGE |= {"scale_factor_temporal", "scale_factor_spatial"}  # not used


@pytest.mark.parametrize("kind, f", KEYS, ids=[f"{kind.__name__}-{f.name}" for kind, f in KEYS])
def test_every_key_of_every_config_has_a_type_and_a_range_and_refuses_all_else(kind, f):
    """Each file's reader builds its config this way, as the rows above show."""
    good = json.loads(json.dumps(asdict(kind())))
    assert build_config(kind, good, "") == kind()
    numbers = [NAN, -INF, 10**30, -(10**30)]
    if re.search("int|float", str(f.type)) and not f.metadata.get("only") and f.name not in WITHOUT_RANGE:
        numbers += outside(f.metadata["within"], "int" in str(f.type))
    if isinstance(good[f.name], list):
        numbers = [[number] * max(1, len(good[f.name])) for number in numbers]
    for value in ["word", [[1]], {}, 1e300, *numbers]:
        with pytest.raises(ValueError, match=f"^file: {f.name} ") as error:
            build_config(kind, good | {f.name: value}, "file: ")
        assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    del good[f.name]
    with pytest.raises(ValueError, match=f"^file: '{f.name}' is missing$"):
        build_config(kind, good, "file: ")
