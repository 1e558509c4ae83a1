"""The options of train.py: what a run may be told."""

from dataclasses import dataclass
from pathlib import Path

from program.options import TOY, Options, option


@dataclass
class TrainOptions(Options):
    """The options of a run: value, allowed range, and the text of --help. The values are those of the laptop's
    distillation. A teacher, or a network of billions, gets others: training/presets.py."""

    objective: str = option("dmd", "dmd: distil a few-step student; flow: train a teacher", "dmd | flow")
    checkpoint: Path = option(TOY, "folder laid out as Qwen-Image-2.1 is published; every network starts from it")
    prompts: tuple[Path, ...] = option((), "files of JSON lines; without any, the toy world's own prompts")
    pool: int = option(1024, "without --prompts: number of toy prompts for each task", "[1, 1e6]")
    recipe: str = option(
        "flash", "composition, ratio and teachers: a row of recipe.py's table; an unknown name lists all"
    )
    out: Path | None = option(None, "folder of this run; default: runs/OBJECTIVE-RECIPE")
    cache: Path | None = option(None, "folder of encoded prompts, for several runs; default: OUT/conditions")
    teacher: tuple[str, ...] = option((), "NAME=FOLDER_OR_LORA: specialised teachers besides the checkpoint's own")
    lora_rank: int = option(
        0, "student and fake score become LoRAs of this rank on one copy of the weights; 0: off", "[0, 4096]"
    )
    guidance: float | None = option(None, "the teachers' guidance w, 1 is off; default: the checkpoint's", "[1, 100]")
    resolution: int | None = option(None, "side of the pictures' area; default: the checkpoint's", "[32, 16384]")
    fit: str = option("stretch", "where sources and targets must change their shape", "stretch | crop | pad")
    aspects: bool = option(False, "draw T2I prompts in five aspects (a hash of the words picks one), not as squares")
    student_steps: int = option(4, "number of steps of the student, its NFE", "[1, 1000]")
    sampler: str = option("renoise", "how the student draws: with new noise at every step, or not", "renoise | euler")
    steps: int = option(110, "updates of the student", "[1, 1e9]")
    batch: int = option(24, "samples in an update, over all its micro-batches", "[1, 1e6]")
    micro_batch: int = option(6, "samples that run at once, over all processes", "[1, 1e6]")
    seed: int = option(0, "every random number follows from it", "[-9e18, 9e18]")
    resume: bool = option(False, "go on from the newest checkpoint in --out")
    redraw: int | None = option(
        None, "give this step other random numbers, after it ended the run as not finite", "[1, 1e9]"
    )
    save_every: int = option(50, "steps between two checkpoints", "[1, 1e9]")
    panel_every: int = option(50, "steps between two panels, pictures of x_theta and both predictions", "[1, 1e9]")
    device: str | None = option(None, "cpu, mps, cuda or cuda:NUMBER; default: cuda if there is one")
    dtype: str | None = option(None, "of the working weights; default: the faster one", "bfloat16 | float32")
    compile: bool = option(False, "torch.compile every block; the first step takes minutes")
    recompute: bool = option(False, "compute blocks again in the backward pass: less memory, a third more work")
    plan: bool = option(False, "print memory, work and time of such a run, and do nothing else")
    gpus: int | None = option(None, "with --plan: number of processes", "[1, 1e6]")

    # The optimisation. Ours, from a prototype of the laptop's size, unless a source is named.
    muon_lr: float = option(0.002, "Muon, for the blocks' matrices; 0: AdamW for those too", "[0, 1]")
    lr: float = option(2e-4, "AdamW, for all other tensors", "[0, 1]")
    fake_muon_lr: float = option(0.005, "Muon of the fake score, higher because it has to keep up", "[0, 1]")
    fake_lr: float = option(5e-4, "AdamW of the fake score", "[0, 1]")
    beta1: float = option(0.9, "AdamW's momentum, of student and fake score", "[0, 1)")
    fake_updates: int = option(2, "updates of the fake score before each of the student; DMD2: 5", "[1, 1000]")
    warmup: int = option(10, "steps over which the learning rates rise from 0", "[0, 1e9]")
    decay: float = option(0.4, "last part of the run, in which the learning rates fall to 0", "[0, 1]")
    clip: float = option(1.0, "largest norm of a gradient (2.0 report, section 4)", "(0, 1e9]")
    ema: float = option(0.97, "decay of the averaged weights, which are exported; 0: no average", "[0, 1)")
    # Ours. Chosen before the plane found 1 to be better there; in the picture world they were not compared.
    time_shift: float = option(1.5, "moves p(t) towards noise; 1: not at all", "[0.01, 100]")
    renoise_times: str = option(
        "pooled", "noise levels of the student's picture: p(t), or p(t) below the step's own sigma", "pooled | below"
    )
    text_dropout: float = option(0.1, "flow: part of the micro-batches without words (2.0 report, section 4)", "[0, 1]")

    @property
    def home(self) -> Path:
        return self.out or Path("runs") / f"{self.objective}-{self.recipe}"

    @property
    def noises(self) -> int:
        """Noises of a sample: one for each of the student's steps if it re-noises, else one."""
        return self.student_steps if self.objective == "dmd" and self.sampler == "renoise" else 1

    @property
    def sizes(self) -> list[int]:
        """Sizes of an update's micro-batches. The last is smaller where they do not divide the batch."""
        return [min(self.micro_batch, self.batch - i) for i in range(0, self.batch, self.micro_batch)]
