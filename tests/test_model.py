"""The MMDiT against QwenImage21Transformer2DModel of diffusers, on small random checkpoints that diffusers wrote."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from safetensors.torch import save_file

from checkpoint.files import config_from_json
from checkpoint.weights import load_weights
from model import Condition, MMDiT, MMDiTConfig
from networks.attention import attend
from training.trainee import recompute

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
SMALL = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": [4, 6, 6],
    "context_in_dim": 24,
    "in_channels": 8,
    "out_channels": 8,
}
CONFIGS = {
    "causal": SMALL,
    "time everywhere": {**SMALL, "causal_condition": False},
    "other numbers": {**SMALL, "num_attention_heads": 3, "num_layers": 3, "axes_dims_rope": [8, 2, 6], "mlp_ratio": 2}
    | {"in_channels": 12, "out_channels": 12, "eps": 1e-3},
}
# (states L, real ones of each sample, slots, source sizes, target size)
LAYOUTS = {
    "text": (9, [9, 6], [], [], (4, 6)),
    "one source": (14, [11, 14], [(2, 6)], [(4, 4)], (6, 2)),
    "two sources": (17, [17, 15, 14], [(1, 4), (6, 12)], [(2, 6), (4, 6)], (8, 2)),
    "adjacent sources": (16, [16, 12], [(3, 7), (7, 10)], [(2, 8), (6, 2)], (2, 6)),
    "source first, nothing padded": (7, [7, 7], [(0, 1)], [(2, 2)], (2, 10)),
    "no text after the source": (6, [6], [(4, 6)], [(2, 4)], (4, 4)),
}


def reference(directory, **config) -> QwenImage21Transformer2DModel:
    """A random network of diffusers, saved in `directory`; norms off their ones and zeros, gates and scales large."""
    torch.manual_seed(0)
    network = QwenImage21Transformer2DModel(**config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if name in ("modulation.1.weight", "norm_out.linear.weight"):
                parameter.mul_(5)
    network.save_pretrained(directory)
    return network


def inputs(layout: str, config: dict):
    """z, t and a random condition; what is padded holds random states too, so that seeing it would show."""
    length, real, slots, sizes, target = LAYOUTS[layout]
    torch.manual_seed(1)
    batch, channels = len(real), config["in_channels"]
    mask = torch.arange(length) < torch.tensor(real)[:, None]
    sources = [torch.randn(batch, channels, *size) for size in sizes]
    condition = Condition(torch.randn(batch, length, config["context_in_dim"]), mask, sources, slots)
    return torch.randn(batch, channels, *target), torch.tensor([0.93, 0.4, 0.05])[:batch], condition


def ask(network, z, t, condition, **cache):
    """The reference's velocity, as a grid."""
    batch, (h, w) = len(z), z.shape[-2:]
    slots = torch.zeros(batch, condition.mask.shape[1] + h * w // 4, dtype=torch.bool)
    slots[:, condition.mask.shape[1] :] = True
    for start, stop in condition.slots:
        slots[:, start:stop] = True
    grids = [*condition.sources, z]
    v = network(
        hidden_states=torch.cat([grid.flatten(2).mT for grid in grids], 1),
        encoder_hidden_states=condition.states,
        encoder_hidden_states_mask=condition.mask,
        timestep=t,
        img_shapes=[[(1, *grid.shape[-2:]) for grid in grids]] * batch,
        img_mask=slots,
        **cache,
    ).sample
    return v[:, -h * w :].mT.unflatten(2, (h, w))


def difference(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradients(network, velocity, z):
    """The output, and the gradients of a random linear function of it in z and in every parameter."""
    network.zero_grad()
    z = z.clone().requires_grad_()
    v = velocity(z)
    v.backward(torch.randn(v.shape, generator=torch.Generator().manual_seed(2)).to(v.dtype))
    return {"v": v.detach(), "z": z.grad} | {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients_equal_the_reference(tmp_path, config, layout):
    theirs = reference(tmp_path, **config)
    ours = MMDiT.from_pretrained(tmp_path)
    z, t, condition = inputs(layout, config)
    expected = gradients(theirs, lambda z: ask(theirs, z, t, condition), z)
    found = gradients(ours, lambda z: ours(z, t, condition), z)
    assert found.keys() == expected.keys()
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_kept_prefix_is_exact_at_every_time_and_target(tmp_path, layout):
    theirs = reference(tmp_path, **SMALL)
    ours = MMDiT.from_pretrained(tmp_path)
    z, t, condition = inputs(layout, SMALL)
    v, prefix = ours.with_prefix(z, t, condition)
    assert torch.equal(v, ours(z, t, condition))
    cache, mode = QwenImage21KVCache(SMALL["num_layers"]), "extract"
    for z, t in ((z, t), (z.flip(0) + 1, t / 3), (-z, 0 * t + 1)):  # noqa: B020
        v = ours(z, t, condition, prefix=prefix)
        assert difference(v, ours(z, t, condition)) < 1e-6
        assert difference(v, ask(theirs, z, t, condition, kv_cache=cache, kv_cache_mode=mode)) < 1e-5
        mode = "cached"


def test_gradients_pass_through_a_kept_prefix(tmp_path):
    reference(tmp_path, **SMALL)
    model = MMDiT.from_pretrained(tmp_path)
    z, t, condition = inputs("two sources", SMALL)
    expected = gradients(model, lambda z: model(z, t, condition), z)
    found = gradients(model, lambda z: model(z, t, condition, model.with_prefix(z, t, condition)[1]), z)
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-5


def test_no_prefix_is_kept_where_it_depends_on_time():
    model = MMDiT(MMDiTConfig(**{**SMALL, "axes_dims_rope": (4, 6, 6), "causal_condition": False}))
    with pytest.raises(ValueError, match="causal_condition"):
        model.with_prefix(*inputs("text", SMALL))


@pytest.mark.parametrize("causal", [True, False])
def test_gradient_checkpointing_computes_again_and_changes_nothing(tmp_path, causal):
    reference(tmp_path, **SMALL, causal_condition=causal)
    model = MMDiT.from_pretrained(tmp_path)
    calls = []
    model.transformer_blocks[1].img_mlp.register_forward_hook(lambda *_: calls.append(1))
    z, t, condition = inputs("one source", SMALL)
    expected = gradients(model, lambda z: model(z, t, condition), z)
    assert len(calls) == 1
    recompute(model)
    found = gradients(model, lambda z: model(z, t, condition), z)
    assert len(calls) == 3  # and twice more
    assert max(difference(found[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_states_are_never_seen_and_cannot_break_a_gradient(tmp_path, dtype):
    reference(tmp_path, **SMALL)
    model = MMDiT.from_pretrained(tmp_path, dtype=dtype)
    z, t, condition = inputs("two sources", SMALL)
    first = gradients(model, lambda z: model(z, t, condition), z)
    condition.states[~condition.mask] = -7.0
    second = gradients(model, lambda z: model(z, t, condition), z)
    assert all(torch.equal(first[name], second[name]) for name in first)

    z, t, condition = inputs("text", SMALL)
    nothing = Condition(condition.states, torch.zeros_like(condition.mask), [], [])  # not one real token
    assert all(g.isfinite().all() for g in gradients(model, lambda z: model(z, t, nothing), z).values())


@pytest.mark.parametrize("masked", [True, False])
def test_both_forms_of_attention_agree(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    bias = torch.zeros(2, 1, 1, 7).masked_fill(torch.arange(7) > 4, -torch.inf) if masked else None
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    full = [x.detach().float().requires_grad_() for x in half]
    ours = attend(*half, bias if bias is None else bias.bfloat16())
    theirs = F.scaled_dot_product_attention(*full, attn_mask=bias)
    assert difference(ours, theirs) < 0.02
    ours.float().square().sum().backward()
    theirs.square().sum().backward()
    assert max(difference(a.grad, b.grad) for a, b in zip(half, full, strict=True)) < 0.04


def test_bf16_is_near_fp32_and_rounds_time_as_the_reference_does(tmp_path):
    full = reference(tmp_path, **SMALL)
    half = QwenImage21Transformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    model = MMDiT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    z, t, condition = inputs("one source", SMALL)
    z, condition = z.bfloat16(), condition.to("cpu", torch.bfloat16)
    t = torch.tensor([0.9275, 0.4005])  # in bf16 0.9258 and 0.4004, 1.7 and 0.1 radians off at the fastest frequency
    assert torch.equal(model(z, t, condition), model(z, t.bfloat16(), condition))
    fine = ask(full, z.float(), t.bfloat16().float(), condition.to("cpu", torch.float32))
    assert difference(model(z, t, condition).float(), fine) < 0.03
    assert difference(ask(half, z, t, condition).float(), fine) < 0.03


def test_a_network_used_in_inference_mode_can_train_afterwards():
    model = MMDiT(MMDiTConfig(**{**SMALL, "axes_dims_rope": (6, 6, 4)}))  # axes no other test has: nothing is kept yet
    z, t, condition = inputs("one source", SMALL)
    with torch.inference_mode():
        model(z, t, condition)
    model(z, t, condition).sum().backward()


def test_fresh_weights_predict_nothing_and_learn():
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(**{**SMALL, "axes_dims_rope": (4, 6, 6)}))
    z, t, condition = inputs("one source", SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (model(z, t, condition) - z.roll(1, -1)).square().mean()  # nothing in a token tells it: look at others
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(z.square().mean().item())
    assert losses[-1] < 0.3 * losses[0]


def test_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        ours, theirs = MMDiT(MMDiTConfig()), QwenImage21Transformer2DModel()
    shapes = [{name: tuple(p.shape) for name, p in network.state_dict().items()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1]


# Loading and saving


@pytest.mark.parametrize("shards", ["10GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_what_diffusers_wrote(tmp_path, shards, written, dtype):
    theirs = reference(tmp_path / "other", **SMALL).to(written)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / INDEX).exists() == (shards == "20KB")
    ours = MMDiT.from_pretrained(tmp_path, dtype=dtype)
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in ours.state_dict().items())
    assert all(p.requires_grad and p.dtype == dtype for p in ours.parameters())


def test_diffusers_loads_what_we_wrote(tmp_path):
    reference(tmp_path, **CONFIGS["other numbers"])
    ours = MMDiT.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path, dtype=torch.float32)
    theirs, report = QwenImage21Transformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for state in (theirs.state_dict(), MMDiT.from_pretrained(tmp_path).state_dict()):
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert config_from_json(MMDiTConfig, tmp_path / "config.json") == ours.config


def test_loaded_weights_survive_being_saved_over(tmp_path):
    expected = reference(tmp_path, **SMALL).state_dict()
    model = MMDiT.from_pretrained(tmp_path)
    with torch.no_grad():
        model.proj_out.weight.zero_()
    model.save_pretrained(tmp_path, dtype=torch.float32)
    expected["proj_out.weight"] = torch.zeros_like(expected["proj_out.weight"])
    for state in (model.state_dict(), MMDiT.from_pretrained(tmp_path).state_dict()):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_tensors_named_in_skip_may_be_there_and_no_others(tmp_path):
    linear = torch.nn.Linear(3, 2)
    save_file({**linear.state_dict(), "head.weight": torch.ones(2)}, tmp_path / "some.safetensors")
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"some\.safetensors: tensor head\.weight"):
        load_weights(module, tmp_path, "some", torch.float32, "cpu", skip=("head",))
    load_weights(module, tmp_path, "some", torch.float32, "cpu", skip=(r"head\..*",))
    assert torch.equal(module.weight, linear.weight)
