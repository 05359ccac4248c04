"""Which proofs stand for which module, which mistakes are tried, and which of them cannot be noticed, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

from lora.errors import LoRAError
from lora.testing.mutants.equivalent import EQUIVALENT
from lora.testing.mutants.generate import Change, changes_of
from lora.testing.mutants.mutant import Mutant, mutate, source_of
from lora.testing.mutants.written import REFERENCE, WRITTEN
from lora.testing.mutants.written_kernels import KERNELS as WRITTEN_KERNELS
from lora.testing.mutants.written_kernels import OFFSETS

PROOF, KERNELS = "tests/proof/test_{}.py", "tests/kernels/test_{}.py"
KEPT = "tests/test_source.py"


class Proofs(NamedTuple):
    """What stands for a module."""

    operation: str
    proofs: tuple[str, ...]
    modes: tuple[bool, ...]  # False: in plain torch, True: in Triton's interpreter


def plain(operation: str, *names: str) -> Proofs:
    """Proofs in plain torch, and then in the interpreter: most functions launch kernels there."""
    return Proofs(operation, tuple(PROOF.format(name) for name in names or (operation,)), (False, True))


def with_kept(proofs: Proofs) -> Proofs:
    """The same, and then the tests of what is kept of an input."""
    return proofs._replace(proofs=(*proofs.proofs, KEPT))


def interpreted(operation: str, own: str, *more: str) -> Proofs:
    """The same proofs in Triton's interpreter, after them the kernel's own tests, and more proofs."""
    proofs = (PROOF.format(operation), KERNELS.format(own), *(PROOF.format(name) for name in more))
    return Proofs(operation, proofs, (True,))


CHECKPOINT = Proofs(  # bits by the proofs, memory and what is run again by the tests
    "checkpoint",
    (PROOF.format("checkpoint"), "tests/test_fast_checkpoint.py", "tests/test_reference_checkpoint.py"),
    (False,),
)
PROOFS = {
    "linear": with_kept(plain("linear", "linear", "qkv")),
    "operands": plain("linear", "qkv", "linear", "mlp", "operands"),
    "products": Proofs("linear", ("tests/test_products.py", PROOF.format("qkv")), (False,)),
    "parts": plain("linear", "linear", "qkv", "mlp"),
    "qkv": plain("qkv"),
    "mlp": with_kept(plain("mlp")),
    "embedding": plain("embedding", "embedding", "accumulation"),
    "norm": with_kept(plain("norm")),
    "rope": plain("rope"),
    "loss": plain("loss", "loss", "large_logits"),
    "nf4": plain("nf4", "nf4", "linear", "qkv", "left_over"),
    "workspace": plain("nf4", "nf4", "left_over"),
    "dropout": plain("dropout", "dropout", "linear", "thresholds"),
    "dora": plain("dora", "dora", "linear"),
    "multi_lora": plain("multi_lora", "multi_lora", "left_over"),
    "source": Proofs("source", (KEPT,), (False,)),
    "attention": Proofs("attention", ("tests/test_attention.py",), (False,)),
    "checkpoint": CHECKPOINT,
    "kernels.nf4": interpreted("nf4", "nf4_kernels"),
    "kernels.dora": interpreted("dora", "dora_kernels"),
    "kernels.norm": interpreted("norm", "norm"),
    "kernels.norm_kernels": interpreted("norm", "norm"),
    "kernels.multi_lora": interpreted("multi_lora", "multi_lora_kernels"),
    "kernels.rope": interpreted("rope", "rope"),
    "kernels.activation": Proofs(
        "mlp", (PROOF.format("mlp"), KERNELS.format("activation"), KERNELS.format("terms")), (True,)
    ),
    "kernels.add_product": interpreted("linear", "dropout_kernels"),
    "kernels.dropout": interpreted("dropout", "dropout_kernels", "thresholds"),
    "kernels.cross_entropy": interpreted("loss", "cross_entropy_kernels"),
    "kernels.gemm": Proofs("gemm", (KERNELS.format("gemm"), KERNELS.format("sum_parts")), (True,)),
}
SHARED = {"lora.reference.merge": plain("merge"), "lora.reference.checkpoint": CHECKPOINT}  # fast's too


def proofs_of(module: str) -> Proofs:
    """What stands for a module of the fast backend."""
    known = SHARED.get(module) or PROOFS.get(module.removeprefix("lora.fast."))
    if known is None:
        names = ", ".join(["lora.fast." + name for name in PROOFS] + list(SHARED))
        raise LoRAError(f"nothing is known to prove {module!r}: name the proofs, or choose one of {names}.")
    return known


# ---- what is tried

FAST = "lora.fast."
OFFSET_PROOF = "tests/compile/test_offsets.py::test_no_offset_is_multiplied_in_32_bits[{}]"
EVERY = 60  # of a function's generated mistakes one is tried, at least one a function
BY_OTHERS = {  # functions that other proofs than their module's stand for
    "linear:project_group": CHECKPOINT._replace(
        operation="linear", proofs=(PROOF.format("linear"), PROOF.format("qkv"), *CHECKPOINT.proofs)
    ),
    "mlp:lora_mlp": CHECKPOINT._replace(operation="mlp", proofs=(PROOF.format("mlp"), *CHECKPOINT.proofs)),
    "linear:LoRAGroup.forward": plain("linear", "linear", "qkv", "checkpoint"),
    "mlp:LoRAMLP.forward": plain("mlp", "mlp", "checkpoint"),
}
NOT_TRIED = {  # functions, and why the generator leaves them alone
    r".*:(check_.*|compile_specs|_.*spec|_spec.*|_.*_spec\..*|_fake_.*|_meta.*)": "errors, and compiled shapes",
    r"kernels\..*:(tile_of|block_of|thin_block|tile_for|thin_tile_for|sum_tile_for|launch_rule|programs_for|fits|warps_of|"
    r"multiprocessors|sum_block|column_block|block_size|tile_size|token_splits|architecture|is_even|tile_in_group)":
        "the size of a tile and the order of programs: any choice gives the same result, in another time",
    r"loss:chunk_rows": "the size of a chunk: any choice gives the same result, in another time",
    r"workspace:(release_workspaces|workspaces_on|workspace)": "memory that is given back, kept, or counted",
    r"checkpoint:(HostInputs\..*|side_stream|pinned_like|_say_pageable|FastRun\.inputs_of)": "runs on a GPU only",
    r"loss:in_one_step": "the second half runs in a compiled graph only",
    r"parts:(flat_.*|part_of|term_of)": "operands of operators: in a compiled graph, or as kernels get them",
    r"products:_has_linear": "which builds of PyTorch have oneDNN: every one here has",
    r"attention:kernel_is_there": "which releases of PyTorch have the kernel: every one here has",
    r"operands:row_blocks": "the size of a block: any choice gives the same result, in another time",
    r"operands:as_autocast": "autocast, which tests/test_fast_models.py proves",
}  # fmt: skip
TRIED = [name for name in PROOFS if name != "qkv"]  # qkv is one call


def all_mutants(operation: str | None = None, every: int = EVERY) -> list[Mutant]:
    """The mutants that count: all that are written, and a fixed choice of those that are generated."""
    return [*written_mutants(operation), *generated_mutants(operation, every)]


def written_mutants(operation: str | None = None) -> Iterator[Mutant]:
    """Every mistake of `written` and `written_kernels`."""
    for module, mistake in written_names():
        if operation in (None, proofs_of(module).operation):
            yield written(module, mistake)
    for kernel, (name, (mistake, old, new)) in OFFSETS.items():
        module, proof = f"{FAST}kernels.{name}", (OFFSET_PROOF.format(kernel),)
        if operation in (None, proofs_of(module).operation):
            yield mutate(module, old, new, mistake=mistake, proofs=proof, interpret=False)


TABLES = {
    **{FAST + name: texts for name, texts in WRITTEN.items()},
    **{"lora.reference." + name: texts for name, texts in REFERENCE.items()},
    **{f"{FAST}kernels.{name}": texts for name, texts in WRITTEN_KERNELS.items()},
}  # module → its written mistakes


def written_names() -> list[tuple[str, str]]:
    """Module and mistake of everything written, without reading any source."""
    return [(module, mistake) for module, texts in TABLES.items() for mistake, _, _ in texts]


def written(module: str, mistake: str) -> Mutant:
    """One written mutant."""
    old, new = next(text[1:] for text in TABLES[module] if text[0] == mistake)
    return mutate(module, old, new, mistake=mistake)


def generated_mutants(operation: str | None = None, every: int = EVERY) -> Iterator[Mutant]:
    """One of `every` generated mistakes of each function, the same ones each time, without the equivalent ones."""
    return (mutant for mutant in sampled(operation, every) if mutant.key not in EQUIVALENT)


def sampled(operation: str | None = None, every: int = EVERY) -> Iterator[Mutant]:
    """The same with the equivalent ones."""
    for name in TRIED:
        if operation not in (None, PROOFS[name].operation):
            continue
        changes = changes_of(source_of(FAST + name), partial(is_tried, name))
        for function, group in groupby(changes, lambda change: change.function):
            known = BY_OTHERS.get(f"{name}:{function}", PROOFS[name])
            for change in sample(group, every):
                yield generated(name, change, known)


def quick_names() -> list[tuple[str, str]]:
    """What `make test` runs: the first written mistake of every module."""
    return [(module, texts[0][0]) for module, texts in TABLES.items()]


def generated(name: str, change: Change, known: Proofs) -> Mutant:
    """A change as a mutant; in a branch of kernels it takes the interpreter to notice it."""
    modes = (True,) if change.on_kernels else known.modes
    return Mutant(
        known.operation, FAST + name, change.function, change.mistake, change.source, known.proofs, modes, False
    )


def sample(changes: Iterable[Change], every: int) -> list[Change]:
    """The first of them in their fixed shuffled order, in the order of the source."""
    pool = list(changes)
    chosen = sorted(pool, key=lambda change: change.order)[: -(-len(pool) // every)]
    return [change for change in pool if change in chosen]


def is_tried(module: str, function: str) -> bool:
    """Whether the generator makes mistakes in a function."""
    return not any(re.fullmatch(pattern, f"{module}:{function}") for pattern in NOT_TRIED)
