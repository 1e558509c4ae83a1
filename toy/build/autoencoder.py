"""Trains the toy's autoencoder: the published class with smaller numbers, on pictures of the toy world.

The loss is a plain VAE's: the squared error of the picture, a little of its absolute error, and BETA times the KL divergence
of the posterior from N(0, I). The world has no texture that would need an adversary or a perceptual network. BETA decides
how much noise the latents carry in training, about BETA / 2 of squared error: too little to be seen, and enough to make the
decoder tolerate the small errors of a diffusion model.

A picture of 128 x 128 has 8 x 8 latent positions. The network is convolutional except for one attention in the middle. So
most steps use crops of 4 x 4 positions, at a quarter of the cost. The last fifth of the steps uses whole pictures.
"""

import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint.files import aside
from networks.vae import VAE, VAEConfig
from toy import world
from training.muon import Muon

# Ours. High resolutions have few channels: pictures are constant over 4 x 4 pixels, so nothing is lost there. The coarse
# levels are wide, because width is cheap there.
CONFIG = {"base_dim": 4, "decoder_base_dim": 4, "dim_mult": [1, 2, 8, 32, 32], "num_res_blocks": 1}
BETA = 2e-4
L1 = 0.1  # weight of the absolute error: it keeps small things, such as eyes and mouths, from fading
MUON_LR = 0.02  # for the kernels, as matrices (outputs x all the rest)
LR = 2e-3  # AdamW, for the rest: biases, gammas, and the first and last convolution of each half
WHOLE_FROM = 0.8  # share of the steps after which whole pictures are used


def random_pictures(count: int, seed: int) -> np.ndarray:
    """(count, 32, 32, 4) float32 in [0, 1], large pixels: everything that the autoencoder will meet.

    One in five is damaged, as the sources of edits are. Some have other colours and some are partly transparent, so that a
    user's own picture is nothing new.
    """
    rng = random.Random(f"vae {seed}")
    pictures = np.ones((count, world.SIDE, world.SIDE, 4), dtype=np.float32)
    for i in range(count):
        category = rng.choice((*world.CATEGORIES, "portrait"))  # twice as many faces: they are the hardest
        small = world.render(world.draw_spec(category, rng))
        kind = rng.random()
        if kind < 0.06:
            small = world.add_noise(small, rng.getrandbits(64))
        elif kind < 0.2:
            small = world.hide(small, world.draw_half(rng))
        if rng.random() < 0.15:  # other colours
            small = small[..., rng.sample(range(3), 3)]
            small = np.clip(small * rng.uniform(0.6, 1.1) + rng.uniform(-0.1, 0.2), 0, 1)
        if rng.random() < 0.05:  # a transparent part
            x = rng.randrange(4, 28)
            pictures[i, :, x:, 3] = rng.choice((0.0, rng.random()))
        pictures[i, ..., :3] = small
    return pictures


def to_images(small: np.ndarray) -> Tensor:
    """(B, s, s, 4) in [0, 1] -> (B, 4, 4s, 4s) in [-1, 1]."""
    images = torch.from_numpy(small).permute(0, 3, 1, 2) * 2 - 1
    return F.interpolate(images, scale_factor=world.ENLARGE).contiguous(memory_format=torch.channels_last)


def crop(small: np.ndarray, rng: random.Random) -> np.ndarray:
    """Half the side of each picture, cut on the latent grid, so that a letter keeps its place on it."""
    crops = []
    for picture in small:
        x, y = 4 * rng.randrange(5), 4 * rng.randrange(5)
        crops.append(picture[y : y + 16, x : x + 16])
    return np.stack(crops)


