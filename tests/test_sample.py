"""Whole pictures: from the same noise, ours and diffusers' QwenImage21Pipeline agree to 1/255 in fp32.

The checkpoints are tiny and random, so that a picture is meaningless but depends on everything: a wrong sign, size,
order or time anywhere shows. The small matrix runs always, the large one with `-m slow`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from page_commands import commands, pages
from PIL import Image
from reference import (
    IDENTITY,
    PROMPT,
    Both,
    changed,
    difference,
    generator,
    open_pipeline,
    picture,
    random_lora,
    write_model_index,
    write_scheduler,
    write_transformer,
)

import sample
import train
from checkpoint.lora import new_lora, write_lora
from data.pictures import open_picture
from model import MMDiT
from networks.qwen3vl import Qwen3VL
from program.options import TOY
from sample import Pipeline

CPU = "--device cpu --dtype float32".split()


def variant(checkpoint: Path, directory: Path) -> Path:
    return Path(shutil.copytree(checkpoint, directory / "checkpoint"))


@pytest.fixture(scope="module")
def shifted(checkpoint):
    return Both(checkpoint)


# ----------------------------------------------------------------------------------------------------------------------
# The small matrix

WIDE, TALL = picture(101, 47, 1), picture(40, 90, 2, "RGBA")

QUICK = {
    "text": {"steps": 4},
    "floored sizes": {"steps": 4, "height": 70, "width": 131},
    "eight steps, guided": {"steps": 8, "guidance": 3.0, "negative_prompt": "blurry, low quality"},
    "guided, empty negative": {"steps": 4, "guidance": 2.0},
    "one source": {"steps": 4, "images": [WIDE]},
    "two sources, the last one's shape": {"steps": 4, "images": [WIDE, TALL]},
    "one RGBA source, guided": {"steps": 4, "images": [TALL], "guidance": 2.5, "negative_prompt": "a dog"},
    "two sources, own size": {"steps": 4, "images": [WIDE, TALL], "height": 64, "width": 96, "resolution": 80},
    "two prompts": {"steps": 4, "prompt": [PROMPT, "油画 🎨 of one house, reading a book by candlelight"]},
    "two prompts, source, guided": {"steps": 4, "prompt": [PROMPT, "red"], "images": [TALL], "guidance": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("case", QUICK)
def test_equals_reference(shifted, case):
    shifted.agree(**QUICK[case])


@pytest.mark.parametrize("images", [None, [picture(128, 128)]])
def test_toy_checkpoint(images):
    """The committed checkpoint is a checkpoint of the real classes: diffusers opens it and draws what we draw."""
    result, expected = Both(TOY).draw("a red house on a hill", images=images, steps=4, guidance=2.0)
    assert difference(result[0], expected[0]) <= 2 and changed(result[0], expected[0]) < 0.02


def test_every_setting_matters(shifted):
    """What the matrix varies must change the picture, or it tests nothing."""
    plain = shifted.ours(PROMPT, steps=4)
    for other in (
        {"seed": 1}, {"steps": 5}, {"guidance": 2.0}, {"images": [picture(96, 96)]}, {"prompt": PROMPT + "."},
    ):  # fmt: skip
        assert changed(plain, shifted.ours(**({"prompt": PROMPT, "steps": 4} | other))) > 0.2, other
    source = picture(96, 96, 3, "RGBA")
    opaque = source.copy()
    opaque.putalpha(255)
    pair = [shifted.ours(PROMPT, [i], steps=4) for i in (source, opaque)]
    assert changed(*pair) > 0.2


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.9, 0.75, 0.5]])
def test_fixed_sigmas(checkpoint, tmp_path, sigmas):
    directory = variant(checkpoint, tmp_path)
    write_scheduler(directory, **IDENTITY)
    write_model_index(directory, sample_sigmas=sigmas, resolution=64)
    both = Both(directory)
    both.agree()
    with pytest.raises(ValueError, match=rf"5 steps: .* fix them to {len(sigmas)}, at \[1.0"):
        both.ours(PROMPT, steps=5)


def test_causal_condition_off(checkpoint, tmp_path):
    directory = variant(checkpoint, tmp_path)
    write_transformer(directory, seed=1, causal_condition=False)
    Both(directory).agree(steps=4, images=[WIDE], guidance=2.0)


def test_given_noise(shifted):
    """Tokens in row-major order, as the reference takes them."""
    noise = torch.randn(1, 4 * 6, 64, generator=torch.Generator().manual_seed(3))
    ours = shifted.ours(PROMPT, height=64, width=96, steps=4, noise=noise)
    theirs = shifted.theirs(PROMPT, height=64, width=96, num_inference_steps=4, latents=noise).images[0]
    assert difference(ours, theirs) <= 1
    with pytest.raises(ValueError, match=r"\(1, 36, 64\) is expected"):
        shifted.ours(PROMPT, steps=4, noise=noise)


@pytest.mark.parametrize("offload", [False, True])
def test_encoder_is_gone_before_the_mmdit_comes(checkpoint, shifted, monkeypatch, offload):
    """Unless it is to be kept. Another call reads it again and draws the same."""
    pipeline, encoders, there = Pipeline.from_pretrained(checkpoint, offload=offload), [], []
    assert not {"encoder", "vae", "mmdit"} & vars(pipeline).keys()  # nothing is read before it is needed
    read_encoder, read_mmdit = Qwen3VL.from_pretrained.__func__, MMDiT.from_pretrained.__func__

    def encoder(*arguments):
        network = read_encoder(*arguments)
        encoders.append(weakref.ref(network))
        return network

    def mmdit(*arguments):
        there.append([reference() for reference in encoders])
        return read_mmdit(*arguments)

    monkeypatch.setattr(Qwen3VL, "from_pretrained", classmethod(encoder))
    monkeypatch.setattr(MMDiT, "from_pretrained", classmethod(mmdit))
    drawn = [pipeline(PROMPT, [WIDE], steps=4) for _ in range(2)]
    assert there == [[None]] and [reference() for reference in encoders] == [None, None]
    expected = shifted.ours(PROMPT, [WIDE], steps=4)
    assert all(difference(picture, expected) == 0 for picture in drawn)
    assert "encoder" in vars(shifted.ours)


def test_prefix_cache_changes_nothing(shifted, monkeypatch):
    settings = {"steps": 4, "images": [WIDE, TALL], "guidance": 2.0}
    cached = shifted.ours([PROMPT, "red"], **settings)
    mmdit = shifted.ours.mmdit
    monkeypatch.setattr(mmdit, "with_prefix", lambda *arguments: (mmdit(*arguments), None))
    for a, b in zip(cached, shifted.ours([PROMPT, "red"], **settings), strict=True):
        assert difference(a, b) <= 1


def test_batch_with_sources_of_their_own(shifted):
    """The reference's batches share their sources. Ours may differ: every prompt is drawn as it would be alone."""
    prompts = ["1 2", "2 1"]  # of equal length, since padding moves the target's positions
    images = [[picture(96, 64, 1)], [picture(97, 65, 2, "RGBA")]]
    noise = torch.randn(2, 4 * 8, 64, generator=torch.Generator().manual_seed(0))
    size = {"height": 64, "width": 128}
    batch = shifted.ours(prompts, images, steps=4, guidance=2.0, noise=noise, **size)
    for i, drawn in enumerate(batch):
        alone = shifted.ours(prompts[i], images[i], steps=4, guidance=2.0, noise=noise[i : i + 1], **size)
        assert difference(drawn, alone) <= 1 and changed(drawn, alone) < 0.01
    with pytest.raises(ValueError, match="equal sizes"):
        shifted.ours(prompts, [[WIDE], [TALL]])


