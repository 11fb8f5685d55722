"""Choose the part of a data set that serves some queries best.

    python prune.py --model DIR --data MIXTURE --queries FILE --keep 10000 --out FILE.jsonl
    torchrun --nproc_per_node 8 prune.py …                  each GPU scores a share of the data
    python prune.py --make-queries mmlu gsm8k bbh --eval-data DIR --out queries.jsonl

FILE.jsonl gets the conversations that are kept, as they stand in the data and in its order;
FILE.scores.jsonl a line for every one, kept or not: `record`, its line from 1, `dataset`, `id`, its
best `score`, the `query` that gives it, from 1, `tokens` and `kept`. Scores stay in a folder beside
them: the same command goes on after an interruption, and another --keep or --select is free.

    rds          cosine of the mean hidden state to each query's (selection/embeddings.py)
    less         what a step on it would do to each query's loss (selection/influence.py)
    perplexity   the answers that surprise the model most
    ifd          those that the prompt helps least, of those that it helps
    length       the longest answers
    balanced     as many of each source (`dataset`), drawn at random
    random       drawn at random

Of rds and less, --select says how queries share what is kept: `queries`, each in turn takes its
best (the default for queries of one task); `tasks`, each task in turn (for several); `global`, the
best score of all. Ties are broken by the order of the data. With millions of conversations a random
choice is hard to beat (arXiv 2410.09335); compare with `balanced` before you believe a score.
"""

from program import threads  # noqa: F401, before torch

# isort: split
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from checkpoint.config import read_config
from checkpoint.weights import find_tensors, load_hf, weights_key
from data import best_fit_decreasing
from model import Llama, LlamaConfig
from program.errors import InputError, RunError, amount, reported
from program.flags import check_bounds, parse_args
from program.ranks import leave, start
from selection import candidates, choose, embeddings, influence, report
from selection.cost import scoring_flops
from selection.influence import LessFlags
from selection.queries import write_queries
from selection.scores import fill, held, missing, open_scores
from tokens.documents import Documents, check_micro_tokens
from tokens.readers import data_files
from tokens.records import encode_conversation
from tokens.report import print_lengths
from tokens.tokenizer import Tokenizer

BY_QUERIES = ("rds", "less")
BY_MODEL = (*BY_QUERIES, "perplexity", "ifd")
METHODS = (*BY_MODEL, "length", "balanced", "random")
FORMAT = 1  # of the scores; a new number computes all again
LESS_GROUP = 64  # conversations whose scores by less are saved together


@dataclass(frozen=True)
class PruneConfig(LessFlags):
    """The flags of prune.py; max_seq_len is the papers'."""

    model: str | None = None  # Hugging Face folder of the Llama that reads the data
    data: list[str] | None = None  # conversations, as for sft.py
    queries: list[str] | None = None  # conversations or pairs of what the model should be good at
    keep: int = 10_000  # conversations to keep
    out: str | None = None  # a .jsonl for them; FILE.scores.jsonl beside it
    method: str = "rds"  # rds, less, perplexity, ifd, length, balanced or random
    select: str | None = None  # tasks, queries or global (default: by the number of tasks)
    drop_duplicates: bool = False  # of equal conversations keep at most the first
    compare: list[str] | None = None  # other FILE.scores.jsonl: say how many rows they share
    max_seq_len: int = 2048  # tokens; a longer conversation is cut on the right
    micro_tokens: int = 16384  # most tokens in one forward pass of one rank
    seed: int = 42  # of random choices, and of less
    dtype: str | None = None  # bfloat16 or float32 (default: bfloat16 on a GPU)
    make_queries: list[str] | None = None  # write the examples of mmlu, gsm8k, bbh, tydiqa to --out
    eval_data: str | None = None  # with it: the folder of the tasks' folders, as for evaluate.py


