"""Where a training step's time goes: the device's kernels by what they compute, and what it does besides.

Beside the profile, the step's frozen products alone, one after another without a pause: what a step could not be faster
than on this card, whose clock falls under lasting load. And attention alone, forward and backward.
"""

from __future__ import annotations

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import lora
from benchmarks.card import model as models
from benchmarks.card.cases import Session
from benchmarks.card.rows import Row
from benchmarks.card.steps import SEQUENCES, synchronize, token_ids
from benchmarks.card.timing import free_memory

WARM, STEPS = 2, 3
SMALL, OTHER = 0.005, "other: "
THIN = 64  # a product with a side no longer than this is the adapter's
FROZEN, THROUGH, ADDED, GRADIENTS = (
    "frozen products", "thin products: u, du", "updates added: u B, du A", "gradients of A and B",
)  # fmt: skip
PRODUCTS = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::_addmm_activation": 1,
}  # the first factor's place
KINDS = (  # by parts of a kernel's name, the first that matches
    ("attention", ("flash", "fmha", "sdpa", "attention", "attn")),
    ("products, by name", ("gemm", "nvjet", "cutlass", "splitk", "gemv", "xmma")),
    ("activation, its updates included", ("gated_",)),
    ("norms", ("norm_", "sum_partial")),
    ("RoPE", ("rope_",)),
    ("loss kernel", ("cross_entropy",)),
    ("NF4 decoding", ("nf4_",)),
    ("dropout", ("dropout_",)),
    ("optimizer", ("adam", "multi_tensor")),
    ("copies and fills", ("memcpy", "memset", "copy", "fill", "cat")),
)


def run(session: Session) -> None:
    """bf16 at 4 and 1 sequences, ours without checkpointing."""
    with lora.use_backend("fast"):
        model = models.build(session)
        with models.ours(model, session.shapes.r) as parameters:
            for sequences in (SEQUENCES, 1):
                profile_steps(session, model, parameters, sequences)
        products_alone(session, model)
        del model
        free_memory()
        attention_alone(session)


def profile_steps(session: Session, model: nn.Module, parameters: list[Tensor], sequences: int) -> None:
    """A row for each kind of kernel, one for the device's idle time; the clock in the step's note."""
    cuda = session.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=cuda)
    ids = token_ids(session, sequences, session.shapes.sequence)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM):
        step()
    with clock() as readings:
        wall = timed(session, step)
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for _ in range(STEPS):
            step()
        synchronize(session)
    name, shape = "step bf16", f"{sequences} x {session.shapes.sequence}"
    tokens = ids.numel()

    def add(variant: str, seconds: float, note: str = "") -> None:
        session.recorder.add(Row("profile", name, variant, tokens, shape, "bfloat16", median_s=seconds, note=note))

    add("the step, not profiled", wall, "; ".join(readings))
    kinds = by_kind(profile.events(), DeviceType.CUDA if cuda else DeviceType.CPU)
    busy = device_seconds(profile.events()) / STEPS if cuda else sum(seconds for seconds, _ in kinds.values()) / STEPS
    kinds["not attributed"] = (STEPS * busy - sum(seconds for seconds, _ in kinds.values()), 0)
    for kind, (seconds, count) in without_small(kinds).items():
        add(kind, seconds / STEPS, f"{count / STEPS:.0f} kernels")
    add("all kernels", busy, f"{busy / wall:.0%} of the step")
    if cuda:
        add("nothing, between kernels of the profiled steps", span_seconds(profile.events()) / STEPS - busy)