# ----------------------------------------------------------------------------------------------------------------------
# Damage that shows while drawing, and the command line


def test_half_precision_draws_the_same_picture():
    """fp16 overflows in the toy's autoencoder, as in many: that runs in fp32 then."""
    drawn = {}
    for dtype in torch.float32, torch.float16, torch.bfloat16:
        pipeline = Pipeline.from_pretrained(TOY, dtype)
        pipeline.progress = False
        image = pipeline("A landscape of hills, clear day sky.", steps=4)
        drawn[dtype] = np.asarray(pipeline("Make it night.", image, steps=4)).astype(int)
    assert np.abs(drawn[torch.float16] - drawn[torch.float32]).mean() < 0.3
    assert np.abs(drawn[torch.bfloat16] - drawn[torch.float32]).mean() < 3
    assert drawn[torch.float32].std() > 20


def test_every_stage_that_overflows_is_named(checkpoint):
    """The error says which stage, and a dtype that may help."""
    source = picture(64, 64)
    for dtype, advice in (
        (torch.float16, "bfloat16 or float32"),
        (torch.bfloat16, "--dtype float32"),
        (torch.float32, "damaged"),
    ):
        pipeline = Pipeline.from_pretrained(checkpoint, dtype, keep_encoder=True)
        pipeline.progress = False
        for stage, message in (
            (lambda p: p.encoder.model["language_model"].embed_tokens, "the language model's states"),
            (lambda p: p.vae.quant_conv, "the latents of a source picture"),
            (lambda p: p.mmdit.proj_out, "the MMDiT's latents"),
            (lambda p: p.vae.decoder.conv_out, "the decoded pixels"),
        ):
            weight = stage(pipeline).weight.data
            whole = weight.clone()
            weight.fill_(torch.inf)
            in_vae = dtype == torch.float16 and ("source" in message or "pixels" in message)
            with pytest.raises(ValueError, match=f"{message} are not finite.*{'damaged' if in_vae else advice}"):
                pipeline(PROMPT, source, steps=1)
            weight.copy_(whole)


