"""Draw, edit and export with a checkpoint in the published layout.

examples:
  python sample.py --prompt "A landscape of hills, clear day sky, house on the left." --out house.png
  python sample.py --checkpoint runs/dmd-flash/student --prompt "This house at night, by the sea." --image house.png
  python sample.py --checkpoint base --lora student.safetensors:0.8 --prompt "a red house"    draw with a LoRA
  python sample.py --checkpoint base --lora student.safetensors --export student              make it a folder
  python sample.py --checkpoint student --base base --export student.safetensors              make a folder a LoRA
"""

from dataclasses import dataclass
from pathlib import Path

from program import options
from program.options import TOY, Options, check_use, option
from program.ranges import check_range

USES = {  # what the program does
    "draw": "drawing",
    "folder": "--export of a folder",
    "lora": "--export OUT.safetensors, a LoRA",
}


@dataclass
class SampleOptions(Options):
    """The options of sample.py."""

    checkpoint: str = option(str(TOY), "folder in the published layout")
    lora: tuple[str, ...] = option((), "FILE or FILE:SCALE, change the MMDiT by these; the scale is 1")
    sigmas: tuple[float, ...] = option((), "stop at these times from 1 down, without the last 0", "(0, 1]")
    shift: str = option(
        "none", "how --sigmas are bent: none, dynamic (as the base's own, without its terminal) or a number"
    )
    overwrite: bool = option(False, "replace files that stand at --out or --export; folders are never replaced")
    device: str | None = option(None, "default: cuda where there is one, else cpu")
    dtype: str | None = option(None, "default: bfloat16 on cuda, else float32", "bfloat16 | float16 | float32")
    offload: bool = option(False, "keep on the device only the network at work")
    compile: bool = option(False, "torch.compile the MMDiT: minutes at first, then faster")

    prompt: str | None = option(None, "what to draw, or how to edit", use="draw")
    image: tuple[str, ...] = option((), "sources of an edit; HEIC needs the package pillow-heif", use="draw")
    prompt_file: str | None = option(None, "JSON lines as train.py reads them, instead of both", use="draw")
    negative_prompt: str | None = option(None, "what to stay away from, with guidance above 1", use="draw")
    guidance: float | None = option(None, "1 is off; default: the checkpoint's", "[1, 1000]", use="draw")
    steps: int | None = option(None, "default: the checkpoint's sigmas, else 40", "[1, 1000]", use="draw")
    height: int | None = option(None, "in pixels, floored to a multiple of 32", "[32, 16384]", use="draw")
    width: int | None = option(None, "likewise", "[32, 16384]", use="draw")
    aspect: str | None = option(None, "W:H, this shape at the resolution's area, instead of both", use="draw")
    resolution: int | None = option(
        None, "sources get this side's area; default: the checkpoint's", "[32, 4096]", use="draw"
    )
    fit: str = option(
        "stretch", "sources whose shape is not one of multiples of 32", "stretch | crop | pad", use="draw"
    )
    seed: int = option(0, "of the noise", "[0, 9223372036854775807]", use="draw")
    num_images: int = option(1, "for each prompt, with seeds N, N + 1, ...", "[1, 10000]", use="draw")
    out: str = option("out.png", "FILE.png; several are FILE-1.png, ...", use="draw")

    export: str | None = option(None, "write the student as a folder, or as a LoRA OUT.safetensors")
    link: bool = option(False, "of a folder: link what did not change instead of copying it", use="folder")
    base: str | None = option(None, "of a LoRA: the checkpoint that it will be loaded onto", use="lora")
    rank: int = option(64, "of a LoRA", "[1, 65536]", use="lora")
    exact: tuple[str, ...] = option((), "of a LoRA: store the changes of layers with these names whole", use="lora")

    @property
    def loras(self) -> list[tuple[str, float]]:
        """File and scale of each --lora."""
        return [split_scale(given) for given in self.lora]

    @property
    def bend(self) -> str | float:
        return split_shift(self.shift)

    @property
    def shape(self) -> tuple[float, float] | None:
        return None if self.aspect is None else split_aspect(self.aspect)


def check(args: SampleOptions) -> None:
    """ValueError where flags do not go together, as far as it can be known without a checkpoint."""
    if args.export is None:
        asked = "draw"
    else:
        asked = "lora" if Path(args.export).suffix == ".safetensors" else "folder"
    check_use(args, asked, USES)
    if args.bend != "none" and not args.sigmas:
        raise ValueError(f"--shift {args.shift}: it bends --sigmas, and none are given")
    if asked == "lora" and not args.base:
        raise ValueError(f"--export {args.export}: a LoRA changes a base; name its folder with --base")
    if asked == "draw":
        check_drawing(args)


def check_drawing(args: SampleOptions) -> None:
    """The same for the flags of a drawing."""
    if args.seed + args.num_images > 2**63:
        raise ValueError(f"--seed {args.seed}: {args.num_images} pictures need as many seeds below 2^63")
    if Path(args.out).suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: pictures have an alpha channel and are written as .png")
    if (args.prompt is None) == (args.prompt_file is None) or (args.prompt_file is not None and args.image):
        raise ValueError("give either --prompt (with --image FILE ... for an edit) or --prompt-file")
    for text in args.prompt, args.negative_prompt:
        if any(0xD800 <= ord(letter) < 0xE000 for letter in text or ""):
            raise ValueError(f"--prompt {text!r}: holds half a letter (a lone surrogate); give whole text")
    if args.shape and (args.height or args.width):
        raise ValueError(f"--aspect {args.aspect}: it gives both sides; leave out --height and --width")


def split_aspect(given: str) -> tuple[float, float]:
    """The two numbers of --aspect."""
    try:
        width, height = (float(side) for side in given.split(":"))
        fits = 0.01 <= width / height <= 100
    except (ValueError, ZeroDivisionError):
        fits = False
    if not fits:
        raise ValueError(f"--aspect {given[:100]}: W:H from 1:100 to 100:1 is expected, such as 16:9")
    return width, height


def split_shift(given: str) -> str | float:
    """The word, or the number, of --shift."""
    if given in ("none", "dynamic"):
        return given
    try:
        number = float(given)
    except ValueError:
        raise ValueError(f"--shift {given[:100]}: expected is none, dynamic or a number") from None
    check_range("--shift", number, "(0, 100]")
    return number


def split_scale(given: str) -> tuple[str, float]:
    """FILE[:SCALE] of --lora; a colon may be part of the file's name."""
    file, colon, scale = given.rpartition(":")
    try:
        file, scale = (file, float(scale)) if colon else (given, 1.0)
    except ValueError:
        return given, 1.0
    check_range(f"--lora {file}: the scale", scale, "[-1000, 1000]")
    return file, scale


def parse(argv: list[str] | None = None) -> SampleOptions:
    args = options.parse(argv, SampleOptions, __doc__)
    check(args)
    return args
