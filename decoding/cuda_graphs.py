"""Decoding on a GPU without waiting for Python: one block compiled, all of them in a CUDA graph.

One step of a 7B for one sequence reads 13.5 GB of weights, 4 ms of an H100's memory bandwidth, and
launches some 1,500 kernels, which takes Python longer than running them takes the GPU.
torch.compile fuses the small ones of a block. It sees one block, not the model: all blocks are
alike, and so they are compiled in seconds, once for one sequence and once for several. A CUDA graph
then launches the kernels of all blocks at once. Shapes and addresses in a graph are fixed, so there
is one for each number of sequences, rounded up to a power of two, recorded when it is first needed;
how long the sequences are stands in memory, where the attention kernel reads it.

Called by cached_model.py. Rows of prompts are not compiled: they keep the GPU busy as they are.
"""

import time
from collections.abc import Callable

import torch

from decoding.kv_cache import KVCache
from kernels.decode_attention import decode_attention
from model import Block, Llama, LlamaConfig, rotary_angles
from program.hardware import on_device


def block_step(
    block: Block, config: LlamaConfig, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x (B, E) after one block, with the new tokens' keys and values put into its cache.

    torch.compile takes sizes that are equal in the first call for one and the same, and compiles
    again when they differ. So no two sizes of these arguments may be equal by chance (as B and D
    would be in cos and sin).
    """
    cos, sin = rotary_angles(positions, config, x.dtype)

    def attend(q, k, v):
        return decode_attention(q, k, v, keys, values, positions)

    return block(x, cos, sin, attend)


class GraphedStep:
    """The step of all sequences: recorded and replayed, or run kernel by kernel.

    compile=False: neither compiled nor recorded. seconds: what both have taken so far.
    """

    def __init__(self, model: Llama, compile: bool = True) -> None:
        self.model, self.compile = model, compile
        # Without `dynamic` each number of sequences would be compiled, and torch gives up at eight.
        self.block = torch.compile(block_step, dynamic=True) if compile else block_step
        self.seconds = {"compiling": 0.0, "recording": 0.0}
        self.forget()

    def forget(self) -> None:
        """Drop the graphs that were recorded on a cache which is freed now."""
        # All graphs share their working memory. A pool whose last graph is gone cannot be used
        # again, hence a new one.
        self.recorded, self.pool = {}, torch.cuda.graph_pool_handle() if self.compile else None

    def __call__(self, tokens, positions, cache):
        """Logits (B, V) after one more token of the sequences in the first B slots.

        tokens and positions are lists. The logits are overwritten by the next call. The batch is
        padded to the recorded number of sequences; padding writes to free slots.
        """
        B = len(tokens)
        if not self.compile:
            return self.step(*(on_device(row, cache.device) for row in (tokens, positions)), cache)
        padded = min(1 << (B - 1).bit_length(), cache.slots - 1)
        padding = [0] * (padded - B)
        inputs = [on_device(row + padding, cache.device) for row in (tokens, positions)]
        if padded not in self.recorded:
            self.recorded[padded] = self.record(inputs, cache)
        replay, recorded_inputs, logits = self.recorded[padded]
        for recorded_input, row in zip(recorded_inputs, inputs, strict=True):
            recorded_input.copy_(row)
        replay()
        return logits[:B]

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) of tokens (B,) at positions (B,); as `Llama.forward`, for a step."""
        decoder = self.model.model
        x = decoder.embed_tokens(tokens)  # (B, E)
        for block, keys, values in zip(decoder.layers, cache.keys, cache.values, strict=True):
            x = self.block(block, decoder.config, x, keys.flatten(1), values.flatten(1), positions)
        return self.model.head(decoder.norm(x))

    def record(
        self, inputs: list[torch.Tensor], cache: KVCache
    ) -> tuple[Callable, list[torch.Tensor], torch.Tensor]:
        """(replay, its inputs: tokens and positions, its logits (B, V)).

        Recording runs the step, which writes to the cache: so it is given the real inputs.
        """
        inputs = [row.clone() for row in inputs]
        # Compiling, and first calls of libraries, cannot be recorded.
        with timed(self.seconds, "compiling"):
            self.step(*inputs, cache)
        with timed(self.seconds, "recording"):
            return self.captured(inputs, cache)

    def captured(
        self, inputs: list[torch.Tensor], cache: KVCache
    ) -> tuple[Callable, list[torch.Tensor], torch.Tensor]:
        """What `record` returns; without a GPU, tests put something else in its place."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.step(*inputs, cache)
        return graph.replay, inputs, logits


class timed:
    """Add the seconds of a block of code to `seconds[name]`, what a GPU does in it included."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.begin = time.perf_counter()

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[self.name] += time.perf_counter() - self.begin