def test_a_lora_that_overflows_is_named(checkpoint, tmp_path):
    file = tmp_path / "huge.safetensors"
    lora = new_lora(MMDiT.from_pretrained(checkpoint / "transformer"), 2)
    write_lora(file, {n: (a, torch.full_like(b, 1e30), alpha) for n, (a, b, alpha) in lora.items()})
    with pytest.raises(ValueError, match=f"{file} at scale 1000.0: .*attn.to_. is not finite in torch.float16"):
        Pipeline.from_pretrained(checkpoint, torch.float16, loras=[(file, 1000.0)])(PROMPT, steps=1)


def test_a_size_that_may_surprise_is_said_once(shifted, capsys):
    for _ in range(2):
        shifted.ours(PROMPT, steps=1, width=200, height=100)
    said = capsys.readouterr().err
    assert said.count("200 x 100 pixels: drawn as 192 x 96") == 1
    assert said.count("192 x 96 pixels: the checkpoint was trained at the area 96 x 96") == 1
    shifted.ours(PROMPT, steps=1)
    shifted.ours(PROMPT, steps=1, width=96, height=96)
    assert "pixels" not in capsys.readouterr().err


def test_as_a_program_in_a_terminal_without_letters(checkpoint, tmp_path):
    """From another folder, which it makes its pictures in."""
    words = ["--checkpoint", str(checkpoint), "--prompt", "红色", "--steps", "1", "--out", "new/x.png"]
    ascii = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, sample.__file__, *words]
    drawn = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ascii)
    assert drawn.returncode == 0 and (tmp_path / "new" / "x.png").is_file() and "\\u7ea2" in drawn.stdout


