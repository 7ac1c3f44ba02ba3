"""Training clips: which videos and frames a step sees follows from seed, epoch and row alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hdc.data.clips import (
    Batches,
    ClipConfig,
    Key,
    TrainingClips,
    loop,
    training_loader,
)
from hdc.data.manifest import Manifest
from hdc.errors import InputError

FrameNumbers = Callable[[np.ndarray], list[int]]


def clips_of(
    manifest: Manifest, *, views: int = 2, seed: int = 0, **config: object
) -> TrainingClips:
    labels = 10 * np.arange(len(manifest))
    return TrainingClips(
        manifest, labels, ClipConfig(**{"size": 32, **config}), views=views, seed=seed
    )


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 99),
    st.integers(0, 50),
)
def test_batches(rows: int, batch_size: int, epochs: int, seed: int, first_step: int) -> None:
    """Every epoch visits each row at most once and drops less than a batch; a later start sees the rest."""
    batch_size = min(batch_size, rows)
    batches = list(Batches(rows, batch_size, epochs, seed, 0))
    per_epoch = rows // batch_size
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        of_epoch = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        keys = [key for batch in of_epoch for key in batch]
        assert {key.epoch for key in keys} == {epoch}
        assert len({key.row for key in keys}) == len(keys) == per_epoch * batch_size
        assert {key.row for key in keys} <= set(range(rows))
    first_step = min(first_step, len(batches))
    resumed = Batches(rows, batch_size, epochs, seed, first_step)
    assert list(resumed) == batches[first_step:]
    assert len(resumed) == len(batches) - first_step


def test_order_differs_by_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batch = list(Batches(50, 50, 2, seed, 0))[epoch]
        return [key.row for key in batch]

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(50))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def draw_clips(dataset: TrainingClips, epoch: int, row: int) -> np.ndarray:
    """uint8 [views, T, size, size, 3] of one row."""
    (clips,) = dataset[[Key(epoch, row)]].clips.unbind(1)
    return clips.numpy()


def test_a_key_decides_the_clips(numbered: Manifest) -> None:
    """Whatever else is in the batch."""

    def draw(epoch: int, row: int, seed: int = 0) -> torch.Tensor:
        return torch.from_numpy(draw_clips(clips_of(numbered, seed=seed), epoch, row))

    assert torch.equal(draw(0, 3), draw(0, 3))
    for other in (draw(1, 3), draw(0, 2), draw(0, 3, seed=1)):
        assert not torch.equal(draw(0, 3), other)
    batch = clips_of(numbered)[[Key(0, 2), Key(1, 3), Key(0, 3)]]
    expected = torch.stack([draw(0, 2), draw(1, 3), draw(0, 3)], dim=1)
    assert torch.equal(batch.clips, expected)
    assert batch.labels.tolist() == [20, 30, 30]


def test_clips_are_consecutive_frames(numbered: Manifest, frame_numbers: FrameNumbers) -> None:
    """Two clips of a video start at different frames, and every start can be drawn."""
    dataset = clips_of(numbered)
    starts = []
    for epoch in range(120):
        clips, labels, _ = dataset[[Key(epoch, 4)]]
        assert clips.shape == (2, 1, 16, 32, 32, 3)
        assert clips.dtype == torch.uint8
        assert labels.tolist() == [40]
        numbers = [frame_numbers(clip) for clip in clips[:, 0].numpy()]
        assert all(n == list(range(n[0], n[0] + 16)) for n in numbers)
        assert numbers[0][0] != numbers[1][0]
        starts += [n[0] for n in numbers]
    assert set(starts) == set(range(48 - 16 + 1))


def test_starts_lie_on_the_grid(numbered: Manifest, frame_numbers: FrameNumbers) -> None:
    dataset = clips_of(numbered, start_every=16)
    pairs = {
        tuple(frame_numbers(clip)[0] for clip in draw_clips(dataset, epoch, 0))
        for epoch in range(60)
    }
    assert pairs == {(a, b) for a in (0, 16, 32) for b in (0, 16, 32) if a != b}


def test_clips_stay_in_their_part_of_the_file(
    numbered: Manifest, frame_numbers: FrameNumbers
) -> None:
    """A row may stand for frames 10 to 27 of a file: its clips start at 10, 11 or 12."""
    part = Manifest(
        numbered.source, numbered.path[:1], np.array([10]), np.array([18]), numbered.columns
    )
    dataset = clips_of(part, views=1)
    starts = {frame_numbers(draw_clips(dataset, e, 0)[0])[0] for e in range(30)}
    assert starts == {10, 11, 12}


def test_no_room_for_different_clips(numbered: Manifest, frame_numbers: FrameNumbers) -> None:
    """A video of exactly one clip gives that clip twice."""
    part = Manifest(
        numbered.source, numbered.path[:1], np.array([0]), np.array([16]), numbered.columns
    )
    clips = draw_clips(clips_of(part), 0, 0)
    assert [frame_numbers(clip) for clip in clips] == [list(range(16))] * 2


def test_random_squares(
    tmp_path: Path, write_video: Callable[..., Path], make_manifest: Callable[..., Manifest]
) -> None:
    """One place per clip, the same in all its frames, anywhere along the long side."""

    def ramp(number: int, width: int, height: int) -> np.ndarray:
        return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3))

    write_video(tmp_path / "v.avi", 20, width=160, height=64, draw=ramp)
    dataset = clips_of(make_manifest(tmp_path, [("v.avi", 0, 20, "a", "train")]), size=64)
    lefts = []
    for epoch in range(40):
        for clip in draw_clips(dataset, epoch, 0).astype(int):
            assert clip.shape == (16, 64, 64, 3)
            assert np.abs(clip - clip[:1]).max() <= 6  # coding noise
            assert clip[0, 0, -1].mean() - clip[0, 0, 0].mean() == pytest.approx(63, abs=6)
            lefts.append(clip[:, :, 0].mean())
    assert min(lefts) < 12
    assert max(lefts) > 84
    assert len({round(left) for left in lefts}) > 25


def test_short_videos_are_repeated(
    tmp_path: Path,
    write_video: Callable[..., Path],
    make_manifest: Callable[..., Manifest],
    frame_numbers: FrameNumbers,
) -> None:
    write_video(tmp_path / "short.avi", 5, width=32, height=32)
    manifest = make_manifest(tmp_path, [("short.avi", 0, 5, "a", "train")])
    for clip in draw_clips(clips_of(manifest, short_videos="loop"), 0, 0):
        assert frame_numbers(clip) == [0, 1, 2, 3, 4] * 3 + [0]
    with pytest.raises(InputError, match=r"short\.avi \(5 frames\)"):
        clips_of(manifest)


def test_loop() -> None:
    assert loop(np.array([7, 8, 9]), 7).tolist() == [7, 8, 9, 7, 8, 9, 7]
    assert loop(np.array([7, 8, 9]), 2).tolist() == [7, 8]


@pytest.fixture
def with_bad_files(
    tmp_path: Path, write_video: Callable[..., Path], make_manifest: Callable[..., Manifest]
) -> Manifest:
    """Rows: good, no video, good, fewer frames than listed."""
    for name in ("0.avi", "2.avi"):
        write_video(tmp_path / name, 20, width=32, height=32)
    (tmp_path / "1.avi").write_text("no video")
    write_video(tmp_path / "3.avi", 10, width=32, height=32)
    return make_manifest(tmp_path, [(f"{i}.avi", 0, 20, "a", "train") for i in range(4)])


def test_unreadable_videos_are_left_out_and_named(with_bad_files: Manifest) -> None:
    dataset = clips_of(with_bad_files)
    batch = dataset[[Key(0, row) for row in range(4)]]
    assert batch.clips.shape == (2, 2, 16, 32, 32, 3)
    assert batch.labels.tolist() == [0, 20]
    assert batch.labels.dtype == torch.int64
    for column, row in enumerate((0, 2)):
        np.testing.assert_array_equal(batch.clips[:, column], draw_clips(dataset, 0, row))
    folder = with_bad_files.source.parent
    assert [entry.path for entry in batch.unreadable] == [str(folder / f"{i}.avi") for i in (1, 3)]
    assert "ends after 10 frames" in batch.unreadable[1].reason


def test_nothing_readable(with_bad_files: Manifest) -> None:
    batch = clips_of(with_bad_files)[[Key(0, 1), Key(0, 3)]]
    assert batch.clips.shape == (2, 0, 16, 32, 32, 3)
    assert len(batch.labels) == 0
    assert [Path(entry.path).name for entry in batch.unreadable] == ["1.avi", "3.avi"]


def test_workers_change_nothing(numbered: Manifest) -> None:
    """Nor does resuming: the loader of step 2 goes on where the other one is."""

    def batches(workers: int, first_step: int) -> list[torch.Tensor]:
        loader = training_loader(
            clips_of(numbered),
            batch_size=3,
            epochs=2,
            first_step=first_step,
            workers=workers,
            pin_memory=False,
        )
        return [torch.cat([batch.clips.flatten(), batch.labels]) for batch in loader]

    alone = batches(0, 0)
    assert len(alone) == 4
    for others, expected in ((batches(2, 0), alone), (batches(0, 2), alone[2:])):
        assert len(others) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(others, expected, strict=True))


def test_errors_of_workers_arrive(with_bad_files: Manifest) -> None:
    loader = training_loader(
        clips_of(with_bad_files), batch_size=4, epochs=1, first_step=0, workers=1, pin_memory=False
    )
    (batch,) = loader
    assert sorted(Path(entry.path).name for entry in batch.unreadable) == ["1.avi", "3.avi"]
    assert batch.clips.shape == (2, 2, 16, 32, 32, 3)
    assert batch.labels.tolist() in ([0, 20], [20, 0])
    assert batch.clips.is_shared()


def test_batch_larger_than_the_dataset(numbered: Manifest) -> None:
    with pytest.raises(InputError, match=r"batch_size is 8 but .* has only 7 training videos"):
        training_loader(
            clips_of(numbered), batch_size=8, epochs=1, first_step=0, workers=0, pin_memory=False
        )


@pytest.mark.parametrize("name", ["frames", "size", "start_every"])
def test_wrong_settings(name: str) -> None:
    with pytest.raises(InputError, match=rf"clips\.{name} is 0; it must be at least 1"):
        ClipConfig(**{name: 0})
