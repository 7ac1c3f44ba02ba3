"""The videos that a command is given: a manifest, or a folder that has one or gets one."""

from pathlib import Path

from hdc import distributed
from hdc.data.manifest import Manifest, manifest_file, read_manifest
from hdc.data.prepare import LOG
from hdc.data.ucf101 import index_ucf101
from hdc.errors import InputError
from hdc.progress import ProgressBar


def open_data(data: str) -> Manifest:
    """The manifest `data`, or that in the folder `data`; UCF101's folder is indexed once, into manifest.csv.

    Raises:
        InputError: there is none, it is damaged, or `hdc-train prepare` has not come to its end.
    """
    return distributed.on_rank0(lambda: _open_data(data))


def _open_data(data: str) -> Manifest:
    folder, file = Path(data), manifest_file(data)
    if file == folder or file.exists():
        return read_manifest(file)
    if (folder / LOG).exists():
        raise InputError(f"{folder} is prepared only in part; run hdc-train prepare again")
    with ProgressBar("counting frames", 1) as bar:
        manifest = index_ucf101(folder, bar.set)
    manifest.write()
    return manifest
