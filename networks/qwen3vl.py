"""The frozen condition encoder: Qwen3-VL reads the prompt together with its source pictures.

The MMDiT's condition is the output of the language model's LAST layer, BEFORE its final norm, without the fixed system
turn at the front. The final norm belongs to the prediction of the next word: it scales the channels for the
vocabulary's matrix (`lm_head`, which is not applied here either). The MMDiT has a norm of its own instead,
`txt_in.text_norm`, whose scales were learned for pictures. The trap: libraries call both "the last hidden state".
With the normed one nothing fails, but pictures get worse.

Parameter names are the tensor names of the published text_encoder/, so that loading is strict and needs no mapping.

Two towers:
  vision    cuts a picture into 16 x 16 patches, reads them with a bidirectional transformer, and merges every 2 x 2
            patches into one token of the language model
  language  a causal transformer over the prompt's tokens, in which each `<|image_pad|>` slot holds one merged token.
            States from earlier blocks of the vision tower ("deepstack") are added to the slots after the first layers

Shapes in the comments:
  B prompts   L tokens of the longest prompt   C width of the language model   H query heads   K key heads
  N pictures of one size   h, w patches down and across   P = h w   S = P / 4 merged tokens   E width of the tower
  D width of a head   J deepstack levels   T image slots of one prompt: the sum of S over its pictures

References: Qwen3-VL technical report (arXiv:2511.21631), Qwen-Image technical report (arXiv:2508.02324).
"""

from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from checkpoint.files import build_config, read_json
from checkpoint.weights import load_weights
from program.edges import short
from program.ranges import Ranged, only, within

SYSTEM_TURN = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
USER_TURN = "<|im_start|>user\n{pictures}{prompt}<|im_end|>\n<|im_start|>assistant\n"
PICTURE = "<image{number}><|vision_start|>{slots}<|vision_end|>"
SLOT = "<|image_pad|>"
TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", SLOT)  # of the template
SIDE = 32  # pixels across a slot


# ---- Configuration ---------------------------------------------------------------------------------------------------


@dataclass
class TextConfig(Ranged):
    """`text_config` of text_encoder/config.json; the defaults are the 8B's."""

    vocab_size: int = within(151936, "[1, 10000000]")
    hidden_size: int = within(4096, "[1, 65536]")
    intermediate_size: int = within(12288, "[1, 1048576]")
    num_hidden_layers: int = within(36, "[1, 512]")
    num_attention_heads: int = within(32, "[1, 1024]")
    num_key_value_heads: int = within(8, "[1, 1024]")
    head_dim: int = within(128, "[2, 1024]")
    rms_norm_eps: float = within(1e-6, "(0, 0.1]")
    rope_theta: float = within(5e6, "[1, 1e12]")
    mrope_section: tuple[int, int, int] = (24, 20, 20)  # rotary frequencies that turn with time, height and width

    def __post_init__(self):
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads is {self.num_key_value_heads}; it must divide num_attention_heads")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section is {self.mrope_section}; its sum must be half of head_dim")


@dataclass
class VisionConfig(Ranged):
    """`vision_config` of text_encoder/config.json; the defaults are the 8B's."""

    depth: int = within(27, "[1, 512]")
    hidden_size: int = within(1152, "[1, 65536]")
    intermediate_size: int = within(4304, "[1, 1048576]")
    num_heads: int = within(16, "[1, 1024]")
    in_channels: int = only(3)
    patch_size: int = only(16)  # a slot stands for 2 x 2 latent tokens of 16 x 16 pixels
    temporal_patch_size: int = within(2, "[1, 16]")
    spatial_merge_size: int = only(2)
    num_position_embeddings: int = within(2304, "[1, 1048576]")  # learned on a square grid, 48 x 48
    out_hidden_size: int = within(4096, "[1, 65536]")
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)  # blocks whose states go to the language model as well

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(f"num_heads is {self.num_heads}; heads of a multiple of 4 channels must fill hidden_size")
        if isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings is {self.num_position_embeddings}; a square is expected")
        levels = self.deepstack_visual_indexes
        if len(set(levels)) != len(levels) or not all(level < self.depth for level in levels):
            raise ValueError(f"deepstack_visual_indexes is {levels}; different blocks below depth are expected")