def loss_of(vae: VAE, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the squared error in it."""
    mean, logvar = vae.moments(images)  # (B, 64, h, w) each
    logvar = logvar.clamp(-12, 4)
    difference = vae.decode_raw(mean + (logvar / 2).exp() * noise) - images
    error = difference.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error + L1 * difference.abs().mean() + BETA * kl, error


def as_matrix(kernel: Tensor) -> Tensor:
    """A convolution kernel (o, i, h, w) in channels-last memory, as the (o, h w i) matrix of the same memory."""
    return kernel.permute(0, 2, 3, 1).contiguous().view(kernel.shape[0], -1)


def split_parameters(vae: VAE) -> tuple[list, list, list]:
    """The kernels that Muon updates; the same kernels as matrices in the same memory, which is what Muon takes; the rest."""
    outer = ("conv_in", "conv_out", "quant_conv")  # and post_quant_conv
    kernels, matrices, rest = [], [], []
    for name, parameter in vae.named_parameters():
        inner = not any(layer in name for layer in outer)
        if inner and parameter.ndim == 4 and parameter[0].numel() > 1:
            kernels.append(parameter)
            matrices.append(nn.Parameter(as_matrix(parameter.detach())))
            assert matrices[-1].data_ptr() == parameter.data_ptr(), "kernels must be channels-last"
        else:
            rest.append(parameter)
    return kernels, matrices, rest


@torch.no_grad()
def psnr(vae: VAE, count: int = 96) -> float:
    """Peak signal-to-noise ratio in dB over `count` held-out pictures."""
    images = to_images(random_pictures(count, seed=-1))
    errors = []
    for batch in images.split(16):
        mean, _ = vae.moments(batch)
        decoded = vae.decode_raw(mean).clamp(-1, 1)
        errors.append(((decoded - batch) / 2).square().mean(dim=(1, 2, 3)))
    return (-10 * torch.cat(errors).log10()).mean().item()


def train_vae(out: Path, state_dir: Path, steps: int, seed: int = 0, batch: int = 16, compile: bool = False) -> dict:
    """Train the autoencoder, measure the statistics of its latents, and write `out`, a vae/ folder. Returns the log.

    A killed run resumes from state_dir.
    """
    torch.manual_seed(seed)
    vae = VAE(VAEConfig(**CONFIG)).to(memory_format=torch.channels_last)
    kernels, matrices, rest = split_parameters(vae)
    muon = Muon(matrices, lr=MUON_LR)
    adam = torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    state_file = state_dir / "vae.pt"
    start, spent, log = 0, 0.0, []
    if state_file.exists():
        state = torch.load(state_file)
        vae.load_state_dict(state["vae"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        start, spent, log = state["step"], state["seconds"], state["log"]
    compute = torch.compile(loss_of, dynamic=False) if compile else loss_of
    began = time.time() - spent
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="vae", smoothing=0.02)
    for step in bar:
        rng = random.Random(f"vae {seed} {step}")
        whole = step >= WHOLE_FROM * steps
        small = random_pictures(batch // 4 if whole else batch, seed=seed * 10**6 + step)
        images = to_images(small if whole else crop(small, rng))
        side = images.shape[2] // 16
        noise = torch.randn(len(images), 64, side, side, generator=torch.Generator().manual_seed(step))
        rate = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate * MUON_LR, rate * LR
        loss, error = compute(vae, images, noise)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        if not math.isfinite(norm):
            raise FloatingPointError(f"vae step {step}: the gradient is not finite")
        for kernel, matrix in zip(kernels, matrices):
            matrix.grad = as_matrix(kernel.grad)
        muon.step()
        adam.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", db=f"{-10 * math.log10(error.item() / 4):.1f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            seconds = round(time.time() - began)
            log.append({"step": step + 1, "seconds": seconds, "loss": loss.item(), "psnr": psnr(vae)})
            tqdm.write(json.dumps(log[-1]))
            state = {"vae": vae.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            state |= {"step": step + 1, "seconds": time.time() - began, "log": log}
            with aside(state_file) as path:
                torch.save(state, path)
    vae.bfloat16().float()  # what is saved is what is measured below
    measure_statistics(vae)
    vae.save_pretrained(out, dtype=torch.bfloat16)
    return {"steps": steps, "seconds": log[-1]["seconds"], "psnr": psnr(vae), "curve": log}


@torch.no_grad()
def measure_statistics(vae: VAE) -> None:
    """Set latents_mean and latents_std of the config: those of the SAMPLED latents.

    A channel that carries nothing has a constant mean and the prior's width. The spread of its means, almost 0, would scale
    it up to noise.
    """
    images = to_images(random_pictures(512, seed=-2))
    means, logvars = zip(*[vae.moments(batch) for batch in images.split(16)])
    mean, logvar = torch.cat(means), torch.cat(logvars)
    centre = mean.mean(dim=(0, 2, 3))
    std = ((mean - centre.view(-1, 1, 1)).square() + logvar.exp()).mean(dim=(0, 2, 3)).sqrt()
    vae.config.latents_mean, vae.config.latents_std = centre.tolist(), std.tolist()
