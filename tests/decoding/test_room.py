"""room.py: what a GPU holds, as arithmetic; and a GPU that cannot decode is refused first."""

from types import SimpleNamespace

import pytest
import torch
from test_generator import Numbers, make_prompts

import generate
from checkpoint.config import config_from_dict
from decoding import cached_model, generator, room
from decoding.generator import TextGenerator
from decoding.room import GIB, GPU, MOST, check_gpu, slots_that_fit, token_bytes, working_bytes
from decoding.sampling import Sampling
from program.errors import InputError
from test_model import TINY, make_pair

LLAMA_2_7B = config_from_dict(
    TINY
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
       "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000}
)  # fmt: skip
WEIGHTS, BF16 = 6_738_415_616, torch.bfloat16
H100 = GPU("NVIDIA H100", (9, 0), 79 * GIB)


def test_bytes_of_a_token():
    """512 KiB for Llama 2 7B in bf16: 2 · 32 layers · 32 heads · 128 · 2 bytes."""
    assert token_bytes(LLAMA_2_7B, BF16) == 512 << 10


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
@pytest.mark.parametrize("sequences", [1, 10, 200, 5000])
def test_slots_fill_the_memory_and_no_more(tokens, sequences):
    """Cache and working memory fit; one slot more would not, or would be more than is asked for."""
    free = 79 * GIB - 2 * WEIGHTS
    slots = slots_that_fit(LLAMA_2_7B, BF16, tokens, sequences, free)
    of_slot = tokens * token_bytes(LLAMA_2_7B, BF16)
    wanted = min(MOST, 1 << (sequences - 1).bit_length())
    left = free - working_bytes(LLAMA_2_7B, BF16, max(8192, tokens), wanted)
    assert (slots + 1) * of_slot <= left and 1 <= slots <= wanted
    assert slots == wanted or (slots + 2) * of_slot > left


def test_no_memory_still_is_one_slot():
    """Whether it exists is then the cache's matter, which says so when it is made."""
    assert slots_that_fit(LLAMA_2_7B, BF16, 4096, 64, 0) == 1


@pytest.mark.parametrize(
    "change, dtype, gpu, expected",
    [
        ({"head_dim": 96}, BF16, H100, None),
        ({"head_dim": 20}, BF16, H100, "heads of 20 elements, expected a multiple of 16 up to 128"),
        ({"head_dim": 256}, BF16, H100, "heads of 256 elements"),
        ({}, BF16, GPU("Tesla T4", (7, 5), 79 * GIB), "Tesla T4 has compute capability 7.5"),
        ({}, BF16, GPU("RTX 3060", (8, 6), 12 * GIB), "12.6 GiB in bfloat16.* has 12.0 GiB free"),
        ({}, torch.float32, GPU("RTX 4090", (8, 9), 24 * GIB), "25.1 GiB in float32"),
        ({}, BF16, GPU("RTX 4090", (8, 9), 24 * GIB), None),
    ],
)
def test_a_gpu_that_cannot_decode(change, dtype, gpu, expected):
    """One line with the model's size and the GPU's, or what it lacks; others pass."""
    config = LLAMA_2_7B.__class__(**(vars(LLAMA_2_7B) | change))
    if expected is None:
        check_gpu("model", config, dtype, WEIGHTS, gpu)
    else:
        with pytest.raises(InputError, match=expected):
            check_gpu("model", config, dtype, WEIGHTS, gpu)


def test_it_is_refused_before_weights_are_read(base, monkeypatch):
    """generate.py on a GPU whose kernels do not take the model's heads; nothing is loaded."""
    monkeypatch.setattr(generate, "start", lambda: (0, 1, SimpleNamespace(type="cuda")))
    monkeypatch.setattr(generator, "gpu_of", lambda device: H100)
    monkeypatch.setattr(generator, "load_hf", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="heads of 8 elements"):
        generate.main({"model": str(base), "prompt": "Hi", "dtype": "bfloat16"})


def test_a_cache_grows_with_what_is_asked(monkeypatch):
    """Slots by memory: few for few prompts, more for more; the answers are those of 16 slots."""
    ours, _ = make_pair({})
    by_memory, fixed = TextGenerator(ours, Numbers()), TextGenerator(ours, Numbers())
    by_memory.cached.by_memory = True
    monkeypatch.setattr(cached_model, "gpu_of", lambda device: GPU("any", (9, 0), 8 * GIB))
    monkeypatch.setattr(room, "ROW_TOKENS", 64)
    seen = []
    for n in (3, 2, 9, 40):
        prompts = make_prompts(n)
        answers = by_memory.generate(prompts, Sampling(3))
        assert [a.ids for a in answers] == [a.ids for a in fixed.generate(prompts, Sampling(3))]
        seen.append(by_memory.slots)
    assert seen == [4, 4, 16, 64] and fixed.slots == 16
    assert by_memory.cached.cache.slots == 65


def test_nothing_to_answer_needs_no_memory(monkeypatch):
    """Neither no prompt nor none that fits: as on CPU."""
    generator = TextGenerator(make_pair({})[0], Numbers(), context=4)
    generator.cached.by_memory = True
    monkeypatch.setattr(cached_model, "gpu_of", lambda device: GPU("any", (9, 0), 8 * GIB))
    assert generator.generate([], Sampling(3)) == generator.option_logps([], []) == []
    (answer,) = generator.generate([[3, 4, 5, 6]], Sampling(3))
    assert answer.finish == "context" and answer.ids == []


def test_a_stream_has_one_slot(monkeypatch):
    """Of the slots that the memory would hold, a chat needs its own."""
    generator = TextGenerator(make_pair({})[0], Numbers())
    generator.cached.by_memory = True
    monkeypatch.setattr(cached_model, "gpu_of", lambda device: GPU("any", (9, 0), 8 * GIB))
    list(generator.stream([3, 4], Sampling(2)))
    assert generator.slots == 1