@dataclass
class Qwen3VLConfig:
    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 151655

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen3VLConfig":
        """Read text_encoder/config.json in either spelling of the rope: `rope_theta` beside `rope_scaling` (as
        published), or `rope_parameters` with both inside (as transformers 5 writes it).

        Unknown keys are ignored, because the file has many for training and generation. ValueError names file and key
        of a missing or wrong value, and of one whose arithmetic is not implemented here.
        """
        content = read_json(path)
        of_text = {"hidden_act": "silu", "rope_type": "default"}
        text = _section(path, content, "text_config", TextConfig, of_text)
        of_vision = {"hidden_act": "gelu_pytorch_tanh", "rope_theta": 1e4}
        vision = _section(path, content, "vision_config", VisionConfig, of_vision)
        slot = content.get("image_token_id")
        if type(slot) is not int or not 0 <= slot < text.vocab_size:
            raise ValueError(f"{path}: 'image_token_id' is {short(slot)}; a token of the vocabulary is expected")
        if vision.out_hidden_size != text.hidden_size:
            raise ValueError(f"{path}: vision_config.out_hidden_size must be text_config.hidden_size")
        if len(vision.deepstack_visual_indexes) > text.num_hidden_layers:
            raise ValueError(f"{path}: vision_config.deepstack_visual_indexes has more levels than text_config layers")
        return cls(text, vision, slot)


def _section(path: str | Path, content: dict, name: str, kind: type, implemented: dict):
    """One of the two configs inside the file. implemented: the only possible values of further keys."""
    section = content.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{path}: key {name!r} is missing or not an object")
    for key in ("rope_parameters", "rope_scaling"):
        rope = section.get(key) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {name}.{key} is {short(rope)}; an object is expected")
        section = rope | section
    for key, value in {**implemented, "attention_bias": False, "mrope_interleaved": True}.items():
        if section.get(key, value) != value:
            raise ValueError(f"{path}: {name}.{key} is {short(section[key])}; only {value!r} is implemented")
    return build_config(kind, section, f"{path}: {name}.")


# ---- Rotary positions, for both towers -------------------------------------------------------------------------------


