"""model.py against transformers' LlamaForCausalLM, on tiny random models in fp32."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from checkpoint.config import config_from_dict, read_config
from model import Llama, RMSNorm, rotary_angles
from program.errors import InputError

TINY = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
VARIANTS = {
    "1:1": {},
    "2:1, like Code Llama": {"num_key_value_heads": 2, "rope_theta": 1e6},
    "4:1": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "head_dim of its own": {"head_dim": 24, "num_key_value_heads": 2},
}
# fp32 rounds at 6e-8. Logits here are sums of a few hundred products of order one through two
# layers, in another order on each side: 1e-5 is some hundred roundings, and far under what any
# wrong angle, head or normalisation would change (over 1e-2, see the last test of this section).
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def make_pair(changes):
    """Our model and transformers', with the same random weights."""
    values = TINY | changes
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(TheirConfig(**values, attn_implementation="eager")).eval()
    with torch.no_grad():  # as wide as a trained model's, norms other than one
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0, 0.3) if "norm" in name else parameter.normal_(0, 0.15)
    ours = Llama(config_from_dict(values))
    weights = {n: p for n, p in theirs.state_dict().items()}
    if values["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    ours.load_state_dict(weights, strict=True)  # the names are the same
    return ours, theirs


def make_row(lengths, seed=0):
    """input_ids (T,) and doc_start (T,) of random documents laid end to end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TINY["vocab_size"], (sum(lengths),), generator=generator)
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    return ids, torch.repeat_interleave(torch.tensor(starts), torch.tensor(lengths)).int()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[37], [1, 7, 101, 2]], ids=str)
def test_logits_equal_transformers(name, lengths):
    """At every position of every document of a row, each document alone on the other side."""
    ours, theirs = make_pair(VARIANTS[name])
    ids, doc_start = make_row(lengths)
    with torch.no_grad():
        logits = ours(ids, doc_start, torch.arange(len(ids)))
        expected = torch.cat([theirs(document[None]).logits[0] for document in ids.split(lengths)])
    assert logits.dtype == torch.float32 and logits.std() > 0.5
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_equal_transformers(name):
    """nll of chosen tokens and the gradient of every parameter, for a loss that weights tokens
    at random, and for the uniform one whose gradients are made in the forward pass."""
    ours, theirs = make_pair(VARIANTS[name])
    lengths = [37, 1, 23]
    ids, doc_start = make_row(lengths)
    generator = torch.Generator().manual_seed(1)
    trained = torch.rand(len(ids), generator=generator) < 0.4
    trained[doc_start.unique().long()] = False  # nothing comes before a document's first token
    labels_at = trained.nonzero()[:, 0]
    for weights in (torch.rand(len(labels_at), generator=generator), torch.tensor(0.25)):
        uniform = weights.ndim == 0
        ours.zero_grad(), theirs.zero_grad()
        nll = ours(ids, doc_start, labels_at - 1, ids[labels_at], uniform_gradient=uniform)
        (nll * weights).sum().backward()
        logits = torch.cat([theirs(document[None]).logits[0] for document in ids.split(lengths)])
        expected = -logits[labels_at - 1].log_softmax(-1).gather(1, ids[labels_at, None])[:, 0]
        (expected * weights).sum().backward()
        torch.testing.assert_close(nll, expected, **TOLERANCE)
        gradients = {n: p.grad for n, p in theirs.named_parameters()}
        assert gradients.keys() == {n for n, _ in ours.named_parameters()}
        for parameter, ours_p in ours.named_parameters():
            largest = gradients[parameter].abs().max()
            assert largest > 0.01  # so that the comparison says something
            # Sums over 61 tokens that partly cancel: rounding is relative to the largest.
            torch.testing.assert_close(
                ours_p.grad, gradients[parameter], rtol=1e-4, atol=1e-5 * largest.item()
            )


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_long_positions_equal_transformers(theta):
    """Angles of positions up to 4,095 are as exact as transformers' (both in fp32)."""
    ours, theirs = make_pair({"rope_theta": theta, "num_hidden_layers": 1})
    theirs.set_attn_implementation("sdpa")  # faster than the default of `make_pair`
    ids, doc_start = make_row([4096])
    last = torch.tensor([0, 1023, 2047, 4094, 4095])
    with torch.no_grad():
        expected = theirs.model(ids[None]).last_hidden_state[0, last]
        logits, expected = ours(ids, doc_start, last), theirs.lm_head(expected)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_a_packed_row_equals_its_documents_alone():
    """Logits, and gradients summed over documents; a neighbour's tokens change nothing."""
    model, _ = make_pair({"num_key_value_heads": 2})
    lengths = [7, 1, 37, 3]
    ids, doc_start = make_row(lengths)
    everywhere = torch.arange(len(ids))
    up = torch.randn(len(ids), TINY["vocab_size"], generator=torch.Generator().manual_seed(2))
    packed = model(ids, doc_start, everywhere)
    (packed * up).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for document, out, upstream in zip(
        ids.split(lengths), packed.split(lengths), up.split(lengths), strict=True
    ):
        T = len(document)
        alone = model(document, torch.zeros(T, dtype=torch.int32), torch.arange(T))
        (alone * upstream).sum().backward()
        torch.testing.assert_close(alone, out, **TOLERANCE)
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * largest)


