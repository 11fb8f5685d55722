"""parallel.py and ranks.py: precision, recomputation and replicas, and sums over ranks."""

import os

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from checkpoint.weights import blocks_bf16, local_rows
from harm import FORKS, free_port
from model import Llama, LlamaConfig
from program.errors import RunError
from program.ranks import gather_lists, own_share, raise_together, start, sum_over_ranks
from training.flags import RunFlags
from training.parallel import shard
from training.update import clip_gradients

CONFIG = LlamaConfig(37, 64, 96, 2, 2, 1, 32, 1e-5, 1e4, False)


def statuses(function, *args, count=1):
    """Run `function(*args)` as each of `count` ranks, in processes; their exit statuses."""
    port = free_port()
    ranks = [(function, args, rank, count, port) for rank in range(count)]
    processes = [FORKS.Process(target=as_rank, args=rank) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    return [process.exitcode for process in processes]


def as_rank(function, args, rank, count, port):
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # NCCL takes no two ranks on one GPU
    function(*args)


def weights(number, shape):
    """Those of a parameter, by its number in the model: the same in every process."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    return 0.1 * normal + (len(shape) == 1)


def row(number):
    """A packed row of two documents, as the model takes it."""
    ids = torch.randint(37, (11,), generator=torch.Generator().manual_seed(100 + number))
    doc_start = torch.tensor([0] * 4 + [4] * 7, dtype=torch.int32)
    predict = torch.tensor([1, 2, 5, 6, 9])
    return ids, doc_start, predict, ids[predict + 1]


def sharded(dtype, reshard=None, **flags):
    """The model as the loops have it, and a list to which each block adds its output's dtype."""
    _, _, device = start()
    with torch.device("meta"):
        model = Llama(CONFIG)
    flags = RunFlags(dtype=str(dtype).removeprefix("torch."), **flags)
    shard(model, flags, device, reshard)
    for number, parameter in enumerate(model.parameters()):
        rows, first = local_rows(parameter.detach())
        rows.copy_(weights(number, parameter.shape)[first : first + len(rows)])
    computed = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _block, _args, out: computed.append(out.dtype))
    return model, computed


def plain_gradients(number, dtype=torch.bfloat16):
    """fp32 copies of one row's gradients by a model that is all of one type, in their order."""
    model = Llama(CONFIG)
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(weights(k, parameter.shape))
    model.to(dtype)(*row(number)).sum().backward()
    return [parameter.grad.float() for parameter in model.parameters()]


# ---- Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_rank_computes_in_the_type_it_is_told_to(dtype):
    """Blocks compute in it; weights, gradients and losses are fp32; fp32 needs no wrapping."""
    model, computed = sharded(dtype)
    nll = model(*(x.to(start()[2]) for x in row(0)))
    nll.sum().backward()
    assert computed == [dtype, dtype]
    assert nll.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert isinstance(model, FSDPModule) == (dtype == torch.bfloat16)


def two_ranks_in_bf16():
    """Rank r takes the rows 2r and 2r + 1."""
    rank = start()[0]
    model, computed = sharded(torch.bfloat16)
    # Each block is gathered by itself, and the rest with the model.
    assert all(isinstance(part, FSDPModule) for part in (model, *model.model.layers))
    for number in (2 * rank, 2 * rank + 1):
        model(*row(number)).sum().backward()
    assert computed == [torch.bfloat16] * 4
    gradients = zip(*(plain_gradients(number) for number in range(4)), strict=True)
    coarse = 0
    for parameter, (a, b, c, d) in zip(model.parameters(), gradients, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        # FSDP averages over ranks, after each row: two terms have one fp32 sum, in any order.
        expected = (a + c) / 2 + (b + d) / 2
        rows, first = local_rows(parameter.grad)
        expected = expected[first : first + len(rows)]
        assert torch.equal(rows, expected)
        coarse += (expected != expected.bfloat16()).sum().item()
    assert coarse > 1000  # sums of which bf16 would lose digits


def test_two_ranks_in_bf16_sum_their_gradients_in_fp32():
    """Bit for bit the fp32 sums of what each row gives in bf16, over rows and ranks."""
    assert statuses(two_ranks_in_bf16, count=2) == [0, 0]


# ---- Recomputation


@pytest.mark.parametrize("recompute, again", [(0, []), (1, [1]), (2, [1, 0])])
def test_recomputation_runs_the_last_blocks_again_in_backward(recompute, again):
    """And only those, and only then: their MLPs keep nothing of the forward pass."""
    model, _ = sharded(torch.float32, recompute=recompute)
    called = []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, n=number: called.append(n))
    nll = model(*(x.to(start()[2]) for x in row(0)))
    assert called == [0, 1]
    nll.sum().backward()
    assert called == [0, 1, *again]


