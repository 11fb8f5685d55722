"""Hugging Face folders in and out. (What a kill or a full disk leaves: test_crash.py.)"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from checkpoint import resume
from checkpoint import weights as checkpoint
from checkpoint.config import read_config
from harm import harmed, recipe
from model import Llama
from program import files
from program.ranks import start
from tokens.tokenizer import Tokenizer
from training.flags import RunFlags
from training.parallel import shard


def sharded(folder):
    """Our model with the weights of `folder`, as the loops have it (one rank)."""
    _, _, device = start()
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shard(model, RunFlags(dtype="float32"), device)
    checkpoint.load_hf(model, folder)
    return model


def logits(model, ids):
    """Our logits of one document."""
    return model(ids, torch.zeros(len(ids), dtype=torch.int32), torch.arange(len(ids)))


def test_what_is_written_gives_the_same_logits_and_ids_in_transformers(base, tmp_path):
    """bf16 weights, read back by both: equal logits and chat ids, and generation stops at EOS."""
    tokenizer = Tokenizer(base)
    checkpoint.save_hf(sharded(base), tokenizer, base, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, theirs.config.vocab_size, (37,), generator=torch.manual_seed(1))
    torch.testing.assert_close(
        logits(sharded(tmp_path), ids), theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5
    )
    messages = [{"role": "user", "content": " Hé! 😀"}, {"role": "assistant", "content": "a  b"}]
    chat = AutoTokenizer.from_pretrained(tmp_path)
    assert chat.apply_chat_template(messages, return_dict=False) == tokenizer.encode(messages)[0]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == tokenizer.eos_id
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def rounded(folder):
    """The weights of a folder as torch rounds them to bf16: to the nearest, ties to even."""
    weights = load_file(folder / "model.safetensors")
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}


def assert_bits(folder, expected):
    """The folder's file holds exactly these tensors in bf16, bit for bit."""
    written = load_file(folder / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, weight in written.items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name


def test_weights_are_rounded_to_bf16_once_and_then_survive_bit_for_bit(base, tmp_path):
    """The file holds w.to(bfloat16) of every fp32 weight; read and written again, the same."""
    checkpoint.save_hf(sharded(base), Tokenizer(base), base, tmp_path / "one")
    assert_bits(tmp_path / "one", rounded(base))
    checkpoint.save_hf(sharded(tmp_path / "one"), Tokenizer(base), base, tmp_path / "two")
    assert_bits(tmp_path / "two", rounded(base))


def test_two_ranks_write_the_same_weights_as_one(base, conversations, tmp_path):
    """w.to(bfloat16) again, after one update at a rate of 0 (the first of the warm-up)."""
    assert harmed(recipe(base, conversations, tmp_path) | {"max_steps": 1}, ranks=2) == 0
    assert_bits(tmp_path, rounded(base))


def test_what_an_older_or_newer_config_says_of_its_type_is_replaced(base, tmp_path):
    """Base and result may differ in dtype and in the code they need; all else is carried over."""
    source = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    foreign = {"dtype": "float32", "_name_or_path": "elsewhere", "auto_map": {"AutoModel": "x.Y"}}
    (source / "config.json").write_text(json.dumps(config | foreign | {"use_cache": False}))
    checkpoint.save_hf(sharded(source), Tokenizer(base), source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    named = {"torch_dtype": "bfloat16", "use_cache": True, "pad_token_id": 0}  # <unk>
    assert written == config | named


def test_the_saved_context_is_as_long_as_what_was_trained(base, tmp_path):
    """Both limits rise to the longest sequence, and neither ever falls."""
    source, limits = Path(shutil.copytree(base, tmp_path / "base")), []
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text('{"model_max_length": 50}')
    for longest in (276, 60, 40):
        out = tmp_path / str(longest)
        checkpoint.save_hf(sharded(source), Tokenizer(source), source, out, np.int64(longest))
        saved = json.loads((out / "config.json").read_text())
        tokens = json.loads((out / "tokenizer_config.json").read_text())
        limits.append((saved["max_position_embeddings"], tokens["model_max_length"]))
    assert limits == [(276, 276), (64, 60), (64, 50)]


def test_tensors_begin_at_a_multiple_of_8_bytes(tmp_path):
    """For readers that map the file: whatever the length of the header (here, of a name in it)."""
    lengths = set()
    for k in range(8):
        name, blocks = "w" * (k + 1), iter([torch.ones(1, 3, dtype=torch.bfloat16)])
        checkpoint.write_tensors({name: (1, 3)}, blocks, tmp_path)
        content = (tmp_path / "model.safetensors").read_bytes()
        lengths.add(int.from_bytes(content[:8], "little"))
        assert torch.equal(
            load_file(tmp_path / "model.safetensors")[name].float(), torch.ones(1, 3)
        )
    assert all(length % 8 == 0 for length in lengths)


def test_a_digest_is_of_the_whole_file(tmp_path):
    """Also of one that is read in several pieces."""
    content = bytes(range(256)) * (9 << 12)  # 9 MiB
    (tmp_path / "file").write_bytes(content)
    expected = [len(content), hashlib.sha256(content).hexdigest()]
    assert files.digest(tmp_path / "file") == expected


def test_checkpoints_are_sorted_by_their_update(tmp_path):
    """Newest first, also where the number outgrows its six digits."""
    steps = [7, 10, 999_998, 999_999, 1_000_000, 1_000_001, 10_000_000]
    for step in steps:
        (tmp_path / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "partial").mkdir()
    found = [int(place.name[5:]) for place in resume.saved_runs(tmp_path)]
    assert found == steps[::-1]


def test_large_models_are_written_in_shards_with_an_index(base, tmp_path, monkeypatch):
    """Every shard within the limit, every tensor in the index, and both sides can read them."""
    checkpoint.save_hf(sharded(base), Tokenizer(base), base, tmp_path / "one")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 25_000)
    checkpoint.save_hf(sharded(base), Tokenizer(base), base, tmp_path / "many")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2
    parts = {}
    for name in names:
        tensors = load_file(tmp_path / "many" / name)
        assert len(tensors) == 1 or sum(2 * t.numel() for t in tensors.values()) <= 25_000
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        parts |= tensors
    total_size = sum(2 * t.numel() for t in whole.values())
    assert index["metadata"]["total_size"] == total_size
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    ours = sharded(tmp_path / "many").state_dict()
    for name in whole:
        assert torch.equal(theirs[name], whole[name])
        assert torch.equal(ours[name], whole[name].float())
    # What fits exactly is one file.
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", total_size)
    checkpoint.save_hf(sharded(base), Tokenizer(base), base, tmp_path / "exact")
    assert (tmp_path / "exact" / "model.safetensors").is_file()


def test_tied_embeddings_are_one_tensor(base, tmp_path):
    """A tied checkpoint loads with or without a head in the file, and is written without one."""
    tied = tmp_path / "tied"
    shutil.copytree(base, tied)
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    weights = load_file(tied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tied / "model.safetensors", metadata={"format": "pt"})
    model = sharded(tied)  # the head is still in the file
    checkpoint.save_hf(model, Tokenizer(base), tied, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(11)
    torch.testing.assert_close(
        logits(sharded(tmp_path / "out"), ids), theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5
    )


def test_plain_models_load_too(base):
    """generate.py and the demo read a folder without FSDP."""
    with torch.device("meta"):
        model = Llama(read_config(base))
    checkpoint.load_hf(model.to_empty(device="cpu"), base)
    ids = torch.arange(7)
    assert torch.equal(logits(model, ids), logits(sharded(base), ids))
