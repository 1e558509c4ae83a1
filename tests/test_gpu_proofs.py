"""What can be proven about a GPU run without a GPU: no masks, one time for all, memory, exchanges and graphs.

Tensors on the meta device have shapes and no values. So the network of 7.1B parameters passes through here in seconds.
"""

import sys
import time
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from random_networks import TINY, randomise
from test_plan import Held
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import exit_codes, job_of

import dmd
import flow
import model as network
import recipe
import train
from checkpoint.lora import new_lora
from data.batches import Batch
from data.encode import Entry, Pool
from model import Condition, MMDiT, MMDiTConfig
from networks import attention
from program import ranks
from sample import Pipeline
from tools import benchmark
from training import plan, presets, sharding
from training import trainee as trainee_file
from training.options import TrainOptions
from training.roles import add_role
from training.trainee import recompute

GRAPHS = 6  # over all forms of a call; the blocks share them, however many there are


def random_network(config: MMDiTConfig = TINY, dtype: torch.dtype = torch.float32) -> MMDiT:
    return randomise(MMDiT(config), 0).to(dtype)


def condition(real: list[int], dtype: torch.dtype = torch.float32) -> Condition:
    """Text, a source of 4 x 4, text; the samples have so many real states."""
    mask = torch.arange(max(real)) < torch.tensor(real)[:, None]
    states, sources = torch.randn(len(real), max(real), 24), [torch.randn(len(real), 64, 4, 4)]
    return Condition(states, mask, sources, [(2, 6)]).to("cpu", dtype)


def small_pool(lengths: tuple[int, ...] = (5, 5, 5, 5, 5, 5, 5, 5)) -> Pool:
    """Prompts and edits of these numbers of text states."""
    entries = []
    for n in lengths:
        entries.append(Entry("t2i", "text", torch.randn(n, 24), torch.randn(2, 24), [], [], None, (4, 4)))
        states, source = torch.randn(n, 24), torch.randn(64, 4, 4)
        entries.append(Entry("edit", "scene", states, torch.randn(2, 24), [(1, 5)], [source], None, (4, 4)))
    return Pool(entries)


