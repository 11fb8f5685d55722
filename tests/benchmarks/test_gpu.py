"""benchmarks/gpu.py: every part at toy size, processes with limits of their own, the plan."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

import bench
from benchmarks import gpu, pairs, summary, tune
from program.errors import InputError

PUT = "import json, sys; json.dump({'speed_up': 2}, open(sys.argv[2], 'w'))"


@pytest.fixture
def one_part_at_a_time(monkeypatch):
    """Parts run in this process, which saves their starts; the tests' part is not run."""

    def run(part, seconds, log, out):
        if part.command[0] == "bench.py":
            bench.main([*part.command[1:], "--out", str(out)])
        return "ok"

    monkeypatch.setattr(gpu, "run", run)


def test_gpu_rehearsal(base, tmp_path, monkeypatch, one_part_at_a_time, capsys):
    """`bench.py gpu --toy` runs every part with the flags of the plan; at most eight files."""
    data = tmp_path / "data"
    (data / "eval" / "gsm8k").mkdir(parents=True)
    lines = [{"question": f"What is {k} plus 2?", "answer": "It is 4."} for k in range(3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (data / "eval" / "gsm8k" / "test.jsonl").write_text(text)
    shutil.copytree(base, data / "llama2-tokenizer")
    monkeypatch.setenv("TULU_DATA", str(data))
    monkeypatch.setattr(tune, "CANDIDATES", {name: [(64, 32, 4, 1)] for name in tune.CANDIDATES})
    monkeypatch.setattr(tune, "SOFTMAX", [(64, 4)])
    monkeypatch.setattr(tune, "WORKSPACES", [1])

    out = tmp_path / "out"
    gpu.main(["--toy", "--out", str(out)])
    results = json.loads((out / "gpu.json").read_text())
    names = [part.name for part in gpu.plan(0, toy=True)]
    assert list(results["parts"]) == names == [part["name"] for part in results["plan"]]
    for name, found in results["parts"].items():
        assert found["status"] == "ok" and (found["figures"] or name == "tests"), name
        assert "another form" not in summary.headline(name, found)
    copies = {f"{name}.json" for name in gpu.COPIED}
    assert {path.name for path in out.iterdir()} == {
        "gpu.json", "summary.md", "output.txt", *copies,
    }  # fmt: skip
    assert len(list(out.iterdir())) <= 8
    assert json.loads((out / "step.json").read_text()) == results["parts"]["step"]["figures"]
    assert [results["parts"][f"step-{how}"]["figures"]["recompute"] for how in ("none", "all")] == [
        0, 2,
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.index("begin  about  limit  part") < printed.index("s  step: 2 layers")
    assert "Left out: nothing." in printed and printed.count("| ok |") == len(names)
    bench.main(["summary", str(out)])
    again = capsys.readouterr().out
    assert again in printed and again == (out / "summary.md").read_text()


def parts(*commands, **changes):
    """Parts that run Python code."""
    return [
        gpu.Part(name, ("-c", code), **{"seconds": 1, "limit": 60} | changes)
        for name, code in commands
    ]


def test_one_failure_ends_nothing(tmp_path, monkeypatch, capsys):
    """A part that fails, one that is ended with what it started, one for which no time is left."""
    child = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '50'])\n"
        "print('begun', p.pid, flush=True); time.sleep(50)"
    )
    plan = parts(("broken", "raise SystemExit('no such kernel')"))
    plan += parts(("slow", child), limit=3) + parts(("late", PUT), seconds=1000)
    plan += parts(("pairs", PUT))
    monkeypatch.setattr(gpu, "plan", lambda gib, toy: plan)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: Answer('["H100", 80.0]'))
    begun = time.monotonic()
    gpu.main(["--minutes", "1.5", "--out", str(tmp_path)])
    assert time.monotonic() - begun < 40
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [f["status"] for f in found.values()] == [
        "failed with status 1", "ended after 3 s", found["late"]["status"], "ok",
    ]  # fmt: skip
    assert found["late"]["status"].startswith("left out: needs 1000 s")
    assert found["broken"]["last_lines"] == ["no such kernel"]
    assert found["pairs"]["figures"] == {"speed_up": 2}
    (line,) = found["slow"]["last_lines"]
    assert not alive(int(line.split()[1]))
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu.json", "summary.md", "output.txt", "pairs.json",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "  if time 1000 s   60 s  late" in printed and "Left out: late." in printed
    assert "no such kernel" in (tmp_path / "output.txt").read_text()


class Answer:
    """What `subprocess.run` returns."""

    def __init__(self, stdout):
        self.stdout = stdout


def alive(pid):
    """Whether a process runs; a dead one that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_plan_goes_by_memory():
    """32 layers where they fit, else 16; every benchmark's command is one of bench.py's."""
    layers = {
        gib: [part.command[part.command.index("--layers") + 1]
              for part in gpu.plan(gib) if part.name.startswith("step")]
        for gib in (139, 79)
    }  # fmt: skip
    assert layers == {139: ["32", "16", "32"], 79: ["16", "16", "16"]}
    value = [part.name for part in gpu.plan(139)]
    assert value[:4] == ["tests", "step", "kernels", "generate"] and len(set(value)) == len(value)
    assert all(part.limit >= part.seconds for part in gpu.plan(139))
    assert summary.HEADLINES.keys() == set(value) - {"tests"}


def test_plan_lines_count_what_fits():
    """A part that would end too late leaves its time to those after it."""
    plan = [gpu.Part(name, ("-c", ""), seconds, 9) for name, seconds in
            (("a", 50), ("b", 90), ("c", 20))]  # fmt: skip
    lines = summary.plan_lines(plan, 5, 80)
    assert [line.split("part")[-1].split()[:2] for line in lines[1:]] == [
        ["5", "s"], ["if", "time"], ["55", "s"],
    ]  # fmt: skip


def test_bad_flags(tmp_path, monkeypatch):
    """No GPU, an unknown part, results of another run: an error before anything is written."""
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: Answer("[null, 0]"))
    with pytest.raises(InputError, match="found no GPU"):
        gpu.main(["--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="--tasks: found nope, expected some of tests, step"):
        gpu.main(["--toy", "--tasks", "nope", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(InputError, match="holds the results of another run"):
        gpu.main(["--toy", "--out", str(tmp_path)])


def test_pairs_rehearsal(tmp_path):
    """`bench.py pairs --toy`: each prompt once is fewer tokens, and the same losses."""
    path = tmp_path / "pairs.json"
    pairs.main(["--toy", "--out", str(path)])
    for name, figures in json.loads(path.read_text())["cases"].items():
        prompt, answer = map(int, name.split(" + "))
        n, once, twice = figures["pairs"], figures["once"], figures["twice"]
        assert (once["tokens"], twice["tokens"]) == (
            n * (prompt + 2 * answer), n * 2 * (prompt + answer),
        )  # fmt: skip
        # In fp32 only the order of sums differs; AdamW turns that into up to a whole rate a weight.
        assert once["losses"][0] == pytest.approx(twice["losses"][0], abs=1e-4)
        assert once["losses"] == pytest.approx(twice["losses"], abs=1e-2)
        assert once["losses"][-1] < once["losses"][0]
