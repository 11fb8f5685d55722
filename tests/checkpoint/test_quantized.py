"""quantized.py: folders that bitsandbytes has quantised, read as they are, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sft
from adapted import adapted
from conftest import updates
from harm import harmed, recipe
from kernels import nf4
from program.errors import InputError

QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}


def quantized_tensors(weights):
    """What bitsandbytes stores of a folder's tensors, by the description of its format."""
    stored = {}
    for name, weight in weights.items():
        if "_proj" not in name:
            stored[name] = weight
            continue
        state = nf4.quantize(weight)
        text = json.dumps(
            {
                "quant_type": "nf4", "blocksize": 64, "dtype": "float32",
                "shape": list(weight.shape), "nested_blocksize": 256, "nested_dtype": "float32",
                "nested_offset": state.offset.item(),
            }
        )  # fmt: skip
        stored |= {
            name: state.codes.view(-1, 1),
            f"{name}.absmax": state.absmax,
            f"{name}.quant_map": torch.tensor(nf4.LEVELS),
            f"{name}.nested_absmax": state.nested,
            f"{name}.nested_quant_map": torch.tensor(nf4.scale_levels()),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode())).byte(),
        }
    return stored


@pytest.fixture
def quantized(wide, tmp_path):
    """`quantized(change)`: `wide` as bitsandbytes stores it, after `change(config, tensors)`."""

    def make(change=lambda config, tensors: None):
        folder = tmp_path / "quantized"
        shutil.copytree(wide, folder)
        config = json.loads((wide / "config.json").read_text())
        config["quantization_config"] = dict(QUANTIZATION)
        tensors = quantized_tensors(load_file(wide / "model.safetensors"))
        change(config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_a_quantised_folder_trains_as_the_folder_it_was_made_of(
    quantized, wide, conversations, tmp_path
):
    """The same losses and the same merged model, on two ranks; whose config says nothing of NF4."""
    flags = {"lora_rank": 4, "quantize": "nf4", "max_steps": 3}
    one = recipe(wide, conversations, tmp_path / "one") | flags
    other = recipe(quantized(), conversations, tmp_path / "other") | flags
    assert harmed(one, ranks=2) == harmed(other, ranks=2) == 0
    losses = [[r["loss"] for r in updates(tmp_path / name)] for name in ("one", "other")]
    assert losses[0] == losses[1]
    merged = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "other")]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    assert "quantization_config" not in json.loads((tmp_path / "other/config.json").read_text())


def test_logits_are_those_of_bitsandbytes_and_pefts_model(wide, tmp_path):
    """Of a folder that transformers has quantised, with adapters of PEFT's on it."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        wide, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=5, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    )
    model = adapted(tmp_path, quantize="nf4")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            theirs_name = "base_model.model." + name.replace(".weight", ".default.weight")
            parameter.data.copy_(theirs.get_parameter(theirs_name))
    ids = torch.randint(3, 361, (29,), generator=torch.Generator().manual_seed(0))
    expected = theirs.train()(ids[None]).logits[0]  # for inference, its CPU's products are bf16
    logits = model(ids, torch.zeros(29, dtype=torch.int32), torch.arange(29))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # fp32, in another order


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = Q + ".quant_state.bitsandbytes__nf4"


def with_state(**changes):
    def change(config, tensors):
        text = json.dumps(json.loads(bytes(tensors[STATE].tolist())) | changes)
        tensors[STATE] = torch.tensor(list(text.encode())).byte()

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t: c["quantization_config"].update(load_in_4bit=False), "load_in_4bit True"),
        (lambda c, t: c["quantization_config"].update(bnb_4bit_quant_type="fp4"), "quant_type nf4"),
        (lambda c, t: c.update(quantization_config={"quant_method": "gptq"}), "'gptq'"),
        (lambda c, t: t.pop(Q + ".absmax"), "q_proj.weight.absmax is missing"),
        (with_state(blocksize=128), "has blocksize 128, expected 64"),
        (with_state(shape=[64, 128]), "has shape [64, 128], expected [64, 64]"),
        (lambda c, t: t[Q + ".quant_map"].mul_(2), "quant_map has other levels than NF4's"),
        (
            lambda c, t: t.update({Q: t[Q][:-1]}),
            "is [2047, 1] of U8, expected 2048 numbers of U8",
        ),
        (lambda c, t: t.pop(STATE), "quant_state.bitsandbytes__nf4 is missing"),
        (lambda c, t: t.update({STATE: t[STATE].float()}), "quant_type None, expected nf4"),
        (with_state(nested_offset=None), "has nested_offset None, expected a number"),
        (with_state(nested_offset=float("inf")), "has nested_offset inf, expected a number"),
        (
            lambda c, t: t.update({Q + ".absmax": t[Q + ".absmax"].float()}),
            "is [64] of F32, expected 64 numbers of U8",
        ),
        (
            lambda c, t: t[Q + ".nested_absmax"].fill_(float("nan")),
            "nested_absmax holds values that are not finite",
        ),
        (
            lambda c, t: t.update({k.replace(".0.", ".2."): t[k] + 0 for k in list(t) if Q in k}),
            "model.layers.2.self_attn.q_proj.weight is unexpected",
        ),
    ],
    ids=[
        "8 bit", "fp4", "gptq", "absmax", "blocks", "shape", "map", "codes", "state", "no json",
        "no offset", "offset", "no double quantisation", "nan", "layer",
    ],
)  # fmt: skip
def test_other_quantisations_are_refused_by_name(
    quantized, conversations, tmp_path, change, message
):
    """Before anything is written."""
    flags = recipe(quantized(change), conversations, tmp_path / "out")
    with pytest.raises(InputError) as caught:
        sft.main(flags | {"lora_rank": 4, "quantize": "nf4"})
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_quantised_folder_is_refused_where_all_weights_would_be_trained(
    quantized, conversations, tmp_path
):
    """As before: by the field of its config.json."""
    with pytest.raises(InputError, match="quantization_config is .* only None is implemented"):
        sft.main(recipe(quantized(), conversations, tmp_path / "out"))
