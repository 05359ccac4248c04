"""What a kernel compiles to, asked of the compiler itself: no GPU needed.

Each kernel file lists its tuned configurations as `KernelSpec`s (`compile_specs()`); `compile_for` compiles one for an
architecture the machine need not have, and reads the result: registers, spills, shared memory, and the instructions.
The tests assert on these reports, and `benchmarks/compile_report.py` prints them.

    report = compile_for(spec, "sm_90")
    assert report.spills == 0 and report.count("LDG.E.128") > 0

On NVIDIA the figures come from the cubin (cuobjdump, which Triton's wheel ships), on AMD from the assembly's own
metadata. Reports are cached for the life of the process, and Triton caches binaries on disk: 0.5-4 s, once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora.errors import LoRAError
from lora.fast.kernels.traffic import Launch, is_counted, traffic_of
from lora.fast.runtime import interpreting

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float64: "*fp64",
}
MOST_THREADS = 1024  # of a program, on every target
MATRIX_KINDS = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")  # Ampere, Hopper, Blackwell, CDNA
ATOMIC_KINDS = ("ATOM", "ATOMG", "RED", "REDG", "global_atomic", "buffer_atomic", "flat_atomic")
SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
AMDGCN_LINE = re.compile(r"^\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)", re.MULTILINE)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel at one tuned configuration, as a launch at a real model's shapes would compile it."""

    name: str  # unique in its file, for tests and the table: "rms_norm_forward bf16 4096"
    fn: Any  # the @triton.jit function
    signature: Mapping[str, str]  # run-time arguments: {"x_ptr": "*bf16", "M": "i32", "eps": "fp32"}
    constexprs: Mapping[str, Any]  # compile-time arguments, and arguments that a launch would specialise to 1 or None
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()  # pointers and integers that are multiples of 16
    bytes_issued: int = 0  # what a call at `shape` loads and stores, from the grid and the tiles; 0: not counted
    bytes_moved: int = 0  # of it, from and to memory: `lora.fast.kernels.traffic` says what L2 is taken to keep
    bytes_minimum: int = 0  # from the shapes alone: each input read once, each output written once
    shape: str = ""  # what the two figures are for: "tokens 8192, 4096 -> 14336, r 16"
    flops: int = 0  # of one launch at `shape`, where it is a product
    fp_fusion: bool = True  # whether a product and a sum may share one rounding, as the launch asks


