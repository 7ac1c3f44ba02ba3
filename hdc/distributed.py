"""Several processes as one: the ranks that torchrun starts, what they tell each other, and which one is lost.

Without torchrun, or with one process, no group is made, and everything here is what one process does.
"""

import argparse
import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from hdc.errors import InputError
from hdc.progress import console

T = TypeVar("T")

START = timedelta(minutes=10)  # in which all ranks must have begun
TIMEOUT = timedelta(minutes=10)  # that a rank waits for another one before it counts as lost
PATIENCE = timedelta(days=365)  # the same where rank 0 works alone: its death breaks the connection
ROLL_CALL = 10.0  # seconds in which the ranks that are left must say so

_restarted = False
_held: dist.ProcessGroup | None = None  # see `leave`


class RankLost(Exception):
    """Another process of the run died or hangs; the message names its rank."""


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def group() -> dist.ProcessGroup | None:
    """The group of all processes, None for a single one."""
    return dist.group.WORLD if dist.is_initialized() else None


def _one_of_several() -> bool:
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def restarted() -> bool:
    """Whether torchrun started this run again, after a process died or the number of nodes changed."""
    return _restarted


@contextmanager
def session() -> Iterator[None]:
    """The process group of a command under torchrun, and one voice for all its ranks.

    Whichever rank fails first raises what it has to say, the others end silently with its exit code. A
    mistake of the user is remembered over torchrun's restarts, which would all run into it again.

    Raises:
        RankLost: another rank died, hangs, or never came.
    """
    global _restarted, _held
    _restarted = (
        dist.is_torchelastic_launched() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    )
    if not _one_of_several():
        yield
        return
    launch, own, size = next(iter(rendezvous("env://", timeout=START)))
    if launch.check(["mistake"]):
        raise SystemExit(2)
    store = PrefixStore(_name_of_start(launch, own, size), launch)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=own,
            world_size=size,
            timeout=TIMEOUT,
        )
        _held = dist.group.WORLD
        console.quiet = own > 0
        # Each node counts the restarts that it caused, so one of them knowing is enough; and none knows
        # when a node that joined made torchrun start anew.
        starts = on_rank0(lambda: launch.add("starts", 1))
        _restarted = any(gather(_restarted)) or starts > 1
        yield
        dist.destroy_process_group()
    except (InputError, argparse.ArgumentError):
        launch.set("mistake", "")
        if store.add("failures", 1) > 1:
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        message = _call_roll(store, own, size, error)
        if store.add("failures", 1) > 1:
            raise SystemExit(2 if launch.check(["mistake"]) else 3) from None
        raise RankLost(message) from error


def leave(code: int) -> NoReturn:
    """End the process with this exit code, after a `session`.

    A gloo thread that was the last to need a tensor takes Python's lock to free it, even after everybody has
    the result (torch 2.13). While the interpreter ends, that aborts the process; where the group is freed, which
    waits for its threads, both wait for ever. So a rank holds the group, and ends without the interpreter's end.
    """
    if not _one_of_several():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _name_of_start(launch: Store, own: int, size: int) -> str:
    """A new name that all ranks of this start agree on, and none of an earlier one has used.

    torchrun hands the same store to the processes of every restart (torch 2.13). What the dead ones left
    in it, such as their addresses, must not be found by the next ones.
    """
    ticket = uuid4().hex
    if own > 0:
        launch.set(f"ticket/{own}", ticket)
        try:
            name = launch.get(f"name/{ticket}").decode()
        except dist.DistError as error:
            raise RankLost(f"rank 0 did not start within {_seconds(START)}") from error
        launch.set(f"{name}/here/{own}", "")
        return name
    deadline = time.monotonic() + START.total_seconds()
    missing = list(range(1, size))
    while missing:
        if time.monotonic() > deadline:
            raise RankLost(f"{_ranks(missing)} did not start within {_seconds(START)}")
        for other in missing:
            # It may be the ticket of a dead process: then nobody reads the answer.
            if launch.check([f"ticket/{other}"]):
                launch.set(f"name/{launch.get(f'ticket/{other}').decode()}", ticket)
        time.sleep(0.01)
        missing = [other for other in missing if not launch.check([f"{ticket}/here/{other}"])]
    return ticket


def _call_roll(store: Store, own: int, size: int, error: Exception) -> str:
    """Who does not answer any more, in words. Every rank whose connection failed calls this."""
    try:
        store.set(f"left/{own}", "")
        deadline = time.monotonic() + ROLL_CALL
        missing = list(range(size))
        while missing and time.monotonic() < deadline:
            time.sleep(0.05)
            missing = [other for other in missing if not store.check([f"left/{other}"])]
    except RuntimeError:
        return "the node that holds torchrun's store is gone"
    if not missing:
        return f"the connection between the ranks failed: {str(error).splitlines()[0]}"
    if "imed out" in str(error):
        return f"{_ranks(missing)} hangs: no answer within {_seconds(TIMEOUT)}"
    return f"{_ranks(missing)} died"


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():.0f} s"


def on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone; every rank returns its result, or raises its InputError.

    The others wait as long as that takes, unless rank 0 dies.
    """
    if world() == 1:
        return function()
    outcome: list[T | InputError | None] = [None]
    if rank() == 0:
        try:
            outcome = [function()]
        except InputError as error:
            outcome = [error]
    _wait_for_rank0()
    dist.broadcast_object_list(outcome)
    result = outcome[0]
    if isinstance(result, InputError):
        raise result
    return result  # type: ignore[return-value]


def _wait_for_rank0() -> None:
    """Not by a broadcast: its timeout is the group's, and it reaches some ranks by way of others, which would
    take these for dead as well."""
    done = torch.zeros(1)
    if rank() == 0:
        for other in range(1, world()):
            dist.send(done, other)
    else:
        work = dist.irecv(done, 0)
        assert work is not None  # it is for ranks outside of the group
        work.wait(PATIENCE)


def gather(value: T) -> list[T]:
    """Every rank's `value`, by rank, on every rank."""
    if world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def gather_numbers(*values: int) -> list[list[int]]:
    """`gather` for a few integers, without pickling: [world][values]."""
    if world() == 1:
        return [list(values)]
    own = torch.tensor(values)
    every = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(every, own)
    return [one.tolist() for one in every]


def average(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over the ranks of each scalar."""
    if world() == 1:
        return {name: value.item() for name, value in values.items()}
    total = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, (total / world()).tolist(), strict=True))


def parallel(model: nn.Module) -> nn.Module:
    """`model` with its gradients averaged over the ranks; itself for a single process."""
    if world() == 1:
        return model
    device = next(model.parameters()).device
    if device.type == "cuda":
        return DistributedDataParallel(model, device_ids=[device])
    network = DistributedDataParallel(model)
    network.register_comm_hook(None, _reduce_one_by_one)
    return network


def _reduce_one_by_one(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch's stubs leave it out
) -> torch.futures.Future[Tensor]:
    """Gloo's order of summation depends on where in a bucket a gradient lies, and DDP changes its buckets
    after the first step of a process. One by one, the sums of a resumed run have the same bits."""
    buffer = bucket.buffer()
    sums = [
        dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()
    ]
    return torch.futures.collect_all(sums).then(lambda _: buffer.div_(world()))
