"""plot.py on the log of a made-up run."""

import json

import matplotlib.image
import pytest

import plot
from program.errors import InputError


def write_log(path, updates):
    """A metrics.jsonl as sft.py writes it, whose last line a kill cut short."""
    config = {"model": "/x/llama", "data": ["/x/chats.jsonl"], "batch_size": 8, "dtype": "float32"}
    environment = {"ranks": 2, "device": "H100", "torch": "2.13"}
    records = [{"event": "start", "config": config, "environment": environment}]
    rewards = {"rewards/margins": 0.5, "rewards/accuracies": 0.75}
    records += [
        {"step": k + 1, "loss": 3 / (k + 1), "lr": 1e-3 * k, **rewards} for k in range(updates)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": ')
    return records[0]


@pytest.mark.parametrize("draw", [plot.plot_sft, plot.plot_dpo])
@pytest.mark.parametrize("updates", [1, 250])
def test_runs(tmp_path, updates, draw):
    """A picture comes out, of one update as of many."""
    write_log(tmp_path / "metrics.jsonl", updates)
    draw(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    image = matplotlib.image.imread(tmp_path / "run.png")
    assert image.std() > 0.01  # not one colour


def test_title_names_model_data_and_hardware(tmp_path):
    """By their last names: no path of the machine."""
    title = plot.title(write_log(tmp_path / "metrics.jsonl", 1), "pairs")
    assert "llama on chats.jsonl" in title and "2 x H100" in title and "/x" not in title


def test_other_files_are_refused(tmp_path):
    """A file without updates is an input error that names it."""
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError, match="other.jsonl"):
        plot.plot_sft(tmp_path / "other.jsonl", tmp_path / "sft.png")
    start = write_log(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "sft.jsonl").write_text(json.dumps(start) + '\n{"step": 1, "loss": 3, "lr": 0}\n')
    with pytest.raises(InputError, match="sft.jsonl: updates without rewards/margins"):
        plot.plot_dpo(tmp_path / "sft.jsonl", tmp_path / "dpo.png")


def test_kernels(tmp_path):
    """Rows and providers that were skipped leave gaps; a file with nothing measured is refused."""
    shape = {"H": 4, "Hk": 2, "D": 16}
    rates = {"ms": {}, "tflops": {"forward": 300.0, "backward": 200.0}}
    attention = [
        shape | {"row": "packed 490", "provider": "ours"} | rates,
        shape | {"row": "dense 512", "provider": "ours"} | rates,
        shape | {"row": "dense 512", "provider": "flex", "skipped": "needs a GPU"},
        shape | {"row": "packed 490", "provider": "varlen"} | rates,
    ]
    losses = [{"N": n, "provider": "ours", "ms": 1.0 * n, "peak_mib": 9.0} for n in (64, 16)]
    facts = {"dtype": "torch.bfloat16", "commit": None, "device": "H100", "date": "2026-01-01T00"}
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(facts | {"attention": attention, "cross_entropy": losses}))
    plot.plot_kernels(path, tmp_path / "kernels.png")
    assert matplotlib.image.imread(tmp_path / "kernels.png").std() > 0.01
    path.write_text(json.dumps(facts | {"attention": attention[2:3], "cross_entropy": losses}))
    with pytest.raises(InputError, match="no figures of attention or of the loss"):
        plot.plot_kernels(path, tmp_path / "kernels.png")
