"""The command line of sample.py: its flags with their ranges, and which of them go together. Torch is not imported here."""

import argparse
import re
from pathlib import Path

from support.program import check_range

TOY = Path(__file__).parents[1] / "toy" / "checkpoint"

EXAMPLES = """examples:
  python sample.py --prompt "a red house under a small moon" --out house.png
  python sample.py --checkpoint runs/dmd-flash/student --prompt "make it night" --image house.png --out night.png
  python sample.py --checkpoint base --lora student.safetensors:0.8 --prompt "a red house"    draw with a LoRA
  python sample.py --checkpoint base --lora student.safetensors --export student              make it a folder
  python sample.py --checkpoint student --base base --export student.safetensors              make a folder a LoRA
"""

# Flag: (keywords of add_argument, interval of its numbers). A default of None says in its help what it stands for.
DRAWING = {
    "--prompt": (dict(metavar="TEXT", help="what to draw, or how to edit"), None),
    "--image": (dict(nargs="+", default=[], metavar="FILE", help="sources of an edit: any format that Pillow reads, and "
                     "HEIC with the package pillow-heif"), None),
    "--prompt-file": (dict(metavar="FILE", help="JSON lines as train.py reads them, instead of both"), None),
    "--negative-prompt": (dict(metavar="TEXT", help="what to stay away from, with guidance above 1"), None),
    "--guidance": (dict(type=float, metavar="W", help="1 is off [the checkpoint's]"), "[1, 1000]"),
    "--steps": (dict(type=int, metavar="N", help="[the checkpoint's sigmas, else 40]"), "[1, 1000]"),
    "--height": (dict(type=int, metavar="N", help="in pixels, floored to a multiple of 32"), "[32, 16384]"),
    "--width": (dict(type=int, metavar="N"), "[32, 16384]"),
    "--aspect": (dict(metavar="W:H", help="this shape at the resolution's area, instead of both"), None),
    "--resolution": (dict(type=int, metavar="N", help="sources get this side's area [the checkpoint's]"), "[32, 4096]"),
    "--fit": (dict(choices=["stretch", "crop", "pad"], default="stretch",
                   help="sources whose shape is not one of multiples of 32 [stretch]"), None),
    "--seed": (dict(type=int, default=0, metavar="N", help="of the noise [0]"), "[0, 9223372036854775807]"),
    "--num-images": (dict(type=int, default=1, metavar="N", help="for each prompt, seeds N, N + 1, ... [1]"), "[1, 10000]"),
    "--out": (dict(default="out.png", metavar="FILE.png", help="several are FILE-1.png, ... [out.png]"), None),
}  # fmt: skip
EXPORTING = {
    "--export": (dict(metavar="OUT", help="write the student as a folder, or as a LoRA OUT.safetensors"), None),
    "--link": (dict(action="store_true", help="of a folder: link what did not change instead of copying it"), None),
    "--base": (dict(metavar="DIR", help="of a LoRA: the checkpoint that it will be loaded onto"), None),
    "--rank": (dict(type=int, default=64, metavar="R", help="of a LoRA [64]"), "[1, 65536]"),
    "--compile": (dict(action="store_true", help="torch.compile the MMDiT: minutes at first, then faster"), None),
}
BOTH = {
    "--checkpoint": (dict(default=str(TOY), metavar="DIR", help="folder in the published layout [toy/checkpoint]"), None),
    "--lora": (dict(nargs="+", default=[], metavar="FILE[:SCALE]", help="change the MMDiT by these [scale 1]"), None),
    "--sigmas": (dict(type=float, nargs="+", metavar="S",
                      help="stop at exactly these times from 1 down, without the last 0"), "(0, 1]"),
    "--overwrite": (dict(action="store_true", help="replace files, and exports, that were made with other settings"), None),
    "--device": (dict(help="[cuda where there is one, else cpu]"), None),
    "--dtype": (dict(choices=["bfloat16", "float16", "float32"], help="[bfloat16 on cuda, else float32]"), None),
    "--offload": (dict(action="store_true", help="keep on the device only the network at work"), None),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Its errors are ValueErrors, one line like all others."""

    def error(self, message: str) -> None:
        raise ValueError(message.removeprefix("argument "))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without a checkpoint. ValueError names the flag."""
    parser = Parser(
        prog="sample.py",
        usage="python sample.py [flags] --prompt TEXT",
        description="Draw, edit and export with a checkpoint in the published layout.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, flags in {"both": BOTH, "drawing": DRAWING, "exporting": EXPORTING}.items():
        group = parser.add_argument_group(title)
        for flag, (keywords, _) in flags.items():
            group.add_argument(flag, **keywords)
    args, given = parser.parse_args(arguments), []  # given: the flags whose values are not their defaults
    for flag, (_, within) in (DRAWING | EXPORTING | BOTH).items():
        name = flag[2:].replace("-", "_")
        value = vars(args)[name]
        given += [flag] if value != parser.get_default(name) else []
        for number in value if isinstance(value, list) else [value]:
            if within and number is not None:
                check_range(flag, number, within)
    lora = args.export is not None and Path(args.export).suffix == ".safetensors"
    for flags, fits, use in (  # what would be passed over without a word
        (DRAWING, args.export is None, "drawing, and --export draws nothing"),
        (["--link"], args.export is not None and not lora, "--export of a folder"),
        (["--base", "--rank"], lora, "--export OUT.safetensors, a LoRA"),
    ):
        if not fits and (wrong := [flag for flag in flags if flag in given]):
            raise ValueError(f"{wrong[0]} is for {use}")
    if args.export is None:
        check_drawing(args)
    args.lora_files = [split_scale(given) for given in args.lora]
    return args


def check_drawing(args: argparse.Namespace) -> None:
    """What to draw, its shape and its file. Sets `args.shape`, the two numbers of --aspect or None."""
    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: pictures have an alpha channel and are written as .png")
    if (args.prompt is None) == (args.prompt_file is None) or (args.prompt_file is not None and args.image):
        raise ValueError("give either --prompt (with --image FILE ... for an edit) or --prompt-file")
    if args.prompt_file == "":
        raise ValueError("--prompt-file '': no such file")
    for text in args.prompt, args.negative_prompt:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in text or ""):
            raise ValueError(f"--prompt {text!r}: holds half a letter (a lone surrogate); give whole text")
    args.shape = None
    if args.aspect is not None:
        match = re.fullmatch(r"(\d*\.?\d+):(\d*\.?\d+)", args.aspect[:100])
        args.shape = tuple(map(float, match.groups())) if match else (0.0, 1.0)
        if 0 in args.shape or not 0.01 <= args.shape[0] / args.shape[1] <= 100 or args.height or args.width:
            raise ValueError(f"--aspect {args.aspect[:100]}: W:H from 1:100 to 100:1 is expected, such as 16:9, and no "
                             f"--height or --width")  # fmt: skip


def split_scale(given: str) -> tuple[str, float]:
    """FILE[:SCALE] of --lora; a colon may be part of the file's name."""
    file, colon, scale = given.rpartition(":")
    try:
        file, scale = (file, float(scale)) if colon else (given, 1.0)
    except ValueError:
        return given, 1.0
    check_range(f"--lora {file}: the scale", scale, "[-1000, 1000]")
    return file, scale
