"""Weights in and out: encoders that `hdc-train export` wrote, and the state dicts of other projects.

The layouts of others, which name the same layers differently:

    c3d-pytorch      DavideA's c3d-pytorch, also the layout of the Sports-1M weights made for it
    3d-resnets       kenshohara's 3D-ResNets-PyTorch, resnet18 with shortcuts of type B
    vcop             xudejing's video-clip-order-prediction, R2Plus1DNet((1, 1, 1, 1))

The first has no norms and the others batch norms, where our encoders have instance norms unless they are
built with another `norm`. An encoder built with the source's norm computes what the source does; any other
takes the convolutions, and of the norms what fits.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hdc.backbones import Backbone, build_backbone
from hdc.errors import InputError

WEIGHTS = "backbone.safetensors"
FORMAT = "hdc-backbone-1"
OPTIONS = ("backbone", "norm_eps", "norm_affine")  # what decides how an encoder is built

Layout = Literal["c3d-pytorch", "3d-resnets", "vcop"]

# What data-parallel training and the networks around an encoder put before its names.
WRAPPERS = re.compile(r"^(module\.|base_network\.|backbone\.)+")

# Patterns of whole names, and ours. A name that none of a layout's patterns fits is a mistake.
_C3D = {
    r"conv1\.(\w+)": r"block1.0.\1",
    r"conv2\.(\w+)": r"block2.1.\1",
    r"conv([345])a\.(\w+)": r"block\1.1.\2",
    r"conv([345])b\.(\w+)": r"block\1.4.\2",
}
_RESNET = {r"conv1\.(\w+)": r"block1.0.\1", r"bn1\.(\w+)": r"block1.1.\1"} | {
    rf"layer{layer}\.(\d+)\.{theirs}\.(\w+)": rf"{stage}.\1.{ours}.\3"
    for layer, stage in ((1, "block2.1"), (2, "block3"), (3, "block4"), (4, "block5"))
    for theirs, ours in (
        (r"conv([12])", r"conv\2"),
        (r"bn([12])", r"norm\2"),
        (r"downsample\.([01])", r"shortcut.\2"),
    )
}
_FACTORED = {"spatial_conv": 0, "bn": 1, "temporal_conv": 3}  # places in a factored convolution
_VCOP = {r"bn1\.(\w+)": r"block1.4.\1"} | {
    pattern: ours
    for part, place in _FACTORED.items()
    for pattern, ours in (
        (rf"conv1\.{part}\.(\w+)", rf"block1.{place}.\1"),
        (rf"conv([2-5])\.block1\.conv1\.{part}\.(\w+)", rf"block\1.residual.{place}.\2"),
        (rf"conv([2-5])\.block1\.conv2\.{part}\.(\w+)", rf"block\1.residual.{place + 6}.\2"),
        (rf"conv([2-5])\.block1\.downsampleconv\.{part}\.(\w+)", rf"block\1.shortcut.{place}.\2"),
    )
}
_VCOP |= {
    r"conv([2-5])\.block1\.bn1\.(\w+)": r"block\1.residual.4.\2",
    r"conv([2-5])\.block1\.bn2\.(\w+)": r"block\1.residual.10.\2",
    r"conv([2-5])\.block1\.downsamplebn\.(\w+)": r"block\1.shortcut.4.\2",
}
_NAMES: dict[str, dict[str, str]] = {"c3d-pytorch": _C3D, "3d-resnets": _RESNET, "vcop": _VCOP}
_HEADS = re.compile(
    r"(fc\d?|linear)\.(weight|bias)"
)  # classifiers, which an encoder has no place for


@dataclass(frozen=True)
class Exchanged:
    """What of a foreign state dict was not used, and what of the encoder is still as it was.

    dropped: the source's names: classifiers, and statistics of batch norms that ours do not keep.
    untouched: our names: norms where the source has none.
    """

    dropped: tuple[str, ...]
    untouched: tuple[str, ...]


def load_foreign(
    backbone: nn.Module, state_dict: Mapping[str, Tensor], layout: Layout
) -> Exchanged:
    """Copy another project's weights into an encoder of the same architecture.

    Args:
        backbone: `C3D` for "c3d-pytorch", `resnet3d_18()` for "3d-resnets", `R2Plus1D10` for "vcop".
        state_dict: names and tensors; a checkpoint that wraps them must be opened first.

    Raises:
        InputError: a name is unknown, a convolution is missing, a shape differs. Nothing is copied then.
    """
    if layout not in _NAMES:
        raise InputError(f"layout is {layout!r}; it must be one of {', '.join(get_args(Layout))}")
    own = backbone.state_dict()
    weights: dict[str, Tensor] = {}
    dropped, unknown = [], []
    for name, value in state_dict.items():
        bare = WRAPPERS.sub("", name)
        ours = _rename(bare, _NAMES[layout])
        if ours in own:
            weights[ours] = value
        elif _HEADS.fullmatch(bare) or (ours and _is_norm_entry(ours, backbone)):
            dropped.append(name)
        else:
            unknown.append(name)
    # c3d-pytorch has no norms: ours may stay as they are.
    norms = {name for name in own if layout == "c3d-pytorch" and _is_norm_entry(name, backbone)}
    untouched = norms - weights.keys()
    _fill(backbone, weights, untouched, unknown, f"layout {layout}")
    return Exchanged(tuple(dropped), tuple(sorted(untouched)))


def pack_backbone(weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> bytes:
    """A safetensors file that `load_backbone` reads; its metadata has the `OPTIONS`, as JSON."""
    given = {name: options[name] for name in OPTIONS}
    tensors = {name: value.contiguous() for name, value in weights.items()}
    return save(tensors, {"format": FORMAT, "options": json.dumps(given)})


def load_backbone(source: str | Path) -> Backbone:
    """The encoder that `hdc-train export` wrote, in evaluation mode; `source` is the file or its folder.

    It takes clips [B, 3, T, H, W] in [−1, 1] and returns the feature maps of blocks 3, 4 and 5.

    Raises:
        InputError: the file is missing, damaged or of something else, or a weight does not fit.
    """
    path = Path(source) / WEIGHTS if Path(source).is_dir() else Path(source)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; hdc-train export writes one") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path} was not written by hdc-train export")
    options = json.loads(metadata["options"])
    backbone = build_backbone(
        options["backbone"], norm_eps=options["norm_eps"], norm_affine=options["norm_affine"]
    )
    left_over = weights.keys() - backbone.state_dict().keys()
    _fill(backbone, weights, (), sorted(left_over), f"backbone {options['backbone']} ({path})")
    return backbone.eval()


def _fill(
    backbone: nn.Module,
    weights: Mapping[str, Tensor],
    optional: Iterable[str],
    unknown: list[str],
    what: str,
) -> None:
    """Copy all of `weights`, or nothing.

    Raises:
        InputError: there are unknown names, one that is not optional is missing, or a shape differs.
    """
    own = backbone.state_dict()
    shared = own.keys() & weights.keys()
    faults = {
        "unknown": unknown,
        "missing": sorted(own.keys() - weights.keys() - set(optional)),
        "of another shape": sorted(key for key in shared if own[key].shape != weights[key].shape),
    }
    if any(faults.values()):
        parts = [
            f"{len(names)} {fault}, e.g. {names[0]}" for fault, names in faults.items() if names
        ]
        raise InputError(f"the weights do not fit {what}: {'; '.join(parts)}")
    backbone.load_state_dict({**own, **weights})


def _rename(name: str, names: Mapping[str, str]) -> str:
    """Our name for theirs; empty where there is none."""
    for pattern, ours in names.items():
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(ours)
    return ""


def _is_norm_entry(name: str, backbone: nn.Module) -> bool:
    """Whether the entry belongs to a norm of ours, which may keep fewer or other values than theirs."""
    try:
        layer = backbone.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return not isinstance(layer, nn.Conv3d)
