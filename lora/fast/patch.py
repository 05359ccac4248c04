"""What `fuse` changes in a model: one module instance at a time, with a handle that undoes it.

    attention   q, k and v are computed together when the first of them is called; RoPE is one function for q and k;
                on a CPU causal attention runs in blocks of what a token may see
    MLP         gate, up, activation and down are one function
    norms       RMSNorm is one function
    layers      where a norm follows the sum with the residual, the sum and the norm are one function
    loss        with labels, in training, the logits are never formed

Known families are told by the class names of their modules. Anything else keeps its own forward, and its adapted
layers are still fused one by one. Everything goes through `lora.ops`, so a fused model also runs on the reference.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from lora import dispatch
from lora.distributed import class_of
from lora.fast.attention import causal_attention, takes_attention
from lora.fast.checkpoint import attention_begins
from lora.fast.operands import rows_of_one
from lora.fast.pickling import NotPickled
from lora.layers import AdapterLayer, LoRALinear, Update
from lora.nf4_format import row_halves
from lora.nf4_layer import NF4Linear
from lora.projection import Dropout, NF4Weight, Projection
from lora.reference.mlp import hidden_dropout

LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Granite", "Olmo2", "Gemma2", "Gemma3")
MLPS = {f"{family}MLP" for family in LLAMA_LIKE}
ATTENTIONS = {f"{family}Attention" for family in (*LLAMA_LIKE, "Phi3")}
CAUSAL_LMS = {f"{family}ForCausalLM" for family in (*LLAMA_LIKE, "Phi3")}
NORMS: dict[str, dict[str, Any]] = {  # class name -> how it differs from the plain RMSNorm
    **{f"{family}RMSNorm": {} for family in (*LLAMA_LIKE, "Phi3")},
    **{f"{family}RMSNorm": {"offset": 1.0, "round_before_weight": False} for family in ("Gemma2", "Gemma3")},
    "Olmo2RMSNorm": {"round_before_weight": False},
}
ACTIVATIONS = {  # class of the model's activation -> the name our MLP knows it by
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


class Layer(NamedTuple):
    """How a decoder layer goes on after its attention: which of its modules are called, in this order."""

    after_attention: str | None  # on the attention's output, before it is added to the residual
    norm: str  # on the sum
    after_mlp: str | None  # on the MLP's output, before it is added


LLAMA_LAYER = Layer(None, "post_attention_layernorm", None)
GEMMA_LAYER = Layer("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
LAYERS = {f"{family}DecoderLayer": LLAMA_LAYER for family in LLAMA_LIKE if family != "Olmo2"} | {
    "Phi3DecoderLayer": Layer("resid_attn_dropout", "post_attention_layernorm", "resid_mlp_dropout"),
    "Gemma2DecoderLayer": GEMMA_LAYER,
    "Gemma3DecoderLayer": GEMMA_LAYER,
}


@dataclass
class Fusion:
    """What was patched, and how to undo it."""

    forwards: list[tuple[nn.Module, Any]] = field(default_factory=list)  # modules, and the forward of ours they got
    stacked: list[list[nn.Parameter]] = field(default_factory=list)  # weights laid one after another
    hooks: list[RemovableHandle] = field(default_factory=list)  # on the modules that those belong to
    notes: dict[str, str] = field(default_factory=dict)  # module path -> what was done, or why not

    def undo(self) -> None:
        """Takes every patch back; weights get memory of their own again, bit for bit the same.

        A forward that somebody put around ours since (TRL, accelerate) stays, and goes on calling ours.
        """
        for module, ours in self.forwards:
            if vars(module).get("forward") is not ours:
                continue
            for name in ("not_pickled", "forward", "shared_input", "fused_options"):
                vars(module).pop(name, None)
        for group in self.stacked:
            for weight in group:
                weight.data = weight.data.clone()
        for hook in self.hooks:
            hook.remove()
        self.forwards, self.stacked, self.hooks, self.notes = [], [], [], {}

    def notes_now(self, model: nn.Module) -> dict[str, str]:
        """The notes, and where the active adapters take apart what was patched to run together."""
        apart = "; now one by one: its active adapters drop out differently, or several have DoRA"
        return {
            path: note + apart if runs_apart(model.get_submodule(path)) else note for path, note in self.notes.items()
        }


def patch_model(model: nn.Module) -> Fusion:
    """Patches every module of a known kind; see the top of this file."""
    fusion = Fusion()
    for path, module in list(model.named_modules()):
        kind = class_of(module).__name__
        if not class_of(module).__module__.startswith("transformers.models.") or "forward" in vars(module):
            continue
        if kind in ATTENTIONS:
            patch_attention(fusion, path, module)
        elif kind in MLPS or kind == "Phi3MLP":
            patch_mlp(fusion, path, module)
        elif kind in NORMS:
            patch(fusion, module, norm_forward, NORMS[kind])
            fusion.notes[path] = "RMSNorm in one pass"
        elif kind in CAUSAL_LMS:
            patch(fusion, module, with_signature_of(type(module).forward), {})
            fusion.notes[path] = "loss without logits, in training with labels"
    for path, module in list(model.named_modules()):  # now that their norms are patched
        known = class_of(module).__module__.startswith("transformers.models.") and "forward" not in vars(module)
        if known and class_of(module).__name__ in LAYERS:
            patch_layer(fusion, path, module)
        elif known and class_of(module).__name__ == "Olmo2DecoderLayer":
            fusion.notes[path] = "its own: the norms come before the sums, so there is nothing to fuse"
    return fusion


def patch(fusion: Fusion, module: nn.Module, forward: Callable[..., Any], options: dict[str, Any]) -> None:
    """Gives one instance another forward; a bound method, so that a deep copy's is its own."""
    vars(module)["not_pickled"] = NotPickled()  # first, so that a pickler meets it before the rest
    vars(module)["fused_options"] = options
    vars(module)["forward"] = types.MethodType(forward, module)
    fusion.forwards.append((module, vars(module)["forward"]))