def test_positions_restart_in_every_document(monkeypatch):
    """The positions themselves: since rotations are relative, a loss would hardly show them."""
    model, _ = make_pair({})
    seen = []

    def spy(positions, *rest):
        seen.append(positions)
        return rotary_angles(positions, *rest)

    monkeypatch.setattr("model.rotary_angles", spy)
    ids, doc_start = make_row([3, 1, 4])
    model(ids, doc_start, torch.arange(8))
    assert [positions.tolist() for positions in seen] == [[0, 1, 2, 0, 0, 1, 2, 3]]


def test_rotary_angles_equal_the_formula():
    """cos and sin of position · theta^(-2i/D), in fp64 with the argument rounded to fp32."""
    config = config_from_dict(TINY | {"head_dim": 8, "rope_theta": 500.0})
    positions = torch.tensor([0, 1, 5, 1000])
    cos, sin = rotary_angles(positions, config, torch.float32)
    i = torch.arange(4, dtype=torch.float64)
    angles = positions[:, None].double() * 500.0 ** (-2 * i / 8)
    angles = torch.cat((angles, angles), dim=1)[:, None]
    # An angle up to 1,000 in fp32 is off by up to 6e-8 · 1,000, and the power by a rounding or two.
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_angles_in_16_bits_are_made_in_fp32(dtype):
    """Bit for bit transformers', at positions that 8 bits cannot hold (from 257 on), too."""
    config = config_from_dict(TINY)
    theirs = LlamaRotaryEmbedding(TheirConfig(**TINY))
    positions = torch.arange(4096)
    expected = theirs(torch.zeros(1, dtype=dtype), positions[None])
    for ours, their in zip(rotary_angles(positions, config, dtype), expected, strict=True):
        assert ours.dtype == dtype and torch.equal(ours[:, 0], their[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalisation_rounds_where_transformers_does(dtype):
    """Bit for bit: the mean and the root in fp32, rounded before the weight and after it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 37, generator=generator).to(dtype)
    weight = (1 + 0.3 * torch.randn(37, generator=generator)).to(dtype)
    ours, theirs = RMSNorm(37, 1e-5).to(dtype), LlamaRMSNorm(37, 1e-5).to(dtype)
    for norm in (ours, theirs):
        norm.load_state_dict({"weight": weight})
    assert torch.equal(ours(x), theirs(x))


def test_only_predicted_positions_reach_the_head():
    """The head's input has as many rows as `predict`, which may be empty."""
    model, _ = make_pair({})
    shapes = []
    model.model.norm.register_forward_hook(lambda *a: shapes.append(a[2].shape))
    ids, doc_start = make_row([9])
    assert model(ids, doc_start, torch.tensor([2, 5])).shape == (2, 101)
    nothing = torch.zeros(0, dtype=torch.int64)
    model(ids, doc_start, nothing, nothing, uniform_gradient=True).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-2}, {"rope_theta": 5e4}, {"num_key_value_heads": 2}],
    ids=lambda change: next(iter(change)),
)
def test_the_tolerance_tells_architectures_apart(change):
    """A wrong epsilon, angle or pairing of heads moves the logits by over ten times as much."""
    ours, _ = make_pair({})
    ids, doc_start = make_row([37])
    weights, config = ours.state_dict(), replace(ours.config, **change)
    if "num_key_value_heads" in change:  # heads shared 2:1, with the first heads' weights
        weights = {
            n: w[: w.shape[0] // 2] if "k_proj" in n or "v_proj" in n else w
            for n, w in weights.items()
        }
    other = Llama(config)
    other.load_state_dict(weights)
    with torch.no_grad():
        a, b = (m(ids, doc_start, torch.arange(37)) for m in (ours, other))
    assert (a - b).abs().max() > 10 * (TOLERANCE["atol"] + TOLERANCE["rtol"] * a.abs().max())


# ---- Configs


LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32000,
}
CODE_LLAMA = LLAMA_2 | {"max_position_embeddings": 16384, "rope_theta": 1000000}


