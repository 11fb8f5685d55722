"""Models with adapters on a tiny base, ours and transformers', for the tests of adapters/."""

from types import SimpleNamespace

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from adapters.lora import put_in
from checkpoint.config import read_config
from checkpoint.weights import load_hf
from kernels import nf4
from model import Llama


def adapted(folder, stir=False, **flags):
    """A model of ours with adapters (rank 5, alpha 7, no dropout; or as `flags` say), loaded.

    stir: B is not zero.
    """
    values = dict(lora_rank=5, lora_alpha=7.0, lora_dropout=0.0, quantize=None, seed=3)
    config = SimpleNamespace(**(values | {"dtype": "float32"} | flags))
    with torch.device("meta"):
        model = Llama(read_config(folder, quantized=bool(config.quantize)))
    model.adapters_dropout = put_in(model, config)
    model.to_empty(device="cpu")
    load_hf(model, folder)
    if stir:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=0.05, generator=generator)
    return model


class Reference:
    """transformers' Llama whose projections are W + scale · B A; gradients reach A and B alone.

    adapted: a model of ours, whose A and B are copied; quantize: W is decoded from NF4, in torch.
    """

    def __init__(self, folder, adapted, scale, quantize=None):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.scale, self.halves = scale, {}
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                self.halves[name] = parameter.detach().clone().float().requires_grad_()
        self.frozen = {}
        for name in {name.split(".lora_")[0] for name in self.halves}:
            weight = self.model.get_parameter(name + ".weight").detach()
            if quantize:
                weight = nf4.dequantize_reference(nf4.quantize(weight), torch.float32)
            self.frozen[name] = weight

    def merged(self):
        """`{name of a weight: W + scale · B A}`, fp32."""
        return {
            f"{name}.weight": weight
            + self.scale
            * (self.halves[f"{name}.lora_B.weight"] @ self.halves[f"{name}.lora_A.weight"])
            for name, weight in self.frozen.items()
        }

    def logits(self, ids):
        """(T, V) of one document, ids (T,)."""
        return functional_call(self.model, self.merged(), args=(ids[None],)).logits[0]
