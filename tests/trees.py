"""Rows of documents, of pairs and of deeper trees, with what each of their tokens sees."""

import torch


def row_of(*trees):
    """doc_start and doc_end (T,) int32 of trees laid end to end, each depth first.

    A tree is (tokens, tree, …): so many tokens, which each of the trees goes on from. A document
    is (tokens,), a pair (prompt, (chosen,), (rejected,)).
    """
    start, end = [], []

    def lay(tree, root):
        tokens, *children = tree
        begin = len(start)
        start.extend([root] * tokens)
        end.extend([0] * tokens)
        for child in children:
            lay(child, root)
        end[begin : begin + tokens] = [len(start)] * tokens

    for tree in trees:
        lay(tree, len(start))
    return torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)


def row_of_documents(lengths):
    """The same of documents of these lengths."""
    return row_of(*((n,) for n in lengths))


def tokens_of(tree):
    return tree[0] + sum(map(tokens_of, tree[1:]))


def random_tree(rng, depth):
    """A tree of at most so many answers in succession; some have no tokens, or one."""
    tokens = rng.choice([0, 1, 2, 5, 17, 40])
    branches = rng.choice([0, 2, 2, 3]) if depth else 0
    return (tokens, *(random_tree(rng, depth - 1) for _ in range(branches)))


def seen(doc_start, doc_end):
    """(T, T) bool: whether token i sees token j, from the definition."""
    i, j = torch.arange(len(doc_start))[:, None], torch.arange(len(doc_start))
    return (doc_start[:, None] <= j) & (j <= i) & (i < doc_end)


# Pairs among documents, with branches that end inside, at and across edges of tiles of 16 to 128;
# an empty prompt; a prompt of one token; an empty answer; trees of three answers, and of three
# levels, with a subtree (of holes in several places) before the last branch.
PAIRS = {
    "pair": [(30, (50,), (40,))],
    "edges": [(64, (64,), (128,)), (16, (1,), (31,))],
    "long": [(5,), (131, (140,), (150,)), (9,)],
    "empty": [(0, (7,), (5,)), (1, (3,), (2,)), (4, (0,), (6,)), (4, (6,), (0,)), (3,)],
    "three": [(20, (3,), (40,), (9,))],
    "deep": [
        (2, (1, (1,), (1,)), (2, (2,), (3,))),
        (20, (19, (33,), (1,)), (21, (22,), (23, (5,), (4,)))),
    ],
}
