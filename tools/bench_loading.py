"""What opening a checkpoint costs in memory. Not a test: it writes a checkpoint of 2.6 GB and takes about a minute.

    python tools/bench_loading.py            in a temporary folder (TMPDIR says where), which is removed afterwards

Each case runs in a process of its own. Its peak is the largest resident memory, mapped pages of files included, less what
was resident before, divided by the size of the loaded weights. Besides, a narrow autoencoder decodes a picture of 2048 x
2048 pixels, whole and in tiles.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoint.files import save_config, write_json
from checkpoint.weights import save_weights
from model import MMDiT, MMDiTConfig
from networks.vae import VAE, VAEConfig

STEM = "diffusion_pytorch_model"
CONFIG = MMDiTConfig(num_layers=5)  # the published width


def resident(which: str) -> int:
    """Bytes in memory, VmRSS now or VmHWM at the most (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def write(directory: Path, shards: int) -> int:
    """A transformer/ folder in bf16 of random numbers, the same in every tensor, in so many files. Returns its bytes."""
    shutil.rmtree(directory, ignore_errors=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MMDiT(CONFIG).state_dict().items()}
    numbers = torch.randn(max(shape.numel() for shape in shapes.values())).bfloat16()
    tensors = {name: numbers[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}
    if shards == 1:
        save_weights(tensors, directory, STEM, torch.bfloat16)
    else:
        files = {f"{STEM}-{i:05}-of-{shards:05}.safetensors": list(tensors)[i::shards] for i in range(shards)}
        for file, names in files.items():
            save_weights({name: tensors[name] for name in names}, directory, Path(file).stem, torch.bfloat16)
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(directory / f"{STEM}.safetensors.index.json", {"weight_map": weight_map})
    save_config(CONFIG, directory / "config.json", "QwenImage21Transformer2DModel")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def load(directory: str, dtype: str) -> dict:
    before, start = resident("VmRSS"), time.perf_counter()
    model = MMDiT.from_pretrained(directory, getattr(torch, dtype))
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weights": weights, "peak": peak, "seconds": seconds}


@torch.no_grad()
def decode(tile: str) -> dict:
    vae = VAE(VAEConfig(base_dim=4, decoder_base_dim=8))
    latents = torch.randn(1, 64, 128, 128)
    before, start = resident("VmRSS"), time.perf_counter()
    vae.decode(latents, int(tile))
    return {"peak": resident("VmHWM") - before, "seconds": time.perf_counter() - start}


def in_a_process(*arguments: str) -> dict:
    """What `load` or `decode` returns in a process of its own. arguments: its name, and its arguments."""
    run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, shards in ("one file", 1), ("5 shards", 5):
            size = write(Path(folder) / "transformer", shards)
            for dtype in "bfloat16", "float32":
                case = in_a_process("load", f"{folder}/transformer", dtype)
                print(
                    f"{size / 1e9:.2f} GB of bf16, {name}, into {dtype}: {case['weights'] / 1e9:.2f} GB of weights, "
                    f"peak {case['peak'] / case['weights']:.3f} times that, {case['seconds']:.1f} s",
                    flush=True,
                )
    for tile in 128, 64:
        case = in_a_process("decode", str(tile))
        print(f"2048 x 2048 pixels in tiles of {tile * 16}: peak {case['peak'] / 1e9:.2f} GB, {case['seconds']:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps({"load": load, "decode": decode}[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
