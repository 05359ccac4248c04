"""What the notebooks share: the exercises' checker, the demo's data, a training loop, byte counts, and how plots look.

    @checks(mine)                an exercise's checker: run at once, says what is missing, never stops the notebook
    pairs, batch, loss_of        the demo's data (`examples/docstrings.py`) as tokens; train, mean_loss
    last_blocks, inputs_of       the last blocks of a model as a model, on what the frozen blocks below it computed
    saved_bytes, peak_bytes      what a computation saves for its backward, and has in memory at most
    axes, finish                 plots in one style

Nothing here is LoRA: all of that is called where it lives, in `lora`.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # also where the package is not installed
    sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes from its package
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import matplotlib.pyplot as plt
import torch
from cycler import cycler
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import lora
from examples import docstrings
from lora.measure import Ledger

COLOURS = ("#1f5fa8", "#d1662a", "#3b8f5c", "#8a4fa3", "#b0913a", "#5c6670")
IGNORED = -100  # a label that no loss is counted for


# ---- exercises


class UnsolvedError(AssertionError):
    """An exercise that the reader has not solved yet: its checker said no."""


def checks(answer: Callable[..., Any]) -> Callable[[Callable[[Any], object]], Callable[[Any], object]]:
    """Decorates the checker of an exercise, and runs it on the reader's `answer`; prints what it found.

    A checker takes the answer and asserts, with a message that helps. Nothing is raised here: the notebook goes on.
    """

    def run(checker: Callable[[Any], object]) -> Callable[[Any], object]:
        try:
            judge(checker, answer)
        except UnsolvedError as verdict:
            print(f"✗ {name_of(answer)}: not yet. {verdict}")
        else:
            print(f"✓ {name_of(answer)}: accepted.")
        return checker

    return run


def judge(checker: Callable[[Any], object], answer: Any) -> None:
    """Raises UnsolvedError, with a message, unless the checker accepts the answer."""
    try:
        checker(answer)
    except NotImplementedError:
        raise UnsolvedError("Replace the line that raises NotImplementedError by your own.") from None
    except AssertionError as error:
        raise UnsolvedError(str(error) or "An assertion of the checker failed.") from None
    except Exception as error:  # the reader's code may raise anything, and is told what
        raise UnsolvedError(f"It raised {type(error).__name__}: {error}") from error


def name_of(answer: Any) -> str:
    """What the exercise is called."""
    return str(getattr(answer, "__name__", type(answer).__name__))


def assert_close(found: Any, expected: Tensor, what: str, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """`torch.testing.assert_close`, with a message for a reader: what was found, what was expected."""
    assert isinstance(found, Tensor), f"{what} is a {type(found).__name__}, expected a tensor."
    assert found.shape == expected.shape, f"{what} is {list(found.shape)}, expected {list(expected.shape)}."
    far = float((found.detach().double() - expected.detach().double()).abs().max())
    near = torch.allclose(found.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)
    assert near, f"{what} has the right shape, but is off by up to {far:.3g}."


# ---- data


@dataclass
class Batch:
    """Some pairs as one padded batch; a label is the token itself where the answer is, else IGNORED."""

    ids: Tensor  # [pairs, tokens]
    mask: Tensor  # [pairs, tokens]
    labels: Tensor  # [pairs, tokens]
    hidden: Tensor | None = field(default=None, repr=False)  # see `inputs_of`

    def arguments(self) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward, without labels: what comes in is hidden, if it is there."""
        if self.hidden is not None:
            return {"inputs_embeds": self.hidden, "attention_mask": self.mask}
        return {"input_ids": self.ids, "attention_mask": self.mask}


def pairs(count: int, held_out: int = 32) -> tuple[list[docstrings.Pair], list[docstrings.Pair]]:
    """(`count` to train on, `held_out` others from packages that those never mention), as the demo splits them."""
    train, held = docstrings.split(docstrings.collect())
    return train[:count], held[:held_out]


def batch(tokenizer: Any, chosen: Sequence[docstrings.Pair], most: int = 96) -> Batch:
    """Question and answer of each pair as the model's chat template writes them; only answers have labels."""
    rows = []
    for pair in chosen:
        text = tokenizer.apply_chat_template(pair.row()["messages"], tokenize=False)
        start = tokenizer.apply_chat_template(
            docstrings.question(pair.signature), tokenize=False, add_generation_prompt=True
        )
        ids, asked = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, start))
        rows.append((ids[:most], ([IGNORED] * len(asked) + ids[len(asked) :])[:most]))
    width = max(len(ids) for ids, _ in rows)
    padded = [(ids + [0] * (width - len(ids)), labels + [IGNORED] * (width - len(ids))) for ids, labels in rows]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return Batch(torch.tensor([ids for ids, _ in padded]), mask, torch.tensor([labels for _, labels in padded]))


