"""Roles on one copy of the weights: against merged weights."""

import re

import pytest
import torch
from reference import assert_close, merged, random_lora

from checkpoint.lora import as_factors, new_lora
from model import Condition, MMDiT
from training.roles import add_role, role_lora, with_role
from training.trainee import recompute


@pytest.fixture
def model(checkpoint):
    return MMDiT.from_pretrained(checkpoint / "transformer")


def inputs(batch: int = 2) -> tuple:
    rng = torch.Generator().manual_seed(1)
    condition = Condition(
        torch.randn(batch, 7, 64, generator=rng),
        torch.ones(batch, 7, dtype=torch.bool),
        [torch.randn(batch, 64, 2, 2, generator=rng)],
        [(1, 2)],
    )
    return torch.randn(batch, 64, 3, 4, generator=rng), torch.rand(batch, generator=rng), condition


@torch.no_grad()
def test_a_role_is_its_merged_network(model):
    loras = {"student": random_lora(model), "fake": random_lora(model, 2, None, r".*(to_q|proj|modulation\.1)", 1)}
    plain, expected = model(*inputs()), {name: merged(model, lora)(*inputs()) for name, lora in loras.items()}
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for name, lora in loras.items():
        add_role(model, name, lora)
    for name in loras:
        with with_role(model, name):
            assert_close(model(*inputs()), expected[name])
            with with_role(model, None):
                assert torch.equal(model(*inputs()), plain)
            assert_close(model(*inputs(), model.with_prefix(*inputs())[1]), expected[name])
        assert (expected[name] - plain).abs().max() > 0.1 * plain.abs().max()
    assert torch.equal(model(*inputs()), plain)
    # One copy of the weights: each where it was, under its name, and unchanged.
    after = {name: (p.data_ptr(), p) for name, p in model.named_parameters() if ".adapters." not in name}
    assert after.keys() == before.keys()
    assert all(after[n][0] == before[n][0] and torch.equal(after[n][1], before[n][1]) for n in before)


def test_a_new_role_is_the_base_and_learns_alone(model):
    model.requires_grad_(False)
    with torch.no_grad():
        plain = model(*inputs())
    for name in "student", "fake":
        add_role(model, name, new_lora(model, 2))
    with with_role(model, "student"):
        v = model(*inputs())
    assert torch.equal(v, plain)  # B is zero
    v.square().mean().backward()
    assert set(re.sub(r"\d+", "N", name) for name in role_lora(model, "student")) == {
        f"transformer_blocks.N.attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.N")
    }
    for a, b, alpha in role_lora(model, "student").values():
        assert alpha == 2 and a.shape[0] == 2 and b.grad.abs().max() > 0
    students = {id(p) for a, b, _ in role_lora(model, "student").values() for p in (a, b)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in students)


def test_the_backward_pass_remembers_the_role(model):
    """With gradient checkpointing a block is computed again in the backward pass, when another role may be on."""
    model.requires_grad_(False)
    for seed, name in enumerate(("student", "fake")):
        add_role(model, name, random_lora(model, layers=r".*attn.*", seed=seed))
    gradients = []
    for again in False, True:
        if again:
            recompute(model)
        with with_role(model, "student"):
            v = model(*inputs())
        with with_role(model, "fake"):
            v.square().mean().backward()
        assert all(b.grad is None for _, b, _ in role_lora(model, "fake").values())
        gradients.append([p.grad for a, b, _ in role_lora(model, "student").values() for p in (a, b)])
        model.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_factors_in_fp32_learn_on_weights_in_bf16(model):
    lora = random_lora(model)
    expected = merged(model, lora).bfloat16()(*inputs())
    model.bfloat16().requires_grad_(False)
    add_role(model, "student", lora)
    with with_role(model, "student"):
        v = model(*inputs())
    v.float().square().mean().backward()
    assert v.dtype == torch.bfloat16
    assert (v - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad.dtype == torch.float32 for a, b, _ in role_lora(model, "student").values() for p in (a, b))


def test_wrong_roles(model):
    add_role(model, "student", new_lora(model, 2))
    for name in "student", "train", "a.b":
        with pytest.raises(ValueError, match=f"role '{name}'"):
            add_role(model, name, new_lora(model, 2))
    with pytest.raises(ValueError, match=r"'studnet' is not among \['student'\]"), with_role(model, "studnet"):
        pass


def test_gains_of_norms_cannot_be_a_role(model):
    with pytest.raises(ValueError, match="role 'student' changes the gains of transformer_blocks.0.attn.norm_q"):
        add_role(model, "student", {"transformer_blocks.0.attn.norm_q": as_factors(torch.ones(32))})
