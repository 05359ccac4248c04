"""How many bytes a launch of each kernel loads and stores, counted from its grid and its tiles.

An operand of a tiled kernel is loaded once by each program along the axes that it lacks: B [N, R], beside tiles of
BLOCK_M rows of [M, N], M / BLOCK_M times. That is what is *issued*, whatever cache answers. What *moves* from and to
memory is less, and there this file assumes, of an H100 and its 50 MB of L2:

- an operand that programs load again and again (factors, a norm's weight, tables) comes from memory once: between two
  loads of it the programs touch far less than L2 keeps;
- a row that one program reads again comes from memory again, unless the rows of all programs of that moment fit into
  `L2_KEEPS`, which the rows of a loss or of a looped norm do not;
- operands of a wide product are shared within a wave of programs, one a multiprocessor, and not kept for the next;
- several blocks of ranks read a wide operand once each.

`tests/kernels/test_traffic.py` counts every load and store of the interpreted kernels, and they are the issued ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

MULTIPROCESSORS = 132  # an H100's
WARPS = 64  # resident on one, at most
L2_KEEPS = 25 * 10**6  # bytes: L2 is two halves, and what both sides read lies in both


class Launch(NamedTuple):
    """One launch of a kernel, as its launcher made it."""

    kernel: str  # the @triton.jit function's name
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by name, compile-time ones and num_warps too


class Touched(NamedTuple):
    """Elements of one operand that all programs together load and store."""

    issued: int
    moved: int  # of them, from and to memory


Touches = dict[str, Touched]  # of the operands that are not touched exactly once an element


class Traffic(NamedTuple):
    """Bytes."""

    issued: int
    moved: int


def traffic_of(launches: Iterable[Launch]) -> Traffic:
    """What these launches load and store."""
    by_operand = [(touched, launch.arguments[name]) for launch in launches for name, touched in touches(launch).items()]
    issued, moved = (sum(touched[i] * operand.itemsize for touched, operand in by_operand) for i in (0, 1))
    return Traffic(issued, moved)


def is_counted(kernel: str) -> bool:
    """Whether this file knows the kernel."""
    return kernel in COUNTS


def touches(launch: Launch) -> Touches:
    """Every operand of a launch, and how much of it is touched."""
    operands = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
    once = {name: Touched(tensor.numel(), tensor.numel()) for name, tensor in operands.items()}
    special = COUNTS[launch.kernel](launch.grid, launch.arguments)
    return {name: special.get(name, usual) for name, usual in once.items()}


def again(operand: Tensor | None, issued: int) -> Touched:
    """An operand that many programs load: from memory once."""
    return Touched(issued, 0 if operand is None else min(issued, operand.numel()))


def reread(elements: int, passes: int, a: Mapping[str, Any], row_bytes: int) -> Touched:
    """Rows that a program goes through several times, `row_bytes` of all operands each time."""
    at_once = MULTIPROCESSORS * WARPS // a["num_warps"]
    return Touched(passes * elements, elements if at_once * row_bytes <= L2_KEEPS else passes * elements)


def _once(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    return {}


def _gated(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    M, N = a["M"], a["N"]
    found = {}
    for term in ("dh", "g", "z"):
        u, factor, r = (a.get(f"{term}_{name}") for name in ("u", "factor", "r"))
        if u is not None and factor is not None:
            found[f"{term}_u"] = again(u, M * r * math.ceil(N / a["BLOCK_N"]))
            found[f"{term}_factor"] = again(factor, N * r * math.ceil(M / a["BLOCK_M"]))
    return found


def _cross_entropy(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    """No row ignored. The logit of the label is loaded by itself."""
    rows, numbers = grid[0], grid[0] * a["vocab"]
    passes = 2 if a["HAS_GRADIENT"] else 1
    loaded = reread(numbers, passes, a, a["vocab"] * a["logits_ptr"].itemsize)
    stored = numbers if a["HAS_GRADIENT"] else 0
    return {"logits_ptr": Touched(loaded.issued + stored + rows, loaded.moved + stored)}


def _dora(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    N, K, R = a["N"], a["K"], a["R"]
    return {
        "a_ptr": again(a["a_ptr"], grid[0] * R * K),
        "b_ptr": again(a["b_ptr"], N * R * math.ceil(K / a["BLOCK_K"])),
    }


def _added_to(name: str) -> Callable[..., Touches]:
    """A buffer that is read and written."""
    return lambda grid, a: {name: Touched(2 * a[name].numel(), 2 * a[name].numel())}


def _dequantize(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    rows, groups = grid[0] // a["row_tiles"], a["TILE"] // a["GROUP"]
    blocks = rows * a["row_groups"]
    codes = a["codes_ptr"]
    found = {name: again(a[name], blocks) for name in ("absmax_ptr", "nested_absmax_ptr")}
    nested = bool(a["NESTED_SIZE"])
    return found | {
        "codes_ptr": again(codes, codes.numel() if a["IN_WORDS"] else rows * a["columns"]),
        "nested_offset_ptr": again(a["nested_offset_ptr"], grid[0]),
        "values_ptr": again(a["values_ptr"], 16 * grid[0]),
        "dynamic_ptr": again(a["dynamic_ptr"], grid[0] * groups if nested else 0),
    }


def _quantize(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    return {"midpoints_ptr": again(a["midpoints_ptr"], 15 * grid[0])}


# ---- products


def _add_product(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    M, N, R = (a[name] for name in "MNR")
    return {
        "dx_ptr": Touched(2 * M * N, 2 * M * N),
        "u_ptr": again(a["u_ptr"], M * R * math.ceil(N / a["BLOCK_N"])),
        "factor_ptr": again(a["factor_ptr"], N * R * math.ceil(M / a["BLOCK_M"])),
    }


def _lora_gemm(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    """A wave is up to GROUP_M tiles high and as wide as there are multiprocessors left."""
    M, N, K, R = (a[name] for name in "MNKR")
    tiles_m, tiles_n = math.ceil(M / a["BLOCK_M"]), math.ceil(N / a["BLOCK_N"])
    high = min(a["GROUP_M"], tiles_m)
    wide = min(MULTIPROCESSORS // high, tiles_n)
    return {
        "x_ptr": Touched(M * K * tiles_n, M * K * math.ceil(tiles_n / wide)),
        "w_ptr": Touched(K * N * tiles_m, K * N * math.ceil(tiles_m / high)),
        "u_ptr": again(a["u_ptr"], M * R * tiles_n),
        "b_ptr": again(a["b_ptr"], R * N * tiles_m),
        "bias_ptr": again(a["bias_ptr"], N * tiles_m),
    }


def _skinny(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    M, K, R = (a[name] for name in "MKR")
    wide = M * K * math.ceil(R / a["BLOCK_R"])
    return {"x_ptr": Touched(wide, wide), "a_ptr": again(a["a_ptr"], R * K * math.ceil(M / a["BLOCK_M"]))}


def _token_sum(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    M, N, R = (a[name] for name in "MNR")
    wide = M * N * grid[1]
    return {"wide_ptr": Touched(wide, wide), "thin_ptr": again(a["thin_ptr"], M * R * grid[0])}


# ---- products of many adapters: every token has one, and all have equally many


def _blocks(a: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens, and blocks of rows that hold any."""
    tokens, adapters = len(a["order_ptr"]), len(a["bounds_ptr"]) - 1
    return tokens, adapters * math.ceil(tokens / adapters / a["BLOCK_M"])