def small_args(**numbers) -> TrainOptions:
    given = dict(dtype="float32", device="cpu", batch=4, micro_batch=2, guidance=1.0, fake_updates=2)
    return TrainOptions(**given | numbers)


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_no_mask_reaches_attention_in_an_unpadded_batch(monkeypatch, padded):
    """A mask is what makes cuDNN's backward pass give NaN (pytorch issue 196678), and what rules flash attention out."""
    masks = []

    def sdpa(q, k, v, attn_mask=None, **others):
        masks.append(attn_mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **others)

    monkeypatch.setattr(attention, "F", SimpleNamespace(scaled_dot_product_attention=sdpa))
    model, z, t = random_network(), torch.randn(2, 64, 4, 4), torch.tensor([0.9, 0.3])
    model(z, t, condition([9, 7] if padded else [9, 9])).sum().backward()
    written = [mask for mask in masks if mask is not None and not isinstance(mask, CausalBias)]
    assert len(masks) == 4 * TINY.num_layers  # text, source, text, target
    assert len(written) == padded * TINY.num_layers  # the target's, which hides the padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_lower_right_is_the_triangle(dtype):
    """Later texts see all before them. Values and gradients, in both forms that a CPU has."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n, 16, dtype=dtype, requires_grad=True) for n in (5, 12, 12)]
    triangle = torch.full((5, 12), -torch.inf, dtype=dtype).triu(8)
    found, expected = (attention.attend(*inputs, mask) for mask in (causal_lower_right(5, 12), triangle))
    assert (found - expected).abs().max() < 1e-6
    weight = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(out, inputs, weight) for out in (found, expected)), strict=True):
        assert (a - b).abs().max() < 1e-6


def test_redraw_changes_the_random_numbers_of_that_step_alone():
    pool, found = small_pool(), recipe.find("flash").resolve({"t2i": ["text"], "edit": ["scene"]}, ())
    for purpose, updates in (("student", [2]), ("fake", [4, 5])):  # of step 3
        for update in range(8):
            once, again = (
                list(train.draw_batches(job_of(small_args(redraw=r), pool, found), purpose, update)) for r in (None, 3)
            )
            same = [torch.equal(a.noises, b.noises) and torch.equal(a.t, b.t) for a, b in zip(once, again, strict=True)]
            assert same == [update not in updates] * len(same)
            assert [b.task for b in once] == [b.task for b in again]


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("steps", range(2, 9))
def test_a_student_is_drawn_at_the_times_it_was_trained_at(monkeypatch, steps, dtype):
    """In training, in panels (Network.velocity) and in sample.py (Pipeline.velocity). The reference rounds 1000 t."""
    model, told = random_network(dtype=dtype), []
    modulate = MMDiT.modulate
    monkeypatch.setattr(MMDiT, "modulate", lambda self, t: (told.append(t.float()), modulate(self, t))[1])
    sigmas, words = flow.student_sigmas(steps), condition([9], dtype)
    noises = torch.randn(steps, 1, 64, 4, 4)

    def times(work) -> list[float]:
        told.clear()
        work()
        return sorted({t.item() for t in told if t.any()}, reverse=True)  # the prefix is told 0

    trained = []
    for k in range(steps):  # the step with gradient is the last
        trained += times(lambda k=k: dmd.rollout(train.Network(model).velocity(words), noises, sigmas, k))[-1:]
    panel = times(lambda: flow.renoise(train.Network(model).velocity(words), noises, sigmas))
    pipeline = SimpleNamespace(mmdit=model, dtype=dtype, device="cpu")
    drawn = times(lambda: flow.renoise(Pipeline.velocity(pipeline, words), noises, sigmas))
    sigmas = torch.tensor(sigmas[:-1])
    reference = (1000 * sigmas).to(dtype) / 1000 if dtype == torch.bfloat16 else sigmas
    assert trained == panel == drawn == reference.tolist()


def test_the_path_is_built_at_the_time_that_is_told():
    found = recipe.find("flash").resolve({"t2i": ["text"], "edit": ["scene"]}, ())
    for update in range(4):
        for batch in train.draw_batches(job_of(small_args(dtype="bfloat16"), small_pool(), found), "student", update):
            assert torch.equal(batch.t, flow.network_time(batch.t, torch.bfloat16))
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    every = every[(every >= 0) & (every <= 1)]
    once = flow.network_time(every, torch.bfloat16)
    assert torch.equal(once, flow.network_time(once, torch.bfloat16))


# ---- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 32])
@pytest.mark.parametrize("processes", [1, 2, 3, 8, 16])
def test_the_defaults_can_be_shared_by_any_number_of_processes(processes, lora_rank):
    values = presets.defaults("dmd", 7_100_000_000, lora_rank)
    args = TrainOptions(**values | presets.divisible(values["batch"], values["micro_batch"], processes))
    assert args.batch >= 32 and all(size % processes == 0 for size in args.sizes)
    assert len(set(args.sizes)) == 1 and args.micro_batch < (8 if not lora_rank else 2) + processes


def test_torchs_own_error_on_one_rank_ends_all(tmp_path):
    """Running out of memory, say. The others are in an exchange by then, and would wait there for two hours."""

    def work(rank: int) -> None:
        sys.stderr = open(tmp_path / f"{rank}.log", "w")
        with suppress(BaseException), train.joined():
            torch.distributed.all_reduce(torch.ones(2))
            with ranks.raise_on_all_ranks():
                if rank == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    began = time.monotonic()
    assert exit_codes(2, work) == [1, 1]
    assert time.monotonic() - began < 60
    assert "rank 1: OutOfMemoryError: CUDA out of memory" in (tmp_path / "1.log").read_text()


# ---- memory ----------------------------------------------------------------------------------------------------------


class Flash(torch.autograd.Function):
    """What flash attention keeps for its backward pass: its inputs, its output and a number for each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def large_edit(size: int, k: int, device: str) -> Batch:
    """An edit at 1024 x 1024 with one source of that size and 200 tokens of text."""
    with unset_fake_temporarily(), torch.device("cpu"):  # a condition reads its mask
        mask, grid = torch.ones(size, 1224, dtype=torch.bool), torch.empty(size, 64, 64, 64)
        told = Condition(torch.empty(size, 1224, 1), mask, [grid], [(8, 1032)])
    grid = torch.empty(size, 64, 64, 64, device=device)
    told.states = torch.empty(size, 1224, 4096, dtype=torch.bfloat16, device=device)
    told.mask, told.sources = torch.empty(size, 1224, dtype=torch.bool, device=device), [grid.bfloat16()]
    times = [0.5] * size
    return Batch(
        task="edit",
        category="scene",
        fraction=1.0,
        condition=told,
        empty=told,
        target=None,
        k=k,
        noises=grid.expand(4, *grid.shape),
        xi=grid.clone(),
        t=torch.empty(size),
        times=times,
        fresh=lambda name, shape: torch.empty(size, *shape),
    )


