"""Hierarchically Decoupled Spatial-Temporal Contrast: self-supervised video representations."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hdc.backbones import Backbone


def load_backbone(source: str | Path) -> "Backbone":
    """The encoder that `hdc-train export` wrote; `source` is its file or folder.

    See `hdc.backbones.exchange.load_backbone`.
    """
    from hdc.backbones import exchange  # imports torch, which not everything in this package needs

    return exchange.load_backbone(source)