def _of_blocks(programs: int, a: Mapping[str, Any], columns: int) -> Touches:
    """What tells a program its rows, `columns` programs a block."""
    found = {name: again(a[name], programs) for name in ("bounds_ptr", "block_adapter_ptr", "block_start_ptr")}
    return found | {"order_ptr": again(a["order_ptr"], len(a["order_ptr"]) * columns)}


def _shrink(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    (tokens, blocks), K, R = _blocks(a), a["K"], a["R"]
    columns = math.ceil(R / a["BLOCK_R"])
    return _of_blocks(grid[0], a, columns) | {
        "x_ptr": Touched(tokens * K * columns, tokens * K * columns),
        "a_ptr": again(a["a_ptr"], blocks * R * K),
        "u_ptr": Touched(tokens * R, 2 * tokens * R),  # the launcher fills it with zeros first
        "scaling_ptr": again(a["scaling_ptr"], blocks * columns),
    }


def _expand(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    (tokens, blocks), N, R = _blocks(a), a["N"], a["R"]
    columns = math.ceil(N / a["BLOCK_N"])
    return _of_blocks(grid[0], a, columns) | {
        "h_ptr": Touched(2 * tokens * N, 2 * tokens * N),
        "u_ptr": again(a["u_ptr"], tokens * R * columns),
        "b_ptr": again(a["b_ptr"], blocks * N * R),
    }


def _sums(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    tokens, N, R = len(a["order_ptr"]), a["N"], a["R"]
    blocks_r = math.ceil(R / a["BLOCK_R"])
    return {
        "wide_ptr": Touched(tokens * N * blocks_r, tokens * N * blocks_r),
        "thin_ptr": again(a["thin_ptr"], tokens * R * (grid[0] // blocks_r)),
        "order_ptr": again(a["order_ptr"], tokens * grid[0]),
        "bounds_ptr": again(a["bounds_ptr"], 2 * math.prod(grid)),
    }


# ---- norms and rotary embedding


def _norm(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    return {name: again(a.get(name), grid[0] * a["N"]) for name in ("weight_ptr", "bias_ptr")}


def _norm_forward_looped(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    read = [name for name in ("x_ptr", "residual_ptr") if a[name] is not None]
    rows = {
        name: reread(a["M"] * a["N"], 3 if a["CENTRED"] else 2, a, len(read) * a["N"] * a["x_ptr"].itemsize)
        for name in read
    }
    return _norm(grid, a) | rows


def _norm_backward_looped(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    M, N, blocks = a["M"], a["N"], math.ceil(a["N"] / a["BLOCK_N"])
    rows = {name: reread(M * N, 2, a, 2 * N * a["s_ptr"].itemsize) for name in ("dy_ptr", "s_ptr")}
    statistics = {name: again(a[name], 2 * blocks * M) for name in ("mean_ptr", "rstd_ptr")}
    return rows | statistics | {"weight_ptr": again(a["weight_ptr"], 2 * grid[0] * N)}


def _norm_weight_gradient(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    reads = a["dweight_ptr"] is not None
    statistics = {name: again(a[name], reads * grid[0] * a["M"]) for name in ("mean_ptr", "rstd_ptr")}
    return statistics | {"s_ptr": again(a["s_ptr"], reads * a["M"] * a["N"])}


def _rope(grid: tuple[int, ...], a: Mapping[str, Any]) -> Touches:
    found = {name: again(a[name], grid[0] * a["ROT"]) for name in ("cos_ptr", "sin_ptr")}
    found["ids_ptr"] = again(a["ids_ptr"], grid[0])
    for head, passes in (("q", a["PASS_Q"]), ("k", a["PASS_K"])):
        share = a["HEAD_DIM"] if passes else a["ROT"]
        numbers = a[f"{head}_ptr"].numel() // a["HEAD_DIM"] * share
        found |= {name: Touched(numbers, numbers) for name in (f"{head}_ptr", f"out_{head}_ptr")}
    return found


COUNTS: dict[str, Callable[[tuple[int, ...], Mapping[str, Any]], Touches]] = {
    "gated_forward_kernel": _gated,
    "gated_backward_kernel": _gated,
    "cross_entropy_kernel": _cross_entropy,
    "dora_norm_kernel": _dora,
    "dropout_forward_kernel": _once,
    "dropout_add_kernel": _added_to("dx_ptr"),
    "dropout_mask_kernel": _once,
    "dropout_add_product_kernel": _add_product,
    "lora_gemm_kernel": _lora_gemm,
    "skinny_kernel": _skinny,
    "token_sum_kernel": _token_sum,
    "sum_parts_kernel": _once,
    "shrink_kernel": _shrink,
    "expand_kernel": _expand,
    "sums_kernel": _sums,
    "nf4_dequantize_kernel": _dequantize,
    "nf4_quantize_kernel": _quantize,
    "norm_forward_kernel": _norm,
    "norm_backward_kernel": _norm,
    "norm_forward_looped_kernel": _norm_forward_looped,
    "norm_backward_looped_kernel": _norm_backward_looped,
    "norm_weight_gradient_kernel": _norm_weight_gradient,
    "sum_partial_kernel": _once,
    "rope_kernel": _rope,
}
