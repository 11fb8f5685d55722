"""What planning/ computes beside what was measured: memory and time. `python bench.py plan`

Peaks and seconds are those of the runs on one H200 in results/gpu/; peaks on 8 and 64 ranks are
torch's FSDPMemTracker's, which runs the model's own code on tensors without memory, in a process
group without other processes, eagerly. Then figures that others published for many GPUs, beside
what planning/ gives for our loops on rows of that length; and plan.py's answers for four sizes on 1
to 64 GPUs. Writes results/plan.json.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import model as model_file
from benchmarks.measure import write
from kernels.attention import attention_triton
from kernels.attention_tiles import TILE
from kernels.cross_entropy import linear_cross_entropy_triton
from plan import read_model
from planning.fit import chosen
from planning.gpus import GPUS
from planning.memory import GIB, Layout, peak
from planning.report import figures
from planning.speed import LOOP, Row, update_seconds
from planning.updates import mixture, ultrafeedback
from program.flags import parse_args

GPU_RESULTS = Path(__file__).parent.parent / "results" / "gpu"

# Rows (tokens, squares, predicted) of each update that was measured on the H200. The step's are
# `packed_lengths(490, 16384)`, all trained. Those of the loops are what plan_rows makes of their
# data (their logs name it): sft/code_alpaca_gsm8k.jsonl; the first 160 pairs of
# prefs/alpaca_eval_tulu2_13b.jsonl. Updates that compiled are left out.
STEP = [Row(16384, 15820464, 16384)]
SFT = {
    2: [Row(16384, 3651644, 10242), Row(2886, 210376, 1320)],
    3: [Row(16383, 3765831, 10659), Row(3103, 225863, 1286)],
    4: [Row(16383, 3540679, 9980), Row(2076, 115448, 729)],
    6: [Row(16372, 3047192, 10435), Row(1010, 52904, 330)],
    7: [Row(16382, 2851124, 9912), Row(440, 19498, 113)],
    8: [Row(16384, 3589356, 11081), Row(2871, 209385, 1291)],
}
DPO = {
    2: [Row(16329, 8378255, 14623), Row(2639, 485415, 1859)],
    3: [Row(16343, 7723117, 14415), Row(2246, 400128, 1608)],
    4: [Row(16383, 9183177, 14113), Row(5012, 1431266, 4314)],
}

# Model, layers of it, ranks, tokens of a row, blocks recomputed, rows: what the tracker runs.
TRACKED = [
    ("7b", 3, 8, 4096, 3, 1),
    ("7b", 3, 64, 4096, 0, 2),
    ("70b", 3, 8, 2048, 3, 1),
    ("70b", 3, 64, 16384, 2, 1),
]

# Other stacks on many GPUs, bf16 and FSDP: size, GPUs, kind, tokens of a row and of a document, and
# the tokens/s a GPU that were published (llm-foundry, scripts/train/benchmarking; fms-fsdp, README;
# torchtitan, docs/performance.md). Their recomputation and batches differ from ours.
PUBLISHED = [
    ("llm-foundry", "7b", 8, "h100", 12288, 2048, 10643),
    ("fms-fsdp", "7b", 96, "h100", 8192, 4096, 9600),
    ("fms-fsdp", "13b", 96, "h100", 8192, 4096, 4850),
    ("fms-fsdp", "70b", 96, "h100", 8192, 4096, 890),
    ("fms-fsdp", "70b", 128, "a100", 8192, 4096, 410),
    ("torchtitan", "70b", 64, "a100", 8192, 4096, 353),
]


def measured():
    """`(name, rows, seconds, peak in GiB or None)` of every update that was measured.

    A log has the largest peak so far, so only an update that raised it has one.
    """
    step = json.loads((GPU_RESULTS / "step.json").read_text())
    found = [("bench.py step", STEP, step["seconds"] + LOOP, step["peak_memory_gib"])]
    for stage, updates in (("sft", SFT), ("dpo", DPO)):
        lines = (GPU_RESULTS / f"{stage}_7b_metrics.jsonl").read_text().splitlines()
        records = {record.get("step"): record for record in map(json.loads, lines)}
        for step, rows in updates.items():
            raised = records[step]["peak_memory_gib"] > records[step - 1]["peak_memory_gib"]
            peak_gib = records[step]["peak_memory_gib"] if raised else None
            found.append((f"{stage}.py, update {step}", rows, records[step]["seconds"], peak_gib))
    return found


def computed(rows):
    """(seconds, peak of the tensors in GiB) of an update of 7B on one H200, all recomputed.

    The peak is in its last row, in whose backward pass the gradients of all rows exist.
    """
    config, last = read_model("7b"), rows[-1]
    layout = Layout(1, 1, last.tokens, len(rows), last.predicted, config.num_hidden_layers)
    seconds = sum(update_seconds(config, layout, GPUS["h200"], [rows]).values())
    return seconds, sum(peak(config, layout)[1].values()) / GIB


def full_rows(size, ranks, kind, tokens, document):
    """(tokens/s a GPU, blocks recomputed) that planning/ gives for a row a rank, all equal."""
    config, gpu = read_model(size), GPUS[kind]
    layout = Layout(ranks, row_tokens=tokens, rows=1, predicted=tokens)
    layout = chosen(config, layout, gpu.gib, None)
    rows = [[Row(tokens, tokens * document, tokens)]] * ranks
    seconds = sum(update_seconds(config, layout, gpu, rows).values())
    return tokens / seconds, layout.recompute


def shortened(size, layers):
    """The `LlamaConfig` of a size, with fewer layers."""
    fields = vars(read_model(size)) | {"num_hidden_layers": layers}
    return model_file.LlamaConfig(**fields)


def computed_peak(case):
    """GiB that planning/ gives for one of `TRACKED`."""
    size, layers, ranks, tokens, recompute, rows = case
    layout = Layout(ranks, 1, tokens, rows, tokens // 2, recompute, compile=False)
    return sum(peak(shortened(size, layers), layout)[1].values()) / GIB


def tracked_peak(case):
    """GiB that FSDPMemTracker sees in the second update of one of `TRACKED`, on rank 0.

    The mesh is made before tensors are fake. AdamW is not fused: the tracker gets that wrong
    (pytorch#123461). Needs a process without a process group; makes one, and destroys it.
    """
    size, layers, ranks, tokens, recompute, rows = case
    model_file.attention = attention_triton  # the kernels' own shapes, by their registered fakes
    model_file.linear_cross_entropy = linear_cross_entropy_triton
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    fsdp = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    with FakeTensorMode():
        model = model_file.Llama(shortened(size, layers))
        for i, block in enumerate(model.model.layers):  # as training/parallel.py
            if i >= layers - recompute:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
            fully_shard(block, reshard_after_forward=True, **fsdp)
        fully_shard(model, reshard_after_forward=False, **fsdp)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids, doc_start = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens).int()
        predict = torch.zeros(tokens // 2, dtype=torch.int64)
        tiles = torch.zeros(2, -(-tokens // TILE), 4, dtype=torch.int32)
        row = {"labels": predict, "uniform_gradient": True, "tiles": tiles}
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((ids, doc_start, predict))
        with tracker:
            for _ in range(2):
                for _ in range(rows):
                    nll = model(ids, doc_start, predict, **row)
                    nll.sum().backward()
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
    dist.destroy_process_group()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"] / GIB


def table(kind):
    """What plan.py says of Tulu 2 on GPUs of one kind: SFT and DPO at the paper's settings."""
    cells = []
    for size in ("7b", "13b", "34b", "70b"):
        for ranks in (1, 8, 16, 64):
            for stage, lengths, epochs, batch in (
                ("sft", mixture(), 2, 128), ("dpo", ultrafeedback(), 3, 32),
            ):  # fmt: skip
                schedule = {"batch_size": batch, "epochs": epochs, "micro_tokens": 16384}
                schedule |= {"max_steps": 0, "seed": 42}
                record = figures(
                    stage, read_model(size), Layout(ranks=ranks), GPUS[kind], lengths, schedule
                )
                cells.append({"size": size} | record)
    return cells


@dataclass(frozen=True)
class PlanConfig:
    """Flags of `python bench.py plan`."""

    gpu: str = "h100"  # the kind of the table: a name of planning/gpus.py
    out: str = "results/plan.json"  # the figures


def main(arguments):
    """Compute, print, and write the JSON file."""
    options = PlanConfig(**parse_args(PlanConfig, arguments))
    updates, tracked = [], []
    for name, rows, seconds, peak_gib in measured():
        ours, ours_gib = computed(rows)
        updates.append(
            {"update": name, "seconds": seconds, "computed_seconds": ours}
            | ({"peak_gib": peak_gib, "computed_gib": ours_gib} if peak_gib else {})
        )
        print(f"{name}: {seconds:.3f} s, computed {ours:.3f} ({ours / seconds - 1:+.1%})", end="")
        print(f"; {peak_gib:.2f} GiB, computed {ours_gib:.2f}" if peak_gib else "")
    for case in TRACKED:
        seen, ours = tracked_peak(case), computed_peak(case)
        tracked.append({"case": case, "tracker_gib": seen, "computed_gib": ours})
        print(f"{case}: tracker {seen:.3f} GiB, computed {ours:.3f} ({ours / seen - 1:+.1%})")
    others = []
    for stack, *case, theirs in PUBLISHED:
        ours, recompute = full_rows(*case)
        others.append({"stack": stack, "case": case, "published": theirs, "computed": ours})
        print(f"{stack} {case}: {theirs} tokens/s a GPU; ours by planning/ {ours:.0f}", end="")
        print(f" ({ours / theirs - 1:+.0%}), {recompute} blocks recomputed")
    cells = table(options.gpu)
    for cell in cells:
        says = f"{cell['hours']:.1f} h, MFU {cell['mfu']:.0%}" if cell["fits"] else "does not fit"
        gib = cell["gib"]["total"]
        print(f"{cell['size']} {cell['stage']} on {cell['gpus']}: {gib:.0f} GiB, {says}")
    facts = {"updates": updates, "tracked": tracked, "published": others, "table": cells}
    write("plan", options, arguments, torch.device("cpu"), **facts)