def rotary_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2i/width) for i < width/2, in fp32: (width/2,)."""
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def rotate_halves(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + D/2) of x (..., P, D) by angles whose cosines and sines are `rope`, each (P, D/2) in fp32.
    The MMDiT's rope turns adjacent pairs instead (attention.rotate_pairs)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)  # (..., P, D/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)  # (..., P, D)


# ---- Vision tower ----------------------------------------------------------------------------------------------------


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "n p (qkv h d) -> qkv n h p d", qkv=3, h=self.heads)  # (N, H, P, D) each
        # Pictures are along the batch axis, so each attends only to itself, without a mask.
        x = F.scaled_dot_product_attention(rotate_halves(q, rope), rotate_halves(k, rope), v)  # (N, H, P, D)
        return self.proj(rearrange(x, "n h p d -> n p (h d)"))  # (N, P, E)


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))  # (N, P, E)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)  # (N, P, E)
        return x + self.mlp(self.norm2(x))  # (N, P, E)


class Merger(nn.Module):
    """Merges each group of four neighbouring patches into one token of the language model."""

    def __init__(self, config: VisionConfig, norm_group: bool):
        super().__init__()
        self.norm_group = norm_group  # deepstack's mergers norm a group as one vector; the last merger norms each patch
        self.group = config.spatial_merge_size**2
        width = self.group * config.hidden_size
        self.norm = nn.LayerNorm(width if norm_group else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm_group else self.norm(x)  # (N, P, E)
        x = rearrange(x, "n (s g) e -> n s (g e)", g=self.group)  # (N, S, 4E)
        x = self.norm(x) if self.norm_group else x  # (N, S, 4E)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))  # (N, S, C); the exact GELU, unlike the blocks' tanh


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        patch = config.temporal_patch_size, config.patch_size, config.patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, config.hidden_size, patch)})
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config, norm_group=False)
        levels = config.deepstack_visual_indexes
        self.deepstack_merger_list = nn.ModuleList(Merger(config, norm_group=True) for _ in levels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pictures of one size (N, 3, 16h, 16w) -> (1 + J, N, S, C): the merged tokens, row by row over the
        grid (h/2, w/2), then the deepstack levels."""
        c, proj = self.config, self.patch_embed["proj"]
        h, w = pixels.shape[-2] // c.patch_size, pixels.shape[-1] // c.patch_size
        # A patch has two frames of a video, so a still picture is repeated. The kernel is applied as a matrix product,
        # because in bf16 a convolution with stride 16 gives wrong results on some CPUs (torch 2.13, oneDNN with AMX).
        sides = {"i": c.patch_size, "j": c.patch_size, "a": c.spatial_merge_size, "b": c.spatial_merge_size}
        patches = "n c (h a i) (w b j) -> n (h w a b) (c t i j)"  # in the order of _grouped
        x = repeat(pixels.to(proj.weight.dtype), patches, t=c.temporal_patch_size, **sides)  # (N, P, 3 2 16 16)
        x = F.linear(x, proj.weight.flatten(1), proj.bias)  # (N, P, E)

        side = round(c.num_position_embeddings**0.5)
        learned = rearrange(self.pos_embed.weight.float(), "(i j) e -> 1 e i j", i=side)  # (1, E, 48, 48)
        learned = F.interpolate(learned, size=(h, w), mode="bilinear", align_corners=True)  # (1, E, h, w)
        x = x + self._grouped(learned).to(x.dtype)  # (N, P, E)

        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")  # (h, w) each
        places = self._grouped(torch.stack([ys, xs])[None].to(x.device))[0]  # (P, 2)
        frequency = rotary_frequencies(c.hidden_size // c.num_heads // 2, 1e4, x.device)  # (D/4,)
        angles = (places[:, :, None] * frequency).flatten(1)  # (P, D/2): half for height, half for width
        rope = angles.cos(), angles.sin()

        levels = []
        for index, block in enumerate(self.blocks):
            x = block(x, rope)  # (N, P, E)
            if index in c.deepstack_visual_indexes:
                merger = self.deepstack_merger_list[c.deepstack_visual_indexes.index(index)]
                levels.append(merger(x))  # (N, S, C)
        return torch.stack([self.merger(x), *levels])  # (1 + J, N, S, C)

    def _grouped(self, x: Tensor) -> Tensor:
        """A map (N, E, h, w) as a sequence (N, P, E) in which the four patches of a group are neighbours."""
        m = self.config.spatial_merge_size
        return rearrange(x, "n e (h a) (w b) -> n (h w a b) e", a=m, b=m)  # (N, P, E)


# ---- Language model --------------------------------------------------------------------------------------------------


class LanguageAttention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        heads, d = "b l (h d) -> b h l d", self.config.head_dim
        q = rearrange(self.q_proj(x), heads, d=d)  # (B, H, L, D)
        k = rearrange(self.k_proj(x), heads, d=d)  # (B, K, L, D)
        v = rearrange(self.v_proj(x), heads, d=d)  # (B, K, L, D)
        q = rotate_halves(self.q_norm(q), rope)  # (B, H, L, D)
        k = rotate_halves(self.k_norm(k), rope)  # (B, K, L, D)
        # The causal mask is enough: padding is on the right, where no token before it can look.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, L, D)
        return self.o_proj(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, C)


class LanguageMLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, L, C)


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LanguageAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LanguageMLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)  # (B, L, C)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, L, C)


class LanguageModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        # In the files but never applied: see the top of this file.
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, places: Tensor, slots: Tensor, seen: Tensor) -> Tensor:
        """States (B, L, C) before the final norm.

        tokens (B, L): ids. places (3, L): time, height and width of each. slots (T,): the positions of the pictures'
        tokens. seen (1 + J, B, T, C): the vision tower's output for them.
        """
        # Interleaved axes: height has the frequencies 1, 4, 7, ..., width 2, 5, 8, ..., time all others.
        frequency = rotary_frequencies(self.config.head_dim, self.config.rope_theta, tokens.device)  # (D/2,)
        axis = torch.zeros_like(frequency, dtype=torch.long)  # (D/2,)
        axis[1 : 3 * self.config.mrope_section[1] : 3] = 1
        axis[2 : 3 * self.config.mrope_section[2] : 3] = 2
        angles = places.T[:, axis] * frequency  # (L, D/2)
        rope = angles.cos(), angles.sin()

        x = self.embed_tokens(tokens)  # (B, L, C)
        x[:, slots] = seen[0]  # (B, L, C); replaces the slots' own embedding
        for index, layer in enumerate(self.layers):
            x = layer(x, rope)  # (B, L, C)
            if index + 1 < len(seen):
                x[:, slots] += seen[index + 1]  # (B, L, C); one deepstack level after each layer
        return x  # (B, L, C)


# ---- Prompts and pictures in, states out -----------------------------------------------------------------------------


@dataclass
class PixelSettings(Ranged):
    """Keys of processor/preprocessor_config.json. The edges are the limits of a picture's area, in pixels."""

    image_mean: tuple[float, float, float] = within((0.5, 0.5, 0.5), "[0, 1]")
    image_std: tuple[float, float, float] = within((0.5, 0.5, 0.5), "[0.001, 1]")
    shortest_edge: int = within(65536, "[0, 1e9]")
    longest_edge: int = within(16777216, "[1, 1e9]")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "PixelSettings":
        """Read the folder processor/. ValueError or FileNotFoundError name file and key."""
        path = Path(directory) / "preprocessor_config.json"
        if not path.is_file() and path.with_name("processor_config.json").is_file():
            path = path.with_name("processor_config.json")  # transformers 5 saves the same keys inside this one
        settings = read_json(path)
        settings = settings.get("image_processor", settings)
        size = settings.get("size") if isinstance(settings, dict) else None
        if not isinstance(size, dict):
            raise ValueError(f"{path}: 'size' is missing or not an object")
        return build_config(cls, settings | size, f"{path}: ")


