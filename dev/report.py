"""Compiles every kernel in every shipped configuration for GPUs that need not be there, and reads what came
out.

    python dev/report.py                       # all of sm_80 and sm_90: some minutes
    python dev/report.py --only dkdv --arch sm_90
    python dev/report.py --arch gfx942         # AMD: registers, spills, local memory, matrix instructions
    python dev/report.py --write_budget  # accept today's registers as the budget (dev/budget.json)

Triton's own wheel brings the compiler and the disassembler; no CUDA toolkit is needed. For each kernel it
prints
- registers, stack and spilling instructions (must be 0), shared memory, blocks and warps that fit on a
  multiprocessor;
- for each loop with tensor-core instructions the FLOPs per pass, added up over the instructions' shapes
  (they must equal the formula's, so that nothing is computed twice or on the ordinary cores), and
  asynchronous copies;
- a bound on cycles per pass: the slowest of tensor cores, exponentials and instruction issue, and the
  tensor cores' share of it (TC);
- FLOPs per byte read from L2 in a pass, and for kernels without a loop, the width of their loads.
It says nothing about results, races or real speed: the interpreter tests results, a GPU the rest
(tests/test_gpu.py). Exit code 1 if any check fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import attention, dropout, linear_cross_entropy, nf4, norm, rotary, swiglu

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BUDGET = Path(__file__).with_name("budget.json")
HEAD_DIMS = (64, 80, 88, 104, 128)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# per multiprocessor: shared memory in all and for one block, dense 16-bit FLOPs a cycle (whitepapers of A100
# and H100: 312 TFLOP/s / 108 / 1.41 GHz, 989 TFLOP/s / 132 / 1.83 GHz); both do 16 exponentials and issue 4
# instructions a cycle
SM = {"sm_80": (167_936, 166_912, 2048), "sm_90": (233_472, 232_448, 4096)}
# "sm_80" tiles also run on sm_86 and sm_89, where a block may have 101,376 bytes
SHARED_LIMIT = {"sm_80": 101_376, "sm_90": 232_448}
REGISTERS, WARPS = 65_536, 64


@dataclass
class Case:
    """One kernel in one configuration. `flops`: of one pass of its hot loop (0: it has none); `loops`: such
    loops."""

    name: str
    fn: object
    dtype: str
    constants: dict
    warps: int
    stages: int
    flops: int = 0
    loops: int = 0
    bytes: int = 0  # read in one pass
    types: dict = field(default_factory=dict)  # arguments that are neither tensors of `dtype` nor int32
    unaligned: tuple = ()  # integers that need not be multiples of 16


def attention_cases(architecture: str):
    kernels = {
        "forward": (attention._attention_forward, 2),
        "decode": (attention._decode, 2),
        "dq": (attention._attention_dq, 3),
        "dkdv": (attention._attention_dkdv, 4),
    }
    types = {"blocks": "*i32", "lse": "*fp32", "delta": "*fp32", "scale": "fp32", "score_scale": "fp32"}
    types |= {"first": "*i64", "end": "*i64"}
    unaligned = ("num_q", *(f"head_{x}" for x in ("q", "k", "v", "o", "do", "dq", "dk")))
    for kind, (fn, dots) in kernels.items():
        for dtype, size in DTYPES.items():
            for D in HEAD_DIMS:
                block_d = triton.next_power_of_2(D)
                m, n, warps, stages = attention.tile(architecture, kind, size, D)
                constants = {
                    "D": D,
                    "BLOCK_M": m,
                    "BLOCK_N": n,
                    "BLOCK_D": block_d,
                    "PRECISION": precision(dtype),
                }
                if kind == "decode":
                    constants |= {"GROUP": 1, "LEAST": attention.LEAST_KEYS}
                passed = m if kind == "dkdv" else n  # rows that a pass moves on by
                flops = 2 * dots * m * n * block_d
                yield Case(
                    f"attention_{kind} D={D}",
                    fn,
                    dtype,
                    constants,
                    warps,
                    stages,
                    flops,
                    2,
                    2 * passed * D * size,
                    types,
                    unaligned,
                )


def cross_entropy_cases(architecture: str):
    types = {
        "targets": "*i32",
        "log_z": "*fp32",
        "sums": "*fp32",
        "target_logits": "*fp32",
        "hit": "fp32",
        "spread": "fp32",
    }
    for name, fn in (
        ("forward", linear_cross_entropy._ce_forward),
        ("gradient", linear_cross_entropy._ce_gradient),
    ):
        for dtype, size in DTYPES.items():
            for smoothing in (False, True) if name == "forward" else (None,):
                m, n, k, warps, stages = linear_cross_entropy.TILES[architecture][size]
                constants = {
                    "BLOCK_M": m,
                    "BLOCK_N": n,
                    "BLOCK_K": k,
                    "EVEN": True,
                    "PRECISION": precision(dtype),
                }
                if smoothing is not None:
                    constants["SUMS"] = smoothing
                suffix = " smoothed" if smoothing else ""
                yield Case(
                    f"cross_entropy_{name}{suffix}",
                    fn,
                    dtype,
                    constants,
                    warps,
                    stages,
                    2 * m * n * k,
                    1,
                    (m + n) * k * size,
                    types,
                    ("num_rows", "num_columns", "first_column"),
                )


def elementwise_cases(architecture: str):
    """Those without a loop over tiles, at Qwen-VL's sizes (and ChatGLM's 2-D rotary)."""
    for dtype in ("bf16", "fp16", "fp32"):
        block = {"BLOCK": 4096}
        row = {"eps": "fp32", "scales": "*fp32", "dw": "*fp32"}
        num_warps = norm.warps(4096)
        yield Case("rms_norm_forward", norm._rms_norm_forward, dtype, block, num_warps, 3, types=row)
        for weight in (False, True):
            name = f"rms_norm_backward{' weight' if weight else ''}"
            yield Case(
                name,
                norm._rms_norm_backward,
                dtype,
                {**block, "WEIGHT": weight},
                num_warps,
                3,
                types=row,
                unaligned=("num_rows", "rows_each"),
            )
        for parts, half in ((1, 64), (2, 32)):
            constants = {"HALF": half, "BLOCK": half, "BLOCK_H": 32, "PARTS": parts}
            types = {"cos": "*fp32", "sin": "*fp32", "direction": "fp32"}
            yield Case(
                f"rotary_{parts}d", rotary._rotary, dtype, constants, 4, 3, types=types, unaligned=("T",)
            )
        for way, fn in (("forward", swiglu._swiglu_forward), ("backward", swiglu._swiglu_backward)):
            yield Case(f"swiglu_{way}", fn, dtype, {"BLOCK": swiglu.BLOCK}, 4, 3)
        types = {"keys": "*i64", "divisor": "fp32"}
        odd = ("seed", "first_channel", "threshold", "count")
        for images in (False, True):
            constants = {"STEP": dropout.KEY_STEP, "IMAGES": images, "BLOCK": 4096}
            name = f"dropout{' of images' if images else ''}"
            yield Case(name, dropout._drop, dtype, constants, num_warps, 3, types=types, unaligned=odd)
        types = {"codes": "*u8", "scales": "*u8", "out": f"*{dtype}"}
        types |= dict.fromkeys(("coarse", "middle", "levels", "bytes_"), "*fp32")
        yield Case("nf4_unpack", nf4._unpack, dtype, {"COUNT": 1024}, 4, 3, types=types)
        constants = {"ROWS": 16, "COLUMNS": 32, "PRECISION": precision(dtype)}
        yield Case("nf4_few_rows", nf4._few_rows, dtype, constants, 4, 3, types=types, unaligned=("M",))


def precision(dtype: str) -> str:
    return "tf32x3" if dtype == "fp32" else "tf32"


def cases(architecture: str):
    yield from attention_cases(architecture)
    yield from cross_entropy_cases(architecture)
    yield from elementwise_cases(architecture)


# --------------------------------------------------------------------------------------------------
# Compiling and reading


POINTERS = {
    "blocks",
    "q",
    "k",
    "v",
    "o",
    "do",
    "dq",
    "dk",
    "dv",
    "x",
    "w",
    "grad",
    "y",
    "dy",
    "dx",
    "weight",
    "gate",
    "up",
    "dgate",
    "dup",
}


def compile_case(case: Case, target: GPUTarget):
    signature, hints = {}, {}
    for i, name in enumerate(case.fn.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.types.get(name) or (f"*{case.dtype}" if name in POINTERS else "i32")
        if signature[name] != "fp32" and name not in case.unaligned:
            hints[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return triton.compile(
        ASTSource(case.fn, signature, case.constants, hints), target=target, options=options
    )


def tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """-> (instructions in order, {label: number of the first one after it})."""
    lines, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(code[1].strip())
    return lines, labels


def tensor_flops(line: str, warps: int) -> int:
    """FLOPs of one instruction, done by all warps of the block; 0 if it is none of the tensor cores'."""
    if shape := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\.", line):  # by groups of 4 warps
        m, n, k = map(int, shape.groups())
        return 2 * m * n * k * warps // 4
    if shape := re.search(r"\bHMMA\.(16816|1688|1684)\.", line):
        return 2 * 16 * 8 * int(shape[1][3:]) * warps
    return 0


