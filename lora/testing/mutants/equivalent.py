"""Generated mistakes that no input can tell from the source, each with the reason why."""

from __future__ import annotations

COST = "It decides only which way the work is done, or whether some is done in vain: every way gives the same result. "
PROMOTED = "The operand it meets next is float32 already, and the result of two types is of the wider one. "

EQUIVALENT: dict[str, str] = {
    "linear:Kept.flat: (None, (None,) * len(self.gains)) if cast is None else (cast.A, cast.B) → "
    "((None, (None,) * len(self.gains)))": COST + "Without the kept casts the backward casts the adapters again.",
    "linear:Kept.of: factors_of(parts, dtype) if A is None else Factors(A, B, True) → (factors_of(parts, dtype))": COST
    + "The adapters are cast again instead of taken from what was kept.",
    "operands:multiplied: rows.new_empty(len(rows), sum(sizes)) if out is None else out → (rows.new_empty(len(rows), "
    "sum(sizes)))": COST + "The products are written to fresh memory instead of the buffer that may be used.",
    "operands:columns_of_one: first.stride(0) < width → (first.stride(0) <= width)": COST
    + "Gradients that fill their buffer go back through one product each.",
    "mlp:hidden_gradient: behind.factors is None → (behind.factors is not None)": COST
    + "The update is added by the product, not by the activation's kernel.",
    "mlp:gated_backward: dh if with_h else None → (dh)": COST + "What is not wanted is not read.",
    "mlp:write_product: torch.mul(left, right, out=out) → torch.mul(right, left, out=out)": "A product of two numbers "
    "is the same in either order.",
    "kernels.nf4:rounded: b_value.to(dtype) → (b_value)": "The store that follows converts to the same type of its "
    "pointer, in the same way.",
    "dropout:masks_in_products: 0 → 1": COST + "At the least p there is, 1/65536, D(x) is written and then multiplied.",
    "dropout:_signed: 63 → 64": "Both numbers are the same 64 bits: PyTorch takes one with or without a sign.",
    "attention:backward_blocks: 0.0 → 0.01 (2)": "PyTorch's kernel for CPUs has no dropout, and its backward does not "
    "read the argument.",
    "checkpoint:Operations.ends: all(y.requires_grad for y in product) → any((y.requires_grad for y in "
    "product))": "All outputs of an autograd function have a gradient, or none has.",
    "dora:row_norms: dense.shape[1] * wide.itemsize → ((dense.shape[1]) + (wide.itemsize))": COST
    + "It is the number of rows at a time, from one to all.",
    "multi_lora:groups_for: 0 → 1": "For x without features only, where every update is zero, whose tokens these are.",
    "multi_lora:EqualGroups.__init__: None if len(mine) == adapters else torch.tensor([*mine], device=order.device) → "
    "(torch.tensor([*mine], device=order.device))": COST + "The adapters that are there are picked out where all are.",
    "kernels.multi_lora:group_tokens: 1 → 2 (3)": COST + "It is the number of rows of a block, for a single adapter.",
    "kernels.multi_lora:_sums: sum_tile_for(N, r, wide.dtype) → sum_tile_for(r, N, wide.dtype)": COST
    + "It is another size of tile.",
    'kernels.norm:_partials: triton.cdiv(rows.M, block["BLOCK_M"]) → triton.cdiv(block["BLOCK_M"], rows.M)': COST
    + "It is how many programs share the tiles, and each goes on to the next tile until there are no more.",
    "kernels.norm_kernels:norm_backward_looped_kernel: tl.program_id(0) * BLOCK_M → (tl.program_id(0))": "A program "
    "of looped rows has one of them: BLOCK_M is 1.",
    "kernels.norm_kernels:load_normed: 0.0 → 0.01 (3)": "Outside the matrix dy is 0, and nothing is stored there.",
    "kernels.gemm:mask_arguments: True → False": "How a mask is counted means nothing where there is no mask.",
    "kernels.gemm:lora_gemm_kernel: tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32) → "
    "(tl.load(bias_ptr + o_n, mask=o_n < N, other=0.0))": PROMOTED + "The bias is added to the accumulator.",
    "kernels.dora:dora_norm: block_of(N, block_r, lora_A.dtype, is_even(rows) and is_even(lora_A)) → "
    "block_of(block_r, N, lora_A.dtype, is_even(rows) and is_even(lora_A))": COST + "It is another size of tile.",
}
