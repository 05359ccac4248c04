"""The operations at a model's shapes: which cases there are, the goals' first."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.card import linear_ops, other_ops
from benchmarks.card.cases import Case, Job, Session, run_jobs
from benchmarks.card.peers import peer
from benchmarks.card.rows import NOT_THERE, Row


def check(session: Session) -> None:
    """Every case once, at a number of tokens off all block sizes; nothing is timed."""
    run_jobs(session, "check", jobs(session, (session.shapes.check_tokens,)), timed=False)


def run(session: Session) -> None:
    """Every case at every number of tokens: checked at that size, then timed."""
    session.read_ceilings()
    if session.bandwidth is None:
        print("no ceilings measured into this directory: figures will have no floors (run the part 'ceilings')")
    chosen = [job for job in jobs(session, session.shapes.tokens) if session.only in job[0]]
    run_jobs(session, "ops", chosen, timed=True)
    for name in ("unsloth", "lorafusion"):
        found = peer(name)
        reason = found if isinstance(found, str) else "is there, but nothing here calls it"
        session.recorder.add(Row("ops", "lora_linear", name, note=f"{NOT_THERE}: {reason}"))


def jobs(session: Session, tokens: tuple[int, ...]) -> list[Job]:
    """In the order of value: with little time the last are left out."""
    s = session.shapes
    shapes = ((s.hidden, s.hidden), (s.hidden, s.ffn), (s.ffn, s.hidden))
    found: list[Job] = []

    def add(name: str, function: Callable[..., Case], *arguments: object) -> None:
        found.append((name, lambda: function(session, *arguments)))

    most = tokens[0]
    for fan_in, fan_out in shapes:
        add(f"lora_linear p=0 {fan_in} -> {fan_out}, {most} tokens", linear_ops.lora_linear, most, fan_in, fan_out, 0.0)
    for fan_in, fan_out in shapes:
        add(f"nf4_dequantize {fan_out} x {fan_in}", other_ops.nf4_dequantize, fan_out, fan_in)
    add(f"linear_cross_entropy, {most} tokens", other_ops.linear_cross_entropy, most)
    for count in tokens:
        for name in ("lora_qkv", "lora_mlp"):
            add(f"{name}, {count} tokens", getattr(linear_ops, name), count)
        for name in ("swiglu", "rms_norm", "add_rms_norm", "rope"):
            add(f"{name}, {count} tokens", getattr(other_ops, name), count)
    add("cross_entropy", other_ops.cross_entropy_kernel)
    for count in tokens:
        for fan_in, fan_out in shapes:
            for p in (0.1,) if count == most else (0.0, 0.1):
                name = f"lora_linear p={p:g} {fan_in} -> {fan_out}, {count} tokens"
                add(name, linear_ops.lora_linear, count, fan_in, fan_out, p)
    for name in ("lora_qkv", "lora_mlp"):
        add(f"{name} p=0.1, {most} tokens", getattr(linear_ops, name), most, 0.1)
    for fan_in, fan_out in shapes:
        add(f"forms {fan_in} -> {fan_out}", linear_ops.forms, most, fan_in, fan_out)
    add("nf4_quantize", other_ops.nf4_quantize)
    add("dora_norm", linear_ops.dora)
    add("multi_lora", linear_ops.multi_lora, most)
    for count in tokens[1:]:
        add(f"linear_cross_entropy, {count} tokens", other_ops.linear_cross_entropy, count)
    return found
