"""Decoding on a GPU without waiting for Python: the step compiled, and replayed as a CUDA graph.

One step of a 7B for one sequence reads 13.5 GB of weights, 4.5 ms of an H100's memory bandwidth,
and launches some 1,500 kernels, which Python takes longer to ask for than the GPU to run.
torch.compile fuses the small ones; a CUDA graph launches all of them at once. A graph's shapes and
addresses are fixed, so there is one for each number of sequences, rounded up to a power of two, and
each limit of tokens, rounded up to a multiple of 256, recorded when first needed. Called by
decoding.py.
"""

import torch

STEP = 256  # tokens between two limits: at most so many masked ones are read for nothing


class GraphedStep:
    """`step(tokens, positions, limit)` -> logits, as decoding.py's, recorded and replayed."""

    def __init__(self, step):
        # Compiled twice, for one sequence and for several, whatever their number, limit and cache.
        # Without `dynamic` it was eight times, after which torch gives up.
        self.step = torch.compile(step, dynamic=True)
        self.forget()

    def forget(self):
        """Drop what was recorded on a cache that is no more."""
        # All graphs share their working memory. A pool whose last graph is gone cannot be used
        # again, hence a new one.
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, tokens, positions, limit, cache):
        """Logits (B, V); they are overwritten by the next call.

        Rows are filled up to the recorded number: those write into slots that nobody is in.
        """
        B = len(tokens)
        rows = min(1 << (B - 1).bit_length(), cache.slots - 1)
        limit = -(-limit // STEP) * STEP  # within the cache's capacity, which is rounded likewise
        filled = torch.zeros(2, rows, dtype=torch.long, device=tokens.device)
        filled[0, :B], filled[1, :B] = tokens, positions
        if (rows, limit) not in self.recorded:
            self.recorded[rows, limit] = self.record(filled, limit)
        graph, inputs, logits = self.recorded[rows, limit]
        inputs.copy_(filled)
        graph.replay()
        return logits[:B]

    def record(self, filled, limit):
        """(graph, its inputs (2, rows): tokens and positions, its logits (rows, V)).

        It is done with the real inputs, since it writes to the cache what they say.
        """
        inputs = filled.clone()
        self.step(*inputs, limit)  # compiling, and first calls of libraries, cannot be recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.step(*inputs, limit)
        return graph, inputs, logits
