"""Whatever a user hands in by mistake: one line that says where and what, and nothing is written.

Most cases call `sft.main` in this process and look at the error it raises; a few start the program,
since what turns that error into a line and an exit status is `errors.reported`.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import run_folder
import sft
from errors import InputError
from training import parse_args

SFT = Path(sft.__file__)


@pytest.fixture
def model(base, tmp_path):
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def refused(base, conversations, tmp_path):
    """`refused(flag=value, …)`: the error of a run on good input but for these flags.

    Checks that it is one line, and that nothing has appeared where the run would write.
    """

    def run(**flags):
        out = tmp_path / "out"
        flags = {"model": str(base), "data": [str(conversations)], "out": str(out)} | flags
        before = listing(tmp_path)
        with pytest.raises(InputError) as caught:
            sft.main(flags)
        if Path(flags["out"]) == out:
            assert not out.exists()
        assert listing(tmp_path) == before, "a refused run wrote something"
        return str(caught.value)

    return run


def listing(folder):
    """Every file and folder below, but for token caches: those may stay, they are whole."""
    return sorted(p for p in folder.rglob("*") if ".tokens-" not in str(p) or p.suffix == ".lock")


def records(*messages):
    return "".join(json.dumps({"messages": m}) + "\n" for m in messages)


GOOD = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
USER = [{"role": "user", "content": "one"}]

# ---- Data


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("x.jsonl", b"", "x.jsonl: no records in it, expected conversations"),
        ("x.jsonl", b"\n \n\r\n", "x.jsonl: no records in it"),
        ("x.jsonl.gz", b"", "x.jsonl.gz: no records in it"),
        ("x.json", b"[]", "x.json: no records in it"),
        ("x.jsonl", records(GOOD, GOOD).encode() + b'{"messages": [\n', "x.jsonl:3: not JSON"),
        ("x.jsonl", records(GOOD).encode() + b'\n\n{"a": "\xff"}\n', "x.jsonl:4: not UTF-8 (byte"),
        ("x.jsonl", "\ufeff{}".encode("utf-16"), "x.jsonl:1: not UTF-8 (byte 0xff at 0)"),
        ("x.jsonl", gzip.compress(b"{}"), "x.jsonl:1: not UTF-8"),
        ("x.jsonl", bytes(range(256)) * 9, "x.jsonl:1: not"),
        ("x.jsonl", b"\0" * 5000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"[" * 100_000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"1" * 5000, "x.jsonl:1: not JSON"),
        ("x.jsonl", b"[]", "x.jsonl:1: found a JSON list, expected an object"),
        ("x.jsonl", b'"text"', "x.jsonl:1: found a JSON str, expected an object"),
        ("x.jsonl", json.dumps([{"messages": GOOD}], indent=1).encode(), "x.jsonl:1: not JSON"),
        ("x.jsonl", b"{}", "x.jsonl:1: messages is nothing, expected a list of messages"),
        ("x.jsonl", b'{"messages": []}', "x.jsonl:1: messages is [], expected a list"),
        ("x.jsonl", b'{"messages": "hi"}', 'x.jsonl:1: messages is "hi", expected a list'),
        ("x.jsonl", b'{"messages": {"a": 1}}', 'x.jsonl:1: messages is {"a": 1}, expected a list'),
        ("x.jsonl", b'{"messages": ["hi"]}', 'x.jsonl:1: messages[0] is "hi", expected an object'),
        (
            "x.jsonl",
            records(GOOD, [{"role": "human", "content": "hi"}]).encode(),
            'x.jsonl:2: messages[0].role is "human", expected one of system, user, assistant',
        ),
        ("x.jsonl", records([{"content": "hi"}]).encode(), "x.jsonl:1: messages[0].role is null"),
        ("x.jsonl", records([{"role": ["user"]}]).encode(), 'messages[0].role is ["user"]'),
        (
            "x.jsonl",
            records(GOOD, [*USER, {"role": "assistant", "content": None}]).encode(),
            "x.jsonl:2: messages[1].content is null, expected a string",
        ),
        (
            "x.jsonl",
            records([{"role": "user", "content": [{"type": "text"}]}]).encode(),
            'x.jsonl:1: messages[0].content is [{"type": "text"}], expected a string',
        ),
        (
            "x.jsonl",
            b'{"messages": [{"role": "user", "content": "a\\ud800b"}]}',
            "x.jsonl:1: messages[0].content holds the lone surrogate '\\ud800' at character 1",
        ),
        ("x.jsonl", records(USER, USER).encode(), "none of the 2 conversations has a trained"),
        ("x.jsonl.gz", records(GOOD).encode(), "x.jsonl.gz:1: not a whole gzip file"),
        (
            "x.jsonl.gz",
            gzip.compress(records(*[GOOD] * 99).encode())[:-20],
            "not a whole gzip file",
        ),
        ("x.json", b'{"messages": []}', "x.json:1: expected [, found {; expected one JSON list"),
        ("x.json", records(GOOD, GOOD).encode(), "x.json:1: expected [, found {"),
        ("x.json", b"\xff\xfe", "x.json:1: 'utf-8' codec"),
        ("x.json", b"[" * 100_000, "x.json:1: expected {, found ["),
        ("x.json", b"[1]", "x.json:1: expected {, found 1"),
        ("x.parquet", b"PAR1 nonsense", "x.parquet: not a readable parquet file"),
        ("x.parquet", b"", "x.parquet: not a readable parquet file"),
        ("x.txt", b"hello", "x.txt: unknown kind of file, expected .jsonl, .jsonl.gz, .json, .par"),
        ("x.csv", b"a,b", "x.csv: unknown kind of file"),
    ],
)
def test_bad_data_file(refused, tmp_path, name, content, expected):
    """A file of the wrong kind or content is refused by name, and by line where there is one."""
    (tmp_path / name).write_bytes(content)
    assert expected in refused(data=[str(tmp_path / name)])


@pytest.mark.parametrize("depth", [200, 600, 900, 3000])
def test_deeply_nested_messages(refused, tmp_path, depth):
    """Nesting that JSON's reader takes, and printing it may not, is refused like other nonsense."""
    (tmp_path / "x.jsonl").write_text(
        '{"messages": [' + '{"role": "user", "content": ' + "[" * depth + "]" * depth + "}]}"
    )
    assert "x.jsonl:1: " in refused(data=[str(tmp_path / "x.jsonl")])