def test_peak_of_a_lora_update_of_the_7b_is_the_plans(monkeypatch):
    """All tensors that are alive at once, at the full size, on the meta device."""
    monkeypatch.setattr(network, "attend", lambda q, k, v, mask: Flash.apply(q, k, v))
    adam, clip = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_  # no fused and foreach forms on meta
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **b: adam(*a, **b, foreach=False))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda tensors, most, foreach: clip(tensors, most))
    network.prefix_segments((8, (64, 64), 192))
    args = TrainOptions(**presets.LARGE_LORA | dict(batch=2, guidance=1.0, lora_rank=32, device="meta"))
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig()).to(torch.bfloat16).requires_grad_(False)
        recompute(model)
        trainees = []
        for role, ema in (("student", args.ema), ("fake", 0.0)):
            add_role(model, role, new_lora(model, args.lora_rank))
            trainees.append(train.Trainee(role, train.Network(model, role), args, 0.0, args.lr, ema))
        found = replace(recipe.find("mix-0-10"), rules=())
        job = job_of(args, None, found, {"base": train.Network(model)}, dict(zip(("student", "fake"), trainees)))
        monkeypatch.setattr(train, "draw_batches", lambda *arguments: iter([large_edit(args.micro_batch, 1, "meta")]))
        with Held() as held:
            for tensor in [*model.parameters(), *trainees[0].average]:
                held.hold(tensor)
            train.update(job, "fake", 0, 1.0)
            train.update(job, "student", 0, 1.0)
    planned = plan.make_plan(args, MMDiTConfig(), found, gpus=1, frozen=1, layouts={"edit": (4296, 4096)})
    assert abs(planned.peak / held.most - 1) < 0.1, (planned.peak, held.most)
    assert 20e9 < held.most < 27e9


# ---- exchanges of eight processes ------------------------------------------------------------------------------------


class Exchanges(TorchDispatchMode):
    """Counts what this rank exchanges with the others, and the bytes of the results."""

    def __init__(self):
        super().__init__()
        self.number, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            name = function.name().split("::")[1].split(".")[0]
            self.number[name] += 1
            self.bytes[name] += sum(t.nbytes for t in tree_leaves(arguments[0]) if isinstance(t, torch.Tensor))
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(arguments[0], FakeTensor):
            return True  # a check of values, which are not there
        return function(*arguments, **keywords or {})


