"""The loop that pretraining and finetuning share: steps, log, checkpoints, resume.

A step depends on the weights, the optimizer's buffers and its own number, on nothing else: batches,
crops and dropout are drawn from (seed, step). So a run that is killed at any moment and resumed from
its last checkpoint goes through the same weights as one that was not. Several processes share each batch
(`hdc.share`), average their gradients, and so hold the same weights; the first of them writes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Generator, Tensor, nn

from hdc import atomic, checkpoint, distributed, environment, lock
from hdc.config import TrainConfig, plain
from hdc.data.clips import Batch, TrainingClips, Unreadable, training_loader
from hdc.data.crashes import items
from hdc.device import decoding_workers
from hdc.errors import InputError
from hdc.journal import Journal
from hdc.optimizer import build_optimizer, set_rate
from hdc.progress import ProgressBar, console, warn
from hdc.share import Share

# (model, clips uint8 [V, B, T, H, W, 3], labels [B], generator, share of the batch)
# -> (loss, detached values to log), of which the mean over the ranks counts. A share without clips comes
# with one black clip, whose gradient must be 0: every rank takes part in every step.
StepLoss = Callable[
    [nn.Module, Tensor, Tensor, Generator, Share], tuple[Tensor, Mapping[str, Tensor]]
]

# What may differ between a run and its continuation without changing what a step computes.
FREE_ON_RESUME = {
    "out",
    "resume",
    "epochs",
    "workers",
    "device",
    "checkpoint_every",
    "keep_every",
    "log_every",
}
# So many unreadable videos without a step between them mean that the disk is gone. Fewer may be chance: a batch
# of one is lost with a single corrupt file.
TOO_MANY_LOST = 8
# A server keeps the locks of a node that died for some time: NFS for 90 s.
SECONDS_TO_RESTART = 120.0


@dataclass(frozen=True)
class TrainedRun:
    """What a finished run leaves."""

    checkpoint: Path
    metrics: dict[str, float]  # of the last logged step; empty if nothing was left to do
    unreadable: list[Unreadable]


def train(
    kind: checkpoint.Kind,
    config: TrainConfig,
    model: nn.Module,
    dataset: TrainingClips,
    step_loss: StepLoss,
    extra: Mapping[str, Any],
    status: Callable[[Mapping[str, float]], str],
    min_videos: int,
) -> TrainedRun:
    """Run `config.epochs` epochs of SGD and leave a checkpoint in `config.out`.

    A step leaves out the videos that cannot be read. With fewer than `min_videos` left it is not made.

    Args:
        kind: stored in the checkpoint: what it can be used for.
        config: stored in the checkpoint and in `out/config.yaml`.
        model: already on its device.
        dataset: its seed decides the batches.
        step_loss: loss and values to log of one batch, or of this rank's share of it.
        extra: plain values to store beside the model, such as class names; a run goes on only with the same.
        status: words the logged values for the progress bar.
        min_videos: that the loss makes sense of, out of `config.batch_size` or fewer.

    Raises:
        InputError: `out` holds another run, which may still be at work, or cannot be written, the videos of
            whole batches cannot be read, a decoding process died, or the loss is no longer finite (the last good
            checkpoint stays).
    """
    out = Path(config.out)
    path = out / checkpoint.FILE
    device = next(model.parameters()).device
    with _alone(out):
        optimizer = build_optimizer(model, config.optimizer)
        state = distributed.on_rank0(lambda: _stored(kind, config, extra))
        step, unreadable = _restore(state, config, path, model, optimizer)
        network = distributed.parallel(model)
        first = distributed.rank() == 0

        loader = training_loader(
            dataset,
            batch_size=config.batch_size,
            epochs=config.epochs,
            first_step=step,
            workers=decoding_workers(config),
            pin_memory=device.type == "cuda",
            rank=distributed.rank(),
            ranks=distributed.world(),
        )
        total = step + len(loader)
        steps_per_epoch = len(dataset) // config.batch_size
        stored = asdict(config)
        if first:
            atomic.write_text(out / "config.yaml", yaml.safe_dump(plain(stored), sort_keys=False))
            if len(loader):
                environment.store(out, device, step)

        def save(file: Path) -> None:
            weights = model.state_dict()
            if not all(torch.isfinite(value).all() for value in weights.values()):
                raise _diverged(step, out)
            checkpoint.save(
                file,
                kind,
                {
                    "config": stored,
                    "step": step,
                    "model": weights,
                    "optimizer": optimizer.state_dict(),
                    "unreadable": [tuple(entry) for entry in unreadable.values()],
                    **extra,
                },
            )

        def save_what_is_due() -> None:
            keep = config.keep_every > 0 and step % (config.keep_every * steps_per_epoch) == 0
            if keep:
                save(checkpoint.kept(out, step // steps_per_epoch))
            due = keep or step % config.checkpoint_every == 0
            # Whoever resumes begins before the lost videos, in case they are back.
            if step == total or (due and not lost):
                save(path)

        def update(batch: Batch, share: Share) -> tuple[Tensor, Mapping[str, Tensor]]:
            if share.count == 0:
                batch = dataset.black_clip()
            clips = batch.clips.to(device, non_blocking=True)
            labels = batch.labels.to(device, non_blocking=True)
            value = step_seed(config.seed, step)
            torch.manual_seed(value)  # dropout, on every device
            generator = Generator().manual_seed(value)  # augmentations
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, values = step_loss(network, clips, labels, generator, share)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.optimizer.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            return loss.detach(), values

        metrics: dict[str, float] = {}
        lost: list[Unreadable] = []  # since the last step that was made
        journal = Journal(out, step) if first else None
        model.train()
        with (
            closing(journal) if journal else nullcontext(),
            ProgressBar(kind, total, step) as bar,
            dataset.readers.name_crashes(),
        ):
            clips_done, since = 0, time.perf_counter()
            for batch in items(loader):
                share, skipped = _share(batch)
                enough = share.total >= min_videos
                lost = [] if enough else [*lost, *skipped]
                if len(lost) >= max(config.batch_size, TOO_MANY_LOST):
                    raise _unreadable(step, lost, config, min_videos)
                for entry in skipped:
                    if entry.path not in unreadable:
                        warn(f"skipped {entry.path}: {entry.reason}")
                        if journal:
                            journal.write(step, skipped=entry.path, reason=entry.reason)
                    unreadable[entry.path] = entry
                rate = set_rate(optimizer, config.optimizer, step)
                if enough:
                    loss, values = update(batch, share)
                    clips_done += dataset.views * share.total
                    if step % config.log_every == 0 or step + 1 == total:
                        metrics = distributed.average({"loss": loss, **values})
                        if not math.isfinite(metrics["loss"]):
                            raise _diverged(step, out)
                        speed = clips_done / (time.perf_counter() - since)
                        if journal:
                            journal.write(
                                step,
                                epoch=step // steps_per_epoch,
                                lr=rate,
                                clips_per_second=round(speed, 1),
                                **metrics,
                            )
                        bar.advance(0, f"{status(metrics)}  {speed:.0f} clips/s")
                step += 1
                if first and step < total:
                    save_what_is_due()
                bar.advance()
            if lost and not (state or clips_done):
                raise _unreadable(step, lost, config, min_videos)
            if len(loader):  # a finished run is left as it is
                distributed.on_rank0(save_what_is_due)
        if unreadable:
            videos = (
                "1 unreadable video was"
                if len(unreadable) == 1
                else f"{len(unreadable)} unreadable videos were"
            )
            warn(f"{videos} left out: {', '.join(sorted(unreadable))}")
        return TrainedRun(path, metrics, list(unreadable.values()))


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Within it no other run writes into `out`.

    Rank 0 has the lock, without its decoding processes, which may outlive it by a batch.

    Raises:
        InputError: another run is at work there.
    """
    seconds = SECONDS_TO_RESTART if distributed.restarted() else 0.0
    with ExitStack() as stack:
        distributed.on_rank0(lambda: stack.enter_context(lock.held(out, "hdc-train", seconds)))
        yield


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step of one run; neighbouring steps get unrelated streams."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def _share(batch: Batch) -> tuple[Share, list[Unreadable]]:
    """Which of the step's readable clips are in `batch`, and what no rank could read."""
    counts = distributed.gather_numbers(len(batch.labels), len(batch.unreadable))
    share = Share.of([readable for readable, _ in counts], distributed.rank())
    if not any(unreadable for _, unreadable in counts):
        return share, []
    return share, [entry for part in distributed.gather(batch.unreadable) for entry in part]


