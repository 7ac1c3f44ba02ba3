"""Processes that decode: a file that crashes FFmpeg, or hangs it, costs one process and not the run.

A worker is a fresh interpreter, not a `multiprocessing` child: those import the main program again, and
`hdc-train` with PyTorch takes 4.9 s and 430 MB, a worker 0.2 s and 45 MB. It reads one job per line from
its standard input and answers with one line. Which file a crash belongs to is thereby known.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

from hdc import atomic
from hdc.data.transcode import measure, transcode
from hdc.data.video import VideoError
from hdc.errors import InputError

COMMAND = [sys.executable, "-P", "-m", "hdc.data.workers"]
SECONDS_PER_FRAME = 60  # a decoder that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Job:
    """Decode `source`; write it to `target`, small, unless that is empty."""

    source: str
    target: str
    short_side: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a manifest says of a video, or why it says nothing: `reason` is empty for a good one."""

    frames: int = 0
    fps: str = ""
    width: int = 0
    height: int = 0
    size: int = 0
    sha256: str = ""
    reason: str = ""


def run_jobs(
    jobs: Sequence[Job], workers: int, inherit: int
) -> Generator[tuple[Job, Outcome], None, None]:
    """The jobs with their outcomes, as they are done. Close the iterator to end the workers early.

    Args:
        inherit: a file descriptor that stays open as long as a worker lives.

    Raises:
        InputError: a result cannot be written.
    """
    pending = iter(jobs)
    lock = Lock()
    done: SimpleQueue[tuple[Job, Outcome] | Exception | None] = SimpleQueue()

    def work(worker: _Worker) -> None:
        try:
            while True:
                with lock:
                    job = next(pending, None)
                if job is None:
                    break
                done.put((job, worker.run(job)))
        except Exception as error:
            done.put(error)
        done.put(None)

    pool = [_Worker(inherit) for _ in range(min(workers, len(jobs)))]
    threads = [Thread(target=work, args=(worker,), daemon=True) for worker in pool]
    try:
        for thread in threads:
            thread.start()
        running = len(threads)
        while running:
            item = done.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for worker in pool:
            worker.stop()
        for thread in threads:
            thread.join()


class _Worker:
    """A process, started when there is something to do and again after a crash."""

    def __init__(self, inherit: int) -> None:
        self.inherit = inherit
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False
        self.lock = Lock()

    def run(self, job: Job) -> Outcome:
        process = self._start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
            with suppress(BrokenPipeError):
                process.stdin.close()
        if answer:
            fields = json.loads(answer)
            if "error" in fields:
                raise InputError(fields["error"])
            return Outcome(**fields)
        self.process = None
        return Outcome(reason=_cause_of_death(process.wait()))

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.process:
                self.process.kill()
                self.process.wait()

    def _start(self) -> subprocess.Popen[str]:
        with self.lock:
            if self.stopped:
                raise InputError("the workers were stopped")
            if self.process is None:
                self.process = subprocess.Popen(
                    COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    pass_fds=[self.inherit],
                    process_group=0,  # Ctrl-C is for the run alone, which then ends its workers
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            return self.process


def _cause_of_death(code: int) -> str:
    if code >= 0:
        # Not a crash in a decoder: every further file would fare the same.
        raise InputError(f"a worker process ended with exit code {code}: {' '.join(COMMAND)}")
    if -code == signal.SIGALRM:
        return f"hangs the decoder: no frame in {SECONDS_PER_FRAME} s"
    return f"crashes the decoder ({signal.Signals(-code).name})"


def serve() -> None:
    """What a worker does, until there is nothing left to read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    parent = os.getppid()

    def on_frame() -> None:
        if os.getppid() != parent:
            os._exit(1)  # the run was killed; another may be waiting for the folder
        signal.alarm(SECONDS_PER_FRAME)  # nobody catches it: it ends the process, C code or not

    for line in sys.stdin:
        try:
            fields = dataclasses.asdict(_carry_out(Job(**json.loads(line)), on_frame))
        except InputError as error:
            fields = {"error": str(error)}
        print(json.dumps(fields), file=answers, flush=True)


def _carry_out(job: Job, on_frame: Callable[[], None]) -> Outcome:
    """Raises InputError when the target cannot be written; whatever else goes wrong is the source's fault."""
    source = Path(job.source)
    content = b""
    try:
        size = source.stat().st_size
        if size == 0:
            return Outcome(reason="is empty (0 bytes)")
        try:
            on_frame()
            if job.target:
                content, info = transcode(source, job.short_side, on_frame)
            else:
                info = measure(source, on_frame)
        finally:
            signal.alarm(0)
        digest = hashlib.sha256(content).hexdigest() if job.target else hash_file(source)
    except VideoError as error:
        return Outcome(reason=error.reason)
    except Exception as error:
        return Outcome(reason=f"cannot be decoded: {type(error).__name__}: {error}")
    if job.target:
        atomic.write_bytes(Path(job.target), content)
        size = len(content)
    return Outcome(info.frames, f"{float(info.fps):.6g}", info.width, info.height, size, digest)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    serve()
