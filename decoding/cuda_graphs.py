"""Decoding on a GPU without waiting for Python: the step compiled, and replayed as a CUDA graph.

One step of a 7B for one sequence reads 13.5 GB of weights, 4.5 ms of an H100's memory bandwidth,
and launches some 1,500 kernels, which takes Python longer than running them takes the GPU.
torch.compile fuses the small ones; a CUDA graph launches all of them at once. The shapes and
addresses of a graph are fixed, so there is one for each number of sequences, rounded up to a power
of two, and each limit of tokens, rounded up to a multiple of 256. It is recorded when it is first
needed. Called by cached_model.py.
"""

import torch

STEP = 256  # tokens from one limit to the next: a step reads at most so many masked ones


class GraphedStep:
    """`step(tokens, positions, limit)` -> logits, as in cached_model.py, recorded and replayed."""

    def __init__(self, step):
        # Compiled twice, for one sequence and for several, whatever their number, limit and cache.
        # Without `dynamic` it was compiled eight times, after which torch gives up.
        self.step = torch.compile(step, dynamic=True)
        self.forget()

    def forget(self):
        """Drop the graphs that were recorded on a cache which is freed now."""
        # All graphs share their working memory. A pool whose last graph is gone cannot be used
        # again, hence a new one.
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, tokens, positions, limit, cache):
        """Logits (B, V); they are overwritten by the next call.

        The batch is padded to the recorded number of sequences. Padding writes to free slots.
        """
        B = len(tokens)
        padded = min(1 << (B - 1).bit_length(), cache.slots - 1)
        limit = -(-limit // STEP) * STEP  # within the cache's capacity, which is rounded likewise
        batch = torch.zeros(2, padded, dtype=torch.long, device=tokens.device)
        batch[0, :B], batch[1, :B] = tokens, positions
        if (padded, limit) not in self.recorded:
            self.recorded[padded, limit] = self.record(batch, limit)
        graph, inputs, logits = self.recorded[padded, limit]
        inputs.copy_(batch)
        graph.replay()
        return logits[:B]

    def record(self, batch, limit):
        """(graph, its inputs (2, B): tokens and positions, its logits (B, V)).

        Recording runs the step, which writes to the cache: so it is given the real inputs.
        """
        inputs = batch.clone()
        self.step(*inputs, limit)  # compiling, and first calls of libraries, cannot be recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.step(*inputs, limit)
        return graph, inputs, logits