def main(flags: dict) -> None:
    rank, _, device = start()
    config = with_defaults(PruneConfig(**flags), device)
    out = Path(config.out)
    if config.make_queries:
        if rank == 0:
            count = write_queries(out, config.make_queries, config.eval_data)
            print(
                f"{out}: {count:,} queries, from the examples of {', '.join(config.make_queries)}"
            )
        return
    model_config, tokenizer = read_config(config.model), Tokenizer(config.model)
    tokenizer.check_fits(model_config.vocab_size)
    if config.method == "less":
        config = influence.with_rank(config, model_config)
    documents = documents_of(config.data, config, encode_conversation)
    queries = None
    if config.method in BY_QUERIES:
        queries = documents_of(config.queries, config, candidates.encode_query)
        if queries.skipped:
            raise InputError(
                f"{queries.paths[0]}: queries without an answer in their first "
                f"{config.max_seq_len} tokens (--max-seq-len): {queries.skipped}, expected none"
            )
    if rank == 0:
        print(documents.summary())
        sources, ids, original = candidates.describe(documents)
        first = original == np.arange(len(documents))
        copies = amount(int((~first).sum()), "exact duplicates")
        print(f"{copies} of another conversation{', left out' * config.drop_duplicates}")
        allowed = first | (not config.drop_duplicates)
        if allowed.sum() < config.keep:
            raise InputError(
                f"--keep is {config.keep}, expected at most {allowed.sum()}, the conversations"
            )
        others = report.read_choices(config.compare or [], len(documents))
        out.parent.mkdir(parents=True, exist_ok=True)
    with held(out):
        scores = scores_of(config, model_config, documents, queries, device)
        if rank == 0:
            chosen = choice(config, scores, queries, sources, allowed)
            best, query = choose.best_queries(scores)
            query = None if queries is None else query
            candidates.write_scores(scores_path(out), documents, sources, ids, best, query, chosen)
            candidates.write_kept(out, documents, chosen)
            report.print_sources(sources, documents.tokens, chosen)
            print("of what is kept, ", end="")
            print_lengths(documents.tokens[chosen])
            if config.method in BY_MODEL:
                report.print_extremes(tokenizer, documents, queries, best, query, allowed)
            report.print_shared(others, chosen)
            print(f"{out}: what is kept; {scores_path(out)}: every score")


def with_defaults(config: PruneConfig, device: torch.device) -> PruneConfig:
    """The config with its defaults filled in. Raises `InputError` for a bad value of a flag."""
    check_bounds(config)
    out = Path(config.out or "")
    if out.suffix != ".jsonl" or out.is_dir():
        raise InputError(f"--out is {config.out}, expected a file whose name ends in .jsonl")
    if config.make_queries:
        if out.exists():
            raise InputError(f"--out {out}: exists, expected a new file")
        return config
    for name in ("model", "data", *(["queries"] if config.method in BY_QUERIES else [])):
        if getattr(config, name) is None:
            raise InputError(f"found no --{name}, expected one with --method {config.method}")
    if config.method not in METHODS:
        raise InputError(f"--method is {config.method}, expected one of {', '.join(METHODS)}")
    if config.select not in (None, *choose.SELECTIONS):
        expected = ", ".join(choose.SELECTIONS)
        raise InputError(f"--select is {config.select}, expected one of {expected}")
    for path in map(Path, [*config.data, *(config.queries or [])]):
        read = {file.resolve() for file in data_files([path])}
        folders = {file.parent for file in read} if path.is_dir() else set()
        if {out.resolve(), scores_path(out).resolve()} & read or out.resolve().parent in folders:
            raise InputError(f"--out {out}: among --data or --queries, expected another place")
    report.check_ours(out, scores_path(out))
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return dataclasses.replace(config, dtype=dtype)


def documents_of(paths: list[str], config: PruneConfig, encode: Callable) -> Documents:
    documents = Documents(paths, config.model, config.max_seq_len, encode, Path(config.out).parent)
    check_micro_tokens(documents, config.micro_tokens)
    return documents


def scores_path(out: Path) -> Path:
    return out.with_name(f"{out.stem}.scores.jsonl")


def choice(config: PruneConfig, scores: np.ndarray, queries: Documents | None, sources: list[str],
           allowed: np.ndarray) -> np.ndarray:  # fmt: skip
    """The candidates to keep, in the order of the data."""
    if config.method in BY_QUERIES:
        tasks = candidates.tasks_of(queries)
        select = config.select or ("tasks" if len(set(tasks)) > 1 else "queries")
        number = amount(len(set(tasks)), "tasks")
        print(f"what is kept serves {len(tasks)} queries of {number} by --select {select}")
        mean = config.method == "less"
        chosen = choose.by_queries(scores, tasks, allowed, config.keep, select, mean)
    elif config.method == "balanced":
        chosen = choose.by_source(scores[0], sources, allowed, config.keep)
    else:
        row = np.array(scores[0])
        if config.method == "ifd":  # where the prompt does harm, it is not the answer's: last
            row = np.where(row < 1, row, -row)
        chosen = choose.ranking(row, allowed, config.keep)
    return np.sort(chosen)


# ---- Scores


