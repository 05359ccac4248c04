"""NF4Linear: a frozen linear layer whose weight is kept in 4 bits, in place of nn.Linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora import dispatch
from lora.errors import LoRAError
from lora.nf4_format import block_count, check_block_size, from_checkpoint, to_checkpoint
from lora.projection import NF4Weight, Projection

TWO_ZEROS = 0x77  # a byte of packed codes whose both halves decode to 0


class NF4Linear(nn.Module):
    """h = x W'ᵀ + b, with W' the matrix nearest to W that NF4 can hold: see `lora.reference.nf4`.

    Everything quantised is a frozen uint8 parameter, float32 numbers too (four bytes a row): a cast of the model, or
    a mixed-precision policy that casts parameters, must not reach them, and sharding by rows never splits a number.
    The state dict has bitsandbytes' keys, so that either program reads what the other has saved.

    Args:
        in_features, out_features, bias: as nn.Linear's. The weight is zero until one is loaded.
        dtype: what the weight counts as: what it is decoded to unless asked otherwise. It follows `.to(dtype)`.
        block_size, double_quant, nested_block_size: see `nf4_quantize`.
    """

    weight: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_size: int = 64,
        double_quant: bool = True,
        nested_block_size: int = 256,
    ) -> None:
        super().__init__()
        check_block_size(block_size)
        check_block_size(nested_block_size, "nested_block_size")
        self.in_features, self.out_features = in_features, out_features
        dtype = dtype or torch.get_default_dtype()
        blocks = block_count(in_features * out_features, block_size)
        zero = torch.zeros(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device)
        codes = torch.full((-(-in_features * out_features // 2),), TWO_ZEROS, dtype=torch.uint8, device=device)
        weight = NF4Weight(codes, zero, (out_features, in_features), dtype, block_size)
        if double_quant:
            nested = torch.zeros(block_count(blocks, nested_block_size), device=device, dtype=torch.float32)
            offset = torch.zeros((), device=device, dtype=torch.float32)
            weight = weight._replace(nested_absmax=nested, nested_offset=offset, nested_block_size=nested_block_size)
        self._hold(weight)
        empty = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", empty)

    @classmethod
    def from_quantised(cls, quantised: NF4Weight, bias: nn.Parameter | None = None) -> NF4Linear:
        """A layer around `quantised`, [out_features, in_features], and `bias`, both as they are."""
        out_features, in_features = quantised.shape
        layer = cls(
            in_features, out_features, bias=False, device="meta", dtype=quantised.dtype, block_size=quantised.block_size
        )
        layer._hold(quantised)
        layer.bias = bias
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str = "weight", **options: Any) -> NF4Linear:
        """A layer around the quantised weight of `linear` and its very bias.

        Args:
            name: what error messages call the weight.
            options: `nf4_quantize`'s block_size, double_quant, nested_block_size.
        """
        layer = cls.from_quantised(dispatch.ops.nf4_quantize(linear.weight, name=name, **options), linear.bias)
        return layer.train(linear.training)

    @property
    def quantised(self) -> NF4Weight:
        """The weight as the operations take it, without a copy."""
        shape = (self.out_features, self.in_features)
        codes = self.weight.flatten()
        if self.nested_absmax is None or self.nested_offset is None:
            return NF4Weight(codes, as_floats(self.absmax), shape, self.dtype, self.block_size)
        nested, offset = as_floats(self.nested_absmax), as_floats(self.nested_offset)[0]
        return NF4Weight(codes, self.absmax, shape, self.dtype, self.block_size, nested, offset, self.nested_block_size)

    def projection(self) -> Projection:
        """The frozen projection, without an adapter."""
        return Projection(self.quantised, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return cast(Tensor, dispatch.ops.lora_linear(x, self.projection()))

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        nested = self.nested_absmax is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.dtype}, block_size={self.block_size}, double_quant={nested}"
        )

    def _hold(self, quantised: NF4Weight) -> None:
        """Makes `quantised` this layer's parameters, geometry and dtype; the tensors are not copied."""
        self.dtype, self.block_size = quantised.dtype, quantised.block_size
        self.nested_block_size = quantised.nested_block_size
        for name, tensor in _parameters_of(quantised).items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # what .to() or .half() makes of a dense weight
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        from lora.distributed import is_sharded

        if self.weight.is_meta and is_sharded(self.weight):  # it would hand the bytes out under our files' names
            raise LoRAError(
                f"{prefix}weight is sharded and without values: accelerate's cpu_ram_efficient_loading does not know "
                "4-bit weights. Either set it to False (fsdp_cpu_ram_efficient_loading: false), or shard the model "
                "with lora.distributed.shard."
            )
        tensors: dict[str, Tensor | None] = {"weight": self.weight, "bias": self.bias}  # in bitsandbytes' order
        tensors |= {key: tensor for key, tensor in to_checkpoint(self.quantised).items() if key != "weight"}
        for key, tensor in tensors.items():
            if tensor is not None:
                destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *reports: list[str],
    ) -> None:
        """Checks bitsandbytes' keys and hands torch's own loader this layer's parameters instead of them."""
        stored = [key for key in state_dict if key == prefix + "weight" or key.startswith(prefix + "weight.")]
        ours = {key: value for key, value in state_dict.items() if key.startswith(prefix) and key not in stored}
        if stored:
            assign = local_metadata.get("assign_to_params_buffers", False)
            quantised = from_checkpoint(state_dict, prefix)
            self._check_fit(quantised, prefix, assign)
            self.dtype = quantised.dtype if assign else self.dtype
            parameters = _parameters_of(quantised)
        else:  # nothing for us: strict or not, torch decides what becomes of a missing key
            missing_keys.append(prefix + "weight")
            parameters = {name: parameter for name, parameter in self._parameters.items() if name != "bias"}
        ours |= {prefix + name: tensor for name, tensor in parameters.items() if tensor is not None}
        super()._load_from_state_dict(ours, prefix, local_metadata, strict, missing_keys, *reports)

    def _check_fit(self, quantised: NF4Weight, prefix: str, assign: bool) -> None:
        """Raises LoRAError unless `quantised` has this layer's shape and blocks."""
        nested = self.nested_absmax is not None
        expected = {
            "shape": (self.out_features, self.in_features),
            "block_size": self.block_size,
            "double_quant": nested,
            "nested_block_size": self.nested_block_size if nested else None,
        }
        found = {
            "shape": quantised.shape,
            "block_size": quantised.block_size,
            "double_quant": quantised.nested_absmax is not None,
            "nested_block_size": quantised.nested_block_size if quantised.nested_absmax is not None else None,
        }
        for what, value in expected.items():
            if found[what] != value:
                raise LoRAError(
                    f"{prefix}weight was stored with {what} = {found[what]}, expected {value}: build the NF4Linear to "
                    "fit the checkpoint, or with NF4Linear.from_quantised."
                )
        if self.weight.is_meta and not assign:
            raise LoRAError(f"{prefix}weight is on the meta device: load it with load_state_dict(..., assign=True).")


