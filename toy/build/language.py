"""The toy checkpoint's language side: a tokenizer of the family's kind, and a random Qwen3-VL that is never trained.

A random network is enough here. Its states tell the tokens apart, and the MMDiT learns their meaning itself. They also
carry something of the words before them and of the source picture, as a real condition does. Both are written in the
published layout. So the code that opens the real checkpoints opens the toy, too: ours and the library's.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from checkpoint.files import write_json
from checkpoint.weights import save_weights
from networks.qwen3vl import PICTURE, SLOT, SYSTEM_TURN, USER_TURN, Qwen3VL, Qwen3VLConfig, TextConfig, VisionConfig

VOCABULARY = 576  # at most: 256 bytes, the merges, the special tokens
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *(SLOT, "<|video_pad|>"),
)
# How the family cuts text into words; merges happen inside a word. Words are contractions, letters with the one sign before
# them, single digits, runs of signs. It must be this pattern: the library uses it, whatever the file says.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The reference measures the system turn with this template, so the turn must end with a newline, as in the prompt.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
)


def build_tokenizer(captions: Iterable[str], directory: Path) -> None:
    """Write `directory`/processor: a byte-level BPE for `captions`, the chat template, the settings for pixels.

    It can write any text, byte by byte where the captions do not help. Capitals never merge with each other: a poster's
    word must reach the MMDiT letter by letter, or it could not spell words that no caption had.
    """
    directory = directory / "processor"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    size, alphabet = VOCABULARY - len(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    # The captions stand inside the template, so that its words become few tokens, too. The text is cut at special tokens,
    # as the tokenizer will cut it before it applies the pattern, and between capitals.
    picture = PICTURE.format(number=1, slots="")
    pieces = []
    for caption in captions:
        text = SYSTEM_TURN + USER_TURN.format(pictures=picture, prompt=caption)
        pieces += re.split(r"<\|\w+\|>|(?<=[A-Z])(?=[A-Z])", text)
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))

    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 4096,
    }
    write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    pixels = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 16777216},  # from one slot up: sources are 128 x 128
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    # This model sees no video, but the library opens no processor of the family without its part for videos.
    for file, key, kind in (
        ("preprocessor_config.json", "image_processor_type", "Qwen2VLImageProcessorFast"),
        ("video_preprocessor_config.json", "video_processor_type", "Qwen3VLVideoProcessor"),
    ):
        write_json(directory / file, {"processor_class": "Qwen3VLProcessor", key: kind} | pixels)


@torch.no_grad()
def build_text_encoder(directory: Path, seed: int) -> None:
    """Write `directory`/text_encoder: a random network for the tokenizer that `directory`/processor already holds."""
    token = Tokenizer.from_file(str(directory / "processor" / "tokenizer.json")).token_to_id
    text_config = TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e4,
        mrope_section=(8, 4, 4),
    )
    vision_config = VisionConfig(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=2,
        num_position_embeddings=64,
        out_hidden_size=128,
        deepstack_visual_indexes=(0,),
    )
    config = Qwen3VLConfig(text_config, vision_config, image_token_id=token(SLOT))
    generator = torch.Generator().manual_seed(seed)
    encoder = Qwen3VL(config, processor=None)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.fill_(1.5)  # sharper attention than with 1, which averages over everything
        elif "norm" not in name:  # the norms stay at 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation(name, parameter))
    save_weights(encoder.state_dict(), directory / "text_encoder", "model", torch.bfloat16)

    text, vision = asdict(config.text), asdict(config.vision)
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": text.pop("mrope_section")}
    content = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,  # so nothing looks for the head, which is not in the file
        "image_token_id": config.image_token_id,
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "text_config": {"model_type": "qwen3_vl_text", "hidden_act": "silu", "rope_scaling": rope} | text,
        "vision_config": {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh"} | vision,
    }
    write_json(directory / "text_encoder" / "config.json", content)


def deviation(name: str, matrix: torch.Tensor) -> float:
    """Standard deviation of a random matrix. Tokens have size 1; an attention adds 0.5 to that, an MLP 0.3."""
    if "embed_tokens" in name:
        return 1.0
    gain = 0.5 if "pos_embed" in name or "down_proj" in name else 1.0
    inputs = 1 if "pos_embed" in name else matrix[0].numel()
    return gain / math.sqrt(inputs)