def gradients_by_layout(dtype, layouts):
    """The bits of this rank's gradients of two rows, one list for each of the `layouts`."""
    rank, _, device = start()
    results = []
    for layout in layouts:
        model, _ = sharded(dtype, **layout)
        for number in (2 * rank, 2 * rank + 1):
            model(*(x.to(device) for x in row(number))).sum().backward()
        results.append([local_rows(parameter.grad)[0] for parameter in model.parameters()])
    return results


def recomputation_changes_no_bit():
    layouts = [{"recompute": n} for n in (0, 1, 2)]
    # A rank of two frees the weights that it gathered, whether they are needed again or not.
    layouts += [{"recompute": n, "reshard": reshard} for n in (0, 1) for reshard in (True, False)]
    for dtype in (torch.float32, torch.bfloat16):
        plain, *others = gradients_by_layout(dtype, layouts)
        assert max(gradient.abs().max() for gradient in plain) > 0.01
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_and_freed_weights_change_no_bit(ranks):
    """For any number of blocks, in fp32 and bf16: gradients of two rows equal those without."""
    assert statuses(recomputation_changes_no_bit, count=ranks) == [0] * ranks


# ---- Replicas


def replicas(count):
    """Each rank takes one row; with so many replicas, all equals what one process computes."""
    rank, world, _ = start()
    model, _ = sharded(torch.float32, replicas=count)
    model(*row(rank)).sum().backward()
    clip_norm = clip_gradients(model, 0)
    every = [plain_gradients(number, torch.float32) for number in range(world)]
    squares = 0.0
    for number, parameter in enumerate(model.parameters()):
        parts = torch.stack([gradients[number] for gradients in every]).double()
        exact, size = parts.mean(0), parts.abs().mean(0)
        squares += exact.square().sum().item()
        # A replica's ranks share its rows evenly, and the first ones hold those of the first.
        rows, first = local_rows(parameter.grad)
        chunk = -(-len(exact) // (world // count))
        assert first == min(rank % (world // count) * chunk, len(exact))
        assert len(rows) == min(chunk, len(exact) - first)
        exact, size = (whole[first : first + len(rows)] for whole in (exact, size))
        # A sum of `world` fp32 numbers in any order, and a division: as many roundings at most.
        assert (rows - exact).abs().le(world * 2**-24 * size).all()
    # fp32 norms of tensors of up to 6,144 numbers: some roundings more.
    assert clip_norm == pytest.approx(squares**0.5, rel=1e-5)
    # What is saved comes from the first replica, and every rank gets it.
    for number, (name, parameter) in enumerate(model.named_parameters()):
        rows = torch.cat(list(blocks_bf16(model, name, parameter.shape)))
        assert torch.equal(rows, weights(number, parameter.shape).bfloat16())


@pytest.mark.parametrize(
    "ranks, count", [(4, 2), (4, 4), (8, 2)], ids=["2 of 2", "4 of 1", "2 of 4"]
)
def test_replicas_equal_one_process(ranks, count):
    """Gradients are means over all ranks, whichever hold their rows; the norm counts each once."""
    assert statuses(replicas, count, count=ranks) == [0] * ranks


# ---- Sums and lists


def sums_and_lists():
    rank, world, device = start()
    # What goes wrong on one rank stops them all, with its message.
    with pytest.raises(RunError, match=r"it failed \(no room\); what was saved before"):
        raise_together(OSError("no  room") if rank == 1 else None, "it failed")
    raise_together(None, "nothing failed")
    assert world == 3
    # fp64: fp32 has no 2^24 + 1. Integers may be among them (the loops send a count of signals).
    assert sum_over_ranks([2**24 * (rank == 0) + rank, 0.1], device) == [2**24 + 3, 0.1 + 0.1 + 0.1]
    assert gather_lists([rank] * (2 - rank)) == [0, 0, 1]
    # Each file is one rank's, whatever the order in which a rank lists its folder.
    share = own_share(["ecbda", "abcde", "deabc"][rank])
    assert share == [["a", "d"], ["b", "e"], ["c"]][rank]


def test_sums_are_fp64_lists_in_the_order_of_ranks_and_failures_and_files_shared():
    """Of three ranks, one of which has nothing to add to the list, and another one fails."""
    assert statuses(sums_and_lists, count=3) == [0, 0, 0]