def hot_loops(lines: list[str], labels: dict[str, int], warps: int) -> list[list[str]]:
    """Bodies of the innermost loops (from a backward branch's target to it) that use the tensor cores."""
    spans = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*?`?\(?(\.L\w+)\)?", line)
        if target and labels.get(target[1], i + 1) <= i:
            spans.append((labels[target[1]], i + 1))
    spans = [s for s in spans if any(tensor_flops(line, warps) for line in lines[s[0] : s[1]])]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [lines[a:b] for a, b in inner]


def count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(rf"(^|\s){pattern}\b", line)) for line in lines)


def examine(case: Case, architecture: str, budget: dict[str, int]) -> tuple[dict, list[str]]:
    """-> (figures, failed checks)."""
    compiled = compile_case(case, GPUTarget("cuda", int(architecture[3:]), 32))
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", path)))
        lines, labels = instructions(tool("nvdisasm", "-c", path))
    all_shared, _, flops_per_cycle = SM[architecture]
    registers, shared = int(usage["REG"]), compiled.metadata.shared
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(REGISTERS // (per_warp * case.warps), all_shared // (shared + 1024), WARPS // case.warps)
    figures = {
        "registers": registers,
        "stack": int(usage["STACK"]) + int(usage["LOCAL"]),
        "spills": count(lines, "STL.*|LDL.*"),
        "shared": shared,
        "warps": blocks * case.warps,
        "async": count(lines, "LDGSTS.*") + count(lines, "UTMALDG.*"),
        "wide": count(lines, r"LDG.*\.128.*"),
        "tensor": count(lines, "HGMMA.*") or count(lines, "HMMA.*"),
    }
    key = f"{architecture} {case.name} {case.dtype}"
    failures = []

    def check(ok: bool, what: str):
        if not ok:
            failures.append(f"{key}: {what}")

    check(len(lines) > 20, "the compiler made an empty kernel")
    check(
        figures["stack"] == 0 and figures["spills"] == 0,
        f"{figures['stack']} bytes of stack, {figures['spills']} spills",
    )
    check(
        shared <= SHARED_LIMIT[architecture],
        f"{shared:,} bytes of shared memory, limit {SHARED_LIMIT[architecture]:,}",
    )
    check(blocks > 0, "does not fit on a multiprocessor")
    check(key in budget, "has no register budget; run with --write_budget")
    check(registers <= budget.get(key, registers), f"{registers} registers, budget {budget.get(key)}")
    if case.flops:
        formula = case.flops * (3 if case.dtype == "fp32" else 1)  # tf32x3: three products
        loops = hot_loops(lines, labels, case.warps)
        check(len(loops) == case.loops, f"{len(loops)} loops use the tensor cores, expected {case.loops}")
        check(figures["async"] > 0, "no asynchronous copies")
        slowest = 0
        for body in loops:
            flops = sum(tensor_flops(line, case.warps) for line in body)
            check(flops == formula, f"{flops:,} tensor FLOPs in a pass, the formula says {formula:,}")
            check(count(body, "STL.*|LDL.*") == 0, "spills inside the loop")
            rate = flops_per_cycle / (2 if case.dtype == "fp32" else 1)
            cycles = {
                "tensor": flops / rate,
                "exp": count(body, "MUFU.EX2") * case.warps * 32 / 16,
                "issue": len(body) * case.warps / 4,
            }
            if max(cycles.values()) > slowest:
                slowest = max(cycles.values())
                figures |= {
                    "bound": max(cycles, key=cycles.get),
                    "cycles": slowest,
                    "share": cycles["tensor"] / slowest,
                }
        figures["intensity"] = case.flops / case.bytes
    else:
        # codes are bytes, and levels are looked up one by one
        check(figures["wide"] > 0 or "*u8" in case.types.values(), "no 128-bit loads")
    return figures, failures


def examine_amd(case: Case) -> tuple[dict, list[str]]:
    """The little that the assembler's text for gfx942 tells: registers, spills, local memory, matrix
    instructions."""
    compiled = compile_case(case, GPUTarget("hip", "gfx942", 64))
    code = compiled.asm["amdgcn"]
    names = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    values = {k: int(v) for k, v in re.findall(rf"\.({names}):\s+(\d+)", code)}
    figures = {
        "registers": values["vgpr_count"],
        "stack": values["private_segment_fixed_size"],
        "spills": values["vgpr_spill_count"],
        "shared": compiled.metadata.shared,
        "warps": "",
        "tensor": code.count("v_mfma"),
        "async": "",
        "wide": code.count("load_dwordx4"),
    }
    key, failures = f"gfx942 {case.name} {case.dtype}", []
    if figures["stack"] or figures["spills"]:
        failures.append(f"{key}: {figures['stack']} bytes of stack, {figures['spills']} spills")
    if figures["shared"] > 65_536:
        failures.append(f"{key}: {figures['shared']:,} bytes of local memory, limit 65,536")
    if case.flops and not figures["tensor"]:
        failures.append(f"{key}: no matrix instructions")
    return figures, failures


COLUMNS = (34, 12, 5, 5, 6, 8, 6, 7, 6, 14, 5, 7)
HEADER = (
    "kernel",
    "tile",
    "w/s",
    "regs",
    "spill",
    "shared",
    "warps",
    "tensor",
    "async",
    "bound by",
    "TC",
    "FLOP/B",
)


def row(case: Case, f: dict) -> tuple:
    tile = "x".join(str(v) for k, v in case.constants.items() if k.startswith("BLOCK"))
    bound, share, intensity = f"{f['wide']} wide loads", "", ""
    if "bound" in f:
        bound, share, intensity = (
            f"{f['bound']} {f['cycles']:,.0f}",
            f"{f['share']:.0%}",
            f"{f['intensity']:.0f}",
        )
    return (
        f"{case.name} {case.dtype}",
        tile,
        f"{case.warps}/{case.stages}",
        f["registers"],
        f["stack"] + f["spills"],
        f["shared"],
        f["warps"],
        f["tensor"],
        f["async"],
        bound,
        share,
        intensity,
    )


def line(values: tuple) -> str:
    return f"{values[0]:{COLUMNS[0]}}" + "".join(
        f"{v:>{w}}" for v, w in zip(values[1:], COLUMNS[1:], strict=True)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], choices=[*SM, "gfx942"])
    parser.add_argument("--only", default="", help="regular expression on 'NAME DTYPE'")
    parser.add_argument("--write_budget", action="store_true")
    args = parser.parse_args()
    budget = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    failures, num = [], 0
    for architecture in args.arch:
        print(f"{architecture}: compiled and statically checked, not run on a GPU\n{line(HEADER)}")
        amd = architecture == "gfx942"
        # the tiles that attention and cross entropy take there
        for case in cases("sm_80" if amd else architecture):
            if not re.search(args.only, f"{case.name} {case.dtype}"):
                continue
            if amd and "PRECISION" in case.constants:
                case.constants["PRECISION"] = "ieee"
            figures, failed = examine_amd(case) if amd else examine(case, architecture, budget)
            if args.write_budget and not amd:
                budget[f"{architecture} {case.name} {case.dtype}"] = figures["registers"]
                failed = [f for f in failed if "budget" not in f]
            print(line(row(case, figures)) + (" FAILED" if failed else ""), flush=True)
            failures += failed
            num += 1
    if args.write_budget:
        BUDGET.write_text(json.dumps(budget, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    print(*failures, f"{num} kernels compiled, {len(failures)} checks failed", sep="\n")
    return 1 if failures or not num else 0


if __name__ == "__main__":
    sys.exit(main())