def test_exchanges_of_one_of_eight_processes(monkeypatch):
    """At the full width, with 8 blocks. Every forward gathers each block and the rest once, every backward gathers and reduces each once. Nothing else."""
    k, config = 1, MMDiTConfig(num_layers=8)
    monkeypatch.setattr(trainee_file, "raise_on_all_ranks", nullcontext)  # its notes are Python objects
    monkeypatch.setattr(network, "attend", lambda q, k, v, mask: Flash.apply(q, k, v))
    monkeypatch.setattr(train.Trainee, "update", lambda self, rate: None)
    monkeypatch.setattr(train, "draw_batches", lambda *arguments: iter([large_edit(1, k, "cpu")]))
    network.prefix_segments((8, (64, 64), 192))
    args = TrainOptions(**presets.LARGE | dict(guidance=1.0, device="cpu"))
    found = replace(recipe.find("mix-0-10"), rules=())
    mesh = device_mesh.init_device_mesh  # reads values of the ranks' numbers, which are not to be fake
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *a: unset_fake_temporarily()(mesh)(*a))
    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        with FakeTensorMode():
            trainees, models = [], [MMDiT(config) for _ in range(2)]
            torch.set_default_dtype(torch.bfloat16)
            models.append(MMDiT(config).requires_grad_(False))
            torch.set_default_dtype(torch.float32)
            for model in models:
                recompute(model)
            sharding.shard(models[2], args)
            for model, name in zip(models, ("student", "fake")):
                trainees.append(train.Trainee(name, train.Network(model), args, 0.0, args.lr, 0.0))
            job = job_of(
                args, None, found, {"base": train.Network(models[2])}, dict(zip(("student", "fake"), trainees))
            )
            for name, gathers in (("fake", (k + 1) + 2), ("student", (k + 1) + 1 + 2)):
                with Exchanges() as seen:
                    train.update(job, name, 0, 1.0)
                groups, weights = config.num_layers + 1, plan.parameters(config)
                assert seen.number == {"_allgather_base_": gathers * groups, "_reduce_scatter_base_": groups}
                assert seen.bytes["_allgather_base_"] == pytest.approx(gathers * 2 * weights, rel=0.01)  # in bf16
                assert seen.bytes["_reduce_scatter_base_"] == pytest.approx(4 * weights / 8, rel=0.01)  # fp32 rows
    finally:
        network.rotations.cache_clear()  # it keeps fake tensors now
        torch.set_default_dtype(torch.float32)
        torch.distributed.destroy_process_group()


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_a_block_compiles_whole_into_a_known_number_of_graphs(monkeypatch):
    """Over all forms of a call: with and without gradient, with a prefix, padded or not, two sizes of each. `fullgraph`
    makes a break an error. In the graphs there is no complex number, for which inductor has no code."""
    graphs = []

    def backend(graph, inputs):
        nodes = [node.meta.get("example_value") for node in graph.graph.nodes]
        graphs.append([value.dtype for value in nodes if isinstance(value, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 64)
    model = random_network(replace(TINY, num_layers=3))
    eager = {}
    for compiled in (False, True):
        if compiled:  # as trainee.load does
            for block in model.transformer_blocks:
                block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True, backend=backend)
        for side in (4, 6):
            for real in ([9, 9], [9, 7], [12, 12]):
                torch.manual_seed(side)
                z, t, told = torch.randn(2, 64, side, side), torch.tensor([0.9, 0.3]), condition(real)
                with torch.no_grad():
                    v, prefix = model.with_prefix(z, t, told)
                    found = [v, model(z, t, told, prefix)]
                model.zero_grad()
                found.append(model(z, t, told))
                found[-1].sum().backward()
                found.append(model.img_in.weight.grad.clone())
                for a, b in zip(found, eager.setdefault((side, *real), found), strict=True):
                    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert len(graphs) == GRAPHS
    assert not any(dtype.is_complex for dtypes in graphs for dtype in dtypes)


# ---- the first hour's script -----------------------------------------------------------------------------------------


def test_the_gpu_benchmark_walks_through_all_of_its_parts(tmp_path):
    benchmark.gpu(benchmark.PARTS, dry=True, out=tmp_path / "table.md")
    table = (tmp_path / "table.md").read_text()
    assert "ours finite" in table and all(line.count("|") == 6 for line in table.splitlines()[2:])
    for what in ("kernel", "t2i, 4 NFE, prefix True, compiled", "edit, 4 NFE, diffusers' class"):
        assert what in table.replace("attention:", "kernel")
    for what in ("edit, LoRA update", "training step 2", "the plan's peak"):
        assert what in table
