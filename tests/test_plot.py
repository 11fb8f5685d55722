"""plot.py on the log of a made-up run."""

import json

import matplotlib.image
import pytest

import plot
from errors import InputError


def write_log(path, updates):
    """A metrics.jsonl as sft.py writes it, whose last line a kill cut short."""
    config = {"model": "/x/llama", "data": ["/x/chats.jsonl"], "batch_size": 8, "dtype": "float32"}
    environment = {"ranks": 2, "device": "H100", "torch": "2.13"}
    records = [{"event": "start", "config": config, "environment": environment}]
    records += [{"step": k + 1, "loss": 3 / (k + 1), "lr": 1e-3 * k} for k in range(updates)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": ')
    return records[0]


@pytest.mark.parametrize("updates", [1, 250])
def test_sft(tmp_path, updates):
    """A picture comes out, of one update as of many."""
    write_log(tmp_path / "metrics.jsonl", updates)
    plot.plot_sft(tmp_path / "metrics.jsonl", tmp_path / "sft.png")
    image = matplotlib.image.imread(tmp_path / "sft.png")
    assert image.std() > 0.01  # not one colour


def test_title_names_model_data_and_hardware(tmp_path):
    """By their last names: no path of the machine."""
    title = plot.title(write_log(tmp_path / "metrics.jsonl", 1))
    assert "llama on chats.jsonl" in title and "2 x H100" in title and "/x" not in title


def test_other_files_are_refused(tmp_path):
    """A file without updates is an input error that names it."""
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError, match="other.jsonl"):
        plot.plot_sft(tmp_path / "other.jsonl", tmp_path / "sft.png")
