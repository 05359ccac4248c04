"""NF4Linear: the module, its checkpoint keys (bitsandbytes', both ways), and what it refuses to load."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from lora import nf4_format
from lora.errors import LoRAError
from lora.nf4_format import BLOCK_SIZES, STATE, from_checkpoint, to_checkpoint
from lora.nf4_layer import NF4Linear, as_bytes, as_floats
from lora.projection import NF4Weight
from lora.reference.nf4 import nf4_bits, nf4_bytes, nf4_dequantize, nf4_quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
State = dict[str, Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(
    in_features: int = 70, out_features: int = 24, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, dtype=dtype)
    layer.weight.data = normal(out_features, in_features, seed=seed, dtype=dtype)
    layer.bias.data = normal(out_features, seed=seed + 1, dtype=dtype)
    return layer


def layer(**options: Any) -> NF4Linear:
    dtype = options.pop("dtype", torch.float32)
    return NF4Linear.from_linear(linear(dtype=dtype), **options)


def same_weight(a: NF4Weight, b: NF4Weight) -> bool:
    """Every tensor bit for bit, and every other field."""
    tensors = [torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)]
    return all(tensors)


# --- the module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_forward_and_gradients_are_those_of_the_decoded_weight(double_quant: bool) -> None:
    nf4 = layer(double_quant=double_quant)
    dense = nf4_dequantize(nf4.quantised)
    x, dy = normal(2, 5, 70, seed=5).requires_grad_(), normal(2, 5, 24, seed=6)
    expected_x = x.detach().clone().requires_grad_()
    h, expected = nf4(x), F.linear(expected_x, dense, nf4.bias)
    h.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(h, expected)
    torch.testing.assert_close(x.grad, expected_x.grad)
    assert nf4.bias is not None and nf4.bias.grad is not None
    assert not h.eq(F.linear(x, linear().weight, nf4.bias)).all()  # it is not the weight from before quantisation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 128, "nested_block_size": 32}])
def test_from_linear_holds_the_quantised_weight(options: dict[str, Any], dtype: torch.dtype) -> None:
    source = linear(dtype=dtype).eval()
    nf4 = NF4Linear.from_linear(source, **options)
    assert same_weight(nf4.quantised, nf4_quantize(source.weight, **options))
    assert (nf4.in_features, nf4.out_features, nf4.dtype, nf4.training) == (70, 24, dtype, False)
    assert nf4.bias is source.bias
    assert nf4.weight.shape == (70 * 24 // 2, 1)
    for name, parameter in nf4.named_parameters():
        if name != "bias":
            assert parameter.dtype == torch.uint8 and not parameter.requires_grad, name


@pytest.mark.parametrize("options", [{}, {"double_quant": False}, {"block_size": 256, "nested_block_size": 64}])
def test_a_new_layer_has_the_same_parameters_and_a_weight_of_zero(options: dict[str, Any]) -> None:
    new, filled = NF4Linear(70, 24, dtype=torch.bfloat16, **options), layer(dtype=torch.bfloat16, **options)
    assert {n: (p.shape, p.dtype) for n, p in new.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in filled.named_parameters()
    }
    assert torch.count_nonzero(nf4_dequantize(new.quantised)) == 0
    assert torch.count_nonzero(new(normal(3, 70, dtype=torch.bfloat16))) == 0
    assert NF4Linear(3, 5, bias=False).bias is None


def test_repr_tells_the_geometry() -> None:
    text = repr(layer(double_quant=False, block_size=128, dtype=torch.bfloat16))
    for part in ("in_features=70", "out_features=24", "bias=True", "bfloat16", "block_size=128", "double_quant=False"):
        assert part in text


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (576, 192), (100, 77)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_parameter_bytes_are_the_arithmetic(in_features: int, out_features: int, double_quant: bool) -> None:
    nf4 = NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=False), double_quant=double_quant)
    n = in_features * out_features
    blocks = math.ceil(n / 64)
    absmax = blocks + 4 * math.ceil(blocks / 256) + 4 if double_quant else 4 * blocks
    stored = sum(parameter.nbytes for parameter in nf4.parameters())
    assert stored == math.ceil(n / 2) + absmax == nf4_bytes(nf4.quantised)
    assert nf4_bits(nf4.quantised) == 8 * stored / n


def test_numbers_survive_as_bytes_whatever_their_alignment() -> None:
    numbers = normal(7)
    raw = as_bytes(numbers)
    assert raw is not None and raw.shape == (7, 4) and raw.dtype == torch.uint8
    assert torch.equal(as_floats(raw), numbers) and as_floats(raw).data_ptr() == numbers.data_ptr()
    for offset in range(4):  # as rows of a larger buffer, where a file or a sharding may have put them
        buffer = torch.zeros(offset + 28, dtype=torch.uint8)
        buffer[offset:] = raw.flatten()
        assert torch.equal(as_floats(buffer[offset:].view(7, 4)), numbers)
    assert as_bytes(None) is None


# --- moving, casting, copying ------------------------------------------------------------------------------------

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to": (lambda m: m.to(torch.float16), torch.float16),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "device": (lambda m: m.to("cpu"), torch.float32),
    "parent": (lambda m: nn.Sequential(m).to(torch.bfloat16)[0], torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_casting_moves_the_bias_and_the_dtype_but_no_quantised_byte(cast: str, double_quant: bool) -> None:
    nf4 = layer(double_quant=double_quant)
    before = {name: p.clone() for name, p in nf4.named_parameters()}
    change, dtype = CASTS[cast]
    after = change(nf4)
    assert isinstance(after, NF4Linear) and after.dtype == dtype
    assert after.bias is not None and after.bias.dtype == dtype
    assert nf4_dequantize(after.quantised).dtype == dtype
    for name, parameter in after.named_parameters():
        if name != "bias":
            assert parameter.dtype == torch.uint8 and torch.equal(parameter, before[name]), name
    assert after(normal(2, 70).to(dtype)).dtype == dtype


def through_pickle(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copied = torch.load(buffer, weights_only=False)
    assert isinstance(copied, nn.Module)
    return copied


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_copies_are_equal_and_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    nf4 = layer(dtype=torch.bfloat16).eval()
    twin = duplicate(nf4)
    assert isinstance(twin, NF4Linear) and same_weight(twin.quantised, nf4.quantised)
    x = normal(3, 70, dtype=torch.bfloat16)
    expected = nf4(x)
    assert torch.equal(twin(x), expected) and twin.training == nf4.training
    twin.weight.data.zero_()
    assert torch.equal(nf4(x), expected)


def test_a_meta_layer_takes_a_checkpoint_by_assignment() -> None:
    source = layer(dtype=torch.bfloat16)
    empty = NF4Linear(70, 24, dtype=torch.float32, device="meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert set(empty.state_dict()) == set(source.state_dict())
    with pytest.raises(LoRAError, match=r"weight is on the meta device: load it with .*assign=True"):
        empty.load_state_dict(source.state_dict())
    empty.load_state_dict(source.state_dict(), assign=True)
    assert same_weight(empty.quantised, source.quantised)  # its dtype too, as with nn.Linear
    assert not empty.weight.requires_grad and torch.equal(empty.bias, source.bias)  # type: ignore[arg-type]


def test_loading_by_copy_keeps_the_module_and_its_dtype() -> None:
    source, target = layer(dtype=torch.bfloat16), NF4Linear(70, 24, dtype=torch.float32)
    pointers = {name: p.data_ptr() for name, p in target.named_parameters()}
    target.load_state_dict(source.state_dict())
    assert same_weight(target.quantised, source.quantised._replace(dtype=torch.float32))
    assert {name: p.data_ptr() for name, p in target.named_parameters()} == pointers


@given(
    in_features=st.integers(1, 90),
    out_features=st.integers(1, 40),
    block_size=st.sampled_from(BLOCK_SIZES[:4]),
    nested_block_size=st.sampled_from((32, 64, 256)),
    double_quant=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    prefix=st.sampled_from(("", "model.layers.0.mlp.up_proj.")),
)
def test_state_dict_round_trip(
    in_features: int,
    out_features: int,
    block_size: int,
    nested_block_size: int,
    double_quant: bool,
    bias: bool,
    dtype: torch.dtype,
    prefix: str,
) -> None:
    options: dict[str, Any] = {
        "block_size": block_size,
        "nested_block_size": nested_block_size,
        "double_quant": double_quant,
    }
    source = NF4Linear.from_linear(nn.Linear(in_features, out_features, bias=bias, dtype=dtype), **options)
    if not double_quant:
        options.pop("nested_block_size")
    target = NF4Linear(in_features, out_features, bias=bias, dtype=dtype, **options)
    state = source.state_dict(prefix=prefix)
    assert all(key.startswith(prefix) for key in state)
    expected = source.quantised if double_quant else source.quantised._replace(nested_block_size=256)
    assert same_weight(from_checkpoint(state, prefix), expected)
    target.load_state_dict({key.removeprefix(prefix): tensor for key, tensor in state.items()})
    assert same_weight(target.quantised, expected)
    assert bias is (target.bias is not None)


# --- bitsandbytes' checkpoints -----------------------------------------------------------------------------------


def bnb_linear(source: nn.Linear, double_quant: bool, **options: Any) -> Any:
    """bitsandbytes' own quantised layer; `.to` is what quantises there."""
    theirs = bitsandbytes.nn.Linear4bit(
        source.in_features,
        source.out_features,
        bias=source.bias is not None,
        compute_dtype=source.weight.dtype,
        compress_statistics=double_quant,
        quant_type=options.pop("quant_type", "nf4"),
        **options,
    )
    theirs.load_state_dict(source.state_dict())
    theirs.weight.data = theirs.weight.data.to(source.weight.dtype)
    return theirs.to("cpu")