def _parameters_of(quantised: NF4Weight) -> dict[str, Tensor | None]:
    """What an NF4Linear stores, by parameter name: uint8 all of it."""
    return {
        "weight": quantised.codes.reshape(-1, 1),  # [ceil(n / 2), 1]
        "absmax": as_bytes(quantised.absmax),  # [blocks, 4], or [blocks] with double quantisation
        "nested_absmax": as_bytes(quantised.nested_absmax),  # [ceil(blocks / nested_block_size), 4]
        "nested_offset": as_bytes(quantised.nested_offset),  # [1, 4]
    }


def as_bytes(numbers: Tensor | None) -> Tensor | None:
    """float32 [k] as its bytes, uint8 [k, 4]; what is uint8 already stays as it is."""
    if numbers is None or numbers.dtype == torch.uint8:
        return numbers
    return numbers.reshape(-1, 1).contiguous().view(torch.uint8)


def as_floats(raw: Tensor) -> Tensor:
    """The inverse of `as_bytes`, uint8 [k, 4] -> float32 [k]: a view, but a copy where the bytes are not aligned."""
    in_graph = torch.compiler.is_compiling()  # which knows no addresses
    aligned = not in_graph and raw.is_contiguous() and raw.storage_offset() % 4 == 0
    return (raw if aligned else raw.clone(memory_format=torch.contiguous_format)).view(torch.float32).flatten()
