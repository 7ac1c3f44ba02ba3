"""Peers that need help to be imported: they import torchvision, of which there is no build beside a CPU torch."""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def lightly() -> ModuleType:
    """lightly.loss. Its losses do not use what it imports of torchvision."""
    vision, ops = ModuleType("torchvision"), ModuleType("torchvision.ops")
    vision.ops = ops  # type: ignore[attr-defined]
    ops.roi_align = ops.StochasticDepth = None  # type: ignore[attr-defined]
    before = set(sys.modules)
    with mock.patch.dict(sys.modules, {"torchvision": vision, "torchvision.ops": ops}):
        loss = importlib.import_module("lightly.loss")
        imported = {name: sys.modules[name] for name in set(sys.modules) - before}
    # `patch.dict` took them all away again; only the stub shall go.
    sys.modules.update({k: v for k, v in imported.items() if not k.startswith("torchvision")})
    return loss


def open_clip() -> ModuleType:
    """open_clip's loss.py alone: the package imports torchvision."""
    package = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(str(package)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