class Processor:
    """The tokenizer and the pixel settings of the published processor/ folder."""

    def __init__(self, directory: str | Path):
        self.directory = directory
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint in the published layout has it")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            self.tokenizer.no_padding()  # the file may carry the padding of whoever saved it
            self.tokenizer.no_truncation()
            self.tokenizer.encode(SYSTEM_TURN + USER_TURN)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises Exception itself, and panics with a wider class
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        missing = [token for token in TOKENS if self.tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(f"{path}: lacks the token {missing[0]}, which the prompt's template needs")
        self.settings = PixelSettings.from_pretrained(directory)

    def pixels(self, image: Image.Image) -> Tensor:
        """One picture as (3, H, W), in [-1, 1] with the published mean and deviation of 0.5, on white.

        ValueError for a size that the published processor would change: the slots must fit the latents of the same
        picture.
        """
        width, height = image.size
        fewest, most = self.settings.shortest_edge, self.settings.longest_edge
        if width % SIDE or height % SIDE or not fewest <= width * height <= most:
            area = f"the area between {fewest} and {most} pixels (processor/preprocessor_config.json)"
            raise ValueError(f"a source picture is {width} x {height}: sides must be multiples of {SIDE}, and {area}")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        image = Image.composite(image.convert("RGB"), white, image.getchannel("A"))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255  # (3, H, W)
        mean, std = torch.tensor([self.settings.image_mean, self.settings.image_std]).view(2, 3, 1, 1)  # (3, 1, 1) each
        return (x - mean) / std  # (3, H, W)


class Qwen3VL(nn.Module):
    """Open it with `from_pretrained`, and use `encode`."""

    def __init__(self, config: Qwen3VLConfig, processor: Processor):
        super().__init__()
        self.config = config
        self.processor = processor
        self.model = nn.ModuleDict({"visual": VisionTower(config.vision), "language_model": LanguageModel(config.text)})

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> "Qwen3VL":
        """Open text_encoder/ and processor/ of the checkpoint `directory`, strictly and frozen.

        FileNotFoundError or ValueError name the file, and the key or tensor, that is missing or does not fit.
        """
        directory = Path(directory)
        config = Qwen3VLConfig.from_json(directory / "text_encoder" / "config.json")
        processor = Processor(directory / "processor")
        if processor.tokenizer.token_to_id(SLOT) != config.image_token_id:
            raise ValueError(f"{directory}: {SLOT} differs in text_encoder/config.json and processor/tokenizer.json")
        if max(processor.tokenizer.get_vocab().values()) >= config.text.vocab_size:
            raise ValueError(f"{directory}: processor/tokenizer.json has more tokens than text_encoder/ has embeddings")
        with torch.device("meta"):
            encoder = cls(config, processor)
        load_weights(encoder, directory / "text_encoder", "model", dtype, device, skip=(r"lm_head\.weight",))
        return encoder.eval().requires_grad_(False)

    # Not inference_mode: its tensors cannot enter a graph, and the MMDiT's backward pass needs the states.
    @torch.no_grad()
    def encode(
        self, prompts: list[str], images: list[list[Image.Image]] | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """The condition of a batch of prompts, each with its own source pictures, already resized.

        images: one list per prompt; None for text to image. A batch has one layout: every prompt has the same number of
        pictures, of the same sizes in the same order. seen: the output of `look` for them, if it is known already.

        Returns states (B, L, C), zero-padded on the right, L without the system turn; mask (B, L), True at real tokens;
        and for each picture [start, stop) of its slots along L, row by row, one slot for 32 x 32 pixels.

        ValueError: different layouts, a size that the vision tower cannot read, a prompt that contains a slot token, a
        tokenizer that reads the slots as something else.
        """
        images = [[] for _ in prompts] if images is None else images
        check_layout(prompts, images)
        seen = self.look(images) if seen is None else seen  # (1 + J, B, T, C)
        grids = [(image.height // SIDE, image.width // SIDE) for image in images[0]]
        counts = [rows * columns for rows, columns in grids]
        tokens, lengths = self.tokens(prompts, counts)  # (B, L), (B,)

        # The pictures come before the prompt, so their slots and all positions are the same for the whole batch.
        slots = (tokens[0] == self.config.image_token_id).nonzero()[:, 0]  # (T,)
        runs = [(int(run[0]), int(run[-1]) + 1) for run in slots.split(counts)]
        length = tokens.shape[1]
        places = rope_places(length, runs, grids)  # (3, L)
        device = seen.device
        states = self.model["language_model"](tokens.to(device), places.to(device), slots.to(device), seen)  # (B, L, C)

        cut = len(self.processor.tokenizer.encode(SYSTEM_TURN).ids)
        mask = (torch.arange(length) < lengths[:, None])[:, cut:].to(device)  # (B, L - cut)
        states = states[:, cut:].masked_fill(~mask[..., None], 0)  # (B, L - cut, C)
        return states, mask, [(start - cut, stop - cut) for start, stop in runs]

    def tokens(self, prompts: list[str], counts: list[int]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) of the prompts in their template, zero-padded on the right, and their lengths (B,).

        counts: the slots of each picture. Special tokens in a user's text are read as such.
        """
        numbered = enumerate(counts, start=1)
        pictures = " ".join(PICTURE.format(number=number, slots=SLOT * count) for number, count in numbered)
        # An empty prompt becomes one space. The language model has no start token, so it needs something to read.
        texts = [SYSTEM_TURN + USER_TURN.format(pictures=pictures, prompt=prompt or " ") for prompt in prompts]
        ids = [encoding.ids for encoding in self.processor.tokenizer.encode_batch(texts)]
        lengths = torch.tensor([len(row) for row in ids])  # (B,)
        longest = int(lengths.max())
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])  # (B, L)
        slots = (tokens == self.config.image_token_id).sum(1)  # (B,)
        if (slots != sum(counts)).any():
            problem = f"{self.processor.directory}/tokenizer.json: makes {slots.tolist()} tokens {SLOT} of prompts"
            raise ValueError(f"{problem} with {sum(counts)} each; its normalizer or its added tokens are damaged")
        return tokens, lengths

    @torch.no_grad()
    def look(self, images: list[list[Image.Image]]) -> Tensor:
        """The vision tower's output for each prompt's pictures, one after the other: (1 + J, B, T, C). See `encode`."""
        weight = self.model["visual"].pos_embed.weight
        columns = [weight.new_zeros(1, len(images), 0, self.config.text.hidden_size)]  # (1, B, 0, C), without pictures
        for column in zip(*images, strict=True):
            different = {id(image): image for image in column}  # prompts often share a picture
            pixels = torch.stack([self.processor.pixels(image) for image in different.values()])  # (N, 3, H, W)
            features = self.model["visual"](pixels.to(weight.device))  # (1 + J, N, S, C)
            numbers = {key: number for number, key in enumerate(different)}
            columns.append(features[:, [numbers[id(image)] for image in column]])  # (1 + J, B, S, C)
        return torch.cat(columns[1:] or columns, dim=2)


def check_layout(prompts: list[str], images: list[list[Image.Image]]) -> None:
    """ValueError unless the prompts can be one batch: see `Qwen3VL.encode`."""
    if not prompts or len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(images)} lists of source pictures: one list per prompt")
    sizes = [image.size for image in images[0]]
    if any([image.size for image in row] != sizes for row in images):
        raise ValueError("the prompts of one batch need equally many source pictures of equal sizes: encode apart")
    for prompt in prompts:
        if SLOT in prompt or "<|video_pad|>" in prompt:
            raise ValueError(f"prompt {prompt!r}: {SLOT} and <|video_pad|> are kept for pictures; remove them")


def rope_places(length: int, runs: list[tuple[int, int]], grids: list[tuple[int, int]]) -> Tensor:
    """Time, height and width (3, length) of every token. runs: [start, stop) of each picture's slots; grids: their
    rows and columns.

    Text advances a counter on all three axes. A picture has the counter as its time, and its rows and columns count
    from there, not from its centre as in the MMDiT. Then the counter advances by the longer of its sides.
    """
    pieces = []
    counter = 0  # the next position
    placed = 0  # tokens that have a position
    for (start, stop), (rows, columns) in zip(runs, grids, strict=True):
        pieces.append((counter + torch.arange(start - placed)).expand(3, -1))  # (3, text before)
        counter += start - placed
        grid = torch.meshgrid(torch.zeros(1).long(), torch.arange(rows), torch.arange(columns), indexing="ij")
        pieces.append(counter + torch.stack(grid).flatten(1))  # (3, rows * columns)
        counter += max(rows, columns)
        placed = stop
    pieces.append((counter + torch.arange(length - placed)).expand(3, -1))  # (3, text after)
    return torch.cat(pieces, dim=1)  # (3, length)