def by_kind(events: Iterable[Any], device: DeviceType) -> dict[str, tuple[float, int]]:
    """Seconds and launches of each kind of kernel.

    A product is known by its operation's shapes; what a kernel's name alone says is taken for the rest. On a CPU (dry
    run) operations stand for kernels.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if device == DeviceType.CPU:
            found = [(event.name, event.self_cpu_time_total)]
        else:
            found = [(kernel.name, kernel.duration) for kernel in getattr(event, "kernels", ())]
        for kernel_name, microseconds in found:
            total = totals[kind_of(event.name, event.input_shapes or (), kernel_name)]
            total[0] += 1e-6 * microseconds
            total[1] += 1
    return {kind: (seconds, int(count)) for kind, (seconds, count) in totals.items()}


def device_events(events: Iterable[Any]) -> list[Any]:
    """All that ran on the GPU, whoever launched it."""
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def device_seconds(events: Iterable[Any]) -> float:
    """How long that took."""
    return sum(1e-6 * event.time_range.elapsed_us() for event in device_events(events))


def span_seconds(events: Iterable[Any]) -> float:
    """From the first kernel's start to the last one's end."""
    ranges = [event.time_range for event in device_events(events)]
    return 1e-6 * (max(r.end for r in ranges) - min(r.start for r in ranges))


def without_small(kinds: Mapping[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """The same from the longest down; unnamed kernels of less than a share SMALL of all become one line."""
    limit = SMALL * sum(seconds for seconds, _ in kinds.values())
    kept = {kind: total for kind, total in kinds.items() if total[0] >= limit or not kind.startswith(OTHER)}
    small = [total for kind, total in kinds.items() if kind not in kept]
    if small:
        kept[f"{len(small)} other kinds of kernels"] = (sum(s for s, _ in small), sum(count for _, count in small))
    return dict(sorted(kept.items(), key=lambda item: -item[1][0]))


def kind_of(operation: str, shapes: Sequence[Sequence[int]], kernel: str) -> str:
    """What a kernel computes."""
    if operation in PRODUCTS and len(shapes) > PRODUCTS[operation] + 1:
        (M, K), (_, N) = shapes[PRODUCTS[operation] :][:2]
        if min(M, N, K) > THIN:
            return FROZEN
        return THROUGH if min(M, N, K) == N else ADDED if min(M, N, K) == K else GRADIENTS
    lowered = kernel.lower()
    return next((kind for kind, parts in KINDS if any(part in lowered for part in parts)), f"{OTHER}{kernel[:60]}")


@torch.no_grad()
def products_alone(session: Session, model: Any) -> None:
    """Every frozen product of a step, x Wᵀ and dy W, in a row, on the model's own weights."""
    tokens = SEQUENCES * session.shapes.sequence
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    widest = max(max(weight.shape) for weight in weights if weight is not model.lm_head.weight)
    x, y = (torch.randn(tokens, widest, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    chunk = max(1, tokens // 8)
    logits = x.new_empty(chunk, model.lm_head.weight.shape[0])

    def body() -> None:
        for weight in weights:
            out_features, in_features = weight.shape
            if weight is model.lm_head.weight:
                for rows in x[:, :in_features].split(chunk):
                    torch.mm(rows, weight.T, out=logits[: len(rows)])
                    torch.mm(logits[: len(rows)], weight)
                continue
            torch.mm(x.view(-1)[: tokens * in_features].view(tokens, in_features), weight.T)
            torch.mm(y.view(-1)[: tokens * out_features].view(tokens, out_features), weight)

    body()
    with clock() as readings:
        seconds = timed(session, body)
    flops = 4 * tokens * sum(weight.numel() for weight in weights)
    session.recorder.add(
        Row(
            "profile", "frozen products in a row", "torch", tokens, "all layers and the head", "bfloat16",
            median_s=seconds, flops=flops, note="; ".join(readings),
        )
    )  # fmt: skip


def attention_alone(session: Session) -> None:
    """torch's causal attention, forward and backward, once a layer."""
    s = session.shapes
    q, k, v = (
        torch.randn(SEQUENCES, heads, s.sequence, s.head_dim, device=session.device, dtype=torch.bfloat16).requires_grad_()
        for heads in (s.heads, s.kv_heads, s.kv_heads)
    )  # fmt: skip
    dy = torch.randn_like(q)

    def body() -> None:
        for _ in range(s.layers):
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            torch.autograd.grad(y, (q, k, v), dy)

    body()
    seconds = timed(session, body)
    tokens = SEQUENCES * s.sequence
    flops = 6 * s.sequence**2 * s.heads * s.head_dim * s.layers * SEQUENCES
    row = Row("profile", "attention in a row", "torch", tokens, f"{s.layers} layers", "bfloat16", seconds, flops=flops)
    session.recorder.add(row)


def timed(session: Session, body: Callable[[], object]) -> float:
    """Seconds of one run among several in a row."""
    synchronize(session)
    start = time.perf_counter()
    for _ in range(STEPS):
        body()
    synchronize(session)
    return (time.perf_counter() - start) / STEPS


@contextmanager
def clock() -> Iterator[list[str]]:
    """The card's clock and power while the body runs, in words, asked every 50 ms; nothing where nobody answers."""
    found: list[str] = []
    command = [
        "nvidia-smi",
        "--id=0",
        "--query-gpu=clocks.sm,power.draw",
        "--format=csv,noheader,nounits",
        "-lms",
        "50",
    ]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        process.terminate()
        lines = [line.split(",") for line in process.communicate()[0].splitlines() if line.count(",") == 1]
    pairs = sorted((float(mhz), float(watt)) for mhz, watt in lines if mhz.strip().isdigit())
    if pairs:
        mhz, watts = pairs[len(pairs) // 2][0], sorted(watt for _, watt in pairs)[len(pairs) // 2]
        found.append(f"median clock {mhz:.0f} MHz, lowest {pairs[0][0]:.0f}, median power {watts:.0f} W")