def test_command_line(checkpoint, tmp_path, shifted):
    picture(50, 70, 1).save(tmp_path / "source.webp")
    out = tmp_path / "out.png"
    command = f"--checkpoint {checkpoint} --out {out} --steps 3".split() + CPU
    words = f"--image {tmp_path}/source.webp --seed 4 --num-images 2 --guidance 2 --offload".split()
    sample.main([*command, "--prompt", PROMPT, *words])
    drawn = Image.open(tmp_path / "out-2.png")
    expected = shifted.ours(PROMPT, tmp_path / "source.webp", steps=3, seed=5, guidance=2.0)
    assert difference(drawn, expected) == 0
    settings = json.loads(drawn.text["parameters"])
    assert (settings["prompt"], settings["seed"], settings["guidance"]) == (PROMPT, 5, 2.0)

    lines = [
        {"task": "t2i", "category": "any", "prompt": "红色"},
        {"task": "edit", "category": "any", "prompt": "red", "images": ["source.webp"]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="out-1.png: exists.*--overwrite"):
        sample.main([*command, "--prompt-file", str(tmp_path / "prompts.jsonl")])
    sample.main([*command, "--prompt-file", str(tmp_path / "prompts.jsonl"), "--overwrite"])
    assert difference(Image.open(tmp_path / "out-1.png"), shifted.ours("红色", steps=3)) == 0
    assert json.loads(Image.open(tmp_path / "out-1.png").text["parameters"])["prompt"] == "红色"
    assert difference(Image.open(tmp_path / "out-2.png"), shifted.ours("red", tmp_path / "source.webp", steps=3)) == 0


def test_shapes_and_schedules_from_the_command_line(checkpoint, tmp_path, shifted):
    command = ["--checkpoint", str(checkpoint), "--prompt", PROMPT, *CPU]
    sample.main([*command, "--steps", "2", "--aspect", "16:9", "--out", str(tmp_path / "wide.png")])
    assert difference(Image.open(tmp_path / "wide.png"), shifted.ours(PROMPT, steps=2, width=128, height=64)) == 0
    sample.main([*command, "--sigmas", "1", "0.5", "--out", str(tmp_path / "two.png")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifted.ours, "sigmas", lambda steps, tokens: [1.0, 0.5, 0.0])
        assert difference(Image.open(tmp_path / "two.png"), shifted.ours(PROMPT)) == 0


def test_students_from_the_command_line(checkpoint, tmp_path, capsys):
    """A folder and LoRA files, each from the other; what they draw is the same, and diffusers draws it too."""
    sigmas, lora = [1.0, 0.9, 0.75, 0.5], tmp_path / "strong.safetensors"
    network = MMDiT.from_pretrained(checkpoint / "transformer")
    rng = torch.Generator().manual_seed(0)
    new = new_lora(network, 2, rng=rng, layers=r".*attn.*")
    write_lora(lora, {n: (a, torch.randn(b.shape, generator=rng), alpha) for n, (a, b, alpha) in new.items()}, sigmas)
    scaled = ["--lora", f"{lora}:0.25", f"{lora}:0.5"]
    sample.main(["--checkpoint", str(checkpoint), *scaled, "--export", str(tmp_path / "student"), "--link", *CPU])
    assert (tmp_path / "student" / "vae").is_symlink()
    drawn = Both(tmp_path / "student").agree(images=[TALL])[0]

    factors = tmp_path / "again.safetensors"
    sample.main(["--checkpoint", str(tmp_path / "student"), "--base", str(checkpoint), "--rank", "2",
                 "--export", str(factors), *CPU])  # fmt: skip
    assert re.search(r"rank 2, (99|100)\.\d% of what", capsys.readouterr().out)  # it is of rank 2, but for the rounding
    assert {p.name for p in tmp_path.iterdir()} == {lora.name, "student", factors.name}
    picture(40, 90, 2, "RGBA").save(tmp_path / "tall.png")
    sample.main(["--checkpoint", str(checkpoint), "--lora", str(factors), "--prompt", PROMPT, "--image",
                 str(tmp_path / "tall.png"), "--seed", "5", "--out", str(tmp_path / "out.png"), *CPU])  # fmt: skip
    close = np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - np.asarray(drawn)).mean()
    assert close < 3  # of 255: bf16 files, merged


LIGHTNING = [1.0, 0.75, 0.5, 0.25]  # lightx2v/Qwen-Image-2.1-Lightning


@pytest.mark.parametrize(
    ("shift", "scheduler"),
    [
        ("none", IDENTITY),
        ("dynamic", {"shift_terminal": None}),  # the published one without its terminal, as Lightning's card has it
        (3.0, IDENTITY | {"shift": 3.0}),
    ],
)
def test_given_sigmas_are_bent_as_by_diffusers(checkpoint, shift, scheduler):
    ours, theirs = Pipeline.from_pretrained(checkpoint, sigmas=LIGHTNING, shift=shift), open_pipeline(checkpoint)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config, **scheduler)
    ours.progress = False
    for size in {"height": 96, "width": 96}, {"height": 64, "width": 160}:  # a dynamic shift depends on the size
        expected = theirs(PROMPT, sigmas=LIGHTNING, generator=generator(theirs, 5), **size).images[0]
        assert difference(ours(PROMPT, seed=5, **size), expected) <= 1
    assert ours.sigmas(None, 36)[-2:] != [0.02, 0.0]  # the base's terminal would spoil a student's last step


def test_a_terminal_is_drawn_as_the_config_says_and_told(checkpoint, tmp_path, capsys):
    """A student's folder that kept its base's scheduler; with --sigmas the terminal is off."""
    directory = variant(checkpoint, tmp_path)
    write_model_index(directory, sample_sigmas=LIGHTNING, resolution=64)
    both = Both(directory)
    both.agree()
    told = capsys.readouterr().err
    assert both.ours.sigmas(None, 16)[-2:] == pytest.approx([0.02, 0.0])
    assert str(directory) in told and "shift_terminal" in told and "0.02" in told
    assert Pipeline.from_pretrained(directory, sigmas=LIGHTNING).sigmas(None, 16) == [*LIGHTNING, 0.0]
    fused = {"sample_sigmas": LIGHTNING, "resolution": 64}  # as darioooooo0o/Lightning-4step-Qwen-Image-2.1-Diffusers
    write_scheduler(directory, shift_terminal=None)
    write_model_index(directory, **fused)
    capsys.readouterr()
    Both(directory).agree()
    assert "terminal" not in capsys.readouterr().err


