"""What README says about this repository's files, lines, commands and pictures is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md")])


def section(heading):
    """The text of one section of README."""
    return README.split(f"\n## {heading}")[1].split("\n## ")[0]


def files_listed():
    """Every path in the reading order and in the tree of the other files, in order.

    A line of the tree begins with a room, `tokens/`, whose files follow; a room without files and
    a command after `◄` stand for themselves.
    """
    text = section("Read it in an afternoon")
    table, tree = text.split("\n```\n")[:2]
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", table, re.M)
    for line in tree.splitlines():
        # Two rooms may share a line; "◄ bench.py" is a file of the root.
        for part in re.split(r"(?=\b\w+/ )", line):
            room = part.split()[0] if part.strip() else ""
            own, *commands = part.split("◄")
            listed += [f"{room}{name}" for name in re.findall(r"\w+\.py", own)] or [room]
            listed += [name for command in commands for name in re.findall(r"\w+\.py", command)]
    return [name for name in listed if name]


def test_file_map_lists_every_file_and_no_other():
    """Each file of the root and of each room stands in the map once, and each name exists.

    Of evals/, benchmarks/ and the rooms without Python files the map has the room alone.
    """
    listed = files_listed()
    files = {path.name for path in ROOT.glob("*.py")} | {"runs/", "results/", "tests/"}
    for room in {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}:
        inside = {f"{room}/{path.name}" for path in (ROOT / room).glob("[a-z]*.py")}
        files |= {f"{room}/"} if room in ("evals", "benchmarks") else inside
    assert sorted(listed) == sorted(files)


def test_line_counts():
    """Of each file that README counts, and of the reading order in all; a few lines may differ."""
    counts = re.findall(r"`([\w/]+\.py)` \((\d+)\s+lines\)", README)
    order = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.M)
    assert len(counts) == 6 and len(order) >= 12
    found = {name: len((ROOT / name).read_text("utf-8").splitlines()) for name, _ in order}
    stale = {name: found[name] for name, n in counts + order if abs(found[name] - int(n)) > 5}
    assert not stale, f"README's counts are not those of the files: {stale}"
    total = int(re.search(r"In this order: ([\d,]+) lines", README)[1].replace(",", ""))
    assert abs(total - sum(found.values())) <= 30


def test_length():
    """170 lines at most."""
    assert len(README.splitlines()) <= 170


def test_names_that_readme_points_to_are_in_their_files():
    """`file.py`: `name` means that the file holds that name."""
    pointers = re.findall(r"`([\w/]+\.py)`: `([^`]+)`", README)
    assert len(pointers) >= 7
    for path, name in pointers:
        assert name in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {name}"


def test_commands_are_on_the_first_screen_and_in_ci():
    """The run and the tests, word for word."""
    first_screen = "\n".join(README.splitlines()[:24])
    assert "\npip install -r requirements.txt && torchrun sft.py\n" in first_screen
    tests = "\npip install -r requirements-dev.txt && pytest\n"
    assert tests in first_screen
    assert tests in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Links and pictures to files, links to headings, and file names in backticks."""
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (page.parent / target).is_file(), target
    for name in re.findall(r"`(tests/[\w/]+\.py|runs/\w+\.sh|benchmarks/\w+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_pictures_are_small_and_beside_their_data():
    """Every picture that a page shows is under 150 KiB, and what it is drawn from is in its folder:
    the command that draws it stands in results/README.md."""
    shown = set()
    for page in PAGES:
        targets = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        shown |= {(page.parent / target).relative_to(ROOT).as_posix() for target in targets}
    commands = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    drawn = dict(re.findall(r"^python plot\.py \w+ (\S+) --out (\S+)", commands, re.M))
    assert shown == set(drawn.values())
    for source, picture in drawn.items():
        assert (ROOT / picture).stat().st_size < 150 * 1024, picture
        assert (ROOT / source).is_file() and Path(source).parent == Path(picture).parent
