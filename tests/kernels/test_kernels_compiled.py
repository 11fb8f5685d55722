"""The kernels compiled for sm_80 and sm_90 without a GPU: registers, shared memory, instructions.

pytest compiles every kernel for some head sizes of each type, those that spilled once among them,
and for Llama 2 70B's heads: 75 seconds on two cores. Triton keeps what it compiled. After a change
of a kernel or of its sizes, `TULU_COMPILE=all pytest tests/kernels/test_kernels_compiled.py` does
so for every configuration that is shipped, 2.6 times as many.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# The most shared memory of one block (CUDA C programming guide, table of compute capabilities): of
# sm_90, and the least of those that run the configurations of sm_80 (sm_86, sm_89, sm_120).
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10}
SIZES = {"bf16": (16, 32, 80, 128), "fp16": (64,), "fp32": (16, 32, 128)}
LLAMA_2 = [(64, 8, 128, "bf16")]  # 34B and 70B
if os.environ.get("TULU_COMPILE") == "all":
    SIZES = dict.fromkeys(SIZES, range(16, 129, 16))
    LLAMA_2 += [(32, 32, 128, "bf16"), (40, 40, 128, "bf16")]  # 7B, 13B
SHAPES = [(32, 8, D, dtype) for dtype, sizes in SIZES.items() for D in sizes]
IN_16_BITS = [shape for shape in SHAPES + LLAMA_2 if shape[-1] != "fp32"]


def compile_kernel(kernel, constants, pointers, integers, arch, options):
    """What a kernel needs on a chip, and its PTX.

    pointers: name -> type; integers: name -> whether it is a multiple of 16; the rest is constant.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    types = {p: f"*{kind}" for p, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
    aligned = {p for p in types if integers.get(p, True)}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in aligned
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [cuobjdump, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What does not fit into registers is spilled to the thread's stack.
    need = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    return need | {"shared_memory": compiled.metadata.shared}, compiled.asm["ptx"]


def compile_attention(name, arch, holes, H, Hk, D, dtype):
    """One attention kernel as `blocks` ships it."""
    import torch

    from kernels import attention

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    options = attention.blocks(name, kind, SHARED_MEMORY[arch])
    constants = dict(HOLES=holes, H=H, Hk=Hk, D=D, BM=options.pop("BM"), BN=options.pop("BN"))
    pointers = dict.fromkeys(("q", "k", "v", "out", "d_out", "dq", "dk", "dv"), dtype)
    pointers |= dict(lse="fp32", delta="fp32", tiles="i32")
    need, ptx = compile_kernel(
        getattr(attention, name), constants, pointers, {"T": False}, arch, options
    )
    need["tensor_core_instructions"] = len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))
    return {
        "kernel": name,
        "arch": arch,
        "holes": holes,
        "H": H,
        "Hk": Hk,
        "D": D,
        "dtype": dtype,
    } | need


def compile_decode(arch, splits, H, Hk, D, dtype):
    """The kernel of a decoding step, with as many parts as one sequence has, or with one."""
    import torch

    from kernels.decode_attention import decode_blocks, decode_kernel

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    options = decode_blocks(kind, D)
    constants = dict(H=H, Hk=Hk, D=D, SPLITS=splits, BN=options.pop("BN"))
    pointers = dict.fromkeys(("q", "k", "v", "keys", "values"), dtype)
    pointers |= dict(positions="i64", out=dtype if splits == 1 else "fp32", lse="fp32")
    need, ptx = compile_kernel(decode_kernel, constants, pointers, {"S": False}, arch, options)
    # The cache is copied to shared memory 16 bytes at a time, without passing through registers.
    need["asynchronous"] = len(re.findall(r"cp\.async\.cg\.shared\.global \[.*\], 0x10", ptx))
    row = dict(kernel="decode_kernel", arch=arch, splits=splits, H=H, Hk=Hk, head_size=D)
    return row | dict(dtype=dtype) | need


def compile_merge(arch, D, dtype):
    """The kernel that puts the parts of a sequence together, as many as there may be."""
    from kernels.decode_attention import MOST_SPLITS, merge_kernel

    pointers = dict(parts="fp32", lse="fp32", out=dtype)
    need, _ = compile_kernel(merge_kernel, dict(D=D, SPLITS=MOST_SPLITS), pointers, {}, arch, {})
    return dict(kernel="merge_kernel", arch=arch, head_size=D, dtype=dtype) | need