@dataclass(frozen=True)
class Report:
    """What one `KernelSpec` compiled to."""

    name: str
    target: str
    registers: int  # a thread; on AMD vector and accumulation registers together
    spills: int  # NVIDIA: instructions that touch local memory; AMD: spilled registers
    stack_bytes: int
    shared_bytes: int  # a block, static and dynamic
    num_warps: int  # as compiled: warp specialisation adds warps of its own
    sass: str | None  # NVIDIA only
    assembly: str  # PTX or AMDGCN
    opcodes: Counter[str] = field(repr=False)

    def count(self, opcode: str) -> int:
        """How many instructions are `opcode` and have its modifiers in any order: "LDG.E.128" counts LDG.E.EF.128 too.

        AMD's names are matched from the left: "v_mfma" counts every matrix instruction.
        """
        base, *modifiers = opcode.split(".")
        if self.sass is None:
            return sum(n for name, n in self.opcodes.items() if name.startswith(opcode))
        parts = ((name.split("."), n) for name, n in self.opcodes.items())
        return sum(n for (head, *rest), n in parts if head == base and set(modifiers) <= set(rest))

    @property
    def wide_loads(self) -> tuple[int, int]:
        """Of the instructions that load from global memory, those of 128 bits, and all."""
        if self.sass is None:
            kinds = [f"{unit}_load" for unit in ("global", "buffer")]
            return sum(self.count(f"{kind}_dwordx4") for kind in kinds), sum(map(self.count, kinds))
        kinds = ["LDG", "LDGSTS"]  # into registers; into shared memory, past them
        return sum(self.count(f"{kind}.128") for kind in kinds), sum(map(self.count, kinds))

    @property
    def instructions(self) -> int:
        """All of them, as written (a loop's body counts once)."""
        return self.opcodes.total()

    @property
    def matrix_instruction(self) -> str:
        """The generation of tensor-core instruction used most: "HGMMA" is Hopper's, "" is none."""
        most = max(MATRIX_KINDS, key=self.count)
        return most if self.count(most) else ""

    @property
    def atomics(self) -> int:
        """Atomic operations on global memory."""
        return sum(self.count(kind) for kind in ATOMIC_KINDS)

    @property
    def occupancy(self) -> float:
        """The share of an H100 multiprocessor's 64 warps that can be resident, by registers, shared memory and blocks.

        Limits: 65,536 registers in four quarters, handed to a warp in units of 256; 228 KiB of shared memory, of which
        each block takes 1 KiB for itself; 32 blocks; 64 warps.
        """
        per_warp = -(-self.registers * 32 // 256) * 256
        warps = 4 * (16384 // max(per_warp, 256))
        by_registers = warps // self.num_warps
        by_shared = 228 * 1024 // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, 32, 64 // self.num_warps) * self.num_warps / 64


def distinct(specs: Iterable[KernelSpec]) -> list[KernelSpec]:
    """The configurations worth compiling for every target: all but float16's, which are bfloat16's in another type."""
    return [spec for spec in specs if "*fp16" not in spec.signature.values()]


def spec_of(name: str, call: Callable[[], object], kernel: Any, *others: Any, **details: Any) -> KernelSpec:
    """What `kernel` would be compiled to when `call()` launches it: the launcher itself says it, so it cannot go stale.

    Args:
        name: of the spec.
        call: runs a launcher, on meta tensors.
        kernel, *others: every kernel that `call` launches; the first one's last launch is meant. Bytes are counted over
            all launches.
        **details: the spec's other fields, `shape` and `bytes_minimum` say.
    """
    launches = launches_of(call, kernel, *others)
    if all(is_counted(launch.kernel) for launch in launches):
        counted = traffic_of(launches)
        details = {"bytes_issued": counted.issued, "bytes_moved": counted.moved, **details}
    meant = next(launch for launch in reversed(launches) if launch.kernel == kernel.fn.__name__)
    return _specialised(name, kernel, dict(meant.arguments), details)


def launches_of(call: Callable[[], object], *kernels: Any, runs: bool = False) -> list[Launch]:
    """The launches of `kernels` that `call()` makes, in their order; nothing is computed unless `runs`."""
    launches: list[Launch] = []

    def recorder(function: Any) -> Callable[..., None]:
        run = function.run

        def record(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            given = dict(zip(function.arg_names, arguments, strict=False)) | options
            launches.append(Launch(function.fn.__name__, tuple(grid), given))
            if runs:
                run(*arguments, grid=grid, warmup=warmup, **options)

        return record

    for function in kernels:
        function.run = recorder(function)  # of this object, not of its class
    try:
        call()
    finally:
        for function in kernels:
            del function.run
    return launches


def _specialised(name: str, kernel: Any, given: dict[str, Any], details: dict[str, Any]) -> KernelSpec:
    """A launch's arguments as Triton sorts them: 1 and None are compiled in, multiples of 16 are promised."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            constexprs[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                divisible.append(parameter.name)
        elif parameter.annotation_type or parameter.do_not_specialize:
            signature[parameter.name] = parameter.annotation_type or _scalar(value)
        elif value == 1 and isinstance(value, int):
            constexprs[parameter.name] = 1
        else:
            signature[parameter.name] = _scalar(value)
            if isinstance(value, int) and value % 16 == 0:
                divisible.append(parameter.name)
    schedule = {field: given[field] for field in ("num_warps", "num_stages") if field in given}
    details = {"fp_fusion": given.get("enable_fp_fusion", True), **details}
    return KernelSpec(name, kernel, signature, constexprs, divisible=tuple(divisible), **schedule, **details)


def _scalar(value: int | float) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


_reports: dict[tuple[object, ...], Report] = {}


def compile_for(spec: KernelSpec, target: str) -> Report:
    """Compiles `spec` for `target`, one of `TARGETS`, and reads what came out.

    Raises: LoRAError for an unknown target, arguments that do not match the kernel's, or under TRITON_INTERPRET=1
        (there a kernel is a Python function); Triton's own error when the kernel does not compile.
    """
    check_spec(spec, target)
    key = (spec.fn, *map(_frozen, (spec.signature, spec.constexprs)), spec.num_warps, spec.num_stages, target)
    key += (spec.name, spec.divisible, spec.fp_fusion)
    if key not in _reports:
        _reports[key] = _read(spec, target, _compile(spec, target))
    return _reports[key]


def check_spec(spec: KernelSpec, target: str) -> None:
    """The target is known, the kernel can be compiled and launched, and every argument is given exactly once."""
    if target not in TARGETS:
        raise LoRAError(f"The target is {target!r}, expected one of {', '.join(TARGETS)}.")
    if (threads := spec.num_warps * TARGETS[target].warp_size) > MOST_THREADS:
        raise LoRAError(
            f"{spec.name} has {spec.num_warps} warps, {threads} threads on {target}, expected at most {MOST_THREADS}: "
            "a program of more compiles, but no GPU launches it."
        )
    if interpreting():
        raise LoRAError(
            f"{spec.name} cannot be compiled under TRITON_INTERPRET=1, which makes kernels Python functions: "
            "unset it and start a new process."
        )
    given = [*spec.signature, *spec.constexprs]
    missing = [name for name in spec.fn.arg_names if name not in given]
    wrong = [name for name in given if name not in spec.fn.arg_names or given.count(name) > 1]
    wrong += [name for name in spec.divisible if name not in spec.signature]
    if missing or wrong:
        raise LoRAError(
            f"{spec.name} does not fit the kernel's arguments: missing {missing}, unknown or given twice {wrong}; "
            "expected each argument in signature or in constexprs, and divisible to name arguments in signature."
        )


def _compile(spec: KernelSpec, target: str) -> Any:
    """Triton's compiled kernel: the same call a launch makes, for a device that need not be here."""
    names = spec.fn.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    source = ASTSource(spec.fn, signature, dict(spec.constexprs), attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": spec.fp_fusion}
    return triton.compile(source, target=TARGETS[target], options=options)


def _read(spec: KernelSpec, target: str, kernel: Any) -> Report:
    if TARGETS[target].backend == "hip":
        return _read_amdgcn(spec, target, kernel)
    usage, sass = _dump(kernel.asm["cubin"])
    opcodes = Counter(SASS_LINE.findall(sass))
    spills = sum(n for name, n in opcodes.items() if name.split(".")[0] in ("LDL", "STL"))
    return Report(
        spec.name, target, usage["REG"], spills, usage["STACK"], max(usage["SHARED"], kernel.metadata.shared),
        kernel.metadata.num_warps, sass, kernel.asm["ptx"], opcodes,
    )  # fmt: skip


def _dump(cubin: bytes) -> tuple[dict[str, int], str]:
    """Cuobjdump's resource usage, and the disassembly."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return usage, text


def _read_amdgcn(spec: KernelSpec, target: str, kernel: Any) -> Report:
    """The same figures from the metadata at the end of AMD's assembly, which is YAML of one kernel."""
    assembly: str = kernel.asm["amdgcn"]
    found = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    return Report(
        spec.name, target, found["vgpr_count"], found["vgpr_spill_count"], found["private_segment_fixed_size"],
        max(found["group_segment_fixed_size"], kernel.metadata.shared), kernel.metadata.num_warps, None, assembly,
        Counter(AMDGCN_LINE.findall(assembly)),
    )  # fmt: skip


def _frozen(arguments: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, repr(value)) for name, value in arguments.items()))