def test_missing_data(refused, tmp_path):
    """A path that does not exist, or a folder without data, is named."""
    (tmp_path / "empty").mkdir()
    assert "no/such.jsonl: no such file or folder" in refused(data=["no/such.jsonl"])
    assert "~/such.jsonl: no such file or folder" in refused(data=["~/such.jsonl"])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "link.jsonl: no such file" in refused(data=[str(tmp_path / "link.jsonl")])
    expected = "empty: no .jsonl, .jsonl.gz, .json, .parquet file in this folder"
    assert expected in refused(data=[str(tmp_path / "empty")])


def test_token_cache_as_data(refused, base, tmp_path):
    """Pointing --data at a token cache is refused, not trained on."""
    path = tmp_path / "x.jsonl"
    path.write_text(records(GOOD))
    data.Documents([path], base, 100, data.encode_conversation)
    (cache,) = tmp_path.glob("*.tokens-*")
    assert f"{cache}" in refused(data=[str(cache)])


def test_error_in_the_second_file(refused, conversations, tmp_path):
    """The error names the file it is in, not the first one."""
    (tmp_path / "x.jsonl").write_text(records(GOOD) + "{\n")
    assert "x.jsonl:2: " in refused(data=[str(conversations), str(tmp_path / "x.jsonl")])


