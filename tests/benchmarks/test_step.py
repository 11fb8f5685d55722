"""bench.py step: what fits, the kernels of a step, and the same step by transformers."""

import json

import pytest
import torch

from benchmarks import peer, step, trace
from program.errors import InputError


def test_layers_that_fit():
    """At 16 bytes a weight a block takes 3 GiB, embedding and head 4: of 79 GiB about 24 blocks.

    Without recomputation most of the 2 GiB that each block keeps besides are there while gradients
    (4 bytes, 0.75 GiB) are not: 4.3 GiB a block, about 17.
    """
    assert 22 <= step.layers_that_fit(step.LLAMA_2_7B, 79) <= 25
    assert 15 <= step.layers_that_fit(step.LLAMA_2_7B, 79, recompute=0) <= 18
    assert step.layers_that_fit(step.LLAMA_2_7B, 1000) == 32
    with pytest.raises(InputError, match="5.0 GiB of the GPU are free: not one block"):
        step.layers_that_fit(step.LLAMA_2_7B, 5)


def test_time_by_kind():
    """Kernels by the profiler's names: each is counted once, under the right kind."""
    kernels = {
        "forward_kernel": 1.0,
        "backward_kv_kernel": 2.0,
        "softmax_kernel": 4.0,
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT": 8.0,
        "triton_red_fused__to_copy_mean_mul_pow_rsqrt_0": 16.0,
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>": 32.0,
        "Memcpy DtoD (Device -> Device)": 64.0,
    }
    sums = step.by_kind(kernels.items())
    assert list(sums.values()) == [3.0, 4.0, 8.0, 32.0, 16.0, 64.0]


# ---- Kernels


FUSED = "triton_poi_fused_mul_silu_0"


def test_kernels_of_a_gpu_have_the_bytes_of_what_they_were_given():
    """Linked by the id of what PyTorch did as it launched them; times and bytes of calls add up.

    In the form of a trace of a GPU, written out: a fused kernel called twice (7 x 5 bf16, 3 fp32
    and a number: 82 bytes), a product, whose bytes are not asked, and a copy that nothing launched.
    """
    given = {"Input Dims": [[7, 5], [3], []], "Input type": ["c10::BFloat16", "float", "Scalar"]}
    events = [{"ph": "M", "name": "process_name"}]
    for number, name in ((1, FUSED), (2, "aten::mm"), (3, FUSED)):
        arguments = given | {"External id": number}
        events.append({"cat": "cpu_op", "name": name, "ts": 9, "dur": 900, "args": arguments})
    for number, name, cost in ((1, FUSED, 4.0), (2, "nvjet", 1.0), (3, FUSED, 2.0)):
        arguments = {"External id": number, "correlation": 5}
        events.append({"cat": "kernel", "name": name, "ts": 99, "dur": cost, "args": arguments})
    events.append({"cat": "gpu_memcpy", "name": "Memcpy", "ts": 99, "dur": 3.0, "args": {}})
    fused, copy, product = trace.rows(events, gpu=True)
    assert fused["name"] == FUSED and fused["calls"] == 2
    assert fused["ms"] == pytest.approx(6e-3) and fused["gb"] == pytest.approx(164e-9)
    assert copy == {"name": "Memcpy", "calls": 1, "ms": 3e-3, "gb": None}
    assert product == {"name": "nvjet", "calls": 1, "ms": 1e-3, "gb": None}


def test_a_trace_has_what_the_table_needs(capsys):
    """A real one: shapes and types of what torch.compile hands its kernels; own times add up."""
    x, y = torch.ones(300, 300), torch.ones(7, dtype=torch.bfloat16)

    def work():
        # So does torch.compile's runtime announce a kernel (_inductor/runtime).
        with torch._C._profiler._RecordFunctionFast(FUSED, (x, y, 3), {}):
            for _ in range(5):
                torch.linalg.matrix_power(x, 3)

    table = trace.kernels(work, torch.device("cpu"))
    (fused,) = [row for row in table if row["name"] == FUSED]
    assert fused["gb"] == pytest.approx((4 * 300 * 300 + 2 * 7) / 1e9) and fused["calls"] == 1
    (product,) = [row for row in table if row["name"] == "aten::mm"]
    assert product["calls"] == 10 and product["gb"] is None
    # Most of the time is the products' own, not that of the kernel around them.
    assert table[0] is product and product["ms"] > 5 * fused["ms"]
    trace.show(table, count=1)
    title, line = capsys.readouterr().out.splitlines()
    assert title.split() == ["ms", "calls", "GB", "GB/s", "kernel"] and "10" in line.split()


# ---- Rehearsals


def test_step_rehearsal(tmp_path, capsys):
    """A tiny model's loss falls; recomputed or not, by us or by transformers, it is the same."""
    path = tmp_path / "step.json"
    step.main(["--toy", "--out", str(path)])
    plain = json.loads(path.read_text())
    assert plain["losses"][-1] < plain["losses"][0]
    assert plain["tokens"] == 256 and plain["tokens_per_second"] > 0
    assert plain["recompute"] == 0 and "kernels" not in plain and "peer" not in plain
    flags = ["--recompute", "2", "--profile", "--peer", "transformers"]
    step.main(["--toy", *flags, "--out", str(path)])
    every = json.loads(path.read_text())
    assert every["losses"] == plain["losses"] and every["recompute"] == 2
    assert len(every["kernels"]) == 30 and every["kernels"][0]["ms"] > 0
    theirs = every["peer"]
    assert theirs["checkpointing"] and theirs["attention"] == "SDPA, padded batches"
    # The same gradients and updates; AdamW's first ones divide rounding by the gradient's size.
    assert theirs["losses"] == pytest.approx(every["losses"], rel=1e-5)
    assert "times as fast. First loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--peer", "trl"], "--peer is trl, expected transformers"),
        (["--recompute", "3"], "--recompute is 3, expected 0 to 2"),
        (["--recompute", "-1"], "--recompute is -1, expected an integer from 0 up"),
    ],
    ids=str,
)
def test_bad_flags_of_the_step_are_refused(flags, expected):
    """Before anything is measured."""
    with pytest.raises(InputError, match=expected):
        step.main(["--toy", *flags])


def test_batches_of_the_peer_hold_every_document_once():
    """Of like length, padded to the right: at most a quarter of the row, or one long document."""
    lengths = [3, 40, 1, 7, 7, 2, 30, 10]
    ids = torch.arange(100)
    batches = peer.padded(ids, ids + 1000, lengths)
    found = []
    for batch in batches:
        assert batch["input_ids"].numel() <= 25 or len(batch["input_ids"]) == 1
        for row, labels in zip(batch["input_ids"], batch["shift_labels"], strict=True):
            n = (labels != -100).sum()
            assert (labels[:n] == row[:n] + 1000).all() and (row[n:] == 0).all()
            found.append(row[:n].tolist())
    assert sorted(found) == [document.tolist() for document in ids.split(lengths)]
    assert len(batches) == 5
