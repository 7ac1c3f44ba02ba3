"""List a folder of videos that comes without lists.

    ROOT/<class>/...                    every video is for training
    ROOT/{train,val,test}/<class>/...   split as the folders say
    ROOT/<video>                        no classes: enough to pretrain

Whether a file is a video shows when it is opened; its name does not matter.
"""

import os
from pathlib import Path

from hdc.data.listing import LISTS, Listed, evaluation_splits


def list_video_folder(root: Path) -> list[Listed]:
    """Every file below `root` that is not hidden, in the order of their paths."""
    tops = [name for name in LISTS if (root / name).is_dir()] if (root / "train").is_dir() else [""]
    splits = evaluation_splits({LISTS[top] for top in tops if top})
    videos = []
    for top in tops:
        for folder, folders, names in os.walk(root / top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = Path(folder).relative_to(root / top).parts
            for name in names:
                if not name.startswith("."):
                    path = Path(folder, name).relative_to(root).as_posix()
                    label = below[0] if below else ""
                    videos.append(Listed(path, label, splits[LISTS.get(top, "train")]))
    return sorted(videos, key=lambda video: video.path)