def scores_of(config: PruneConfig, model_config: LlamaConfig, documents: Documents,
              queries: Documents | None, device: torch.device) -> np.ndarray:  # fmt: skip
    """Scores (queries, candidates) fp32 by the method; one row where there are no queries.

    What a model computes is kept in a folder beside --out, whose name has a hash of all that it
    depends on.
    """
    if config.method not in BY_MODEL:
        draws = np.random.default_rng(config.seed).random(len(documents))
        lengths = documents.trained_counts[:, 0]
        return (lengths if config.method == "length" else draws)[None].astype(np.float32)
    with torch.device("meta"):
        model = Llama(model_config).to(getattr(torch, config.dtype))
    find_tensors(model, config.model)
    folder = scores_folder(config, documents, queries, device)
    with held(folder):  # by runs to another --out, too
        scores = open_scores(folder / "scores", (len(queries) if queries else 1, len(documents)))
        unfinished = missing(scores).any()
        dist.barrier()
        if unfinished:
            lengths, trained = documents.lengths[:, 0], documents.trained_counts.sum()
            flops = scoring_flops(model_config, config.method, lengths, trained, config)
            if dist.get_rank() == 0:
                print(f"{config.method}: {flops:.1e} FLOP for all conversations")
            compute = less if config.method == "less" else score_rows
            compute(scores, model, documents, queries, config, folder, device)
    if bad := np.flatnonzero(missing(scores)).tolist():
        raise RunError(f"no finite score for {', '.join(documents.names(bad[:5]))}")
    return scores


def scores_folder(config: PruneConfig, documents: Documents, queries: Documents | None,
                  device: torch.device) -> Path:  # fmt: skip
    names = ["method", "max_seq_len", "dtype"]
    if config.method == "less":
        names += ["seed", *(field.name for field in dataclasses.fields(LessFlags))]
    facts = {name: getattr(config, name) for name in names} | {"format": FORMAT}
    facts |= {"weights": weights_key(config.model), "device": device.type, "data": documents.key}
    facts |= {"queries": queries.key if queries else None}
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Path(config.out).parent / f"scores-{config.method}-{key}"


def load(model: Llama, config: PruneConfig, device: torch.device) -> None:
    """Give a model that is on the meta device its memory and weights."""
    model.to_empty(device=device)
    load_hf(model, config.model)


def score_rows(scores: np.ndarray, model: Llama, documents: Documents, queries: Documents | None,
               config: PruneConfig, folder: Path, device: torch.device) -> None:  # fmt: skip
    """Fill scores by one forward pass of packed rows: rds, perplexity and ifd."""
    load(model, config, device)
    longest_first = np.argsort(-documents.tokens, kind="stable").tolist()
    rows = best_fit_decreasing(documents.tokens, longest_first, config.micro_tokens)
    if config.method == "rds":
        longest = np.argsort(-queries.tokens, kind="stable").tolist()
        asked = torch.empty(len(queries), model.config.hidden_size, device=device)
        for row in best_fit_decreasing(queries.tokens, longest, config.micro_tokens):
            asked[row] = embeddings.embeddings(model, queries.sequences(row), device)

    def score(row):
        sequences = documents.sequences(row)
        if config.method == "rds":
            own = embeddings.embeddings(model, sequences, device)
            return (asked @ own.T).cpu().numpy()
        return getattr(embeddings, config.method)(model, sequences, device)[None].cpu().numpy()

    fill(scores, rows, documents.tokens, score, config.method)


def less(scores: np.ndarray, model: Llama, documents: Documents, queries: Documents,
         config: PruneConfig, folder: Path, device: torch.device) -> None:  # fmt: skip
    """Fill scores by (2) of selection/influence.py, checkpoint after checkpoint."""
    dropout = influence.put_adapters(model, config)
    load(model, config, device)
    influence.warm_up(model, dropout, documents, config, folder, device)
    longest_first = np.argsort(-documents.tokens, kind="stable").tolist()
    groups = [longest_first[k : k + LESS_GROUP] for k in range(0, len(longest_first), LESS_GROUP)]
    rates, parts = [], []
    for number, path in enumerate(influence.checkpoints(folder, config), 1):
        parts.append(open_scores(folder / f"scores-{number}", scores.shape))
        rate, score = influence.scorer(model, queries, config, path, device)
        rates.append(rate)
        what = f"less, checkpoint {number} of {config.warmup_epochs}"
        fill(parts[-1], groups, documents.tokens,
             lambda group, score=score: score(documents.sequences(group)), what)  # fmt: skip
    if dist.get_rank() == 0:
        for q in range(len(scores)):
            scores[q] = sum(r / sum(rates) * p[q] for r, p in zip(rates, parts, strict=True))
        scores.flush()
        influence.tidy(folder)
    dist.barrier()


if __name__ == "__main__":
    with reported():
        main(parse_args(PruneConfig))
        leave()
