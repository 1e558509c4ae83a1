"""The libraries the tests compare with: tiny random checkpoints in the published layout, written by diffusers and
transformers themselves, and their pipeline opened on one.

    checkpoint = write_checkpoint(tmp_path / "checkpoint")     every folder; or write_text_encoder(...) etc. one by one
    pipeline = open_pipeline(checkpoint)                       diffusers' QwenImage21Pipeline, fp32, no progress bar

Every parameter is random, norms and biases too: with the libraries' own initialisation (ones and zeros) a test would
be blind to them. Run-time code never imports this file.
"""

import copy
import json
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from random_networks import randomise
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from checkpoint.lora import LoRA, merge, new_lora
from model import MMDiT
from sample import Pipeline

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
VOCABULARY = 384  # 256 bytes, about a hundred merges, and the special tokens after them, as in the published files
IMAGE_TOKEN_ID = VOCABULARY - 2

# The part of the published template that the pipeline uses: a system turn, with the newline after it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
PROMPT = "A capybara wearing a wizard hat"
CORPUS = [
    "Comprehend and analyze the provided prompt. system user assistant image",
    "A capybara wearing a wizard hat, reading a book by candlelight, oil painting; it's the user's own prompt",
    "Make the sky red and put a small house on the left hill. Replace the text on the sign with HELLO WORLD",
    "一只戴着巫师帽的水豚 在烛光下读书 油画 把天空变成红色",
    "1 2 3 2026 image1 image2 image3",
] * 4  # fmt: skip

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY + 8,  # published embeddings have spare rows too
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [12, 2, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
TRANSFORMER = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "context_in_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
VAE = {"base_dim": 8, "decoder_base_dim": 12}
IDENTITY = {"use_dynamic_shifting": False, "shift": 1.0, "shift_terminal": None}  # a scheduler that bends nothing
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_checkpoint(directory: Path, seed: int = 0, **model_index) -> Path:
    """A whole checkpoint of the tiny networks above; `model_index`: further keys, such as sample_sigmas."""
    write_processor(directory)
    write_text_encoder(directory, seed)
    write_transformer(directory, seed + 1)
    write_vae(directory, seed + 2)
    write_scheduler(directory)
    write_model_index(directory, **model_index)
    return directory


def write_transformer(directory: Path, seed: int = 0, shard_size: str = "10GB", **config) -> None:
    network = randomise(QwenImage21Transformer2DModel(**TRANSFORMER | config), seed)
    network.save_pretrained(directory / "transformer", max_shard_size=shard_size)


def write_vae(directory: Path, seed: int = 0, **config) -> None:
    randomise(AutoencoderKLQwenImage21(**VAE | config), seed).save_pretrained(directory / "vae")


def write_scheduler(directory: Path, **config) -> None:
    FlowMatchEulerDiscreteScheduler(**SCHEDULER | config).save_pretrained(directory / "scheduler")


def write_model_index(directory: Path, **keys) -> None:
    content = {
        "_class_name": "QwenImage21Pipeline",
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage21"],
    }
    (directory / "model_index.json").write_text(json.dumps(content | keys, indent=2))


def write_text_encoder(
    directory: Path,
    seed: int = 0,
    text: dict | None = None,
    vision: dict | None = None,
    shard_size: str = "10GB",
    published_spelling: bool = False,
) -> None:
    """`text`, `vision`: config keys that differ from TEXT and VISION above. `published_spelling`: rope_theta and
    rope_scaling, as transformers 4 wrote them, instead of rope_parameters."""
    config = Qwen3VLConfig(
        text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), image_token_id=IMAGE_TOKEN_ID
    )
    config.video_token_id, config.vision_start_token_id = IMAGE_TOKEN_ID + 1, VOCABULARY - 5
    config.vision_end_token_id = VOCABULARY - 4
    network = randomise(Qwen3VLForConditionalGeneration(config), seed)
    network.save_pretrained(directory / "text_encoder", max_shard_size=shard_size)
    if published_spelling:
        path = directory / "text_encoder" / "config.json"
        content = json.loads(path.read_text())
        rope = content["text_config"].pop("rope_parameters")
        content["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        del content["vision_config"]["rope_parameters"]
        path.write_text(json.dumps(content, indent=2))


def write_processor(directory: Path, shortest_edge: int = 1024, longest_edge: int = 16777216) -> None:
    """processor/: a byte-level BPE trained on a few lines, and the published settings for pictures of any small size."""
    bpe = Qwen2Tokenizer().backend_tokenizer  # the family's way of normalising and splitting, and an empty vocabulary
    size = VOCABULARY - len(SPECIAL_TOKENS)
    alphabet = ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], eos_token="<|im_end|>"
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory / "processor")
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": shortest_edge, "longest_edge": longest_edge},
        patch_size=16,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    images.save_pretrained(directory / "processor")


# ----------------------------------------------------------------------------------------------------------------------
# Opening


