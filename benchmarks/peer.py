"""The step of bench.py step, as a user of transformers takes it: the yardstick beside ours.

The same documents, weights, precision and optimizer, with what transformers and PyTorch offer:
fp32 weights under bf16 autocast, flash attention, gradient checkpointing, every layer compiled, and
Liger's loss where it is installed. With the flash-attn package the documents are one packed row, as
ours. Without it PyTorch's flash attention takes no packed documents: then they are padded, sorted
by length, in batches of a quarter of the row's tokens: of 16,384 then 18 % are padding, of whole
ones 43 %. (Padding to the right needs no mask, which flash attention would not take either.)
"""

from importlib.util import find_spec

import torch

import sft
from training import update


def make_step(config, ids, labels, lengths, device, dtype, recompute, compile, fill):
    """A function that takes one training step and returns the loss; and what it is made of.

    ids, labels (T,): of a row of documents of these lengths. recompute: whether layers are
    checkpointed. fill(model): sets the weights.
    """
    import transformers

    liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # Its other kernels are left out: what torch.compile fuses includes them.
        apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False)
    packed = device.type == "cuda" and find_spec("flash_attn") is not None
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
    shape = transformers.LlamaConfig(
        **{name: getattr(config, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=max(lengths),
        attn_implementation="flash_attention_2" if packed else "sdpa",
    )
    with device:
        model = transformers.LlamaForCausalLM(shape).float().train()
    fill(model)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    batches = [one_row(ids, labels, lengths)] if packed else padded(ids, labels, lengths)
    optimizer = update.make_optimizer(model, sft.SFTConfig(lr=1e-5))

    def step():
        total = 0.0
        for batch in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                # num_items_in_batch: the batch's share of the mean over all tokens.
                loss = model(**batch, use_cache=False, num_items_in_batch=len(ids)).loss
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    positions = sum(batch["input_ids"].numel() for batch in batches)
    return step, {
        "transformers": transformers.__version__,
        "attention": "flash-attn, one packed row" if packed else "SDPA, padded batches",
        "batches": len(batches),
        "padding": 1 - len(ids) / positions,
        "liger_loss": liger,
        "checkpointing": bool(recompute),
        "compile": compile,
    }


def one_row(ids, labels, lengths):
    """All documents in one row, whose positions start again with each."""
    position_ids = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
    return {"input_ids": ids[None], "position_ids": position_ids[None], **targets(labels[None])}


def padded(ids, labels, lengths):
    """Batches of documents of like length, padded to the right, of a quarter of the tokens."""
    documents = sorted(zip(ids.split(lengths), labels.split(lengths), strict=True), key=by_length)
    batches, batch = [], []
    for document in documents:
        if batch and (len(batch) + 1) * len(document[0]) > len(ids) // 4:
            batches.append(batch)
            batch = []
        batch.append(document)
    batches.append(batch)
    pad = torch.nn.utils.rnn.pad_sequence
    return [
        {"input_ids": pad([ids for ids, _ in batch], batch_first=True)}
        | targets(pad([labels for _, labels in batch], batch_first=True, padding_value=-100))
        for batch in batches
    ]


def by_length(document):
    return len(document[0])


def targets(labels):
    """The loss's arguments: labels that stand already below the token that predicts them."""
    return {"labels": labels, "shift_labels": labels}
