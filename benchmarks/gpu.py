"""All that a short time on a GPU can tell, in one command: `python bench.py gpu --minutes 9`.

The parts run by value, most of all first: the GPU's tests, then the benchmarks, each as a process
of its own with a limit on its time. One that fails or is ended ends nothing else; one for which too
little time is left is left out, and that is said. The plan is printed first, and at the end a table
of what each part found. The folder --out gets at most eight files, written as each part ends:

    gpu.json                    plan, versions, status and figures of every part
    step.json … tune.json       the figures of `COPIED` parts, as `bench.py NAME` writes them
    output.txt, summary.md      what the parts printed; the table

The GPU's memory decides how many of 7B's layers a step has. Questions and tokenizer for `generate`
come from $TULU_DATA. To rehearse on CPU: --toy.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import summary
from benchmarks.measure import commit, cpu_name, versions
from program.errors import InputError
from program.flags import parse_args

ROOT = Path(__file__).parent.parent
COPIED = ("step", "kernels", "generate", "pairs", "tune")  # with three files more: eight
GENERATE = ("--prompts", "16", "--rounds", "1", "--seconds", "12", "--no-alone")
RESERVE = 5  # seconds, to end a part and to write
ASK = """
import json, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps([gpu.name, gpu.total_memory / 2**30] if gpu else [None, 0]))
"""


@dataclass(frozen=True)
class Part:
    """One process: `python *command`, with `--out FILE` for the figures where it `writes` them.

    seconds: how long it takes, by prediction; with less left it does not begin. limit: it is ended
    after so many.
    """

    name: str
    command: tuple
    seconds: float
    limit: float
    writes: bool = True


def plan(gib, toy=False):
    """The parts by value, for a GPU with so many GiB.

    Predicted from an H200: 10 s to start, 40 to compile a step, 1.6 s for a step of 32 layers.
    """
    tests = ("-m", "pytest", "-m", "gpu", "-n", "6", "--dist", "load", "-p", "no:cacheprovider")
    if toy:
        tests = (*tests, "-n", "0", "tests/kernels/test_cross_entropy.py")
    layers = 32 if gib > 115 else 16  # with all recomputed 107 and 57 GiB
    size = () if toy else ("--layers", str(layers))
    every, half = ("2", ()) if toy else (str(layers), ("--layers", "16"))
    return [
        Part("tests", tests, 110, 150, writes=False),
        bench("step", 85, "step", *size, "--profile", "--minutes", "1.3", toy=toy),
        bench("kernels", 75, "kernels", "--minutes", "1", toy=toy),
        bench("generate", 90, "generate", *GENERATE, toy=toy),
        bench("step-none", 60, "step", *half, "--recompute", "0", "--minutes", "1", toy=toy),
        bench("pairs", 75, "pairs", "--minutes", "1.2", toy=toy),
        bench("step-all", 75, "step", *size, "--recompute", every, "--minutes", "1.2", toy=toy),
        bench("tune", 75, "tune", "--minutes", "1", toy=toy),
        bench("peer", 80, "step", *(() if toy else ("--layers", "8")), "--peer", "transformers",
              "--minutes", "1", toy=toy),
    ]  # fmt: skip


def bench(name, seconds, *arguments, toy):
    """A part that runs one of benchmarks/, and may take a third longer than predicted."""
    return Part(name, ("bench.py", *arguments, *["--toy"] * toy), seconds, seconds * 4 // 3)


def run(part, seconds, log, out):
    """Run a part for at most so many seconds, its output to the file `log`: how it ended, as text.

    Its process leads a group, so that what it has started ends with it.
    """
    command = [sys.executable, *part.command, *(["--out", str(out)] if part.writes else [])]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        status = process.wait(timeout=seconds)
        return "ok" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    finally:  # also where we are told to stop
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=RESERVE / 2)
            except (ProcessLookupError, PermissionError):
                break  # all of them have ended
            except subprocess.TimeoutExpired:
                continue
        process.wait()


@dataclass(frozen=True)
class GPUBenchConfig:
    """Flags of `python bench.py gpu`."""

    minutes: float = 9.0  # for all of it
    tasks: list[str] | None = None  # only these parts, by name (default: all, by value)
    out: str = "runs/gpu"  # folder of the results
    toy: bool = False  # tiny models, to rehearse on CPU


def main(arguments):
    """Print the plan, run the parts, and print the table."""
    began = time.monotonic()
    config = GPUBenchConfig(**parse_args(GPUBenchConfig, arguments))
    if (Path(config.out) / "gpu.json").exists():
        raise InputError(f"--out {config.out}: holds the results of another run")
    # Asked of a process of its own: a context of ours would take memory from the parts.
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    gpu, gib = json.loads(asked.stdout)
    if gpu is None and not config.toy:
        raise InputError("found no GPU, expected one (--toy rehearses without)")
    if gpu is None:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    parts = plan(gib, config.toy)
    names = [part.name for part in parts]
    if unknown := set(config.tasks or ()) - set(names):
        raise InputError(f"--tasks: found {min(unknown)}, expected some of {', '.join(names)}")
    parts = [part for part in parts if not config.tasks or part.name in config.tasks]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder, end = Path(config.out), began + 60 * config.minutes
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python bench.py gpu --minutes {config.minutes:g}" + " --toy" * config.toy,
        "commit": commit(),
        "device": gpu or cpu_name(),
        "gib": gib,
        "versions": versions(),
        "plan": [asdict(part) for part in parts],
        "parts": {},
    }
    print(f"{results['device']}, {gib:.0f} GiB, {config.minutes:g} minutes")
    print(*summary.plan_lines(parts, time.monotonic() - began, end - began), sep="\n", flush=True)
    (folder / "output.txt").write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            found = results["parts"][part.name] = take(part, Path(scratch), end, folder)
            write(folder, results)
            text = summary.headline(part.name, found)
            print(f"{time.monotonic() - began:4.0f} s  {part.name}: {text}", flush=True)
    print("", *summary.table(results), sep="\n")
    print(f"{folder}: gpu.json has all figures, output.txt what the parts printed")


def take(part, scratch, end, folder):
    """The entry of a part in gpu.json: its status, seconds, last lines and figures."""
    left = end - time.monotonic() - RESERVE
    if left < part.seconds and "--toy" not in part.command or left <= 0:
        return {"status": f"left out: needs {part.seconds:.0f} s, {max(0, left):.0f} were left"}
    begin, log, out = time.monotonic(), scratch / "log", scratch / f"{part.name}.json"
    status = run(part, min(part.limit, left), log, out)
    output = log.read_text(errors="replace") if log.exists() else ""
    with open(folder / "output.txt", "a") as file:
        file.write(f"==== {part.name}: {' '.join(part.command)}\n{output[-200_000:]}\n")
    figures = figures_in(out)
    if figures and part.name in COPIED:
        (folder / f"{part.name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    last = [line.strip() for line in output.splitlines() if line.strip()][-3:]
    seconds = round(time.monotonic() - begin, 1)
    return {"status": status, "seconds": seconds, "last_lines": last, "figures": figures}


def figures_in(path):
    """The figures that a part wrote; None where it wrote none, or was ended as it wrote."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write(folder, results):
    """gpu.json and summary.md, so far."""
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "summary.md").write_text("\n".join(summary.table(results)) + "\n")
