"""Loading and saving a made-up Llama of 1.1 B parameters, beside transformers, on CPU:

    python bench.py load --tokenizer DIR

Ours: load_hf into FSDP2 shards (fp32) on 2 ranks and save_hf (bf16). transformers: from_pretrained
and save_pretrained in one process, in fp32 and in bf16. Every measurement is a process of its own
(Linux): wall time, and the peak of memory beyond what it held before, as the kernel counts it
(VmHWM) and without pages mapped from files (RssAnon, sampled). The bound is a rank's own shards and
one tensor. All of them read from the page cache, and all end with fsync.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from benchmarks import inputs
from benchmarks.measure import write
from checkpoint.config import read_config
from checkpoint.weights import load_hf, save_hf
from model import Llama
from program.files import fsync
from program.flags import parse_args
from program.ranks import start
from tokens.tokenizer import Tokenizer
from training.flags import RunFlags
from training.parallel import shard

ROOT = Path(__file__).parent.parent
TOY = inputs.shape(64, 172, 3, 4, 2)  # a few tensors for each of the checkpoint's files
WAYS = ("ours", "transformers float32", "transformers bfloat16")


@dataclass(frozen=True)
class LoadBenchConfig:
    """Flags of `python bench.py load`."""

    tokenizer: str | None = None  # folder of a tokenizer.model (default: Llama 2's of $TULU_DATA)
    ranks: int = 2  # of ours
    rounds: int = 3  # of all ways; the shortest time and the most memory of them count
    toy: bool = False  # a tiny model, to rehearse
    out: str = "results/load.json"  # the figures


def main(arguments):
    """Measure, print the table, and write the JSON file."""
    config = LoadBenchConfig(**parse_args(LoadBenchConfig, arguments))
    shape, rounds = TOY if config.toy else inputs.TINY_LLAMA, []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        inputs.copy_tokenizer(config, source)
        sizes = make_checkpoint(source, shape)
        for _ in range(config.rounds):
            rounds.append({way: run(way, config.ranks, source, Path(folder)) for way in WAYS})
    figures = {way: best([r[way] for r in rounds]) for way in WAYS}
    bound = {
        "own_shards_mb": 4 * sum(sizes) / config.ranks / 1e6,
        "largest_tensor_bf16_mb": 2 * max(sizes) / 1e6,
        "largest_tensor_fp32_mb": 4 * max(sizes) / 1e6,
    }
    show(figures, bound, sum(sizes), config.ranks)
    facts = {"model": shape | {"parameters": sum(sizes)}, "ranks": config.ranks}
    facts |= {"rounds": config.rounds, **bound, "figures": figures}
    write("load", config, arguments, torch.device("cpu"), **facts)


def make_checkpoint(folder, shape):
    """Write random bf16 weights in five safetensors files; returns the sizes of all tensors."""
    (folder / "config.json").write_text(json.dumps(inputs.model_fields(shape, folder)))
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    names, files, weight_map = list(shapes), 5, {}
    for k in range(files):
        file_name = f"model-{k + 1:05}-of-{files:05}.safetensors"
        part = names[k * len(names) // files : (k + 1) * len(names) // files]
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) / 50 for name in part}
        save_file(tensors, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return [shape.numel() for shape in shapes.values()]


def run(way, ranks, source, folder):
    """Load and save once, in processes of their own; returns the record of each rank."""
    words = ["benchmarks.load", way, source, folder / "saved", folder / "records"]
    shutil.rmtree(folder / "records", ignore_errors=True)
    (folder / "records").mkdir()
    launcher = ["-m"]
    if way == "ours":
        launcher += ["torch.distributed.run", "--nproc_per_node", ranks, "--module"]
    command = map(str, [sys.executable, *launcher, *words])
    done = subprocess.run(list(command), cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    shutil.rmtree(folder / "saved")
    return [json.loads(path.read_text()) for path in (folder / "records").iterdir()]


def best(rounds):
    """The least time of a round, and the most memory of any rank in any of them."""
    figures = {}
    for phase in ("load", "save"):
        of_rounds = [[rank[phase] for rank in round_] for round_ in rounds]
        everything = [record for round_ in of_rounds for record in round_]
        figures[phase] = {
            "seconds": min(max(r["seconds"] for r in round_) for round_ in of_rounds),
            "peak_mb": max(record["peak_mb"] for record in everything),
            "anonymous_mb": max(record["anonymous_mb"] for record in everything),
        }
    figures["baseline_mb"] = max(rank["baseline_mb"] for round_ in rounds for rank in round_)
    return figures


def show(figures, bound, parameters, ranks):
    """Print the table."""
    print(
        f"{parameters / 1e9:.2f} B parameters; own shards of {ranks} ranks (fp32) "
        f"{bound['own_shards_mb']:,.0f} MB each, largest tensor "
        f"{bound['largest_tensor_bf16_mb']:,.0f} MB in bf16.\n"
        "MB of a process beyond its baseline: all, and without pages mapped from files (anon.)"
    )
    columns = ("baseline", "load s", "MB", "anon.", "save s", "MB", "anon.")
    print(f"{'':24}" + "".join(f"{column:>9}" for column in columns))
    for way, f in figures.items():
        columns = (f"{f[p]['seconds']:9.1f}{f[p]['peak_mb']:9,.0f}{f[p]['anonymous_mb']:9,.0f}"
                   for p in ("load", "save"))  # fmt: skip
        print(f"{way:24}{f['baseline_mb']:9,.0f}" + "".join(columns))


# ---- In the measured process


def measure_here(way, source, target, records):
    """Load and save in this process, alone or a rank; its record goes to the folder `records`."""
    name, *dtype = way.split()
    if name == "ours":
        _, _, device = start()
        tokenizer = Tokenizer(source)
        with torch.device("meta"):
            model = Llama(read_config(source))
    else:
        import transformers

        dtype = getattr(torch, dtype[0])
        transformers.LlamaForCausalLM  # noqa: B018, imported now: part of the baseline
    before = status()
    record = {"baseline_mb": before["VmRSS"]}
    with watched(record, "load", before):
        if name == "ours":
            shard(model, RunFlags(dtype="float32"), torch.device("cpu"))
            load_hf(model, source)
        else:
            model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=dtype)
    with watched(record, "save", before):
        if name == "ours":
            save_hf(model, tokenizer, source, target)
        else:
            model.save_pretrained(target)
            for path in Path(target).iterdir():
                fsync(path)  # as save_hf does
    Path(records, os.environ.get("RANK", "0")).write_text(json.dumps(record))
    if name == "ours":
        dist.destroy_process_group()


@contextmanager
def watched(record, phase, before):
    """Add the block's wall time and its peak memory beyond `before` to `record`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    anonymous, over = [status()["RssAnon"]], threading.Event()

    def sample():
        while not over.wait(0.002):
            anonymous.append(status()["RssAnon"])

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    over.set()
    thread.join()
    record[phase] = {
        "seconds": seconds,
        "peak_mb": status()["VmHWM"] - before["VmRSS"],
        "anonymous_mb": max(anonymous) - before["RssAnon"],
    }


def status():
    """Memory of this process in MB, by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name[:-1]: int(kilobytes) * 1024 / 1e6 for name, kilobytes, _ in fields}


if __name__ == "__main__":
    measure_here(*sys.argv[1:])