def test_a_few_step_lora_and_a_style_lora_together(checkpoint, tmp_path, capsys):
    """The few-step one's sigmas win, and it is said; diffusers with both adapters draws the same."""
    few, style = tmp_path / "few.safetensors", tmp_path / "style.safetensors"
    network = MMDiT.from_pretrained(checkpoint / "transformer")
    write_lora(few, random_lora(network, 2, 2.0, r".*attn.*"), [1.0, 0.5], torch.float32, stochastic=False)
    write_lora(style, random_lora(network, 3, 3.0, r".*attn.*", seed=1), dtype=torch.float32)
    command = ["--checkpoint", str(checkpoint), "--prompt", PROMPT, "--seed", "5", *CPU]
    sample.main([*command, "--lora", f"{style}:0.7", f"{few}:1", "--out", str(tmp_path / "both.png")])
    assert f"{few}: draws in 2 steps at [1.0, 0.5]" in capsys.readouterr().err
    theirs = open_pipeline(checkpoint)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler()
    for name, file in ("few", few), ("style", style):
        theirs.load_lora_weights(file, adapter_name=name)
    theirs.set_adapters(["few", "style"], [1.0, 0.7])
    size = {"height": 96, "width": 96}
    expected = theirs(PROMPT, sigmas=[1.0, 0.5], generator=generator(theirs, 5), **size).images[0]
    assert difference(Image.open(tmp_path / "both.png"), expected) <= 1
    other = tmp_path / "other.safetensors"
    write_lora(other, random_lora(network, 2), [1.0, 0.25])
    loras = [(few, 1.0), (other, 1.0)]
    with pytest.raises(ValueError, match=r"\[1.0, 0.5\], \[1.0, 0.25\].*; choose one by sigmas"):
        Pipeline.from_pretrained(checkpoint, loras=loras)
    assert Pipeline.from_pretrained(checkpoint, loras=loras, sigmas=[1.0]).sample_sigmas == [1.0]


