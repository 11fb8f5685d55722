"""merge.py and adapter_folder.py: what a run saves, what PEFT makes of it, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapted import adapted
from adapters.merge import MergeConfig, merge
from harm import harmed, recipe
from program.errors import InputError
from program.ranks import start

ADAPTER = "adapter/adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(scope="module", params=[None, "nf4"], ids=str)
def trained(request, wide, conversations, tmp_path_factory):
    """A run's output folder and its flag --quantize: six updates that move every weight's bf16."""
    out = tmp_path_factory.mktemp("trained") / "out"
    flags = recipe(wide, conversations, out) | {"max_steps": 6, "lr": 0.02, "lora_rank": 4}
    assert harmed(flags | {"quantize": request.param}) == 0
    return out, request.param


@pytest.fixture
def merged(wide, tmp_path):
    """`merged(adapter, **flags)`: the folder of the merged model."""
    start()

    def make(adapter, **flags):
        merge(MergeConfig(**{"model": str(wide), "adapter": str(adapter), **flags}, out=str(out)))
        return out

    out = tmp_path / "merged"
    return make


def same_files(one, other):
    return [
        name
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
        if (one / name).read_bytes() != (other / name).read_bytes()
    ]


def test_merging_a_runs_adapter_gives_the_folder_that_the_run_saved(trained, merged):
    """Bit for bit: the run streams the same sums."""
    out, _ = trained
    assert same_files(merged(out / "adapter"), out) == []


def test_merged_weights_are_base_plus_product_rounded_once(trained, wide):
    """To half a unit of bf16, of the fp64 sum; added to a base in bf16, they would be a whole."""
    out, quantize = trained
    model = adapted(wide, quantize=quantize)  # B is zero: the base
    base, halves = load_file(wide / "model.safetensors"), load_file(out / ADAPTER)
    for name, weight in load_file(out / "model.safetensors").items():
        exact = base[name].double()
        module = model.get_submodule(name.rpartition(".")[0])
        if hasattr(module, "lora_A"):
            A, B = (halves[f"{PREFIX}{name[:-6]}lora_{half}.weight"].double() for half in "AB")
            W = module.merged_rows(0)
            exact = W.double() + 16 / 4 * B @ A
            assert not torch.equal(weight, W.bfloat16())
        # bf16 has 8 significant bits; fp32's own sum is some 1e-8 off.
        torch.testing.assert_close(weight.double(), exact, rtol=2**-8 * 1.001, atol=1e-7)


def test_peft_gives_the_adapter_folders_logits(trained, wide):
    """The folder loads, on the weights it was trained on; logits are those of the merged fp32."""
    peft = pytest.importorskip("peft")
    out, quantize = trained
    base = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    model = adapted(wide, quantize=quantize, lora_rank=4, lora_alpha=16.0)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            base.get_parameter(name + ".weight").data.copy_(module.merged_rows(0))
    for name, half in load_file(out / ADAPTER).items():
        model.get_parameter(name.removeprefix(PREFIX)).data.copy_(half)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter")
    ids = torch.randint(3, 361, (29,), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids[None]).logits[0]
    logits = model(ids, torch.zeros(29, dtype=torch.int32), torch.arange(29))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # fp32, in another order


def test_an_adapter_of_pefts_merges_to_its_own_models_logits(wide, merged, tmp_path):
    """Of another shape than ours: two of the seven projections, scale alpha / √R."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"], use_rslora=True,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(7)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "theirs")
    ids = torch.randint(3, 361, (29,))
    expected = model(ids[None]).logits[0]
    out = merged(tmp_path / "theirs")
    logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids[None]).logits[0]
    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)(ids[None]).logits[0]
    # bf16 keeps 8 bits of each weight: the logits move by far less than by the adapter.
    assert (logits - expected).norm() < 0.02 * expected.norm() < 0.2 * (plain - expected).norm()


@pytest.fixture
def refusal(trained, merged, tmp_path):
    """`refusal(change)`: the error once `change(config, tensors)` was done to an adapter."""

    def run(change, **flags):
        folder = tmp_path / "changed"
        shutil.copytree(trained[0] / "adapter", folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(InputError) as caught:
            merged(folder, **flags)
        assert not (tmp_path / "merged").exists()
        return str(caught.value)

    return run


FIRST = PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"
THIRD = FIRST.replace(".0.", ".2.")  # the base has two layers


def narrower(config, tensors):
    tensors[FIRST] = tensors[FIRST][:, :-1].contiguous()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c, t: c.update(use_dora=True), "use_dora is True, only False is implemented"),
        (lambda c, t: c.update(peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda c, t: c.update(bias="all"), "bias is 'all'"),
        (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda c, t: c.update(r="four"), "r is 'four'"),
        (lambda c, t: c.update(r=5), "an adapter of another base"),
        (narrower, r"are (4, 63) and (64, 4), expected (4, 64) and (64, 4)"),
        (lambda c, t: t.pop(FIRST), "expected a B for each of 13 A"),
        (lambda c, t: t.pop(FIRST.replace("_A", "_B")), "are (4, 64) and None"),
        (lambda c, t: t.update({THIRD: t[FIRST] + 1}), "which the base does not have"),
        (
            lambda c, t: t.update({PREFIX + "score.weight": t[FIRST] + 1}),
            "score.weight is unexpected",
        ),
        (lambda c, t: t[FIRST].fill_(float("nan")), "not finite"),
    ],
    ids=[
        "dora",
        "ia3",
        "bias",
        "pissa",
        "r",
        "rank",
        "width",
        "no A",
        "no B",
        "layer",
        "other",
        "nan",
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(refusal, change, message):
    """By name, with what was expected, and before anything is written."""
    assert message in refusal(change)


def test_an_adapter_of_another_base_is_refused(trained, base, wide, merged, tmp_path):
    """By the hash of the weights it was trained on, where its shapes fit; and a used --out."""
    other = tmp_path / "other"
    shutil.copytree(wide, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="an adapter of another base"):
        merged(trained[0] / "adapter", model=str(other))
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        merged(wide)
    assert not (tmp_path / "merged").exists()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes").touch()
    with pytest.raises(InputError, match="expected a new folder"):
        merged(trained[0] / "adapter")
