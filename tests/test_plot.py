"""plot.py on the log of a made-up run."""

import json
import math

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

import plot
from program.errors import InputError


def write_log(path, updates):
    """A metrics.jsonl as sft.py writes it, whose last line a kill cut short."""
    config = {"model": "/x/llama", "data": ["/x/chats.jsonl"], "batch_size": 8, "dtype": "float32"}
    environment = {"ranks": 2, "device": "H100", "torch": "2.13"}
    records = [{"event": "start", "config": config, "environment": environment}]
    for k in range(updates):
        rewards = {"rewards/margins": 0.5 * k, "rewards/accuracies": 1 / (k + 2)}
        records.append({"step": k + 1, "loss": 3 / (k + 1), "lr": 1e-3 * k, **rewards})
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": ')
    return records[0]


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(function, *arguments)`: the axes of the figure that the function draws and saves."""
    figures = []
    close = plt.close
    monkeypatch.setattr(plot.plt, "close", figures.append)

    def draw(function, *arguments):
        function(*arguments)
        return figures[-1].axes

    yield draw
    for figure in figures:
        close(figure)


def points(axis):
    """The points of every line of an axis, each a list of (x, y)."""
    return [list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()]


@pytest.mark.parametrize("draw", [plot.plot_sft, plot.plot_dpo])
@pytest.mark.parametrize("updates", [1, 250])
def test_runs(tmp_path, updates, draw):
    """A picture comes out, of one update as of many."""
    write_log(tmp_path / "metrics.jsonl", updates)
    draw(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    image = matplotlib.image.imread(tmp_path / "run.png")
    assert image.std() > 0.01  # not one colour


@pytest.mark.parametrize("draw", [plot.plot_sft, plot.plot_dpo])
def test_held_out_data_are_points_of_their_own(tmp_path, drawn, draw):
    """Among the updates, of which none is lost by them."""
    log = tmp_path / "metrics.jsonl"
    write_log(log, 5)
    text = log.read_text()
    measured = {"loss": 0.7, "rewards/margins": 0.8, "rewards/accuracies": 0.9}
    lines = [json.dumps({"event": "eval", "step": k} | measured) + "\n" for k in (2, 4)]
    log.write_text(text[: text.rindex("\n") + 1] + "".join(lines))
    axes = drawn(draw, log, tmp_path / "run.png")
    axes = axes if draw is plot.plot_dpo else axes[:1]
    for axis, value in zip(axes, list(measured.values())[: len(axes)], strict=True):
        updates, held_out = points(axis)[:2]
        assert [x for x, _ in updates] == [1, 2, 3, 4, 5]
        assert held_out == [(2, value), (4, value)]


def test_every_update_of_sft_is_drawn(tmp_path, drawn):
    """Loss and learning rate by update, under labels with their units and a title."""
    start = write_log(tmp_path / "metrics.jsonl", 5)
    loss, rate = drawn(plot.plot_sft, tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert points(loss) == [[(k + 1, 3 / (k + 1)) for k in range(5)]]
    assert points(rate) == [[(k + 1, 1e-3 * k) for k in range(5)]]
    assert loss.get_ylabel() == "loss, nats per trained token"
    assert (rate.get_ylabel(), rate.get_xlabel()) == ("learning rate", "update")
    assert loss.get_title() == plot.title(start, "conversations")


def test_every_update_of_dpo_is_drawn(tmp_path, drawn):
    """Loss beside ln 2, margin and accuracy, each in its own axis; all accuracies are in view."""
    start = write_log(tmp_path / "metrics.jsonl", 5)
    axes = drawn(plot.plot_dpo, tmp_path / "metrics.jsonl", tmp_path / "run.png")
    loss, margin, accuracy = axes
    ln_2 = points(loss).pop()
    assert {y for _, y in ln_2} == {math.log(2)}
    assert points(loss)[:-1] == [[(k + 1, 3 / (k + 1)) for k in range(5)]]
    assert points(margin) == [[(k + 1, 0.5 * k) for k in range(5)]]
    assert points(accuracy) == [[(k + 1, 1 / (k + 2)) for k in range(5)]]
    labels = ["loss, nats per pair", "reward margin, nats", "reward accuracy"]
    assert [axis.get_ylabel() for axis in axes] == labels and accuracy.get_xlabel() == "update"
    assert loss.get_title() == plot.title(start, "pairs")
    low, high = accuracy.get_ylim()
    assert low <= 0 and high >= 1


def test_a_long_run_is_drawn_with_its_mean_over_a_hundredth(tmp_path, drawn):
    """350 updates: behind every update the mean of it and the two before it, which the legend
    says; from 199 updates down, a line alone."""
    write_log(tmp_path / "metrics.jsonl", 350)
    loss, _ = drawn(plot.plot_sft, tmp_path / "metrics.jsonl", tmp_path / "run.png")
    each, mean = points(loss)
    assert each == [(k, 3 / k) for k in range(1, 351)]
    expected = [(k, (3 / (k - 2) + 3 / (k - 1) + 3 / k) / 3) for k in range(3, 351)]
    assert mean == [(k, pytest.approx(y, rel=1e-12)) for k, y in expected]
    texts = [text.get_text() for text in loss.get_legend().get_texts()]
    assert texts == ["each update", "mean of the last 3"]
    write_log(tmp_path / "metrics.jsonl", 199)
    loss, _ = drawn(plot.plot_sft, tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert len(points(loss)) == 1


def test_title_names_model_data_and_hardware(tmp_path):
    """By their last names: no path of the machine."""
    title = plot.title(write_log(tmp_path / "metrics.jsonl", 1), "pairs")
    assert "llama on chats.jsonl" in title and "2 x H100" in title and "/x" not in title


def test_a_continued_run_is_titled_by_its_last_start(tmp_path):
    """The updates of all its starts, and the hardware on which it ended."""
    path = tmp_path / "metrics.jsonl"
    start = write_log(path, 3)
    last = start | {"environment": start["environment"] | {"ranks": 4}}
    whole = path.read_text().rpartition("\n")[0]
    path.write_text(f'{whole}\n{json.dumps(last)}\n{{"step": 4, "loss": 1.0}}\n')
    found, updates = plot.read_metrics(path, "loss")
    assert found == last and [record["step"] for record in updates] == [1, 2, 3, 4]


def test_note_follows_the_title(tmp_path, drawn):
    """What the log does not hold, such as the commit, is named when it is given."""
    start = write_log(tmp_path / "metrics.jsonl", 3)
    for draw, examples in ((plot.plot_sft, "conversations"), (plot.plot_dpo, "pairs")):
        axes = drawn(draw, tmp_path / "metrics.jsonl", tmp_path / "run.png", "commit abc")
        assert axes[0].get_title() == plot.title(start, examples) + ", commit abc"


def test_other_files_are_refused(tmp_path):
    """A file without updates is an input error that names it."""
    (tmp_path / "other.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError, match="other.jsonl"):
        plot.plot_sft(tmp_path / "other.jsonl", tmp_path / "sft.png")
    start = write_log(tmp_path / "metrics.jsonl", 0)
    (tmp_path / "sft.jsonl").write_text(json.dumps(start) + '\n{"step": 1, "loss": 3, "lr": 0}\n')
    with pytest.raises(InputError, match="sft.jsonl: updates without rewards/margins"):
        plot.plot_dpo(tmp_path / "sft.jsonl", tmp_path / "dpo.png")


def test_kernels(tmp_path, drawn):
    """Rates by row and times by tokens, in order, a line for each provider; rows and providers
    that were skipped leave gaps, and so does the step from packed to dense rows, which nothing
    joins; a file with nothing measured is refused."""
    shape = {"H": 4, "Hk": 2, "D": 16}

    def rates(forward):
        return {"ms": {}, "tflops": {"forward": forward, "backward": forward - 100}}

    attention = [
        shape | {"row": "packed 490", "provider": "ours"} | rates(300.0),
        shape | {"row": "dense 1024", "provider": "ours"} | rates(400.0),
        shape | {"row": "dense 512", "provider": "ours"} | rates(350.0),
        shape | {"row": "dense 512", "provider": "flex", "skipped": "needs a GPU"},
        shape | {"row": "packed 490", "provider": "varlen"} | rates(250.0),
        shape | {"row": "dense 512", "provider": "ours", "D": 32} | rates(999.0),
    ]
    losses = [{"N": n, "provider": "ours", "ms": 1.0 * n, "peak_mib": 9.0} for n in (64, 16)]
    facts = {"dtype": "torch.bfloat16", "commit": None, "device": "H100", "date": "2026-01-01T00"}
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(facts | {"attention": attention, "cross_entropy": losses}))
    forward, backward, time, memory = drawn(plot.plot_kernels, path, tmp_path / "kernels.png")
    assert matplotlib.image.imread(tmp_path / "kernels.png").std() > 0.01
    names = ["packed 490", "", "dense 512", "dense 1024"]
    for axis, less in ((forward, 0), (backward, 100)):
        lines = {line.get_label(): line.get_data() for line in axis.get_lines()}
        assert lines.keys() == {"ours", "varlen"}
        assert list(lines["ours"][0]) == list(lines["varlen"][0]) == names
        packed, gap, *dense = lines["ours"][1]
        assert (packed, dense) == (300 - less, [350 - less, 400 - less]) and math.isnan(gap)
        rate, *gaps = lines["varlen"][1]
        assert rate == 250 - less and all(math.isnan(gap) for gap in gaps)
    assert points(time) == [[("16", 16), ("64", 64)]]
    assert points(memory) == [[("16", 9), ("64", 9)]]
    titles = ["attention forward", "attention backward"]
    titles += ["head and loss, forward and backward"] * 2
    assert [axis.get_title() for axis in (forward, backward, time, memory)] == titles
    labels = ["TFLOP/s", "TFLOP/s", "time, ms", "memory, MiB"]
    assert [axis.get_ylabel() for axis in (forward, backward, time, memory)] == labels
    assert "H 4, Hk 2, D 16" in forward.figure.get_suptitle()
    path.write_text(json.dumps(facts | {"attention": attention[3:4], "cross_entropy": losses}))
    with pytest.raises(InputError, match="no figures of attention or of the loss"):
        plot.plot_kernels(path, tmp_path / "kernels.png")


def bars(axis):
    """(left, right, y, colour) of every bar of an axis that has a width."""
    return [
        (round(x0), round(x1), y, tuple(collection.get_facecolor()[0]))
        for collection in axis.collections
        for path in collection.get_paths()
        for (x0, y0), (x1, y1) in [path.get_extents().get_points()]
        for y in [round((y0 + y1) / 2)]
        if x1 > x0
    ]


def test_packing_is_drawn_to_scale(tmp_path, drawn):
    """Two packed rows against two padded batches, of 16 and of one: prompts, trained tokens and
    padding end to end in each pass, no gap between them, and the counts in the titles."""
    lengths = [7, *[5] * 15, 3]  # padded: 16 x 7 and 1 x 3
    trained = [[[2, 4], [6, 7]], *[[[4, 5]]] * 15, [[0, 3]]]
    content = {"lengths": lengths, "trained": trained, "rows": [list(range(16)), [16]]}
    record = {"commit": "0123456789", "date": "2026-01-01T00", "data": "chats.jsonl"}
    path = tmp_path / "packing.json"
    path.write_text(json.dumps(record | content | {"row_tokens": 90}))
    packed, padded = drawn(plot.plot_packing, path, tmp_path / "packing.png")
    assert matplotlib.image.imread(tmp_path / "packing.png").std() > 0.01
    for axis, passes in ((packed, {1: 82, 2: 3}), (padded, {1: 112, 2: 3})):
        for y, tokens in passes.items():
            spans = sorted((left, right) for left, right, at, _ in bars(axis) if at == y)
            assert [0, *(right for _, right in spans)] == [*(left for left, _ in spans), tokens]
    prompt, answer, padding = dict.fromkeys(colour for *_, colour in bars(padded))
    first = [(left, right, colour) for left, right, y, colour in sorted(bars(padded)) if y == 1][:6]
    assert first == [
        (0, 2, prompt),
        (2, 4, answer),
        (4, 6, prompt),
        (6, 7, answer),
        (7, 11, prompt),
        (11, 12, answer),
    ]
    assert sum(right - left for left, right, _, c in bars(padded) if c == padding) == 15 * 2
    assert "2 forward passes, 85 tokens, 100%" in packed.get_title("left")
    assert "2 forward passes, 115 tokens, 74%" in padded.get_title("left")
    assert packed.get_shared_x_axes().joined(packed, padded)  # one scale
    facts = packed.figure.get_suptitle()
    assert "17 conversations of chats.jsonl" in facts and "commit 0123456" in facts


def test_scores_are_drawn_by_source(tmp_path, drawn):
    """Every conversation in one bar of its source, kept ones apart; another file is refused."""
    path, lines = tmp_path / "kept.scores.jsonl", []
    for k in range(30):
        lines.append({"dataset": "ab"[k % 3 == 0], "score": k / 30, "kept": k >= 20})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    axes = drawn(plot.plot_prune, path, tmp_path / "prune.png")
    assert [axis.get_title("left") for axis in axes] == ["b: 3 of 10 kept", "a: 7 of 20 kept"]
    for axis, kept, total in zip(axes, (3, 7), (10, 20), strict=True):
        heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
        assert [sum(each) for each in heights] == [kept, total - kept]
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="expected prune.py's scores"):
        plot.plot_prune(path, tmp_path / "prune.png")
