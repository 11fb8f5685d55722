"""The kernels compiled for sm_80 and sm_90 without a GPU: registers, shared memory, instructions.

`python tests/test_kernels_compiled.py` prints the table of every head size and type (some minutes);
pytest takes those that need the most: 7B's head size, the largest padded one, a small one, in bf16.
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

# The most shared memory of one block (CUDA C programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
SHAPES = [(32, 8, 128, "bf16"), (4, 4, 112, "bf16"), (32, 32, 64, "bf16"), (32, 8, 128, "fp32")]
SIZES = range(16, 129, 16)
EVERY_SHAPE = [(32, 8, D, dtype) for dtype in ("bf16", "fp16", "fp32") for D in SIZES]


def compile_kernel(name, constants, pointers, integers, arch, options):
    """What a kernel needs on a chip, from its machine code.

    pointers: name -> type; integers: names of 32-bit ones; the rest are constants.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    import kernels.attention
    import kernels.cross_entropy

    kernel = getattr(kernels.attention, name, None) or getattr(kernels.cross_entropy, name)
    types = {p: f"*{kind}" for p, kind in pointers.items()} | dict.fromkeys(integers, "i32")
    signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in pointers
    }
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        # Spilled registers are stored to and loaded from the thread's "local" memory.
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared_memory": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"\b(?:HMMA|HGMMA)\b", sass)),
    }


def compile_attention(name, arch, H, Hk, D, dtype):
    """One attention kernel as `blocks` ships it."""
    import torch

    import kernels.attention

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    kernel = getattr(kernels.attention, name)
    options = kernels.attention.blocks(kernel, kind, hopper=arch >= 90)
    constants = dict(H=H, Hk=Hk, D=D, BM=options.pop("BM"), BN=options.pop("BN"))
    pointers = dict.fromkeys(("q", "k", "v", "out", "d_out", "dq", "dk", "dv"), dtype)
    pointers |= dict(lse="fp32", delta="fp32", doc_start="i32", doc_end="i32")
    need = compile_kernel(name, constants, pointers, ("T",), arch, options)
    return {"kernel": name, "arch": arch, "H": H, "Hk": Hk, "D": D, "dtype": dtype} | need


def compile_softmax(arch):
    """The kernel of the loss, for bf16."""
    pointers = dict(logits="fp32", d_logits="bf16", labels="i64", d_nll="fp32", nll="fp32")
    integers = ("V", "LOGITS_ROW", "D_LOGITS_ROW")
    constants = dict(GRADIENT=True, BLOCK=4096)
    need = compile_kernel("softmax_kernel", constants, pointers, integers, arch, {"num_warps": 8})
    return {"kernel": "softmax_kernel", "arch": arch, "dtype": "bf16"} | need


def print_table(shapes):
    """One JSON line per kernel, chip and shape."""
    names = ("forward_kernel", "backward_q_kernel", "backward_kv_kernel")
    with ThreadPoolExecutor(2) as pool:
        rows = [pool.submit(compile_softmax, arch) for arch in SHARED_MEMORY]
        for shape in shapes:
            for name in names:
                for arch in SHARED_MEMORY:
                    rows.append(pool.submit(compile_attention, name, arch, *shape))
        for row in rows:
            print(json.dumps(row.result()), flush=True)


@pytest.fixture(scope="module")
def table():
    """The rows of `SHAPES`, compiled in a process whose Triton is not the interpreter."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "--few"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_register_spills(table):
    """Every value of every kernel stays in registers."""
    assert [row for row in table if row["spills"] or row["registers"] > 255] == []


def test_shared_memory_fits_the_chip(table):
    """No kernel asks for more than one block may have."""
    assert [row for row in table if row["shared_memory"] > SHARED_MEMORY[row["arch"]]] == []


def test_products_run_on_tensor_cores(table):
    """In 16 bits, every product of attention; fp32 is multiplied as fp32, which they cannot."""
    sixteen = [row for row in table if "D" in row and row["dtype"] != "fp32"]
    assert len(sixteen) == 18
    assert [row for row in sixteen if row["tensor_core_instructions"] == 0] == []


if __name__ == "__main__":
    print_table(SHAPES if "--few" in sys.argv else EVERY_SHAPE)
