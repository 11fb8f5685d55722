"""Command-line flags: a frozen dataclass becomes a parser, its comments the help.

Every script states its flags as one dataclass; this file parses, checks and compares them.
"""

import argparse
import dataclasses
import inspect
import math
import os
import re
import types
import typing

from program.errors import InputError

# Smallest and largest value of a flag.
BOUNDS = {
    "epochs": (1, math.inf),
    "batch_size": (1, math.inf),
    "max_seq_len": (2, math.inf),
    "lr": (0, math.inf),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "beta1": (0, 1),
    "beta2": (0, 1),
    "clip": (0, math.inf),
    "beta": (0, math.inf),
    "micro_tokens": (2, math.inf),
    "max_steps": (0, math.inf),
    "save_every": (0, math.inf),
    "keep": (1, math.inf),
    "eval_share": (0, 1),
    "eval_every": (0, math.inf),
    "keep_exports": (0, math.inf),
    "recompute": (0, math.inf),
    "replicas": (1, math.inf),
    "seed": (0, 2**63),
    "lora_rank": (0, math.inf),
    "lora_alpha": (0, math.inf),
    "lora_dropout": (0, 1),
    "projection": (1, math.inf),
    "warmup_share": (0, 1),
    "warmup_epochs": (1, math.inf),
    "warmup_lr": (0, math.inf),
    "show": (0, math.inf),
    "slots": (1, math.inf),
    "context": (0, math.inf),
    "mmlu_shots": (0, 5),
    "temperature": (0, math.inf),
    "top_p": (0, 1),
    "max_new_tokens": (1, math.inf),
    "gpus": (1, math.inf),
    "price": (0, math.inf),
}
# Bounds that are not allowed.
EXCLUDED = {"lr": 0, "beta": 0, "beta1": 1, "beta2": 1, "eval_share": 1, "top_p": 0}
EXCLUDED |= {"lora_alpha": 0, "lora_dropout": 1, "warmup_share": 0, "warmup_lr": 0}

# What a flag that is a word may say.
WORDS = {"dtype": ("bfloat16", "float32"), "too_long": ("cut", "drop", "error")}

# Flags that say how a run is carried out: it may be continued with other values. (The model is
# compared by its real path; the data, with what `too_long` and `eval_share` leave of them, by their
# content.)
MAY_CHANGE_ON_RESUME = {
    "model",
    "data",
    "out",
    "micro_tokens",
    "max_steps",
    "save_every",
    "keep",
    "keep_checkpoints",
    "recompute",
    "replicas",
    "compile",
    "too_long",
    "eval_data",
    "eval_share",
    "eval_every",
    "export_every",
    "keep_exports",
    "export_merged",
    "tensorboard",
    "wandb",
}

MAY_BE_EMPTY = {"prompt", "system"}  # texts

# What --help calls the values of a list that does not hold paths.
METAVARS = {"tasks": "TASK", "stop": "TEXT", "sources": "NAME", "make_queries": "TASK"}


def parse_args(config_class: type, argv: list[str] | None = None) -> dict:
    """The flags on the command line, as a dict. Raises `InputError` for an unknown or bad flag.

    Every field of the dataclass is a flag, and the comment behind the field is the flag's help.
    What the dataclass inherits is a group of its own in --help, under the class's docstring.
    """
    source = "".join(map(inspect.getsource, config_class.__mro__[:-1]))  # what it inherits, too
    comments = dict(re.findall(r"^ +(\w+):.*?# (.+)$", source, re.M))
    parser = argparse.ArgumentParser(
        description=inspect.getmodule(config_class).__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def refuse(message):
        raise InputError(f"{message} (--help lists the flags)")

    parser.error = refuse
    own, groups = config_class.__annotations__, {}
    for kin in config_class.__mro__[1:-1]:
        title, _, description = inspect.getdoc(kin).partition("\n")
        group = parser.add_argument_group(title.rstrip("."), description.strip())
        groups |= dict.fromkeys(kin.__annotations__, group)
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own):
        kind = field.type
        if isinstance(kind, types.UnionType):  # `int | None`: the default depends on something
            kind = typing.get_args(kind)[0]
        options = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is list:
            options = {
                "nargs": "+",
                "action": "extend",  # `--data a b` and `--data a --data b` are the same
                "metavar": METAVARS.get(field.name, "PATH"),
            }
        default = "" if field.default is None else f" (default: {field.default})"
        help = f"{comments[field.name]}{default}".replace("%", "%%")
        group = groups.get(field.name, parser)
        group.add_argument("--" + field.name.replace("_", "-"), help=help, **options)
    flags = vars(parser.parse_args(argv))
    for name, value in flags.items():
        # [] is argparse's reading of `--epochs=--`. "" is what a shell makes of a variable that is
        # not set, and as a path it would be the current folder.
        values = value if isinstance(value, list) else [value]
        if not values or ("" in values and name not in MAY_BE_EMPTY):
            refuse(f"--{name.replace('_', '-')}: expected a value")
    return flags


def check_flags(config) -> None:
    """Raise `InputError` for a flag of sft.py or dpo.py with a bad value."""
    check_bounds(config)
    if (config.model is None) != (config.data is None):
        raise InputError("--model and --data go together (with neither, the demo runs)")
    if config.eval_data and config.eval_share:
        raise InputError("--eval-data and --eval-share are both given, expected one of them")
    if config.eval_every and not (config.eval_data or config.eval_share):
        raise InputError("--eval-every needs held-out data: --eval-data or --eval-share")
    if config.keep_exports and not config.export_every:
        raise InputError("--keep-exports needs --export-every")
    every = str(config.export_every or "epoch")
    if every != "epoch" and not (every.isdecimal() and 0 < int(every) < 1 << 63):
        raise InputError(f"--export-every is {every}, expected an integer from 1 up, or epoch")


def check_bounds(config) -> None:
    """Raise `InputError` for a flag of any script outside its `BOUNDS` or `WORDS`."""
    for name, value in dataclasses.asdict(config).items():
        if name in WORDS and value not in (None, *WORDS[name]):
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {value}, expected {' or '.join(WORDS[name])}")
        if name not in BOUNDS or value is None:  # None: what the device decides
            continue
        low, high = BOUNDS[name]
        too_large = value >= (1 << 63 if isinstance(value, int) else math.inf)  # int64, or inf
        if not low <= value <= high or too_large or value == EXCLUDED.get(name):
            kind = "an integer" if isinstance(value, int) else "a number"
            expected = f"{kind} from {low} " + ("up" if high == math.inf else f"to {high}")
            if name in EXCLUDED:
                expected += f", {EXCLUDED[name]} excluded"
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


def resolve(config, device) -> typing.Any:
    """The config, with its device-dependent defaults filled in.

    A GPU's `recompute` stays None: training/layout.py knows, once model and data are known.
    """
    gpu = device.type == "cuda"
    defaults = {"dtype": "bfloat16" if gpu else "float32", "compile": gpu}
    defaults["recompute"] = None if gpu else 0
    missing = {name: v for name, v in defaults.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def run_facts(config) -> dict:
    """The flags that decide what a run computes: what tells it from another run."""
    facts = dataclasses.asdict(config)
    facts = {name: value for name, value in facts.items() if name not in MAY_CHANGE_ON_RESUME}
    return {"program": type(config).__name__, "model": os.path.realpath(config.model), **facts}