def test_error_in_a_large_file(refused, tmp_path):
    """Workers of a file large enough for several processes report the line, and once."""
    path, size = tmp_path / "x.jsonl", 5 << 20
    line = records([{"role": "user", "content": "one " * 5000}, GOOD[1]])
    path.write_text(line * (size // len(line)) + "{broken\n" + line * 3)
    assert f"x.jsonl:{size // len(line) + 1}: not JSON" in refused(data=[str(path)])


def test_parquet(refused, base, tmp_path, monkeypatch):
    """Parquet: without pyarrow, without messages, of other types, damaged in the middle."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"

    def write(**columns):
        parquet.write_table(pyarrow.table(columns), path)
        return str(path)

    assert "x.parquet:1: messages is nothing" in refused(data=[write(text=["a"])])
    assert "x.parquet:1: messages is" in refused(data=[write(messages=[b"bytes"])])
    content = [[{"role": "user", "content": b"bytes"}]]
    assert "x.parquet:1: messages[0].content is" in refused(data=[write(messages=content)])
    assert "x.parquet: no records" in refused(data=[write(messages=pyarrow.array([], "string"))])

    write(messages=[GOOD] * 2000, id=[os.urandom(20).hex() for _ in range(2000)])
    assert len(data.Documents([path], base, 100, data.encode_conversation)) == 2000
    content = bytearray(path.read_bytes())
    content[2000:4000] = os.urandom(2000)
    path.write_bytes(content)
    assert "x.parquet: not a readable parquet file" in refused(data=[str(path)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "x.parquet: reading parquet needs pyarrow: pip install" in refused(data=[str(path)])


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + records(GOOD, GOOD),
        records(GOOD, GOOD).replace("\n", "\r\n"),
        "\n\n" + records(GOOD, GOOD)[:-1],
        records([GOOD[0], {"role": "assistant", "content": ""}], GOOD),
        records(GOOD, GOOD).replace('"messages"', '"score": NaN, "messages"'),
        records([GOOD[0] | {"name": 5}, GOOD[1] | {"tool": None}], GOOD),
        records([{"role": "user", "content": "x" * 1_000_000}, GOOD[1]], GOOD, GOOD),
    ],
    ids=["BOM", "CRLF", "blank lines", "empty answer", "NaN", "extra fields", "huge line"],
)
def test_unusual_but_right(base, tmp_path, content):
    """What looks odd and is not wrong is read."""
    path = tmp_path / "x.jsonl"
    path.write_text(content, newline="")
    assert len(data.Documents([path], base, 8192, data.encode_conversation)) == 2


def test_a_path_given_twice_counts_twice(base, conversations):
    """Naming a file twice is how one gives it more weight."""
    documents = data.Documents([conversations] * 2, base, 8192, data.encode_conversation)
    assert len(documents) == 48


# ---- Model folder


def change_config(**fields):
    def change(folder):
        values = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(values))

    return change


def change_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def write(name, content):
    """Put another content into a file, or none there (None)."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def shards(weight_map):
    """An index with this weight map instead of the one file."""

    def change(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        index = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)

    return change


def cut_short(name, size):
    return lambda folder: os.truncate(folder / name, size)


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")


NORM = "model.norm.weight"
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "breakage, expected",
    [
        (write("config.json", None), "config.json: no such file, expected a Hugging Face Llama"),
        (write("config.json", b"{"), "config.json: not JSON"),
        (write("config.json", b"\xff"), "config.json: not JSON"),
        (write("config.json", b"[1]"), "config.json: found a JSON list, expected an object"),
        (change_config(model_type="mistral"), "config.json: model_type is 'mistral', only 'llama'"),
        (change_config(model_type=None), "config.json: model_type is None, only 'llama'"),
        (change_config(hidden_act="gelu"), "hidden_act is 'gelu', only 'silu' is implemented"),
        (change_config(attention_bias=True), "attention_bias is True, only False"),
        (change_config(mlp_bias=True), "mlp_bias is True, only False"),
        (change_config(attention_dropout=0.1), "attention_dropout is 0.1, only 0"),
        (change_config(quantization_config={"bits": 4}), "quantization_config is {'bits': 4}"),
        (change_config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is 'linear'"),
        (change_config(rope_scaling=LINEAR), "rope_scaling is 'linear', only 'default'"),
        (change_config(rope_scaling={"factor": 2.0}), "rope_scaling is '?', only 'default'"),
        (change_config(rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
        (change_config(rope_parameters=LINEAR), "rope_parameters.rope_type is 'linear'"),
        (change_config(rope_parameters=[1]), "rope_parameters is [1], expected an object"),
        (change_config(rope_parameters={"rope_theta": "x"}), "rope_theta is 'x', expected a pos"),
        (change_config(hidden_size="32"), "hidden_size is '32', expected a positive integer"),
        (change_config(hidden_size=32.0), "hidden_size is 32.0, expected a positive integer"),
        (change_config(hidden_size=None), "hidden_size is None, expected a positive integer"),
        (change_config(vocab_size=-1), "vocab_size is -1, expected a positive integer"),
        (change_config(num_hidden_layers=True), "num_hidden_layers is True, expected a positive"),
        (change_config(rms_norm_eps=float("nan")), "rms_norm_eps is nan, expected a positive"),
        (change_config(rope_theta=float("inf")), "rope_theta is inf, expected a positive number"),
        (change_config(num_attention_heads=5), "hidden_size 32 is no multiple of num_attention_h"),
        (change_config(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_"),
        (change_config(head_dim=7), "head_dim is 7, rotary embedding needs pairs"),
        (change_config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
        (change_config(vocab_size=100), "tokenizer.model: 360 pieces, expected at most the 100"),
        (change_config(num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight is missing"),
        (change_config(intermediate_size=50), "mlp.gate_proj.weight is (88, 32), expected (50, 32"),
        (write("model.safetensors", None), "model: no model.safetensors"),
        (only_bin, "only pytorch_model*.bin: convert it with transformers' save_pretrained"),
        (write("model.safetensors", b""), "model.safetensors: not a whole safetensors file"),
        (write("model.safetensors", b"version https://git-lfs"), "safetensors: not a whole"),
        (write("model.safetensors", b"\xff" * 99), "model.safetensors: not a whole safetensors"),
        (cut_short("model.safetensors", 50_000), "model.safetensors: not a whole safetensors file"),
        (cut_short("model.safetensors", 100), "model.safetensors: not a whole safetensors file"),
        (
            change_tensors(lambda t: t.pop(NORM)),
            "model: tensors do not fit its config.json: model.norm.weight is missing",
        ),
        (
            change_tensors(lambda t: t.update(extra=torch.ones(2))),
            "tensors do not fit its config.json: extra is unexpected",
        ),
        (
            change_tensors(lambda t: t.update({NORM: torch.ones(31)})),
            "model.norm.weight is (31,), expected (32,)",
        ),
        (
            change_tensors(lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
            "model.norm.weight is I8, expected one of F32, F16, BF16",
        ),
        (shards({"a": "model-00002-of-00002.safetensors"}), "model-00002-of-00002.safetensors: no"),
        (shards({"a": 5}), "model.safetensors.index.json: not an index of safetensors"),
        (shards([1]), "model.safetensors.index.json: not an index of safetensors"),
        (shards({}), "model.norm.weight is missing"),
        (write("tokenizer.model", None), "tokenizer.model: no such file, expected Llama's"),
        (write("tokenizer.model", b""), "tokenizer.model: "),
        (write("tokenizer.model", b"\xff\xfe nonsense"), "tokenizer.model: not a SentencePiece"),
        (write("tokenizer.model", b"version https://git-lfs.github.com"), "not a SentencePiece"),
        (write("tokenizer.model", b"IQ== 0\nIg== 1\n"), "tokenizer.model: not a SentencePiece"),
        (write("tokenizer_config.json", b"{"), "tokenizer_config.json: not JSON"),
        (write("tokenizer_config.json", b"[1]"), "tokenizer_config.json: found a JSON list"),
        (write("tokenizer.json", b"{"), "tokenizer.json: not a BPE tokenizer"),
        (write("tokenizer.json", b'{"model": {"vocab": []}}'), "tokenizer.json: not a BPE"),
        (write("tokenizer.json", b'{"model": {"merges": [5]}}'), "tokenizer.json: not a BPE"),
    ],
)
def test_bad_model_folder(refused, model, breakage, expected):
    """A folder that is not a whole Llama of the kind implemented is refused by file and field."""
    breakage(model)
    assert expected in refused(model=str(model))


def test_missing_model_folder(refused, model):
    """A folder that is not there (a hub's name, say), or a file, is refused."""
    assert "no such folder, expected a Hugging Face" in refused(model="meta-llama/Llama-2-7b-hf")
    assert "no such folder" in refused(model=str(model / "config.json"))


def test_weights_that_are_not_finite(base, conversations, model, tmp_path):
    """NaN in the weights stops the run before anything but the empty folder is there."""
    change_tensors(lambda t: t[NORM].fill_(float("nan")))(model)
    out = tmp_path / "out"
    flags = {"model": str(model), "data": [str(conversations)], "out": str(out)}
    with pytest.raises(InputError, match=f"model.safetensors: {NORM} holds values that are not"):
        sft.main(flags)
    assert list(out.iterdir()) == []


# ---- Flags


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--epochs 0", "--epochs is 0, expected an integer from 1 up"),
        ("--batch-size -1", "--batch-size is -1, expected an integer from 1 up"),
        ("--max-seq-len 1", "--max-seq-len is 1, expected an integer from 2 up"),
        ("--lr 0", "--lr is 0.0, expected a number from 0 up, 0 excluded"),
        ("--lr -1", "--lr is -1.0"),
        ("--lr nan", "--lr is nan, expected a number"),
        ("--lr inf", "--lr is inf, expected a number"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--warmup-ratio 1.5", "--warmup-ratio is 1.5, expected a number from 0 to 1"),
        ("--warmup-ratio -0.1", "--warmup-ratio is -0.1"),
        ("--weight-decay -1", "--weight-decay is -1.0"),
        ("--beta1 1", "--beta1 is 1.0, expected a number from 0 to 1, 1 excluded"),
        ("--beta2 nan", "--beta2 is nan"),
        ("--clip -1", "--clip is -1.0"),
        ("--clip nan", "--clip is nan"),
        ("--micro-tokens 0", "--micro-tokens is 0, expected an integer from 2 up"),
        ("--max-steps -1", "--max-steps is -1"),
        ("--save-every -1", "--save-every is -1"),
        ("--keep 0", "--keep is 0, expected an integer from 1 up"),
        ("--seed -1", "--seed is -1"),
        ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
        ("--dtype float16", "--dtype is float16, expected bfloat16 or float32"),
        ("--dtype", "--dtype: expected one argument"),
        ("--data", "--data: expected at least one argument"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate 1 (--help lists the flags)"),
        ("--epoch 1", "unrecognized arguments: --epoch 1"),
    ],
)
def test_bad_flag(refused, base, conversations, line, expected):
    """A flag that is unknown, has no value or one that makes no sense, is named with both."""
    given = ["--model", str(base), "--data", str(conversations), *line.split()]
    try:
        flags = parse_args(sft.SFTConfig, given)
    except InputError as error:
        assert expected in str(error)
    else:
        del flags["model"], flags["data"]
        assert expected in refused(**flags)


def test_flags_that_do_not_fit_the_data(refused, conversations):
    """Rows too small for the longest conversation name a number that works; so the length does."""
    message = refused(micro_tokens=50)
    assert "--micro-tokens is 50, expected at least " in message
    enough = int(message.split("at least ")[1].split(",")[0])
    assert f"{conversations}:" in message and "(id made-up-" in message
    assert f"--micro-tokens is {enough - 1}, expected at" in refused(micro_tokens=enough - 1)
    assert "has a trained token in its first 2 tokens" in refused(max_seq_len=2)


@pytest.mark.parametrize("given", ["model", "data"])
def test_model_without_data(given, tmp_path, monkeypatch):
    """--model and --data go together; one alone does not start the demo."""
    monkeypatch.chdir(tmp_path)
    value = {"model": "somewhere", "data": ["some.jsonl"]}[given]
    with pytest.raises(InputError, match="--model and --data go together"):
        sft.main({given: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--batch-size 0", "--batch-size is 0, expected"),
        ("--max-seq-len -5", "--max-seq-len is -5, expected"),
        ("--micro-tokens 50", "--micro-tokens is 50, expected at least"),
        ("--show -1", "--show is -1, expected"),
        ("--seed -1", "--seed is -1, expected"),
    ],
)
def test_bad_flag_of_data(base, conversations, line, expected):
    """`python data.py` checks its flags as training does."""
    given = ["--model", str(base), "--data", str(conversations), *line.split()]
    with pytest.raises(InputError, match=expected):
        data.main(parse_args(data.DataConfig, given))


# ---- Output folder


def test_output_folder_that_will_not_do(refused, base, tmp_path, monkeypatch):
    """A file, a model, a finished or other run, a place that cannot be written, a full disk."""
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in refused(out=str(tmp_path / "file"))
    assert "file is not a folder" in refused(out=str(tmp_path / "file" / "below"))
    expected = "holds a finished run or a model (config.json), expected a new folder"
    assert expected in refused(out=str(base))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("")
    assert "a model (model.safetensors)" in refused(out=str(tmp_path / "weights"))

    monkeypatch.setattr(run_folder.os, "access", lambda *_: False)
    assert f"{tmp_path} cannot be written" in refused()
    monkeypatch.undo()
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: full)
    assert "0.0 GB free, expected 0.0 GB for the model" in refused()


def test_output_folder_of_another_run(refused, conversations, tmp_path):
    """Going on with another flag, other data or another model is refused, and says which."""
    other = tmp_path / "other"
    sft_flags = {"batch_size": 8, "max_steps": 1, "save_every": 1}
    other.mkdir()
    facts = {"program": "SFTConfig", "model": "elsewhere"}
    (other / "metrics.jsonl").write_text(json.dumps({"event": "start", "run": facts}) + "\n")
    message = refused(out=str(other), **sft_flags)
    assert "holds a different run, with model 'elsewhere' where this one has" in message
    for content in ("[]\n", "5\n", '{"run": 5}\n', '{"event": "start"}\n', "\xff\xfe\n"):
        (other / "metrics.jsonl").write_text(content, encoding="latin-1")
        assert f"--out {other}: holds " in refused(out=str(other), **sft_flags)


# ---- The whole program


def run_program(launcher, *flags, program=SFT):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(program), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def test_error_line_and_exit_status(base, tmp_path):
    """One line on standard error that begins with `error: `, and exit status 2."""
    path = tmp_path / "x.jsonl"
    path.write_text(records(GOOD) + "{\n")
    flags = ["--model", base, "--data", path, "--out", tmp_path / "out"]
    for program in (SFT, SFT.with_name("data.py")):
        extra = [] if program == SFT else flags[-2:]
        given = [flag for flag in flags if flag not in extra]
        done = run_program([sys.executable], *given, program=program)
        assert done.returncode == 2
        assert done.stdout == ""
        lines = done.stderr.strip().splitlines()
        assert lines[-1].startswith(f"error: {path}:2: not JSON"), done.stderr
        assert "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    assert listing(tmp_path) == [path]


def test_error_line_under_torchrun(base, tmp_path):
    """Two ranks meet the same error: the line stands there once, and torchrun fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", "2"]
    flags = ["--model", base, "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out"]
    done = run_program(launcher, *flags)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert f"error: {tmp_path / 'none.jsonl'}: no such file or folder\n" in done.stderr
    assert not (tmp_path / "out").exists()
