"""kernels/attention_tiles.py: the list of tiles against what the definition lets tokens see."""

import random

import numpy as np
import pytest

from kernels import attention_tiles as module
from kernels.attention_tiles import TILE, attention_tiles, blocks
from trees import PAIRS, random_tree, row_of, row_of_documents, seen

RANDOM = [[random_tree(random.Random(i), 3) for i in range(4 * n, 4 * n + 4)] for n in range(8)]


def arrays(trees):
    """doc_start and doc_end as packing has them."""
    return [x.numpy() for x in row_of(*trees)]


def keys_of(tile):
    """The keys that a tile of queries walks over."""
    _, end, low, _, *holes = tile
    keys = set(range(low, end))
    for begin, stop in zip(holes[::2], holes[1::2], strict=True):
        assert low <= begin <= stop <= end
        keys -= set(range(begin, stop))
    return keys


@pytest.mark.parametrize("trees", [*PAIRS.values(), *RANDOM], ids=str)
@pytest.mark.parametrize("size", [4, TILE])
def test_a_tile_walks_over_what_its_tokens_see(trees, size, monkeypatch):
    """Queries over the keys that they see, keys over the queries that see them, and no others."""
    monkeypatch.setattr(module, "TILE", size)
    row = row_of(*trees)
    mask, (queries, keys) = seen(*row).numpy(), attention_tiles(*arrays(trees)).tolist()
    for tile in queries:
        assert keys_of(tile) == set(mask[tile[0] : tile[1]].any(0).nonzero()[0])
    for first, end, _, high, *_ in keys:
        assert set(range(first, high)) == set(mask[:, first:end].any(1).nonzero()[0])


@pytest.mark.parametrize("trees", [*PAIRS.values(), *RANDOM, [(300,), (1,), (129,)]], ids=str)
def test_tiles_are_a_partition_and_the_longest_walk_comes_first(trees):
    """Every token is in one tile of queries and in one of keys, with tokens of its branch alone."""
    start, end = arrays(trees)
    queries, keys = attention_tiles(start, end).tolist()
    for tiles in (queries, keys):
        assert sorted(i for tile in tiles for i in range(*tile[:2])) == list(range(len(start)))
        for first, stop, low, high, *_ in tiles:
            assert 0 < stop - first <= TILE
            assert (start[first:stop] == low).all() and (end[first:stop] == high).all()
    walks = (
        [len(keys_of(tile)) for tile in queries],
        [high - first for first, _, _, high, *_ in keys],
    )
    for walk in walks:
        assert walk == sorted(walk, reverse=True)


def test_documents_have_no_holes_and_pairs_one():
    """What only pairs need costs rows of documents nothing: not even a column."""
    for trees, holes in (([(5,), (9,)], 0), ([(5, (2,), (3,)), (4,)], 1), ([], 0)):
        tiles = attention_tiles(*arrays(trees))
        assert tiles.dtype == np.int32 and tiles.shape[::2] == (2, 4 + 2 * holes)


def test_tiles_of_a_document_do_not_depend_on_the_row():
    """But for where it begins, and for the order."""
    alone = attention_tiles(*arrays([(300,)]))[0]
    shifted = attention_tiles(*(x.numpy() for x in row_of_documents([70, 300, 9])))[0]
    ours = shifted[shifted[:, 2] == 70] - 70
    assert sorted(ours.tolist()) == sorted(alone.tolist())


def test_blocks_divide_a_tile():
    """A program's tokens are a whole tile of the list, or one of its equal parts."""
    for name, size in (
        ("forward_kernel", "BM"),
        ("backward_q_kernel", "BM"),
        ("backward_kv_kernel", "BN"),
    ):
        for itemsize in (2, 4):
            for memory in (0, 99 << 10, 227 << 10):
                dtype = np.dtype(f"f{itemsize}")
                assert TILE % blocks(name, dtype, memory)[size] == 0
