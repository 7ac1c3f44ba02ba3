"""A decoding process that dies, and what is said of it: real processes that kill themselves."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hdc.data import clips, crashes
from hdc.data.clips import Batch, ClipConfig, TrainingClips, training_loader
from hdc.data.crashes import Readers
from hdc.data.manifest import Manifest
from hdc.data.video import Store
from hdc.errors import InputError

Die = Callable[[], None]


def abort() -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.abort()


ENDS: dict[str, tuple[Die, str]] = {
    "segfault": (
        lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "was killed by the signal Segmentation fault",
    ),
    "out of memory": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        "was killed by the signal Killed",
    ),
    "abort": (abort, "was killed by the signal Aborted"),
    "exit": (lambda: os._exit(3), "exited unexpectedly with exit code 3"),
}


def die_at(name: str, die: Die, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decoder dies when it is to decode a video of this name."""
    decode = clips.store_clips

    def store_clips(path: Path, starts: list[int], frames: int, side: int, store: Store) -> None:
        if path.name == name:
            die()
        decode(path, starts, frames, side, store)

    monkeypatch.setattr(clips, "store_clips", store_clips)


def dataset_of(manifest: Manifest) -> TrainingClips:
    labels = np.zeros(len(manifest), dtype=np.int64)
    return TrainingClips(manifest, labels, ClipConfig(size=32), views=2, seed=0)


def start(dataset: TrainingClips, workers: int) -> DataLoader[Batch]:
    """A hundred epochs."""
    return training_loader(
        dataset, batch_size=2, epochs=100, first_step=0, workers=workers, pin_memory=False
    )


def run(loader: DataLoader[Batch]) -> None:
    with loader.dataset.readers.name_crashes():  # type: ignore[attr-defined]
        for _ in crashes.items(loader):
            pass


@pytest.mark.parametrize("end", ENDS)
def test_the_video_is_named(end: str, numbered: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    die, cause = ENDS[end]
    die_at("5.avi", die, monkeypatch)
    with pytest.raises(InputError) as caught:
        run(start(dataset_of(numbered), 1))
    folder = numbered.source.parent
    assert str(caught.value) == (
        f"a decoding process {cause} while it read {folder / '5.avi'}; if memory ran out, "
        f"lower --workers, if not, take the video out of {numbered.source}"
    )


def test_its_end_is_reported_whenever(numbered: Manifest) -> None:
    """The pipe broke; PyTorch's signal comes before that is noticed, in the middle of it, or after."""
    readers = Readers(numbered, 1)
    readers.at[0] = torch.tensor([os.getpid(), 5])

    def report(signum: int, frame: object) -> None:
        raise RuntimeError(
            f"DataLoader worker (pid {os.getpid()}) exited unexpectedly with exit code 3"
        )

    def broken(seconds: float) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        raise ConnectionResetError("Connection reset by peer")
        yield

    before = signal.signal(signal.SIGALRM, report)
    try:
        for microseconds in range(1, 200):
            with (
                pytest.raises(InputError, match=r"exit code 3 while it read [^;]*/5\.avi; "),
                readers.name_crashes(),
            ):
                for _ in crashes.items(broken(microseconds * 1e-6)):
                    pass
    finally:
        signal.signal(signal.SIGALRM, before)


def test_one_of_several(numbered: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the other one is alive, or died of the same video in the next epoch."""
    die_at("5.avi", ENDS["out of memory"][0], monkeypatch)
    with pytest.raises(InputError, match=r"while it read [^,;]*/5\.avi; if memory ran out"):
        run(start(dataset_of(numbered), 2))


def test_between_two_videos(numbered: Manifest) -> None:
    """Killed from outside, with nothing to do: no video is to blame."""
    dataset = dataset_of(numbered)

    def kill_an_idle_worker() -> None:
        loader = start(dataset, 1)
        before = set(torch.multiprocessing.active_children())
        with dataset.readers.name_crashes():
            batches = crashes.items(loader)
            next(batches)
            (worker,) = set(torch.multiprocessing.active_children()) - before
            assert worker.pid
            os.kill(worker.pid, signal.SIGSTOP)
            while dataset.readers.at[0, 0]:
                os.kill(worker.pid, signal.SIGCONT)
                time.sleep(0.01)
                os.kill(worker.pid, signal.SIGSTOP)
            os.kill(worker.pid, signal.SIGKILL)
            list(batches)

    with pytest.raises(InputError, match=r"Killed between two videos; .* lower --workers$"):
        kill_an_idle_worker()


def test_no_room_in_shared_memory(numbered: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says where /dev/shm has 1 MB."""
    message = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"

    def fail(size: int) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", fail)
    with pytest.raises(InputError, match=r"^/dev/shm is full, .*; lower --workers or --batch_size"):
        run(start(dataset_of(numbered), 1))


def test_other_errors_pass(numbered: Manifest) -> None:
    with (
        pytest.raises(RuntimeError, match="the loss is wrong"),
        Readers(numbered, 1).name_crashes(),
    ):
        raise RuntimeError("the loss is wrong")


def test_what_pytorch_says() -> None:
    """Its third wording comes up only where it cannot watch signals."""
    found = crashes.DEAD.search("DataLoader worker (pid(s) 17, 23) exited unexpectedly")
    assert found
    assert found.groups() == ("17, 23", "exited unexpectedly")


COMMAND = """
import os, signal, sys
from hdc.data import clips, whole_videos
from hdc.cli import main

def dies(decode):
    def wrapped(path, *rest):
        if path.name == "2.avi":
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, *rest)
    return wrapped

clips.store_clips, whole_videos.read_all = dies(clips.store_clips), dies(whole_videos.read_all)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["pretrain", "retrieve"])
def test_one_line_and_exit_code_2(command: str, numbered: Manifest, tmp_path: Path) -> None:
    numbered.write()
    options = [f"--data={numbered.source}", f"--out={tmp_path}", "--workers=2", "--device=cpu"]
    options += ["--backbone=tiny", "--clips.size=32"]
    if command == "pretrain":
        options += ["--augment.crop_size=28", "--batch_size=4", "--epochs=50"]
    else:
        options += ["--crop_size=28"]
    run = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, command, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert run.returncode == 2, run.stderr
    # Another worker may complain of the pipe that broke when the run ended.
    (line,) = (line for line in run.stderr.splitlines() if line.startswith("hdc-train: "))
    assert f" while it read {numbered.source.parent}/2.avi; " in line