def finished(
    kind: checkpoint.Kind, config: TrainConfig, videos: int, extra: Mapping[str, Any]
) -> bool:
    """Whether `train` of so many videos has nothing left to do; arguments as there.

    Raises:
        InputError: `out` holds another run, or a damaged checkpoint.
    """

    def look() -> bool:
        state = _stored(kind, config, extra)
        return state is not None and state["step"] >= config.epochs * (videos // config.batch_size)

    return distributed.on_rank0(look)


def _stored(
    kind: checkpoint.Kind, config: TrainConfig, extra: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one."""
    path = Path(config.out) / checkpoint.FILE
    if not path.exists():
        return None
    if not (config.resume or distributed.restarted()):
        raise InputError(f"{path} exists; add --resume to go on with it, or choose another --out")
    state = checkpoint.load(path, kind)
    ours, theirs = asdict(config), state["config"]
    different = [
        key
        for key in ours
        if key not in FREE_ON_RESUME and plain(ours[key]) != plain(theirs.get(key))
    ]
    different += [
        key.replace("_", " ") for key in extra if plain(extra[key]) != plain(state.get(key))
    ]
    if different:
        raise InputError(
            f"{path} was made with different {', '.join(different)}; "
            f"repeat what {path.parent / 'config.yaml'} says, or choose another --out"
        )
    return state


def _restore(
    state: dict[str, Any] | None,
    config: TrainConfig,
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict[str, Unreadable]]:
    """The step to go on from, and the unreadable videos found before it."""
    if state:
        checkpoint.load_strict(model, state["model"], str(path), f"backbone {config.backbone}")
        optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"] if state else 0
    if distributed.restarted():
        console.print(f"restarted by torchrun: going on from step {step}", highlight=False)
    return step, {entry[0]: Unreadable(*entry) for entry in state["unreadable"]} if state else {}


def _diverged(step: int, out: Path) -> InputError:
    return InputError(
        f"training diverged at step {step}: lower --optimizer.lr{_last_checkpoint(out)}"
    )


def _unreadable(
    step: int, lost: list[Unreadable], config: TrainConfig, min_videos: int
) -> InputError:
    return InputError(
        f"training stopped at step {step}: of a batch of {config.batch_size} videos (batch_size), "
        f"fewer than {min_videos} can be read, e.g. {lost[-1].path}: {lost[-1].reason}"
        + _last_checkpoint(Path(config.out))
    )


def _last_checkpoint(out: Path) -> str:
    path = out / checkpoint.FILE
    return f"; the last good checkpoint is {path}" if path.exists() else ""