def compile_softmax(arch, dtype, gradient, V):
    """The kernel of the loss."""
    from kernels.cross_entropy import softmax_block, softmax_kernel

    pointers = dict(logits="fp32", d_logits=dtype, labels="i64", d_nll="fp32", nll="fp32")
    integers = dict(V=False, LOGITS_ROW=True, D_LOGITS_ROW=True)
    options = softmax_block(V)
    constants = dict(GRADIENT=gradient, BLOCK=options.pop("BLOCK"))
    need, ptx = compile_kernel(softmax_kernel, constants, pointers, integers, arch, options)
    # Loads and stores of logits, by their width in bytes; one load is that of the label's logit.
    need["narrow"] = len(re.findall(r"(?:ld|st)\.global\.(?!v4|b64|v\d\.b64)", ptx))
    need["wide"] = len(re.findall(r"(?:ld|st)\.global\.v4\.b32", ptx))
    return dict(kernel="softmax_kernel", arch=arch, dtype=dtype, gradient=gradient, V=V) | need


def compile_nf4(arch, dtype):
    """The kernel that decodes NF4."""
    from kernels import nf4

    pointers = dict(codes="u8", absmax="u8", nested="fp32", offset="fp32", C="fp32", S="fp32")
    pointers["out"] = dtype
    options = {"num_warps": nf4.KERNEL_WARPS, "enable_fp_fusion": False}
    constants = {"BLOCKS": nf4.KERNEL_BLOCKS}
    need, ptx = compile_kernel(
        nf4.dequantize_kernel,
        constants,
        pointers | {"out": dtype},
        {"blocks": False},
        arch,
        options,
    )
    need["fused"] = len(re.findall(r"\bfma\.", ptx))
    need["wide_stores"] = len(re.findall(r"st\.global\.v4\.b32", ptx))
    need["stores"] = len(re.findall(r"st\.global", ptx))
    return dict(kernel="dequantize_kernel", arch=arch, dtype=dtype) | need


def print_table():
    """One JSON line per kernel, chip and configuration."""
    # Rows of documents, and of pairs; for dk and dv both are the same walk.
    names = [(name, holes) for name in ("forward_kernel", "backward_q_kernel") for holes in (0, 1)]
    names.append(("backward_kv_kernel", 0))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [
            pool.submit(compile_softmax, arch, dtype, gradient, V)
            for arch in SHARED_MEMORY
            for dtype in ("bf16", "fp16", "fp32")
            for gradient in (True, False)
            for V in (32000, 1000)
        ]
        rows += [
            pool.submit(compile_nf4, arch, dtype)
            for arch in SHARED_MEMORY
            for dtype in ("bf16", "fp16", "fp32")
        ]
        rows += [
            pool.submit(compile_attention, name, arch, holes, *shape)
            for arch in SHARED_MEMORY
            for name, holes in names
            for shape in SHAPES + LLAMA_2
        ]
        rows += [
            pool.submit(compile_decode, arch, splits, *shape)
            for arch in SHARED_MEMORY
            for splits in (1, 16)
            for shape in SHAPES + LLAMA_2
        ]
        rows += [
            pool.submit(compile_merge, arch, D, dtype)
            for arch in SHARED_MEMORY
            for _, _, D, dtype in SHAPES
        ]
        for row in rows:
            print(json.dumps(row.result()), flush=True)


@pytest.fixture(scope="module")
def table():
    """All rows, compiled in a process whose Triton is not the interpreter."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_register_spills(table):
    """Every value of every kernel stays in registers."""
    assert [row for row in table if row["stack"]] == []


def test_shared_memory_fits_the_chip(table):
    """No kernel asks for more than one block may have."""
    assert [row for row in table if row["shared_memory"] > SHARED_MEMORY[row["arch"]]] == []


def test_products_run_on_tensor_cores(table):
    """In 16 bits, every product of attention; fp32 is multiplied as fp32, which they cannot."""
    sixteen = [row for row in table if "D" in row and row["dtype"] != "fp32"]
    assert len(sixteen) == 2 * 5 * len(IN_16_BITS)
    assert [row for row in sixteen if row["tensor_core_instructions"] == 0] == []


def test_a_step_copies_the_cache_ahead(table):
    """In 16 bits, the kernel of a step copies keys and values while it computes: it is bound by
    memory."""
    rows = [row for row in table if row["kernel"] == "decode_kernel" and row["dtype"] != "fp32"]
    assert len(rows) == 2 * 2 * len(IN_16_BITS)
    assert [row for row in rows if row["asynchronous"] == 0] == []


def test_logits_move_sixteen_bytes_at_a_time(table):
    """Where a block of them is long enough, for 1,024 threads: the loss is bound by memory."""
    rows = [row for row in table if row.get("V") == 32000]
    assert len(rows) == 2 * 3 * 2
    assert [row for row in rows if row["wide"] == 0 or row["narrow"] > 4] == []


def test_nf4_is_decoded_without_fused_multiply_adds_and_stored_sixteen_bytes_at_a_time(table):
    """Fused, a scale would have other bits than torch's; and decoding is bound by its stores."""
    rows = [row for row in table if row["kernel"] == "dequantize_kernel"]
    assert len(rows) == 2 * 3
    assert [row for row in rows if row["fused"] or row["wide_stores"] < row["stores"]] == []


if __name__ == "__main__":
    print_table()
