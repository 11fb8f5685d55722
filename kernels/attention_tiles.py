"""What each part of a packed row sees, as a list of tiles: made once a row, on the host, in NumPy.

Token i sees j where doc_start[i] <= j <= i < doc_end[j] (kernels/attention.py). A branch is a run
of tokens with the same doc_start and the same doc_end: a whole document, or a pair's prompt, chosen
or rejected answer. Its tokens see each other causally, and their document before the branch, except
holes: rejected does not see chosen. A tile is up to TILE tokens of one branch; with a TILE
of 4, and one character a token, of a pair (prompt, chosen, rejected) and a document:

    row      PPPPPCCCCCCRRDDDDD
    tiles    [  ][[  ][][][  ][        also of one token, as the second ones of P and D are

No tile has tokens of two branches: what a document computes depends on no neighbour and no place.
"""

import numpy as np

TILE = 128  # tokens: kernels work on whole tiles, or on equal parts of them


# How many scores are computed for each one that is needed, in rows of about 16,384 tokens. Left:
# with tiles cut from the row whatever its documents, and prompts twice; right: with these tiles.
#
#     BM, BN                                forward 128, 128    dq 128, 64      dk, dv 64, 128
#     chats of 1,097 tokens on average         1.19   1.15      1.16   1.14       1.15   1.10
#     chats of 490                             1.34   1.31      1.29   1.29       1.29   1.22
#     Code-Alpaca and GSM8K, 142               3.09   2.81      2.67   2.51       2.73   2.24
#     pairs, prompt 1,000, answers 200         1.99   1.29      1.91   1.27       1.90   1.15
#     pairs, prompt 185, answers 305           1.93   1.83      1.78   1.65       1.77   1.54
#     pairs of alpaca_eval, which are short    2.07   2.28      1.89   1.97       1.86   2.00
#     documents of 20                          21.9   78.0      17.0   39.0       17.0   39.0
#
# Very short documents do not share a tile: their bits would depend on their neighbours, and in the
# last line, the worst, attention computes 0.6 TFLOP in a block of 7B, its matrices 20.


def blocks(kernel: str, dtype, shared_memory: int) -> dict[str, int]:
    """Block sizes of a kernel, by name: of those tried, the largest that spill no registers.

    shared_memory: bytes that the chip gives a block, 227 KiB on Hopper; the small sizes fit 99 KiB.
    tests/kernels/test_kernels_compiled.py compiles them (TULU_COMPILE=all: each), `bench.py tune`
    times others. fp32 runs without tensor cores: it is there to check the others by.
    """
    if dtype.itemsize == 4:
        warps = 8 if kernel == "backward_q_kernel" else 4
        return {"BM": 16, "BN": 16, "num_warps": warps, "num_stages": 1}
    large = shared_memory >= 227 << 10
    BM, BN = {
        "forward_kernel": (128, 128) if large else (128, 64),
        "backward_q_kernel": (128, 64),
        "backward_kv_kernel": (64, 128) if large else (32, 64),
    }[kernel]
    # With two stages the small forward kernel spills at D = 32; the third takes no block's place.
    stages = 3 if kernel == "forward_kernel" and not large else 2
    return {"BM": BM, "BN": BN, "num_warps": 8, "num_stages": stages}


def attention_tiles(doc_start: np.ndarray, doc_end: np.ndarray) -> np.ndarray:
    """tiles (2, n, 4 + 2·h) int32 of a row, from doc_start and doc_end (T,) int32.

    tiles[0] are those of queries, tiles[1] the same n tiles as keys, each list in the order in
    which a GPU should begin: the longest walk first. A tile is

        first, end    its own tokens             holes    h times begin, end, in rising order; where
        low, high     doc_start and doc_end               a branch has fewer, empty ones at its head

    h is 0 in a row of documents, 1 with pairs, and never more than the depth of a tree.
    """
    first, end, paths = branches(doc_start, doc_end)
    counts = -(-(end - first) // TILE)
    branch = np.repeat(np.arange(len(first)), counts)  # of each tile
    holes = branch_holes(first, end, doc_start, paths)[branch]
    first = first[branch] + TILE * (np.arange(len(branch)) - (counts.cumsum() - counts)[branch])
    end, low, high = np.minimum(first + TILE, end[branch]), doc_start[first], doc_end[first]
    tiles = np.column_stack((first, end, low, high, holes)).astype(np.int32)
    keys = end - low - (holes[:, 1::2] - holes[:, ::2]).sum(1)  # that a tile of queries walks over
    queries = high - first  # that a tile of keys walks over
    tiles = tiles[np.stack([(-walk).argsort(kind="stable") for walk in (keys, queries)])]
    # Two at least, the others empty: torch.compile would compile again for a size of 1.
    return np.pad(tiles, ((0, 0), (0, max(0, 2 - len(first))), (0, 0)))


def branches(doc_start: np.ndarray, doc_end: np.ndarray) -> tuple[np.ndarray, np.ndarray, list]:
    """first and end (b,) of a row's branches, and paths: what each sees, from root to itself."""
    edges = (np.diff(doc_start) != 0) | (np.diff(doc_end) != 0)
    first = np.append(np.zeros(len(doc_start[:1]), np.int64), edges.nonzero()[0] + 1)
    end = np.append(first, len(doc_start))[1:]
    paths, path, seen_until = [], [], doc_end[first].tolist()
    for branch, begin in enumerate(first.tolist()):
        path = [b for b in path if seen_until[b] > begin] + [branch]
        paths.append(path)
    return first, end, paths


def branch_holes(first: np.ndarray, end: np.ndarray, doc_start: np.ndarray,
                 paths: list) -> np.ndarray:  # fmt: skip
    """(b, 2·h): of each branch the intervals between its document's start and its path's parts."""
    holes = [()] * len(paths)
    for branch in (first > doc_start[first]).nonzero()[0]:  # none in a row of documents
        parts = paths[branch]
        ends = doc_start[first[branch]], *end[parts[:-1]]
        pairs = zip(ends, first[parts], strict=True)
        holes[branch] = sum((pair for pair in pairs if pair[0] < pair[1]), ())
    most = max(map(len, holes), default=0)
    holes = [h + (f,) * (most - len(h)) for h, f in zip(holes, first, strict=True)]
    return np.array(holes, np.int64).reshape(len(first), most)
