"""What runs beside `bench.py generate` ends in time, and answers that are cut off."""

from benchmarks import peers
from test_model import make_pair


def test_a_program_alone_is_ended_in_time(tmp_path):
    """What takes too long, or fails, is a case without figures that says why."""
    job = {"folder": "none", "dtype": "float32", "prompts": [[3]], "lengths": [1], "batch": 1}
    path = tmp_path / "job.json"
    assert peers.alone("vllm", job, path, 0.1)["skipped"].startswith("not done after")
    failed = peers.alone("first_token", job, path, 300)
    assert "none" in failed["skipped"] and "no such" in peers.rate(failed).lower()


def test_transformers_answers_are_cut_at_the_end_of_time():
    """An answer that is not finished then counts as far as it came."""
    _, theirs = make_pair({})
    whole = peers.padded(theirs, [[3, 4], [5]], [6, 4])
    assert [len(a) for a in whole] == [6, 4]
    cut = peers.padded(theirs, [[3, 4], [5]], [6, 4], end=0)
    assert cut == [a[:1] for a in whole]
    assert peers.padded(theirs, [[3, 4], [5]], [6, 4], fixed=(4, 8)) == whole
