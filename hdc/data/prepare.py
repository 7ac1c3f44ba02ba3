"""Turn a downloaded dataset into a folder to train from, whatever is wrong with some of its files.

    TARGET/<as in the source>.mp4   small videos, quick to seek
    TARGET/manifest.csv             what there is
    TARGET/bad_files.csv            what there is not, and why
    TARGET/prepare.jsonl            what was done: the settings, then a line per video

The log is what makes a second run go on where the first one was killed. It is the only file that is not
written in one go: lines are appended, and a last line that was cut off does not count.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from hdc import atomic, lock
from hdc.data.hmdb51 import list_hmdb51
from hdc.data.kinetics400 import list_kinetics400
from hdc.data.listing import Listed, label_columns
from hdc.data.manifest import MANIFEST, OF_THE_FILE, Manifest, csv_text, read_manifest
from hdc.data.packed import is_packed
from hdc.data.ucf101 import list_ucf101
from hdc.data.video_folder import list_video_folder
from hdc.data.workers import Job, Outcome, hash_file, run_jobs
from hdc.device import cores
from hdc.errors import InputError, reason, unwritable

DATASETS: dict[str, Callable[[Path], list[Listed]]] = {
    "kinetics400": list_kinetics400,
    "ucf101": list_ucf101,
    "hmdb51": list_hmdb51,
    "folder": list_video_folder,
}
BAD_FILES, LOG = "bad_files.csv", "prepare.jsonl"
MISSING = "is missing"
SECONDS_TO_WAIT = 10.0  # for the workers of a run that was killed: they notice at their next frame

Progress = Callable[[int, int, int], None]  # done, total, of these bad


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How a dataset is prepared.

    Attributes:
        short_side: of the videos that DST gets, in pixels (even); smaller ones keep their size.
        workers: decoding processes; null takes one per core.
        no_transcode: write only the manifest, of the videos where they lie.
        check: change nothing; compare DST with its manifest and list the differences (exit code 1).
    """

    short_side: int = 128
    workers: int | None = None
    no_transcode: bool = False
    check: bool = False

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.short_side % 2:
            raise InputError(
                f"short_side is {self.short_side}; it must be even and at least 16 pixels"
            )
        if self.workers is not None and self.workers < 1:
            raise InputError(f"workers is {self.workers}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The outcome: the manifest, the bad files with their reasons, and whether anything was left to do."""

    manifest: Manifest
    bad: dict[str, str]
    changed: bool


def prepare(
    dataset: str,
    source: Path,
    target: Path,
    config: PrepareConfig,
    progress: Progress = lambda done, total, bad: None,
) -> Prepared:
    """Decode every video that the lists in `source` name, and write what `target` lacks.

    Raises:
        InputError: folders or lists that do not fit, a target that cannot be written, no good video.
    """
    source, target = source.resolve(), target.resolve()
    _check_folders(source, target, config)
    videos = DATASETS[dataset](source)
    if source == target:
        own = (MANIFEST, BAD_FILES, LOG)
        videos = [v for v in videos if v.path not in own and not is_packed(v.path, MANIFEST)]
    if not videos:
        raise InputError(f"{source} holds no videos")
    settings = {
        "dataset": dataset,
        "no_transcode": config.no_transcode,
        "short_side": None if config.no_transcode else config.short_side,
    }
    with _Log(target, settings) as log:
        outcomes, worked = _decode_all(source, target, videos, config, log, progress)
        good = [video for video in videos if not outcomes[video.path].reason]
        bad = {
            _printable(video.path): outcomes[video.path].reason
            for video in videos
            if outcomes[video.path].reason
        }
        wrote = _write_if_new(target / BAD_FILES, csv_text(["path", "reason"], bad.items()))
        if not good:
            raise InputError(
                f"none of the {len(videos)} videos of {source} is good; {target / BAD_FILES} says why"
            )
        paths = _manifest_paths(source, target, good, config)
        manifest = _manifest(target, good, paths, outcomes)
        wrote |= _write_if_new(target / MANIFEST, manifest.text())
    return Prepared(manifest, bad, worked or wrote)


def check(target: Path, progress: Progress = lambda done, total, bad: None) -> list[str]:
    """The differences between `target` and its manifest: "missing PATH", "changed PATH", "extra PATH".

    Raises:
        InputError: there is no manifest, or none with checksums.
    """
    manifest = read_manifest(target / MANIFEST)
    if "sha256" not in manifest.columns:
        raise InputError(f"{manifest.source} has no column 'sha256' to check against")
    expected = dict(zip(manifest.path.tolist(), manifest.columns["sha256"].tolist(), strict=True))

    def compare(path: str) -> str:
        try:
            return "" if hash_file(target / path) == expected[path] else f"changed {path}"
        except FileNotFoundError:
            return f"missing {path}"
        except OSError as error:
            return f"unreadable {path}: {error.strerror}"

    differences = []
    with ThreadPoolExecutor(cores()) as pool:
        for done, difference in enumerate(pool.map(compare, expected), start=1):
            if difference:
                differences.append(difference)
            progress(done, len(expected), len(differences))
    if not _read_settings(target).get("no_transcode"):  # else the folder may hold anything
        own = {MANIFEST, BAD_FILES, LOG}
        there = {
            path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()
        }
        extra = sorted(
            path for path in there - own - set(expected) if not is_packed(path, MANIFEST)
        )
        differences += [f"extra {_printable(path)}" for path in extra]
    return differences


def _check_folders(source: Path, target: Path, config: PrepareConfig) -> None:
    for folder in (source, target):
        if _printable(str(folder)) != str(folder):
            raise InputError(f"the name of {_printable(str(folder))} is not UTF-8")
    if not source.is_dir():
        raise InputError(f"{source} is no folder")
    nested = source in target.parents or target in source.parents
    if nested or (source == target and not config.no_transcode):
        raise InputError(f"{source} and {target} must not lie inside each other")
    if (target / MANIFEST).exists() and not (target / LOG).exists():
        raise InputError(
            f"{target / MANIFEST} is not of hdc-train prepare; move it away, or choose another folder"
        )


def _decode_all(
    source: Path,
    target: Path,
    videos: list[Listed],
    config: PrepareConfig,
    log: "_Log",
    progress: Progress,
) -> tuple[dict[str, Outcome], bool]:
    """The outcome of every video, and whether any had to be decoded now."""
    outcomes: dict[str, Outcome] = {}
    waiting: dict[Job, tuple[str, list[Any]]] = {}
    targets = _target_paths(videos)
    for video in videos:
        file = source / video.path
        try:
            video.path.encode()
            status = file.stat()
        except UnicodeEncodeError:
            outcomes[video.path] = Outcome(reason="has a name that is not UTF-8")
            continue
        except OSError as error:
            gone = video.missing or isinstance(error, FileNotFoundError)
            outcomes[video.path] = Outcome(reason=MISSING if gone else reason(error))
            continue
        written = "" if config.no_transcode else targets[video.path]
        stamp = [status.st_size, status.st_mtime_ns, written]
        known = log.find(video.path, stamp)
        if known and (known.reason or not written or _has_size(target / written, known.size)):
            outcomes[video.path] = known
        else:
            job = Job(str(file), written and str(target / written), config.short_side)
            waiting[job] = (video.path, stamp)
    bad = sum(bool(outcome.reason) for outcome in outcomes.values())
    workers = config.workers or cores()
    with closing(run_jobs(list(waiting), workers, log.descriptor)) as finished:
        for job, outcome in finished:
            path, stamp = waiting[job]
            log.add(path, stamp, outcome)
            outcomes[path] = outcome
            bad += bool(outcome.reason)
            progress(len(outcomes), len(videos), bad)
    return outcomes, bool(waiting)


def _target_paths(videos: list[Listed]) -> dict[str, str]:
    """Where each video goes: a.avi to a.mp4, but to a.avi.mp4 where there is an a.webm, too."""
    short = {video.path: str(PurePosixPath(video.path).with_suffix(".mp4")) for video in videos}
    wanted_by = Counter(path.casefold() for path in short.values())
    return {
        path: f"{path}.mp4" if wanted_by[wanted.casefold()] > 1 else wanted
        for path, wanted in short.items()
    }


def _manifest_paths(
    source: Path, target: Path, videos: list[Listed], config: PrepareConfig
) -> list[str]:
    """Relative to the manifest where the videos lie below it, absolute where not."""
    if not config.no_transcode:
        targets = _target_paths(videos)
        return [targets[video.path] for video in videos]
    return [video.path if source == target else str(source / video.path) for video in videos]


def _manifest(
    target: Path, videos: list[Listed], paths: list[str], outcomes: dict[str, Outcome]
) -> Manifest:
    found = [outcomes[video.path] for video in videos]
    measured = {
        name: np.array([str(getattr(outcome, name)) for outcome in found]) for name in OF_THE_FILE
    }
    return Manifest(
        target / MANIFEST,
        np.array(paths),
        np.zeros(len(videos), dtype=np.int64),
        np.array([outcome.frames for outcome in found], dtype=np.int64),
        label_columns(videos) | measured,
    )


class _Log:
    """prepare.jsonl: read on entering, then held open and locked, so that two runs never mix."""

    def __init__(self, target: Path, settings: dict[str, Any]) -> None:
        self.path = target / LOG
        self.settings = settings
        self.entries: dict[str, tuple[list[Any], Outcome]] = {}

    def __enter__(self) -> "_Log":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            lock.take(self.file, "hdc-train prepare", SECONDS_TO_WAIT, inherit=True)
            self._load()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    @property
    def descriptor(self) -> int:
        """Workers inherit it, and with it the lock: it falls when the last of them is gone."""
        return self.file.fileno()

    def find(self, path: str, stamp: list[Any]) -> Outcome | None:
        """What came of a video, if it is still the same file (and goes to the same place)."""
        logged_stamp, outcome = self.entries.get(path, ([], None))
        return outcome if logged_stamp == stamp else None

    def add(self, path: str, stamp: list[Any], outcome: Outcome) -> None:
        """Append one video."""
        self._append({"path": path, "stamp": stamp, "outcome": dataclasses.asdict(outcome)})

    def _load(self) -> None:
        self.file.seek(0)
        content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self.file.truncate(len(whole))
        first, *lines = whole.splitlines() or [b""]
        if not first:
            self._append(self.settings)
            return
        try:
            settings = dict(json.loads(first))
            for entry in map(json.loads, lines):
                self.entries[entry["path"]] = (entry["stamp"], Outcome(**entry["outcome"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path} is damaged; delete it to begin anew") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise InputError(
                    f"{self.path.parent} was prepared with {name} = {settings.get(name)}, not {value}; "
                    "choose another folder, or delete this one"
                )

    def _append(self, value: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(value).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error


def _read_settings(target: Path) -> dict[str, Any]:
    """The first line of the log, empty where there is none: a folder may be copied without it."""
    try:
        with (target / LOG).open("rb") as file:
            return dict(json.loads(file.readline()))
    except (OSError, ValueError):
        return {}


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _printable(path: str) -> str:
    """The path as UTF-8 can write it: bytes that are none become \\udcff."""
    return path.encode(errors="backslashreplace").decode()


def _write_if_new(path: Path, text: str) -> bool:
    """False where the file says so already."""
    try:
        if path.read_bytes() == text.encode():
            return False
    except FileNotFoundError:
        pass
    atomic.write_text(path, text)
    return True
