"""evals/harness.py: the answer loop that the benchmarks share."""

import dataclasses
import json

import pytest

from decoding.generator import Completion
from decoding.sampling import Sampling
from evals.harness import Records, answer_all, digest_of, seed_of
from program.ranks import start

ITEMS = [{"id": f"q{k}", "kind": "even" if k < 3 else "odd", "number": k} for k in range(5)]


class Doubling:
    """A stand-in for `TextGenerator`: a prompt is one number, its answer is twice that number."""

    class tokenizer:
        visible = staticmethod(lambda ids: f"<{ids[0]}>")

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling, seeds, advance):
        self.calls.append((prompts, sampling, seeds))
        return [Completion(ids, str(2 * ids[0]), "eos") for ids in prompts]


OLD = {"task": "t", "id": "q2", "prompt": "<2>", "completion": "old"}
OLD |= {"key": digest_of([ITEMS[2], dataclasses.asdict(Sampling(7))])}


@pytest.fixture
def records(tmp_path):
    """Records of an earlier start that had answered the third item."""
    start()
    records = Records(tmp_path / "lines.jsonl", [OLD])
    records.task = "t"
    return records


def test_only_items_without_a_record_are_answered(records):
    """Batches of at most `per_rank` and of one group; each item's own seed; records in order."""
    generator, sampling, mapped = Doubling(), Sampling(7), []

    def mapper(score, items, texts):
        mapped.append(list(texts))
        return map(score, items, texts)

    def prompt(item):
        return [item["number"]], {"shots": 3}

    answered = answer_all(
        generator, records, ITEMS, prompt,
        lambda item, text: {"right": int(text) == 2 * item["number"]},
        sampling, per_rank=1, group_by="kind", mapper=mapper,
    )  # fmt: skip
    asked = [ITEMS[k] for k in (0, 1, 3, 4)]
    assert generator.calls == [([[i["number"]]], sampling, [seed_of(i)]) for i in asked]
    assert mapped == [["0"], ["2"], ["6"], ["8"]]
    new = [
        {"task": "t", "id": i["id"], "prompt": f"<{i['number']}>", "finish": "eos",
         "key": digest_of([i, dataclasses.asdict(sampling)]),
         "completion": str(2 * i["number"]), "shots": 3, "right": True}
        for i in asked
    ]  # fmt: skip
    assert answered == [*new[:2], OLD, *new[2:]]
    assert [json.loads(line) for line in open(records.path, encoding="utf-8")] == new
    whole = answer_all(generator, records, ITEMS, prompt, None, sampling)
    assert whole == answered and len(generator.calls) == 4