def sizes(hidden, mlp, layers, heads, kv_heads):
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SEVEN, THIRTEEN = sizes(4096, 11008, 32, 32, 32), sizes(5120, 13824, 40, 40, 40)
# The published sizes to the last parameter: 2·V·E + L·(2·E² + 2·E·Hk·D + 3·E·F + 2·E) + E.
REAL = {
    "Llama 2 7B": (LLAMA_2 | SEVEN, 6_738_415_616, 1e4),
    "Llama 2 13B": (LLAMA_2 | THIRTEEN, 13_015_864_320, 1e4),
    "Llama 2 70B": (LLAMA_2 | sizes(8192, 28672, 80, 64, 8), 68_976_648_192, 1e4),
    "Code Llama 7B": (CODE_LLAMA | SEVEN | {"vocab_size": 32016}, 6_738_546_688, 1e6),
    "Code Llama 13B": (CODE_LLAMA | THIRTEEN | {"vocab_size": 32016}, 13_016_028_160, 1e6),
    "Code Llama 34B": (CODE_LLAMA | sizes(8192, 22016, 48, 64, 8), 33_743_970_304, 1e6),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_accepted(name):
    """Every checkpoint of the paper has the right number of parameters, on the meta device."""
    values, parameters, theta = REAL[name]
    config = config_from_dict(values)
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert (config.rope_theta, config.head_dim, config.rms_norm_eps) == (theta, 128, 1e-5)


def test_the_table_of_sizes_is_true():
    """Each line of model.py's table is a published config and its number of parameters."""
    doc = sys.modules[Llama.__module__].__doc__
    lines = re.findall(r"^ +((?:Llama 2|Code Llama) \d+B) +(.*)$", doc, re.M)
    for name, numbers in lines:
        values, parameters, theta = REAL[name]
        config = config_from_dict(values)
        assert [float(number.replace(",", "")) for number in numbers.split()] == [
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.vocab_size,
            theta,
            parameters,
        ]
    assert len(lines) == 4


@pytest.mark.parametrize(
    "rope, theta",
    [
        ({}, 10_000.0),
        ({"rope_theta": None}, 10_000.0),
        ({"rope_theta": 1000000}, 1e6),
        ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}}, 1e6),
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, 1e6),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5),
        ({"rope_scaling": {"type": "default", "factor": 1.0}}, 10_000.0),
    ],
    ids=str,
)
def test_every_spelling_of_rope_is_read(rope, theta):
    """At the top level, in rope_parameters, absent, or null; of two, as transformers reads them."""
    assert config_from_dict(TINY | rope).rope_theta == theta
    if "rope_scaling" not in rope and rope.get("rope_theta", 1):
        assert TheirConfig(**TINY | rope).rope_parameters["rope_theta"] == theta


def test_absent_fields_mean_what_they_mean_to_transformers():
    """Of a config that has the sizes alone."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    values = {name: TINY[name] for name in (*needed, "model_type", "num_attention_heads")}
    ours, theirs = config_from_dict(values), TheirConfig(**values)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    for name in (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_configs_that_transformers_writes_are_read(tmp_path):
    """transformers 5's own config.json of any variant gives the architecture back."""
    for k, changes in enumerate(VARIANTS.values()):
        values = TINY | changes
        TheirConfig(**values).save_pretrained(tmp_path / str(k))
        assert read_config(tmp_path / str(k)) == config_from_dict(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": None},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"attention_dropout": 0.1},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"factor": 2.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        {"rope_parameters": [1]},
        {"hidden_size": None},
        {"hidden_size": 0},
        {"hidden_size": 32.0},
        {"hidden_size": "32"},
        {"hidden_size": True},
        {"hidden_size": 30},
        {"vocab_size": -1},
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"rms_norm_eps": 0},
        {"rope_theta": "1e4"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_implemented_is_refused(changes):
    """Each field that is not implemented, or makes no sense, is named in the error."""
    with pytest.raises(InputError, match=next(iter(changes))):
        config_from_dict(TINY | changes, "the-path")
    with pytest.raises(InputError, match="^the-path: "):
        config_from_dict(TINY | changes, "the-path")


def test_unreadable_configs_are_refused(tmp_path):
    """No folder, no file, no JSON, no object."""
    with pytest.raises(InputError, match="no such folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path)
    for text, problem in (("{", "not JSON"), (json.dumps([TINY]), "found a JSON list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=problem):
            read_config(tmp_path)
