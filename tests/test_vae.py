"""The autoencoder against AutoencoderKLQwenImage21 of diffusers, on small random checkpoints that diffusers wrote."""

import json

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21
from reference import assert_close

from networks.vae import VAE, VAEConfig

# Between them: shortcuts that double, keep, quarter and halve the channels, with and without time; a last level that
# halves the channels; more and fewer levels and blocks than published; no decoder_base_dim.
NETWORKS = {
    "published": {},
    "other halvings of time": {"dim_mult": [1, 2, 4, 4, 4], "temperal_downsample": [True, False, True, False]},
    "one block, three levels": {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "num_res_blocks": 1},
    "steep and back": {"dim_mult": [1, 4, 4, 2], "temperal_downsample": [False, True, False], "decoder_base_dim": None},
    "growing from the start": {"dim_mult": [1, 4, 2], "temperal_downsample": [False, False], "num_res_blocks": 3},
}


def reference(directory, **config) -> AutoencoderKLQwenImage21:
    """A random network of diffusers, saved in `directory`; every weight (gammas too) and statistic off its default."""
    torch.manual_seed(0)
    config = {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 6, **config}
    config["latents_mean"] = torch.randn(config["z_dim"]).tolist()
    config["latents_std"] = (0.5 + torch.rand(config["z_dim"])).tolist()
    network = AutoencoderKLQwenImage21(**config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    network.save_pretrained(directory)
    return network


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint with the published pattern of levels; not to be written to."""
    directory = tmp_path_factory.mktemp("published")
    reference(directory)
    return directory


def statistics(network):
    config = network.config
    return (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (config.latents_mean, config.latents_std))


@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 2, 3), (3, 4, 1)])
@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_encodes_and_decodes_like_the_reference(tmp_path, config, batch, rows, columns):
    theirs = reference(tmp_path, **config)
    ours = VAE.from_pretrained(tmp_path)
    mean, std = statistics(theirs)
    side = 2 ** (len(theirs.config.dim_mult) - 1)
    images = torch.rand(batch, 4, rows * side, columns * side) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images[:, :, None]).latent_dist
        assert_close(ours.moments(images)[1], posterior.logvar[:, :, 0])
        latents = (posterior.mode() - mean) / std
        assert_close(ours.encode(images), latents[:, :, 0])
        pixels = theirs.decode(latents * std + mean).sample[:, :, 0]
        assert (pixels.abs() < 1).float().mean() > 0.9  # the reference clamps: there must be something left to compare
        assert_close(ours.decode(latents[:, :, 0]).clamp(-1, 1), pixels)


@pytest.mark.parametrize("config", ["published", "one block, three levels"])
@torch.no_grad()
def test_parts_leave_no_seam(tmp_path, config, monkeypatch):
    """In parts as whole: the rounding of fp32 apart nothing changes, at the edges of a picture's strips least of all."""
    reference(tmp_path, **NETWORKS[config])
    vae = VAE.from_pretrained(tmp_path)
    latents = torch.randn(1, 6, 32, 7, generator=torch.Generator().manual_seed(0))
    pictures = vae.decode(latents)
    images, sizes = pictures[..., :16].reshape(4, 4, -1, 16).clamp(-1, 1), []
    again = vae.encode(images)
    vae.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr("networks.vae.DECODED", 21)  # three rows
    monkeypatch.setattr("networks.vae.ENCODED", 3 * again[0, 0].numel())
    assert_close(vae.decode(latents), pictures)
    assert_close(vae.encode(images), again)
    assert sizes == [3, 1]


def test_gradients_are_the_references(tmp_path):
    theirs = reference(tmp_path)
    ours = VAE.from_pretrained(tmp_path).requires_grad_(True)
    images, probe = torch.rand(2, 4, 32, 16) * 2 - 1, torch.randn(2, 4, 32, 16)
    posterior = theirs.encode(images[:, :, None]).latent_dist
    pixels = theirs.decode(posterior.mean).sample[:, :, 0]
    ((pixels * probe).mean() + posterior.logvar.square().mean()).backward()
    mean, logvar = ours.moments(images)
    ((ours.decode_raw(mean).clamp(-1, 1) * probe).mean() + logvar.square().mean()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    scale = max(g.abs().max() for g in gradients.values())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients.pop(name)).abs().max() / scale < 1e-5, name
    assert not gradients


def test_half_precision_is_as_close_to_the_truth_as_the_references(tmp_path):
    truth = reference(tmp_path)
    theirs = AutoencoderKLQwenImage21.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = VAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    images = (torch.rand(2, 4, 64, 48) * 2 - 1).bfloat16()
    with torch.no_grad():
        exact = truth.decode(truth.encode(images[:, :, None].float()).latent_dist.mode()).sample[:, :, 0]
        rounded = theirs.decode(theirs.encode(images[:, :, None]).latent_dist.mode()).sample[:, :, 0]
        pixels = ours.decode(ours.encode(images))
    assert pixels.dtype is torch.bfloat16
    error, allowed = ((p.float().clamp(-1, 1) - exact).square().mean().sqrt() for p in (pixels, rounded))
    assert 0 < error < 1.3 * allowed


def test_reference_opens_what_we_save(tmp_path):
    torch.manual_seed(1)
    config = VAEConfig(
        base_dim=4, decoder_base_dim=8, z_dim=3, latents_mean=[0.1, 0.2, -0.3], latents_std=[1.5, 2.0, 0.5]
    )
    ours = VAE(config)
    ours.save_pretrained(tmp_path)
    theirs, report = AutoencoderKLQwenImage21.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or mismatched
    mean, std = statistics(theirs)
    latents = torch.randn(2, 3, 2, 1)
    with torch.no_grad():
        pixels = theirs.decode(latents[:, :, None] * std + mean).sample[:, :, 0]
        assert_close(ours.decode(latents).clamp(-1, 1), pixels)

    again = VAE.from_pretrained(tmp_path)
    assert again.config == config
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_published_size_has_the_published_names_and_shapes():
    with torch.device("meta"):
        ours, theirs = VAE(VAEConfig()), AutoencoderKLQwenImage21()
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    assert not shapes.keys() & ours.video_weights().keys()
    assert shapes | ours.video_weights() == {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    config = json.loads(json.dumps(vars(VAEConfig())))
    expected = {key: value for key, value in json.loads(theirs.to_json_string()).items() if not key.startswith("_")}
    assert config.keys() == expected.keys()
    assert {key for key in config if config[key] != expected[key]} == {"latents_mean", "latents_std"}