def runs(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether the module's own forward is this one of ours: not if it was given another since."""
    return getattr(vars(module).get("forward"), "__func__", None) is forward


# ---- attention


class SharedInput:
    """Projections of one x, computed together when the first is called and handed out to the others."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self.x: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def output_of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of one of the layers; each is handed out once, so nothing outlives the attention's forward."""
        if self.x is not x or id(layer) not in self.outputs:
            self.x, self.outputs = None, {}
            if not together(self.layers):
                alone: Tensor = type(layer).forward(layer, x)
                return alone
            updates = [update_of(each) for each in self.layers]
            dropout = next((update.dropout for update in updates if update.dropout is not None), None)
            outputs = dispatch.ops.lora_qkv(x, *(update.projection for update in updates), dropout=dropout)
            self.x = x
            self.outputs = {id(each): output for each, output in zip(self.layers, outputs, strict=True)}
        output = self.outputs.pop(id(layer))
        if not self.outputs:
            self.x = None
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        import copy

        return SharedInput([copy.deepcopy(layer, memo) for layer in self.layers])


def shared_forward(self: Any, x: Tensor) -> Tensor:
    """The forward of a projection that shares its x."""
    output: Tensor = self.shared_input.output_of(self, x)
    return output


def patch_attention(fusion: Fusion, path: str, module: Any) -> None:
    """q, k and v together, and RoPE through `lora.ops`."""
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    notes = []
    if all(isinstance(layer, LoRALinear) or plain(layer) for layer in layers):
        stack_weights(fusion, layers)
        shared = SharedInput([layer for layer in layers if layer is not None])
        for layer in shared.layers:
            patch(fusion, layer, shared_forward, {})
            vars(layer)["shared_input"] = shared
        notes.append("q, k, v in one product")
    forward = inspect.unwrap(type(module).forward)
    if "apply_rotary_pos_emb" in forward.__code__.co_names and forward is type(module).forward:
        announces = asks_for_attention(forward)
        patch(fusion, module, with_rotary(forward), {"announces_attention": True} if announces else {})
        notes.append("RoPE in one pass")
        notes += ["causal attention in blocks on a CPU"] if announces else []
    fusion.notes[path] = ", ".join(notes) or "left as it is: an attention of another shape"


@functools.cache
def with_rotary(forward: Any) -> Any:
    """An attention's forward with our `rotary`: one function for all instances, with code and globals of its own.

    torch.compile keeps what it compiled with the code object and finds it by name in the globals: neither may be
    shared with a function that does not share the other. And it looks globals that have a module's name up in that
    module, where these are not.
    """
    code = forward.__code__.replace(co_name=f"fused_{forward.__name__}")
    names = {**forward.__globals__, "apply_rotary_pos_emb": rotary}
    del names["__name__"]
    if asks_for_attention(forward):
        names["ALL_ATTENTION_FUNCTIONS"] = Announcing(names["ALL_ATTENTION_FUNCTIONS"])
    fused = types.FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    fused.__module__ = forward.__module__
    return fused


def asks_for_attention(forward: Any) -> bool:
    """Whether an attention's forward takes its function from transformers' table, by the call that `Announcing` has."""
    return {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= {*forward.__code__.co_names}


class Announcing:
    """transformers' attention functions, each of which tells a checkpoint when it runs; ours for SDPA's on a CPU."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """The attention function of that name."""
        attention = self.functions.get_interface(name, default)
        blocks = name == "sdpa" and dispatch.get_backend() != "reference"

        def announced(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            with attention_begins():
                # beyond the mask by name only: what another place means is the attention function's to say
                if blocks and len(args) <= 1 and is_plain(module, query, key, value, *args, **kwargs):
                    return causal_attention(query, key, value, kwargs.get("scaling")), None
                return attention(module, query, key, value, *args, **kwargs)

        return announced


def is_plain(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    is_causal: bool | None = None, **options: Any,
) -> bool:  # fmt: skip
    """Whether a call of transformers' SDPA attention is causal, each token with its own key, and no more than that."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    more = any(options.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    plain = attention_mask is None and not dropout and causal and query.shape[2] > 1 and not more
    return plain and takes_attention(query, key, value)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """What an attention's forward calls in place of transformers' apply_rotary_pos_emb."""
    if unsqueeze_dim != 1:
        raise ValueError(f"unsqueeze_dim={unsqueeze_dim}, expected 1: q and k are [batch, heads, seq, head_dim]")
    rotated: tuple[Tensor, Tensor] = dispatch.ops.rope(q, k, cos, sin)
    return rotated


# ---- MLP


def patch_mlp(fusion: Fusion, path: str, module: Any) -> None:
    """gate, up, activation and down as one function."""
    fused = hasattr(module, "gate_up_proj")  # Phi-3 stores gate and up as one matrix
    act_fn = type(module.activation_fn if fused else module.act_fn).__name__
    layers = [module.gate_up_proj] if fused else [module.gate_proj, module.up_proj]
    layers.append(module.down_proj)
    activation = ACTIVATIONS.get(act_fn)
    if activation is None:
        fusion.notes[path] = f"left as it is: its activation is {act_fn}"
        return
    if not all(isinstance(layer, LoRALinear) or plain(layer) for layer in layers):
        fusion.notes[path] = "left as it is: a projection of another kind"
        return
    if fused and not can_halve(layers[0]):
        fusion.notes[path] = "left as it is: NF4 weights of gate and up in one matrix, with a block that holds both"
        return
    stack_weights(fusion, layers[:-1])
    patch(fusion, module, mlp_forward, {"activation": activation})
    fusion.notes[path] = "gate, up and down in one function"


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """down(act(gate(x)) ⊙ up(x)) through `lora.ops`."""
    layers = mlp_layers(self)
    if not together(layers) or any(hooked(layer) for layer in layers):  # fused, they are not called
        unfused: Tensor = type(self).forward(self, x)
        return unfused
    updates = [update_of(layer) for layer in layers]
    if len(layers) == 2:  # gate and up are one matrix
        updates = [*halves(updates[0]), updates[1]]
    dropout = mlp_dropout([update.dropout for update in updates])
    projections = (update.projection for update in updates)
    y: Tensor = dispatch.ops.lora_mlp(x, *projections, dropout=dropout, **self.fused_options)
    return y


def mlp_layers(mlp: Any) -> tuple[nn.Module, ...]:
    """gate, up and down, or gate and up in one and down."""
    if hasattr(mlp, "gate_up_proj"):
        return mlp.gate_up_proj, mlp.down_proj
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def halves(update: Update) -> list[Update]:
    """A projection to gate and up at once as two that share A: the rows of the others are the first and second half."""
    weight, bias, lora_A, lora_B, scaling, magnitude = update.projection
    parts = zip(*(two(rows) for rows in (weight, bias, lora_B, magnitude)), strict=True)
    return [Update(Projection(W, b, lora_A, B, scaling, m), update.dropout) for W, b, B, m in parts]


def two(rows: Any) -> tuple[Any, Any]:
    """The first and the second half of the rows of a tensor, of an NF4 weight, or of nothing."""
    if isinstance(rows, NF4Weight):
        found = row_halves(rows)
        if found is None:
            raise TypeError("an NF4 weight with a block in both halves is not fused")
        return found
    return (None, None) if rows is None else rows.chunk(2)


def can_halve(layer: nn.Module) -> bool:
    """Whether the layer's weight is two of the same rows, side by side in memory."""
    base = getattr(layer, "base_layer", layer)
    return not isinstance(base, NF4Linear) or row_halves(base.quantised) is not None


def mlp_dropout(drops: Sequence[Dropout | None]) -> Dropout | None:
    """The one dropout behind those of gate, up and down, whose stream is the next."""
    above = next((drop for drop in drops[:2] if drop is not None), None)
    if above is None and drops[2] is not None:
        above = drops[2]._replace(stream=drops[2].stream - 1)
    in_graph = torch.compiler.is_compiling()  # where seeds are symbols, which some releases of torch do not compare
    if not in_graph and drops[2] is not None and drops[2] != hidden_dropout(above):
        raise TypeError("down_proj does not follow gate_proj's mask seed")
    return above


# ---- norms, and the sums before them


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """RMSNorm through `lora.ops`."""
    y: Tensor = dispatch.ops.rms_norm(hidden_states, self.weight, **norm_options(self))
    return y


def norm_options(norm: Any) -> dict[str, Any]:
    """What our RMSNorm is told about a patched norm, besides its weight."""
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return {"eps": eps, **norm.fused_options}


def norm_of_sum(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual: in one pass where the norm's forward is ours and nothing watches it."""
    if not is_patched_norm(norm) or hooked(norm) or x.dtype != residual.dtype:  # autocast mixes dtypes
        total = residual + x
        return norm(total), total
    y, total = dispatch.ops.rms_norm(x, norm.weight, residual=residual, **norm_options(norm))
    return y, total


def is_patched_norm(norm: Any) -> bool:
    """Whether this very module runs `norm_forward`: not if it was replaced, or given another forward since."""
    return runs(norm, norm_forward)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: its own hooks, or those on all modules."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or _has_any_global_hook()


def patch_layer(fusion: Fusion, path: str, module: Any) -> None:
    """The sum after the attention, and the norm after that sum."""
    layer = LAYERS[class_of(module).__name__]
    norm = getattr(module, layer.norm, None)
    code = inspect.unwrap(type(module).forward).__code__
    parts = ("input_layernorm", "self_attn", layer.after_attention, layer.norm, "mlp", layer.after_mlp)
    used = [name for name in code.co_names if name != "residual_multiplier"]  # in the order of their first use
    rebuilt = around(type(module).forward, layer_forward)
    if used != [name for name in parts if name] or rebuilt is None:
        fusion.notes[path] = "left as it is: a decoder layer of another shape"
    elif not is_patched_norm(norm):
        fusion.notes[path] = f"left as it is: its {layer.norm} is a {type(norm).__name__}"
    else:
        forward = type(module).forward
        options = {
            "layer": layer,
            "around": (forward, rebuilt),
            "signature": inspect.signature(inspect.unwrap(forward)),
        }
        patch(fusion, module, wrapped_layer_forward, options)
        fusion.notes[path] = f"attention's residual sum and {layer.norm} in one pass"


def wrapped_layer_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The class's forward, with what transformers wraps around it (checkpointing), and `layer_forward` inside."""
    forward, (known, rebuilt) = type(self).forward, self.fused_options["around"]
    if forward is not known:  # the class was given another since
        rebuilt = around(forward, layer_forward) or forward
    output: Tensor = rebuilt(self, *args, **kwargs)
    return output


@functools.cache
def around(function: Any, inner: Callable[..., Any]) -> Callable[..., Any] | None:
    """`function` with `inner` in place of what it wraps innermost: the same code, one name it closes over rebound.

    None where a wrapper does not hold what it wraps in its closure. A function that wraps nothing gives `inner`.
    """
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        return inner
    cells, inside = function.__closure__ or (), around(wrapped, inner)
    if inside is None or not any(cell.cell_contents is wrapped for cell in cells):
        return None
    closure = tuple(types.CellType(inside) if cell.cell_contents is wrapped else cell for cell in cells)
    other = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


def layer_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer: x + attention, normalised in the same pass, and then the MLP, added too.

    Takes what the class's own forward takes. Its attention is called with all of that by name, as every known layer
    calls it. The last sum stays alone: the norm after it belongs to another module.
    """
    layer: Layer = self.fused_options["layer"]
    given = self.fused_options["signature"].bind(self, *args, **kwargs)
    given.apply_defaults()
    extra, residual = given.arguments.pop("kwargs", {}), given.arguments.pop("hidden_states")
    del given.arguments["self"]
    x, _ = self.self_attn(hidden_states=self.input_layernorm(residual), **given.arguments, **extra)
    x = added_part(self, layer.after_attention, x)
    x, residual = norm_of_sum(getattr(self, layer.norm), x, residual)
    return residual + added_part(self, layer.after_mlp, self.mlp(x))


def added_part(layer: Any, name: str | None, x: Tensor) -> Tensor:
    """What a layer adds to the residual, given an attention's or MLP's output: through a norm (Gemma), dropout (Phi-3)
    or times a constant (Granite)."""
    if name is not None:
        x = getattr(layer, name)(x)
    multiplier = getattr(layer, "residual_multiplier", None)
    return x if multiplier is None else x * multiplier


# ---- loss


@functools.cache
def with_signature_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`causal_lm_forward` that says it takes what `forward` takes: trainers and `generate` look at that."""

    @functools.wraps(forward)
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        return causal_lm_forward(self, *args, **kwargs)

    return fused


def causal_lm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """With labels, in training: the loss from the last hidden states, and no logits. Otherwise the model's own."""
    original = type(self).forward
    bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    labels, _ = bound.pop("labels", None), bound.pop("self")
    watched = hooked(self.lm_head)  # fused, it is not called
    wants_all = isinstance(keep := bound.pop("logits_to_keep", 0), int) and keep == 0
    if labels is None or not self.training or not wants_all or watched:
        return original(self, *args, **kwargs)
    shifted = extra.pop("shift_labels", None)  # given where a sequence is split over ranks
    as_dict = extra.pop("return_dict", None)
    as_dict = self.config.return_dict if as_dict is None else as_dict
    num_items = extra.pop("num_items_in_batch", None)
    outputs = self.model(**bound, **extra, return_dict=True)
    hidden = outputs.last_hidden_state
    config = self.config.get_text_config()
    update = update_of(self.lm_head)
    rows, targets = (hidden[:, :-1], labels[:, 1:]) if shifted is None else (hidden, shifted)
    loss = dispatch.ops.linear_cross_entropy(
        rows,
        update.projection,
        targets.to(hidden.device),
        dropout=update.dropout,
        num_items=num_items,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=1 / getattr(config, "logits_scaling", 1.0),
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return output if as_dict else output.to_tuple()


# ---- layers


def plain(layer: Any) -> bool:
    """A linear layer that carries no adapter and no forward of its own."""
    if not isinstance(layer, nn.Module) or "forward" in vars(layer):
        return False
    return isinstance(layer, NF4Linear) or (isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward)


def update_of(layer: Any) -> Update:
    """What one layer adds up to now: its base with the active adapters, and their dropout."""
    if isinstance(layer, AdapterLayer):
        return layer.updates()[0]
    if isinstance(layer, NF4Linear):
        return Update(layer.projection(), None)
    current = getattr(layer, "current", layer)  # a head trained in full
    return Update(Projection(current.weight, current.bias), None)


def together(layers: Sequence[nn.Module]) -> bool:
    """Whether one function can run these layers now: each has one update, and they drop out alike."""
    rates = set()
    for layer in layers:
        if isinstance(layer, AdapterLayer):
            groups = layer.groups()
            if len(groups) > 1:
                return False
            rates |= {layer.dropout_rate(group[0]) for group in groups}
    return len(rates) <= 1


def runs_apart(module: nn.Module) -> bool:
    """Whether what was patched to run together does not, as its adapters stand now."""
    shared = [vars(layer)["shared_input"] for layer in module.children() if "shared_input" in vars(layer)]
    if shared:
        return not together(shared[0].layers)
    return runs(module, mlp_forward) and not together(mlp_layers(module))


def stack_weights(fusion: Fusion, layers: Sequence[Any]) -> None:
    """Lays frozen dense weights of one x one after another in memory; each stays the parameter it was."""
    bases = [layer.base_layer if isinstance(layer, AdapterLayer) else layer for layer in layers]
    if not all(type(base) is nn.Linear for base in bases):
        return
    weights = [base.weight for base in bases]
    alike = len({(w.dtype, w.device, w.shape[1]) for w in weights}) == 1
    if not alike or any(w.requires_grad or w.is_meta or type(w.data) is not Tensor for w in weights):
        return
    if rows_of_one(weights) is None:
        buffer = torch.cat([w.detach() for w in weights])
        for weight, rows in zip(weights, buffer.split([len(w) for w in weights]), strict=True):
            weight.data = rows
        fusion.stacked.append(weights)
        fusion.hooks += [base.register_state_dict_post_hook(own_storage) for base in bases]


def own_storage(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """In a state dict a stacked weight, still the same memory, has a storage that is no larger than it, as before.

    Else safetensors, and so accelerate's `save_state`, would refuse it as a part of another tensor.
    """
    weight = state.get(f"{prefix}weight")
    if type(weight) is Tensor and weight.untyped_storage().nbytes() > weight.nbytes:
        start = weight.storage_offset() * weight.itemsize
        storage = weight.untyped_storage()[start : start + weight.nbytes]
        part = torch.empty(0, dtype=weight.dtype, device=weight.device)
        state[f"{prefix}weight"] = part.set_(storage, 0, weight.shape, weight.stride())
