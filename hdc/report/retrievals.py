"""The paper's Figures 1 and 4 with clips that play: queries beside each model's nearest neighbour."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from hdc.data.manifest import Manifest, manifest_file, read_manifest
from hdc.data.video import Frames, VideoError, read_clips
from hdc.errors import InputError
from hdc.report.html import Html, element, joined
from hdc.report.records import CONFIG, Record, read_config

ROWS = 8  # queries in a grid
SIDE = 96  # short side of a clip in pixels
SHOWN = 16  # frames of a clip
RATE = 10  # of them in a second: slower than life, so that a short clip can be seen
# 96 × 128 pixels and 16 frames of a moving camera take 7 KB so; an animated WebP takes 38 KB, a GIF 250.
QUALITY = {"crf": "28", "preset": "slow"}

Place = tuple[str, int]  # a manifest row's path and start


def draw_retrievals(records: Sequence[Record], data: Path | None) -> list[Html]:
    """A grid for every (manifest, label, split) that models retrieved by.

    Args:
        data: the manifest to take clips and classes from; None tries those that the runs were trained with.
    """
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        if record.retrieval:
            found = record.retrieval
            key = (found.get("data", ""), found["label"], found["split"])
            groups.setdefault(key, []).append(record)
    return [_grid(label, members, data) for (_, label, _), members in groups.items()]


def _grid(label: str, records: Sequence[Record], data: Path | None) -> Html:
    found = [_pairs(record) for record in records]
    common = [place for place in found[0] if all(place in pairs for pairs in found)]
    drawn = np.random.default_rng(0).choice(len(common), min(ROWS, len(common)), replace=False)
    queries = [common[number] for number in sorted(drawn)]
    heading = element("h3", f"Nearest neighbours by {label}")
    try:
        needed = {*queries, *(pairs[query] for pairs in found for query in queries)}
        clips = _Clips(_manifest(label, records, data, needed), label)
    except InputError as error:
        note = f"No clips are shown: {error}. --data names the manifest that was retrieved from."
        return joined([heading, element("p", note, class_="soft")])
    rows = [
        element(
            "tr",
            element("th", clips.show(query), scope="row"),
            *(element("td", clips.show(pairs[query], clips.words[query])) for pairs in found),
        )
        for query in queries
    ]
    head = [element("th", name, scope="col") for name in ("query", *(r.name for r in records))]
    about = (
        f"{len(rows)} of {len(common)} queries, drawn at random, and the nearest clip of the training list "
        "under each model. Green and underlined: the same class. Red: another one. A click stops a clip."
    )
    grid = element(
        "table", element("thead", element("tr", *head)), element("tbody", *rows), class_="grid"
    )
    return joined(
        [heading, element("p", about, class_="soft"), element("div", grid, class_="wide")]
    )


def _pairs(record: Record) -> dict[Place, Place]:
    """Each query with its nearest neighbour."""
    return {
        (pair["query"], pair["start"]): (pair["neighbor"], pair["neighbor_start"])
        for pair in record.retrieval["nearest"]
    }


def _manifest(
    label: str, records: Sequence[Record], data: Path | None, needed: set[Place]
) -> Manifest:
    """The first manifest that lists what is needed.

    Raises:
        InputError: none does; says what is wrong with the last one tried.
    """
    error = InputError("no configuration beside these results names a manifest")
    for source in [data] if data else _sources(records):
        try:
            manifest = read_manifest(source)
            manifest.labels(label)
        except InputError as reason:
            error = reason
            continue
        missing = needed - set(_places(manifest))
        if not missing:
            return manifest
        error = InputError(f"{source} does not list {min(missing)[0]}")
    raise error


def _sources(records: Sequence[Record]) -> list[Path]:
    """The manifests that were retrieved from, and those in the configurations beside results and models."""
    configs = [*(record.retrieval for record in records), *(record.config for record in records)]
    for record in records:
        checkpoint = record.retrieval.get("checkpoint")
        if checkpoint:
            configs.append(read_config(Path(checkpoint).parent / CONFIG))
    return [manifest_file(config["data"]) for config in configs if "data" in config]


def _places(manifest: Manifest) -> Iterator[Place]:
    return zip(manifest.path.tolist(), manifest.start.tolist(), strict=True)


class _Clips:
    """The clips of a manifest as elements that play; each is encoded once."""

    def __init__(self, manifest: Manifest, label: str) -> None:
        places = list(_places(manifest))
        self.manifest = manifest
        self.words = dict(zip(places, manifest.columns[label].tolist(), strict=True))
        self._rows = {place: row for row, place in enumerate(places)}
        self._encoded: dict[Place, bytes | str] = {}

    def show(self, place: Place, wanted: str | None = None) -> Html:
        """The clip and its class; `wanted` is the class that would be right, if there is such a thing."""
        if place not in self._encoded:
            self._encoded[place] = self._encode(place)
        content, word = self._encoded[place], self.words[place]
        verdict = "" if wanted is None else "hit" if word == wanted else "miss"
        sign = {"": "", "hit": "✓ ", "miss": "✗ "}[verdict]
        return element(
            "figure",
            _player(content) if isinstance(content, bytes) else element("p", content),
            element("figcaption", sign, element("span", word)),
            class_=f"clip {verdict}",
            title=f"{place[0]}, from frame {place[1]}",
        )

    def _encode(self, place: Place) -> bytes | str:
        """`SHOWN` frames from the middle of the row, or why there are none."""
        row = self._rows[place]
        start, length = int(self.manifest.start[row]), int(self.manifest.frames[row])
        count = min(length, SHOWN)
        first = start + (length - count) // 2
        try:
            return encode_clip(read_clips(self.manifest.file(row), [first], count, SIDE)[0])
        except VideoError as error:
            return f"cannot be decoded: {error.reason}"


def encode_clip(frames: Frames) -> bytes:
    """An MP4 file of frames [T, H, W, 3] that every browser plays."""
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # as yuv420p asks
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options=QUALITY)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))
    return file.getvalue()


def _player(content: bytes) -> Html:
    source = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return element("video", src=source, autoplay="", loop="", muted="", playsinline="")
