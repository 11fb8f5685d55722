"""Conversations, and preference pairs with their log-probabilities."""

import json

import numpy as np
import torch

from checkpoint.config import read_config
from checkpoint.weights import load_hf
from model import Llama
from program.ranks import start
from training.flags import RunFlags
from training.parallel import shard


def message(role, content):
    return {"role": role, "content": content}


def chat(*contents, **more):
    """A conversation of a user and an assistant in turn."""
    roles = ("user", "assistant")
    return more | {"messages": [message(roles[k % 2], c) for k, c in enumerate(contents)]}


def pair(prompt, chosen, rejected, **more):
    """A record of UltraFeedback's schema, with prompt a list of messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    return {side: [*prompt, message("assistant", answer)] for side, answer in sides.items()} | more


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def loaded(folder):
    """Our model with a folder's weights, as the loop has it (one rank), and the device."""
    _, _, device = start()
    with torch.device("meta"):
        model = Llama(read_config(folder))
    shard(model, RunFlags(dtype="float32"), device)
    load_hf(model, folder)
    return model, device


def their_logps(model, documents, pairs):
    """(n, 2) from transformers' logits, one document at a time, differentiable."""
    rows = []
    for i in pairs:
        row = []
        for ids, trained in documents[i]:
            ids = torch.tensor(np.array(ids)).long()
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
            picked = logps.gather(1, ids[1:, None])[:, 0]
            row.append(picked[torch.tensor(np.array(trained))[1:]].sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)
