"""README's commands and file map are true."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_file_map_lists_every_file_and_no_other():
    """Each source file stands in the map once, and each name in the map exists."""
    table = README.split("## The files")[1].split("\n## ")[0]
    listed = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (.*?) \|", table, re.M)))
    sources = {path.name for path in ROOT.glob("*.py")}
    rooms = "kernels", "tokens", "training", "checkpoint", "decoding", "program"
    for room in rooms:
        sources |= {f"{room}/{path.name}" for path in (ROOT / room).glob("[a-z]*.py")}
    assert sources <= set(listed)
    assert all((ROOT / name).exists() for name in listed)
    assert len(listed) == len(set(listed))


def test_commands_are_on_the_first_screen_and_in_ci():
    """The run and the tests, word for word."""
    first_screen = "\n".join(README.splitlines()[:24])
    assert "\npip install -r requirements.txt && torchrun sft.py\n" in first_screen
    tests = "\npip install -r requirements-dev.txt && pytest\n"
    assert tests in first_screen
    assert tests in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere():
    """Links to headings of this file, and file names in backticks with a known ending."""
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", README, re.M)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings
    for name in re.findall(r"`(tests/[\w/]+\.py|runs/\w+\.sh|benchmarks/\w+\.py)`", README):
        assert (ROOT / name).is_file(), name