def bnb_decoded(theirs: Any) -> Tensor:
    return bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_reads_what_bitsandbytes_saved(double_quant: bool, dtype: torch.dtype) -> None:
    theirs = bnb_linear(linear(128, 40, dtype=dtype), double_quant)
    ours = NF4Linear(128, 40, dtype=dtype, double_quant=double_quant, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert ours.dtype == dtype
    assert torch.equal(nf4_dequantize(ours.quantised), bnb_decoded(theirs))
    assert torch.equal(ours.bias, theirs.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reads_what_we_saved(double_quant: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through a safetensors file and the function transformers calls; and what it saves then is what we had saved."""
    ours = NF4Linear.from_linear(linear(128, 40, dtype=dtype), double_quant=double_quant)
    save_file(ours.state_dict(prefix="fc."), tmp_path / "model.safetensors")
    state = {key.removeprefix("fc."): tensor for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    theirs = bitsandbytes.nn.Linear4bit(128, 40, compute_dtype=dtype, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        data=state["weight"],
        quantized_stats={key: tensor for key, tensor in state.items() if key.startswith("weight.")},
        device="cpu",
        module=theirs,
    )
    theirs.bias.data = state["bias"]
    assert theirs.weight.quant_state.nested is double_quant
    assert theirs.weight.quant_state.blocksize == 64 and theirs.weight.quant_state.dtype == dtype
    assert torch.equal(bnb_decoded(theirs), nf4_dequantize(ours.quantised))
    back = theirs.state_dict()
    assert list(back) == list(ours.state_dict())
    for key, tensor in ours.state_dict().items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key


def test_checkpoint_keys_and_types_are_those_of_facts() -> None:
    state = layer().state_dict()
    blocks = math.ceil(70 * 24 / 64)
    assert {key: (tensor.dtype, list(tensor.shape)) for key, tensor in state.items() if key != STATE} == {
        "weight": (torch.uint8, [70 * 24 // 2, 1]),
        "bias": (torch.float32, [24]),
        "weight.absmax": (torch.uint8, [blocks]),
        "weight.quant_map": (torch.float32, [16]),
        "weight.nested_absmax": (torch.float32, [1]),
        "weight.nested_quant_map": (torch.float32, [256]),
    }
    fields = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
    offset = fields.pop("nested_offset")
    assert torch.tensor(offset) == layer().quantised.nested_offset
    assert fields == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 70],
        "nested_blocksize": 256, "nested_dtype": "float32",
    }  # fmt: skip


def test_transformers_with_bitsandbytes_reads_and_writes_the_same_files(tmp_path: Path) -> None:
    """A saved model directory, both ways, through `from_pretrained` and `save_pretrained` as they are."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    ours = LlamaForCausalLM(config)
    ours.save_pretrained(tmp_path / "dense")
    lora.quantize(ours)
    ours.config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    ours.save_pretrained(tmp_path / "ours")

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    layers = {path: module for path, module in ours.named_modules() if isinstance(module, NF4Linear)}
    assert len(layers) == 7
    for path, module in layers.items():
        assert torch.equal(bnb_decoded(theirs.get_submodule(path)), nf4_dequantize(module.quantised)), path

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    missing, unexpected = ours.load_state_dict(stored, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied, so not in the file
    for path, module in layers.items():
        assert torch.equal(bnb_decoded(theirs.get_submodule(path)), nf4_dequantize(module.quantised)), path


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_bytes_stored_under_a_wider_dtype(storage: torch.dtype) -> None:
    """bitsandbytes' quant_storage, which FSDP users set."""
    theirs = bnb_linear(linear(128, 40), True, quant_storage=storage)
    state = theirs.state_dict()
    assert state["weight"].dtype == storage
    assert torch.equal(nf4_dequantize(from_checkpoint(state)), bnb_decoded(theirs))


def test_a_whole_model_saves_to_one_safetensors_file(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory: every layer must bring its own tables."""
    model = nn.Sequential(layer(), nn.ReLU(), NF4Linear.from_linear(linear(24, 70)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin = nn.Sequential(NF4Linear(70, 24), nn.ReLU(), NF4Linear(24, 70))
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(twin(normal(3, 70)), model(normal(3, 70)))


def test_float64_is_saved_as_float32_which_loses_nothing() -> None:
    nf4 = layer().double()
    weight = from_checkpoint(nf4.state_dict())
    assert weight.dtype == torch.float32
    assert torch.equal(nf4_dequantize(weight).double(), nf4_dequantize(nf4.quantised))


def edit(**fields: Any) -> Callable[[State], None]:
    """Changes fields of the JSON in a state dict; None takes one out."""

    def change(state: State) -> None:
        stored = json.loads(bytes(state[STATE].tolist())) | fields
        kept = {key: value for key, value in stored.items() if value is not None}
        state[STATE] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)

    return change


def put(key: str, tensor: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({key: tensor})


def drop(key: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[key]

    return change


def poison(key: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[key] = state[key].clone()
        state[key][0] = value

    return change


DAMAGE: dict[str, tuple[Callable[[State], None], str]] = {
    "no codes": (drop("weight"), r"weight is missing, expected 840 bytes"),
    "no absmax": (drop("weight.absmax"), r"weight\.absmax is missing, expected torch\.uint8 \[27\]"),
    "no map": (drop("weight.quant_map"), r"weight\.quant_map is missing"),
    "no second absmax": (drop("weight.nested_absmax"), r"nested_absmax is missing, expected torch\.float32 \[1\]"),
    "no second map": (drop("weight.nested_quant_map"), r"nested_quant_map is missing"),
    "no state": (drop(STATE), r"bitsandbytes__nf4 is missing"),
    "dense": (put("weight", torch.zeros(24, 70)), r"weight is torch\.float32 \[24, 70\], 6720 bytes, expected the 840"),
    "short codes": (put("weight", torch.zeros(839, 1, dtype=torch.uint8)), r"839 bytes, expected the 840"),
    "absmax not nested": (put("weight.absmax", torch.zeros(27)), r"absmax is torch\.float32 \[27\], expected torch\.u"),
    "long absmax": (put("weight.absmax", torch.zeros(28, dtype=torch.uint8)), r"absmax is torch\.uint8 \[28\], expec"),
    "long second": (put("weight.nested_absmax", torch.zeros(2)), r"nested_absmax is torch\.float32 \[2\], expected"),
    "half second": (put("weight.nested_absmax", torch.zeros(1).half()), r"nested_absmax is torch\.float16 \[1\]"),
    "nan second": (poison("weight.nested_absmax", math.nan), r"nested_absmax holds a NaN"),
    "other map": (poison("weight.quant_map", -0.99), r"quant_map\[0\] is -0\.99.*, expected -1\.0.*another code table"),
    "other second map": (poison("weight.nested_quant_map", -1.0), r"nested_quant_map\[0\] is -1\.0, expected -0\.9929"),
    "nan map": (poison("weight.quant_map", math.nan), r"quant_map holds a NaN"),
    "fp4 in state": (edit(quant_type="fp4"), r"says quant_type = 'fp4', expected 'nf4'"),
    "block size": (edit(blocksize=48), r"says blocksize = 48, expected one of"),
    "no block size": (edit(blocksize=None), r"says blocksize = None"),
    "dtype": (edit(dtype="int8"), r"says dtype = 'int8', expected one of \('float32'"),
    "listed dtype": (edit(dtype=["float32"]), r"says dtype = \['float32'\]"),
    "negative shape": (edit(shape=[24, -70]), r"says shape = \[24, -70\], expected a list of positive integers"),
    "no shape": (edit(shape=None), r"says shape = None"),
    "other shape": (edit(shape=[70, 24]), r"shape = \(70, 24\), expected \(24, 70\)"),
    "wrong count": (edit(shape=[24, 71]), r"840 bytes, expected the 852 bytes"),
    "nested size": (edit(nested_blocksize=7), r"says nested_blocksize = 7"),
    "other nested size": (edit(nested_blocksize=128), r"nested_block_size = 128, expected 256"),
    "nested dtype": (edit(nested_dtype="float16"), r"says nested_dtype = 'float16', expected 'float32'"),
    "offset": (edit(nested_offset="0.1"), r"says nested_offset = '0\.1', expected a finite number"),
    "nan offset": (edit(nested_offset=math.nan), r"says nested_offset = nan"),
    "no offset": (edit(nested_offset=None), r"absmax is torch\.uint8 \[27\], expected torch\.float32 \[27\]"),
    "not JSON": (put(STATE, torch.tensor([123, 34], dtype=torch.uint8)), r"does not hold JSON"),
    "not text": (put(STATE, torch.tensor([255, 254], dtype=torch.uint8)), r"does not hold JSON"),
    "not bytes": (put(STATE, torch.zeros(3)), r"does not hold JSON"),
    "a JSON list": (put(STATE, torch.tensor([91, 93], dtype=torch.uint8)), r"holds \[\], expected a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_key(damage: str) -> None:
    change, message = DAMAGE[damage]
    model = nn.Sequential(layer())
    before = copy.deepcopy(model).state_dict()
    state = layer().state_dict()
    change(state)
    with pytest.raises(LoRAError, match=rf"^0\.(?=weight).*{message}"):
        model.load_state_dict({f"0.{key}": tensor for key, tensor in state.items()})
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_fp4_is_refused() -> None:
    theirs = bnb_linear(linear(), True, quant_type="fp4")
    with pytest.raises(LoRAError, match="weight is stored in FP4, expected NF4"):
        layer().load_state_dict(theirs.state_dict())


def test_other_blocks_are_refused_both_ways() -> None:
    with pytest.raises(LoRAError, match="block_size = 64, expected 128"):
        layer(block_size=128).load_state_dict(layer().state_dict())
    with pytest.raises(LoRAError, match="double_quant = True, expected False"):
        layer(double_quant=False).load_state_dict(layer().state_dict())
    with pytest.raises(LoRAError, match="block_size is 63"):
        NF4Linear(4, 4, block_size=63)


def test_a_partial_load_leaves_the_layer_out() -> None:
    """strict=False is how an adapter's weights get into a model: what is not there stays."""
    nf4 = layer()
    before = nf4.quantised.codes.clone()
    missing, unexpected = nf4.load_state_dict({"bias": torch.ones(24), "extra": torch.ones(1)}, strict=False)
    assert torch.equal(nf4.quantised.codes, before) and torch.equal(nf4.bias, torch.ones(24))  # type: ignore[arg-type]
    assert missing == ["weight"] and unexpected == ["extra"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"\. $'):
        nf4.load_state_dict({"bias": torch.ones(24)})
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        nf4.load_state_dict(to_checkpoint(nf4.quantised))


def test_the_format_names_every_tensor_it_writes() -> None:
    names = {value for name, value in vars(nf4_format).items() if name.isupper() and isinstance(value, str)}
    assert names | {"weight"} == set(to_checkpoint(layer().quantised))