def test_a_student_trained_for_euler_is_drawn_by_a_fresh_scheduler(checkpoint, tmp_path):
    """A LoRA that train.py wrote, in diffusers with nothing but its sigmas."""
    lines = [{"task": "t2i", "category": "any", "prompt": text} for text in ("a house", "a hill")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = f"--checkpoint {checkpoint} --prompts {tmp_path}/mine.jsonl --out {tmp_path}/run --recipe step-wise "
    words += "--lora-rank 2 --sampler euler --steps 2 --batch 2 --micro-batch 2 --lr 0.05 --resolution 64"
    train.main([*words.split(), *CPU])
    ours = Pipeline.from_pretrained(checkpoint, loras=[(tmp_path / "run" / "lora.safetensors", 1.0)])
    ours.progress = False
    theirs, size = open_pipeline(checkpoint), {"height": 96, "width": 64}
    plain = theirs(PROMPT, sigmas=ours.sample_sigmas, generator=generator(theirs, 5), **size).images[0]
    theirs.load_lora_weights(tmp_path / "run" / "lora.safetensors")
    theirs.scheduler = FlowMatchEulerDiscreteScheduler()
    expected = theirs(PROMPT, sigmas=ours.sample_sigmas, generator=generator(theirs, 5), **size).images[0]
    drawn = ours(PROMPT, seed=5, **size)
    assert difference(drawn, expected) <= 1 and changed(drawn, plain) > 0.2


def test_documented_commands(checkpoint, tmp_path, monkeypatch):
    """The page on published checkpoints, its commands as they stand there: a picture, an edit, students."""
    monkeypatch.chdir(tmp_path)
    Path("Qwen-Image-2.1").symlink_to(checkpoint)
    network = MMDiT.from_pretrained(checkpoint / "transformer")
    write_lora("student.safetensors", new_lora(network, 2), [1.0, 0.9, 0.75, 0.5])
    for words in commands("sample.py", pages("docs/checkpoints.md")):
        few = ["--steps", "2"] if "--out" in words and "--lora" not in words else []
        sample.main([*words, *CPU, *few])
    wide, night, four = (Image.open(f"{name}.png") for name in ("fox", "night", "four"))
    assert (wide.size, night.size, four.size) == ((128, 64), (128, 64), (96, 96))
    call = {"height": 96, "width": 96}
    pipe = open_pipeline(Path("student"))
    expected = pipe("A fox in the snow.", generator=generator(pipe, 0), **call).images[0]
    assert difference(four, expected) <= 8  # the folder's weights are bf16, those under the LoRA fp32
    pipe = open_pipeline(checkpoint)
    pipe.load_lora_weights("small.safetensors")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    sigmas = [1.0, 0.9, 0.75, 0.5]
    expected = pipe("A fox in the snow.", sigmas=sigmas, generator=generator(pipe, 0), **call).images[0]
    assert difference(four, expected) <= 1


def test_documented_flags_of_public_students(checkpoint, tmp_path, monkeypatch):
    """Every row of the table that has flags draws: with a LoRA of any kind, at as many steps as the row says."""
    lines = [line for line in pages("docs/checkpoints.md").splitlines() if "`--lora FILE --sig" in line]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert len(rows) == 7
    monkeypatch.chdir(tmp_path)
    write_lora("FILE", new_lora(MMDiT.from_pretrained(checkpoint / "transformer"), 2))
    for _, steps, _, shift, flags in rows:
        args = sample.parse(["--checkpoint", str(checkpoint), "--prompt", PROMPT, *flags.strip("`").split()])
        pipeline = Pipeline.from_pretrained(checkpoint, loras=args.loras, sigmas=list(args.sigmas), shift=args.bend)
        assert len(pipeline.sigmas(None, 4096)) - 1 == int(steps) and args.shift == shift
    pruna = [1, 14 / 15, 6 / 7, 10 / 13, 2 / 3, 6 / 11, 0.4, 2 / 9, 0]  # as programs that draw with it list them
    (flags,) = [flags.strip("`").split() for _, _, _, shift, flags in rows if shift == "2"]
    args = sample.parse(["--prompt", PROMPT, *flags])
    pipeline = Pipeline.from_pretrained(checkpoint, sigmas=list(args.sigmas), shift=args.bend)
    assert pipeline.sigmas(None, 1) == pytest.approx(pruna)


# ----------------------------------------------------------------------------------------------------------------------
# The large matrix: pytest -m slow

SIZES = {"square": (96, 96), "wide": (65, 161), "tall": (190, 64)}  # height, width
SOURCES = [picture(101, 47, 1), picture(40, 90, 2, "RGBA"), picture(64, 64, 3, "L")]
PROMPTS = {
    "long": "A house, a hill, a sign. " * 40,
    "empty": "",
    "Chinese": "一只戴着巫师帽的水豚",
    "emoji": "🎨🏠 a 🌙",
}


def sources(count: int, tmp_path: Path) -> list[Image.Image]:
    """Odd sizes; transparency; grey; and files as cameras and scanners write them, opened by us, then given to both."""
    exif = Image.Exif()
    exif[0x0112] = 8
    picture(70, 50, 4).save(tmp_path / "camera.jpg", exif=exif)
    Image.fromarray(np.asarray(picture(60, 80, 5, "L")).astype(np.uint16) * 257).save(tmp_path / "scanner.png")
    picture(55, 45, 6).quantize(8).save(tmp_path / "palette.png", transparency=2)
    files = [open_picture(tmp_path / name) for name in ("camera.jpg", "scanner.png", "palette.png")]
    return ([*SOURCES, *files] * 2)[:count]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, 8, 40])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_matrix_of_sources(shifted, tmp_path, count, guidance, steps):
    images = sources(count, tmp_path) or None
    shifted.agree(images=images, guidance=guidance, steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_matrix_of_sizes_and_prompts(shifted, tmp_path, prompt, count, size):
    height, width = SIZES[size]
    images = sources(count, tmp_path) or None
    shifted.agree(PROMPTS[prompt], images=images, height=height, width=width, steps=4, guidance=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [0, 3])
def test_matrix_of_batches(checkpoint, tmp_path, count, causal):
    directory = variant(checkpoint, tmp_path)
    write_transformer(directory, seed=1, causal_condition=causal)
    both = Both(directory)
    for guidance in 1.0, 4.0:
        both.agree(list(PROMPTS.values()), images=sources(count, tmp_path) or None, steps=4, guidance=guidance)
