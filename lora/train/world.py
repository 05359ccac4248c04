"""The processes of one run: who they are, what they agree on, and which of them speaks.

`torchrun` and `accelerate launch` start N processes alike and tell each its number. All of them train; the first one
alone takes the lock, writes and prints. Whatever decides how a run goes on is decided once and told to the others: a
process that went its own way would wait for the others for ever, and they for it.

    first(f)         one process does it, all have the result, or all end with its error
    together()       what one process raises inside, all end with
    any(flags)       a signal that has reached one process has reached all
    one_voice()      of several processes that end with an error, one says it

A process that ends silently, because another has said why, raises `SaidElsewhere`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lora.errors import LoRAError
from lora.train.stopping import InterruptedRunError

T = TypeVar("T")
FAILED, ENDED = "lora/failed", "lora/ended"  # counted in the store
PATIENCE = timedelta(hours=12)  # the first process may measure, answer and write for long while the others wait
FAREWELL = 10.0  # seconds in which the others find out that this one ends
OWN_WAYS = {  # what an accelerate config may ask for that would happen behind our back, and what to do instead
    "ACCELERATE_USE_FSDP": "remove fsdp_config from accelerate's config, and give --sharding full",
    "ACCELERATE_USE_DEEPSPEED": "remove deepspeed_config from accelerate's config, and give --sharding full",
    "ACCELERATE_USE_MEGATRON_LM": "remove megatron_lm_config from accelerate's config",
}
SEVERAL = ("MASTER_ADDR", "MASTER_PORT", "ACCELERATE_DYNAMO_BACKEND")  # from `accelerate launch` of several processes
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # by launchers that start them
LOST = ("gloo", "Connection closed", "Connection reset", "NCCL", "Socket")  # in errors of a connection


class SaidElsewhere(SystemExit):
    """Ends a process without a word: another one has said why."""


class World:
    """This process among those of its run; alone, every method does the obvious without a message."""

    joined = False  # whether this process has met the others, and knows who speaks

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None, group: Any = None, started: bool = False):
        self.rank, self.size, self._store, self._group, self._started = rank, size, store, group, started

    @classmethod
    def join(cls) -> World:
        """Meets the other processes that a launcher has started, if one has.

        Raises: LoRAError where the launcher's settings ask for what is done here in another way.
        """
        size = int(os.environ.get("WORLD_SIZE") or 1)
        for name, instead in OWN_WAYS.items():
            if os.environ.get(name, "").lower() in ("1", "true"):
                raise LoRAError(f"the launcher has set {name}, which `lora train` does not use: {instead}.")
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
        if precision != "no":
            raise LoRAError(
                f"the launcher asks for mixed precision ({precision}), expected none: weights are used in the dtype "
                "they are loaded in. Set mixed_precision: no in accelerate's config, and choose with --dtype."
            )
        if all(name in os.environ for name in SEVERAL) and not any(name in os.environ for name in COUNTS):
            raise LoRAError(
                "accelerate launch was asked for several processes and has started one, as it does with --cpu, and "
                "with fewer than two GPUs: start with torchrun --nproc-per-node N -m -- lora train …, or give "
                "accelerate launch --multi_gpu and no --cpu. (If one is what you want, unset MASTER_ADDR.)"
            )
        if size == 1:
            return cls()
        if not dist.is_initialized():
            return cls._meet()
        cls.joined = True
        return cls(dist.get_rank(), size, None, dist.new_group(backend="gloo", timeout=PATIENCE))

    @classmethod
    def _meet(cls) -> World:
        """Starts the process group."""
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK") or 0)
        if cuda and local >= torch.cuda.device_count():
            raise LoRAError(
                f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start one process a GPU "
                "(--nproc-per-node)."
            )
        if cuda:
            torch.cuda.set_device(local)
        store, rank, size = next(rendezvous("env://", timeout=timedelta(minutes=10)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=PrefixStore("lora/group", store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        cls.joined = True
        return cls(rank, size, store, dist.new_group(backend="gloo", timeout=PATIENCE), started=True)

    def leave(self) -> None:
        """Parts from the others; to be called where all have come to the end."""
        if self._started:
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    # ---- agreeing

    def gather(self, value: T) -> list[T]:
        """What every process has, in the order of their numbers. For small things: they are pickled on the way."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def add(self, *numbers: float) -> list[float]:
        """Each number summed over the processes, in float64."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Each flag, set where it is set on any process."""
        return [bool(count) for count in self.add(*map(float, flags))]

    def first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first process, which alone runs it; its error ends all."""
        result: Any = None
        with self.together():
            result = action() if self.main else None
        return self.gather(result)[0]  # type: ignore[no-any-return]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error that a process raises within the block ends all of them: one with it, the others with silence.

        Within the block the processes do not talk to each other: one might not be there to answer.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception:
            if self._failed(True)[0] == self.rank:
                raise
            raise SaidElsewhere(2) from None
        if self._failed(False):
            raise SaidElsewhere(2)

    def _failed(self, error: bool) -> list[int]:
        """The processes that have an error."""
        return [rank for rank, has in enumerate(self.gather(error)) if has]

    def check_alike(self, value: Any, what: str) -> None:
        """Raises LoRAError where processes have different values."""
        found = self.gather(value)
        others = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if others:
            raise LoRAError(
                f"process {others[0]} has another {what} than process 0: every process of a run needs the same files. "
                "Copy them to each machine, or put them on a file system that all share."
            )

    # ---- ending

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Around a whole run: of the processes that it ends in one, or because others ended, one says why."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except SaidElsewhere:
            self._part()
            raise
        except InterruptedRunError as stopped:
            if not self._speaks():
                raise SaidElsewhere(stopped.exit_code) from None
            raise
        except BaseException as error:
            if not self._speaks():
                raise SaidElsewhere(2) from None
            if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
                raise LoRAError(
                    f"process {self.rank} has lost another process of this run: it was killed, or its machine is out "
                    "of reach. --resume goes on from the newest checkpoint."
                ) from error
            raise

    def _speaks(self) -> bool:
        """Whether no other process has spoken yet."""
        try:
            first = self._store is None or self._store.add(FAILED, 1) == 1
        except RuntimeError:  # the store was with a process that was killed
            return True
        self._part()
        return first

    def _part(self) -> None:
        """Lets the others go that wait for this process, which ends; if it keeps their store, it waits for them."""
        if not self._started:
            return
        with suppress(RuntimeError):
            ended = self._store.add(ENDED, 1)
            if not torch.cuda.is_available():  # NCCL's own end of a group waits; there, the launcher ends the others
                dist.destroy_process_group()
            limit = time.monotonic() + FAREWELL
            keeps_store = self.main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            while keeps_store and ended < self.size and time.monotonic() < limit:
                time.sleep(0.05)
                ended = self._store.add(ENDED, 0)