def batches(tokenizer: Any, chosen: Sequence[docstrings.Pair], size: int) -> list[Batch]:
    """`batch` of every `size` pairs."""
    return [batch(tokenizer, chosen[i : i + size]) for i in range(0, len(chosen), size)]


# ---- training


def loss_of(model: Any, each: Batch) -> Tensor:
    """The mean cross-entropy of a batch's answers, nats a token: logits are made where an answer is, nowhere else."""
    hidden = model.model(**each.arguments(), use_cache=False).last_hidden_state[:, :-1]  # [pairs, tokens - 1, features]
    counted = each.labels[:, 1:] != IGNORED
    loss: Tensor = lora.ops.linear_cross_entropy(hidden[counted], model.lm_head.weight, each.labels[:, 1:][counted])
    return loss


@torch.no_grad()
def mean_loss(model: Any, held_out: Sequence[Batch]) -> float:
    """The mean over all answer tokens of some batches, without dropout; the model's mode is put back."""
    training = model.training
    model.eval()
    counts = [int((each.labels[:, 1:] != IGNORED).sum()) for each in held_out]
    losses = [float(loss_of(model, each)) for each in held_out]
    model.train(training)
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def train(model: Any, optimizer: torch.optim.Optimizer, data: Sequence[Batch]) -> list[float]:
    """One step for each batch; returns each step's loss, taken before it."""
    losses = []
    for each in data:
        optimizer.zero_grad()
        loss = loss_of(model, each)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def last_blocks(model: Any, count: int) -> Any:
    """The last `count` decoder blocks of a model, with its norm and head: a model of its own that shares nothing.

    Blocks below the first adapted one are frozen and have no adapters, so what they compute is a constant: `inputs_of`
    computes it once, and a step then costs as much as the blocks that are left.
    """
    top = copy.copy(model)
    top._modules = dict(model._modules)
    top.model = copy.copy(model.model)
    top.model._modules = dict(model.model._modules)
    top.model.layers = nn.ModuleList(list(model.model.layers)[-count:])
    return copy.deepcopy(top)


@torch.no_grad()
def inputs_of(model: Any, data: Sequence[Batch], count: int) -> list[Batch]:
    """The same batches with what the blocks below the last `count` make of them: inputs for `last_blocks`."""
    found = []
    for each in data:
        seen: list[Tensor] = []
        block = model.model.layers[-count]
        handle = block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        with _without(model, count):
            model.model(**each.arguments(), use_cache=False)
        handle.remove()
        found.append(Batch(each.ids, each.mask, each.labels, seen[0]))
    return found


@contextmanager
def _without(model: Any, count: int) -> Iterator[None]:
    """The decoder without the blocks after the first of its last `count`."""
    layers = model.model.layers
    kept = len(layers) - count + 1
    model.model.layers = nn.ModuleList(list(layers)[:kept])
    try:
        yield
    finally:
        model.model.layers = layers


# ---- bytes


def saved_bytes(call: Callable[[], Any], parameters: Sequence[Tensor] = ()) -> int:
    """What `call()` saves for its backward, each piece of memory once; `parameters` are in memory anyway."""
    known = {x.untyped_storage()._cdata for x in parameters}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(x.detach())
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = call()
    del result
    return sum(sizes.values())


def peak_bytes(call: Callable[[], Any], owned: Sequence[Tensor] = ()) -> int:
    """The most that `call()` has in memory at one time, above `owned` tensors, which were there before."""
    ledger = Ledger(torch.device("cpu"), list(owned))
    with ledger:
        result = call()
    del result
    ledger.close()
    return int(ledger.most)


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.{1 if size >= 2**20 else 2}f} MiB"


# ---- plots


def axes(columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.1) -> Any:
    """A figure's axes, one or an array of them."""
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), constrained_layout=True)[1]


def finish(ax: Any, title: str, x: str = "", y: str = "", legend: bool = False) -> None:
    """Title and labels."""
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if legend:
        ax.legend(frameon=False, fontsize=8)


def settle() -> None:
    """One seed, quiet libraries, one look."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message=".*IProgress.*")
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "savefig.dpi": 80,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.grid": True,
            "grid.alpha": 0.25,
        }
    )


settle()
