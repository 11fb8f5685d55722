"""What prune.py says of a choice: how much of each source, how long, the best, the worst."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from program.errors import InputError, amount
from tokens.documents import Documents
from tokens.tokenizer import Tokenizer


def print_sources(sources: list[str], tokens: np.ndarray, chosen: np.ndarray) -> None:
    """Kept and all conversations by source, and their mean length."""
    all_of, kept = Counter(sources), Counter(sources[i] for i in chosen)
    print(f"{'':48}{'share':>10}{'mean tokens':>16}")
    print(f"{'source':28}{'kept':>10}{'of':>10}{'of kept':>10}{'kept':>8}{'all':>8}")
    of_source = {name: [] for name in all_of}
    for i, name in enumerate(sources):
        of_source[name].append(i)
    own = set(chosen.tolist())
    rows = [(name, members) for name, members in of_source.items()]
    for name, members in [*rows, ("total", range(len(sources)))]:
        picked = [i for i in members if i in own]
        count = len(chosen) if name == "total" else kept[name]
        mean = f"{tokens[picked].mean():,.0f}" if picked else "-"
        share = count / len(chosen)
        print(
            f"{name[:27]:28}{count:>10,}{len(members):>10,}{share:>10.1%}{mean:>8}"
            f"{tokens[list(members)].mean():>8,.0f}"
        )


def print_extremes(
    tokenizer: Tokenizer, documents: Documents, queries: Documents | None, best: np.ndarray,
    query: np.ndarray | None, allowed: np.ndarray,
) -> None:  # fmt: skip
    """The three candidates of the highest and of the lowest score, each with its query."""
    candidates = np.flatnonzero(allowed)
    order = candidates[np.argsort(-best[candidates], kind="stable")]
    for title, some in (("highest scores", order[:3]), ("lowest", order[-3:])):
        print(f"{title}:")
        for i in some:
            print(f"  {best[i]:.4f}  {beginning(tokenizer, documents, i)}")
            if query is not None:
                asked = beginning(tokenizer, queries, query[i])
                print(f"          for query {query[i] + 1}: {asked}")


def beginning(tokenizer: Tokenizer, documents: Documents, i: int) -> str:
    """The first words of a conversation, on one line."""
    ((ids, _),) = documents[i]
    text = " ".join(tokenizer.decode(ids[:60].tolist()).split())
    return text if len(text) <= 90 else text[:89] + "…"


def check_ours(out: Path, scores: Path) -> None:
    """Raise `InputError` where `out` or `scores` would overwrite what prune.py has not written."""
    try:
        with open(scores, encoding="utf-8") as file:
            ours = "kept" in json.loads(file.readline())
    except FileNotFoundError:
        ours = not out.exists()
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        found = scores if scores.exists() else out
        raise InputError(f"--out {out}: {found} is there, and not prune.py's, expected a new file")


def read_choices(paths: list[str], candidates: int) -> dict[Path, list[bool]]:
    """`{path: kept}` of other choices from the same data, each a FILE.scores.jsonl: lists of bool.

    Raises `InputError` for a file of another kind or another number of candidates.
    """
    choices = {}
    for path in map(Path, paths):
        try:
            with open(path, encoding="utf-8") as file:
                kept = [bool(json.loads(line)["kept"]) for line in file]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--compare {path}: {error}, expected a FILE.scores.jsonl") from None
        if len(kept) != candidates:
            raise InputError(
                f"--compare {path}: {amount(len(kept), 'candidates')}, expected the "
                f"{candidates:,} of this data"
            )
        choices[path] = kept
    return choices


def print_shared(choices: dict[Path, list[bool]], chosen: np.ndarray) -> None:
    """How many kept conversations each other choice has in common with this one."""
    for path, kept in choices.items():
        shared = sum(kept[i] for i in chosen)
        expected = len(chosen) * sum(kept) / len(kept)
        print(
            f"{path}: {shared:,} of its {sum(kept):,} kept are kept here, too; by chance it would "
            f"be {expected:,.0f}"
        )
