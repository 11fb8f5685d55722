"""speed.py beside what was measured on a GPU, and its arithmetic by hand."""

import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan import GPU_RESULTS, STEP, computed, measured
from plan import SIZES, read_model
from planning import speed
from planning.gpus import GPUS
from planning.memory import Layout, block_weights, weights
from planning.report import model_flops
from program.hardware import PEAK_FLOPS
from program.ranks import start
from training import update

STEP_LAYOUT = Layout(rows=1, recompute=32)
PARTS = {
    "matrix products": ["matrix products"],
    "attention": ["attention"],
    "norms, rotation, SwiGLU, sums": ["norms, rotation, SwiGLU"],
    "optimizer": ["optimizer"],
    "other": ["casts, NF4"],
    "loss": ["loss"],
}


def test_the_rates_are_those_of_the_profiled_step():
    """Each kind of kernel within 1 % (0.4 ms where that is less) of the H200's milliseconds."""
    kernel_ms = json.loads((GPU_RESULTS / "step.json").read_text())["kernel_ms"]
    parts = speed.update_seconds(read_model("7b"), STEP_LAYOUT, GPUS["h200"], [STEP])
    assert kernel_ms.keys() == PARTS.keys()
    for kind, names in PARTS.items():
        ours = 1e3 * sum(parts[name] for name in names)
        assert ours == pytest.approx(kernel_ms[kind], rel=0.01, abs=0.4), kind


@pytest.mark.parametrize(("name", "rows", "seconds"), [case[:3] for case in measured()])
def test_measured_updates(name, rows, seconds):
    """SFT and DPO of 7B on the H200: within 3 %. Updates of one kind differ by 2 % themselves."""
    assert computed(rows)[0] == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize("rank", [0, 64])
@pytest.mark.parametrize("size", SIZES)
def test_flops_are_those_of_the_loops(size, rank):
    """`model_flops` of training/update.py, which the metrics' MFU is made of."""
    config, lengths = read_model(size), [7, 1500, 1]
    row = speed.Row(sum(lengths), sum(n * n for n in lengths), 600)
    theirs = update.model_flops(config, lengths, 600, lora_rank=rank)
    assert model_flops(config, row, rank) == theirs


@pytest.mark.parametrize("rank, passes", [(0, 3), (64, 2)])
def test_the_reference_takes_one_of_the_passes(rank, passes):
    """Of a row without recomputation: a third, or half where only adapters have gradients."""
    config, layout, gpu = read_model("7b"), Layout(lora_rank=rank), GPUS["h100"]
    row = speed.Row(8192, 8192 * 500, 4000)
    whole = sum(speed.row_seconds(config, layout, gpu, row).values())
    assert speed.forward_seconds(config, layout, gpu, [[row]]) == pytest.approx(whole / passes)


class Copied(TorchDispatchMode):
    """Bytes that casts and copies read and write inside of it."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.size += out.nbytes + (args[0] if out is not args[0] else args[1]).nbytes
        return out


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_fsdp_copies_to_gather_on_one_rank(trained):
    """A trained weight is cast and copied, a frozen one of the compute type is copied: no more."""
    start()
    dtype = torch.float32 if trained else torch.bfloat16
    layer = torch.nn.Linear(7, 37, bias=False, dtype=dtype).requires_grad_(trained)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    with Copied() as copied:
        layer.unshard()
    sizes = (7 * 37, 0) if trained else (0, 2 * 7 * 37)
    assert copied.size == speed.gather_bytes(Layout(), *sizes)


def test_blocks_that_are_freed_are_gathered_a_second_time():
    """Not embedding and head, which stay; and `fastest` weighs the same bytes."""
    config = read_model("7b")
    kept, freed = (speed.cast_bytes(config, Layout(reshard=freed), 1) for freed in (False, True))
    assert kept[0] == freed[0] == 10 * weights(config)
    assert freed[1] - kept[1] == 10 * 32 * block_weights(config)


def test_recomputation_adds_the_forward_pass_of_its_blocks():
    """A quarter of the blocks again: a quarter of what the blocks multiply forward."""
    config, row = read_model("7b"), speed.Row(8192, 8192 * 500, 4000)
    times = [
        speed.row_seconds(config, Layout(recompute=count), GPUS["h100"], row)["matrix products"]
        for count in (0, 8, 32)
    ]
    forward = speed.matrix_flops(config, Layout(), row)[0] / (speed.MATRIX * 989e12)
    assert times[1] - times[0] == pytest.approx(forward / 4)
    assert times[2] - times[0] == pytest.approx(forward)


def test_exchange_by_hand():
    """70B on 64 H100: 138 GB gathered forward, the same and 276 GB reduced backward."""
    config, gpu = read_model("70b"), GPUS["h100"]
    forward, backward, _ = speed.exchange(config, Layout(ranks=64), gpu)
    ring = 63 / 64 / 347e9  # the slower of the machine's own links and the network
    assert forward == pytest.approx(137.95e9 * ring, rel=1e-3)
    assert backward == pytest.approx(3 * 137.95e9 * ring, rel=1e-3)
    assert speed.exchange(config, Layout(), gpu) == (0, 0, 0)


def test_replicas_keep_gathering_inside_the_machine():
    """Two machines of slow network: two replicas gather over their own links, and are faster."""
    config, gpu = read_model("7b"), GPUS["a100"]
    flat = speed.exchange(config, Layout(ranks=16), gpu)
    hybrid = speed.exchange(config, Layout(ranks=16, replicas=2), gpu)
    assert hybrid[0] < flat[0] and hybrid[1] < flat[1]


def test_exchange_hides_behind_computation_alone():
    """Long rows hide it but for a block at either end; short ones do not, and that is told."""
    config, layout, gpu = read_model("70b"), Layout(ranks=64, recompute=80), GPUS["h100"]
    long, short = (
        speed.row_seconds(config, layout, gpu, speed.Row(T, T * 500, T // 2)) for T in (16384, 256)
    )
    ends = speed.exchange(config, layout, gpu)
    assert long["exchange, not hidden"] == pytest.approx(ends[2])
    assert short["exchange, not hidden"] > 0.3 * sum(ends[:2])


def test_the_slowest_rank_counts():
    """An update takes as long as if all ranks had the row of the busiest."""
    config, layout, gpu = read_model("7b"), Layout(ranks=2), GPUS["h100"]
    small, large = (speed.Row(T, T * 300, T // 2) for T in (4096, 8192))
    uneven = speed.update_seconds(config, layout, gpu, [[small], [large]])
    even = speed.update_seconds(config, layout, gpu, [[large], [large]])
    assert sum(uneven.values()) == pytest.approx(sum(even.values()))


def test_peaks_of_gpus_are_said_once():
    """planning/gpus.py and the MFU of the metrics agree, whatever the name's spelling."""
    for gpu in GPUS.values():
        key = next(key for key in PEAK_FLOPS if set(key.split()) <= set(gpu.name.split()))
        assert PEAK_FLOPS[key] == gpu.flops, gpu.name
