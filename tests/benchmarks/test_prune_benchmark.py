"""bench.py prune, rehearsed: every row of the table from a few short conversations."""

import json
import random

import pytest

import prune
import sft
from benchmarks import prune as benchmark
from demo import tasks
from pairs import message, write
from program.flags import parse_args


@pytest.fixture
def here(monkeypatch):
    """What the benchmark starts runs in this process, by the same words; the list of the ranks."""
    monkeypatch.setitem(tasks.CONFIG, "num_hidden_layers", 1)
    asked = []

    def run(program, flags, ranks=None):
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        module, config = {
            "sft.py": (sft, sft.SFTConfig), "prune.py": (prune, prune.PruneConfig)
        }[program]  # fmt: skip
        module.main(parse_args(config, words))
        asked.append(ranks)

    monkeypatch.setattr(benchmark, "run", run)
    return asked


def test_every_row(here, tmp_path, capsys):
    """Losses, shares, lengths and times of six rows; the share of a third in the data, which
    `balanced` makes a half; training on more of one kind than nothing lowers the loss."""
    rng = random.Random(3)

    def words(count):
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for _ in range(count))

    def chat(k):
        messages = [message("user", words(9)), message("assistant", words(rng.randint(3, 12)))]
        return {"dataset": "gsm8k" if k % 3 == 0 else "code", "messages": messages}

    data = write(tmp_path / "data.jsonl", [chat(k) for k in range(60)])
    tests = [{"question": words(6), "answer": words(5)} for _ in range(3)]
    flags = {"data": data, "held-out": write(tmp_path / "test.jsonl", tests)}
    flags |= {"out": tmp_path / "prune.json", "epochs": 1, "batch-size": 8, "projection": 64}
    flags |= {"lora-rank": 3, "warmup-epochs": 1}
    benchmark.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    results = json.loads((tmp_path / "prune.json").read_text())
    rows = results["methods"]
    assert list(rows) == ["nothing more", "rds", "less", "balanced", "random", "everything"]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert 0 < row["loss"] < 10 and row["training_seconds"] > 0
        assert f"{name:13}{row['loss']:8.4f} nats a token" in printed
        assert ("seconds" in row) == (name in benchmark.METHODS)
    assert results["kept"] == 6 and 0 <= results["kept_by_rds_and_less"] <= 6
    assert rows["balanced"]["gsm8k"] == 0.5 and rows["everything"]["gsm8k"] == 1 / 3
    assert rows["everything"]["loss"] < rows["nothing more"]["loss"]
    assert sum(ranks is not None for ranks in here) == 1  # less, whose cost is the largest