class Processor(Qwen3VLProcessor):
    """The library's processor without its video part, which wants torchvision: that one class check is left out."""

    def check_argument_for_proper_class(self, argument_name, argument):
        pass


def open_processor(directory: Path) -> Processor:
    tokenizer = AutoTokenizer.from_pretrained(directory / "processor")
    images = Qwen2VLImageProcessorPil.from_pretrained(directory / "processor")
    return Processor(images, tokenizer, None, chat_template=tokenizer.chat_template)


def open_pipeline(directory: Path, dtype: torch.dtype = torch.float32) -> QwenImage21Pipeline:
    processor = open_processor(directory)
    pipeline = QwenImage21Pipeline.from_pretrained(directory, processor=processor, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(pipeline: QwenImage21Pipeline, seed: int) -> torch.Generator:
    """For one call: all its noises come from the seed, as ours do. By itself diffusers takes those of later steps from
    torch's own generator."""
    rng, scheduler = torch.Generator().manual_seed(seed), pipeline.scheduler
    scheduler.step = partial(type(scheduler).step, scheduler, generator=rng)
    return rng


def open_text_pipeline(directory: Path) -> QwenImage21Pipeline:
    """Only what encode_prompt needs: checkpoints that have text_encoder/ and processor/ alone."""
    network = Qwen3VLForConditionalGeneration.from_pretrained(directory / "text_encoder", dtype=torch.float32)
    return QwenImage21Pipeline(
        scheduler=None, vae=None, text_encoder=network.eval(), processor=open_processor(directory), transformer=None
    )


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth random picture with some noise; in RGBA its transparency varies from none to full."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8), "RGBA")
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    pixels = pixels + rng.integers(-16, 17, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


# ----------------------------------------------------------------------------------------------------------------------
# LoRAs

EVERYTHING = r".*"  # all linear layers


def random_lora(
    model: MMDiT, rank: int = 4, alpha: float | None = 3.0, layers: str = EVERYTHING, seed: int = 0
) -> LoRA:
    """Strong enough to change any picture."""
    rng = torch.Generator().manual_seed(seed)
    lora = new_lora(model, rank, alpha, layers, rng)
    return {n: (a, 0.5 * torch.randn(b.shape, generator=rng), alpha) for n, (a, b, alpha) in lora.items()}


def merged(model: MMDiT, lora: LoRA, scale: float = 1.0) -> MMDiT:
    model = copy.deepcopy(model)
    merge(model, [("the LoRA", lora, scale)])
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


@torch.no_grad()
def encode_prompt(pipeline: QwenImage21Pipeline, prompts: list[str], images: list[Image.Image]):
    """The library's answer in our terms: states, mask, slots."""
    states, mask, is_slot = pipeline.encode_prompt(prompts, images or None)
    mask = torch.ones(states.shape[:2]) if mask is None else mask
    edges = torch.diff(is_slot[0].int(), prepend=torch.zeros(1), append=torch.zeros(1))
    slots = list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))
    return states, mask.bool(), slots


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The tolerance of every comparison of networks in fp32: 1e-5 of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


class Both:
    """Ours and the reference, opened on one folder and asked for the same picture."""

    def __init__(self, directory: Path):
        self.ours, self.theirs = Pipeline.from_pretrained(directory, keep_encoder=True), open_pipeline(directory)
        self.ours.progress = False

    def draw(
        self, prompt, images=None, steps=None, guidance=1.0, negative_prompt=None, resolution=None, seed=5, **size
    ):
        result = self.ours(
            prompt, images, steps=steps, guidance=guidance, negative_prompt=negative_prompt, resolution=resolution,
            seed=seed, **size,
        )  # fmt: skip
        if guidance > 1 and not isinstance(negative_prompt, list):
            negative_prompt = negative_prompt or ""
            negative_prompt = [negative_prompt] * len(prompt) if isinstance(prompt, list) else negative_prompt
        expected = self.theirs(
            prompt, image=images, num_inference_steps=steps or 40, true_cfg_scale=guidance,
            negative_prompt=negative_prompt, output_resolution=resolution or self.ours.resolution,
            generator=generator(self.theirs, seed), **size,
        ).images  # fmt: skip
        return result if isinstance(result, list) else [result], expected

    def agree(self, prompt=PROMPT, **settings) -> list[Image.Image]:
        result, expected = self.draw(prompt, **settings)
        assert len(result) == len(expected)
        for ours, theirs in zip(result, expected, strict=True):
            assert (ours.mode, ours.size) == (theirs.mode, theirs.size) == ("RGBA", ours.size)
            assert difference(ours, theirs) <= 1 and changed(ours, theirs) < 0.003
            # A picture that is clipped nearly everywhere would agree with anything.
            assert np.mean((np.asarray(ours) > 0) & (np.asarray(ours) < 255)) > 0.5
        return result


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


def changed(a: Image.Image, b: Image.Image) -> float:
    """The share of values that are not the same. fp32 flips 1 in 10,000; dividing sources by 256 instead of 255, 50."""
    return float(np.mean(np.asarray(a) != np.asarray(b)))
