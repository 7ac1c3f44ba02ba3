"""A batch larger than the encoder's memory, with any loss and exact gradients: a gradient cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    PyTree,
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)
from torch.utils.checkpoint import checkpoint

from hdc_kernels.checks import check_count


class InChunks(nn.Module):
    """Runs an encoder on `chunk_size` rows at a time; the loss sees the whole batch.

        images, texts = InChunks(image_encoder, 64), InChunks(text_encoder, 256)
        fused_info_nce(images(pixels), texts(**tokens), symmetric=True).backward()

    The activations of one chunk at most are in memory: the forward pass keeps nothing but the outputs, the
    backward pass runs the encoder on a chunk once more when it gets there. The gradients are those of the
    whole batch. The price is that second pass: about a third more time, as a backward pass costs about two
    forward passes. What shrinks is the activations: inputs, outputs, parameters and gradients stay as large.

    In the second pass, dropout and autocast are what they were in the first. Buffers are updated by the first
    only, chunk after chunk, and the second finds them as they were then; any other state that the encoder
    changes is changed twice. Batch norm sees the statistics of a chunk, not of the batch. Between forward
    and backward pass neither the inputs may be modified, which PyTorch notices, nor the parameters, which
    it does not. Where no gradient is recorded, as under `torch.no_grad`, it is evaluation in chunks.

    `DDP(InChunks(encoder, 64))` is the right order: the second pass must not run DDP's forward pass again.
    `InChunks(torch.compile(encoder, dynamic=False), 64)` is, too. Without `dynamic=False`, chunks of
    two sizes can make the second pass take another graph than the first, which PyTorch refuses.

    Args:
        encoder: any module that maps each row of its inputs to a row of its outputs, not wrapped in DDP.
        chunk_size: rows at a time, at least 1; the last chunk of a batch may have fewer.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    def __init__(self, encoder: nn.Module, chunk_size: int) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder is a {type(encoder).__name__}; it must be a torch.nn.Module")
        if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in encoder.modules()):
            raise ValueError(
                "encoder is or holds a DistributedDataParallel, whose forward pass must not run twice; "
                "it must be wrapped the other way round, DistributedDataParallel(InChunks(encoder, ...))"
            )
        check_count("chunk_size", chunk_size)
        self.encoder = encoder
        self.chunk_size = chunk_size

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What `encoder(*inputs, **kwargs)` returns, computed in chunks.

        Args:
            inputs, kwargs: tensors [B, ...], also in nested lists, tuples and dicts; everything else is
                handed to every chunk as it is.

        Returns:
            A tensor [B, ...], or such tensors in lists, tuples and dicts, with None among them if need be.

        Raises:
            TypeError, ValueError: an input without a tensor, tensors with different B, or an output
                that is not [B, ...]; naming it.
        """
        leaves, spec = tree_flatten((inputs, kwargs))
        rows = _count_rows(leaves, inputs, kwargs)
        # An empty batch is one chunk, too: the encoder says what its output looks like.
        chunks = [min(self.chunk_size, rows - i) for i in range(0, max(rows, 1), self.chunk_size)]
        columns = [x.split(chunks) if isinstance(x, Tensor) else [x] * len(chunks) for x in leaves]
        # A checkpoint replays the random state of its arguments' devices: let the encoder's be among them.
        devices = [torch.empty(0, device=d) for d in {p.device for p in self.encoder.parameters()}]
        known: dict[int, _Copy] = {}
        outputs = []
        for chunk in zip(*columns, strict=True):
            if torch.is_grad_enabled():
                run = _Run(self.encoder, spec, _copy_buffers(self.encoder, known))
                outputs.append(checkpoint(run, devices, *chunk, use_reentrant=False))
            else:
                chunk_inputs, chunk_kwargs = tree_unflatten(chunk, spec)
                outputs.append(self.encoder(*chunk_inputs, **chunk_kwargs))
        return _join(outputs, chunks)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


class _Copy(NamedTuple):
    """A buffer, how often it had been written to, and its value then."""

    buffer: Tensor
    version: int
    value: Tensor


Place = tuple[nn.Module, str, _Copy]  # who holds the buffer, under which name, and its copy


class _Run:
    """The encoder on one chunk: with its own buffers the first time, with copies of them ever after."""

    def __init__(self, encoder: nn.Module, spec: TreeSpec, places: list[Place]) -> None:
        self.encoder = encoder
        self.spec = spec
        self.places = places
        self.ran = False

    def __call__(self, devices: list[Tensor], *leaves: Any) -> Any:
        inputs, kwargs = tree_unflatten(leaves, self.spec)
        if self.ran:
            with _put_in_place(self.places):
                return self.encoder(*inputs, **kwargs)
        self.ran = True
        return self.encoder(*inputs, **kwargs)


def _copy_buffers(encoder: nn.Module, known: dict[int, _Copy]) -> list[Place]:
    """Where the encoder's buffers are and what is in them; `known`: the copies so far, by the buffer's id.

    A buffer that was not written to since its last copy shares that: there can be many chunks and large
    constants. PyTorch does not count what batch norm writes, but its output in training is independent of it.
    """
    places = []
    for module in encoder.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            copy = known.get(id(buffer))
            if copy is None or copy.version != buffer._version:
                copy = known[id(buffer)] = _Copy(buffer, buffer._version, _clone(buffer))
            places.append((module, name, copy))
    return places


@contextmanager
def _put_in_place(places: list[Place]) -> Iterator[None]:
    """Lets the modules work on clones of the copies; their own buffers stay untouched, and come back."""
    own = [module._buffers[name] for module, name, _ in places]
    copies = {id(copy): copy for _, _, copy in places}  # a buffer that modules share stays shared
    clones = {key: _clone(copy.value) for key, copy in copies.items()}
    for module, name, copy in places:
        module._buffers[name] = clones[id(copy)]
    try:
        yield
    finally:
        for (module, name, _), buffer in zip(places, own, strict=True):
            module._buffers[name] = buffer


def _clone(buffer: Tensor) -> Tensor:
    """A gradient that was required stays required: it decides what autograd saves."""
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


def _count_rows(leaves: list[Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """B, which all tensors among the leaves of (inputs, kwargs) have as their dimension 0."""
    sizes = {i: x.shape[:1] for i, x in enumerate(leaves) if isinstance(x, Tensor)}
    if not sizes:
        raise ValueError(
            "there is no tensor among the inputs; one at least must be split in chunks"
        )
    first = min(sizes)
    for i, size in sizes.items():
        if not size or size != sizes[first]:
            names = _names("inputs", inputs) + _names("kwargs", kwargs)
            shapes = [f"{names[k]} has shape {list(leaves[k].shape)}" for k in (i, first)]
            if not size:
                raise ValueError(f"{shapes[0]}; it must have a dimension 0, to be split in chunks")
            raise ValueError(f"{shapes[0]} but {shapes[1]}; dimension 0 must be equal")
    return sizes[first][0]


def _join(outputs: list[Any], chunks: list[int]) -> Any:
    """The outputs of chunks of so many rows as one; each tensor must have its chunk's rows as dimension 0."""
    flat = [tree_flatten(output) for output in outputs]
    for output, (leaves, _), rows in zip(outputs, flat, chunks, strict=True):
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.shape[:1] != (rows,):
                    raise ValueError(
                        f"{_names('output', output)[i]} of the encoder has shape {list(leaf.shape)} for a "
                        f"chunk of {rows} rows; dimension 0 must be the rows of the chunk "
                        "(inputs that are no tensors are not split)"
                    )
            elif leaf is not None:
                raise TypeError(
                    f"{_names('output', output)[i]} of the encoder is a {type(leaf).__name__}; "
                    "it must be a tensor or None"
                )
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in columns]
    return tree_unflatten(joined, flat[0][1])


def _names(root: str, tree: PyTree) -> list[str]:
    """How one would write each leaf in Python, where its containers say."""
    try:
        return [root + keystr(path) for path, _ in tree_flatten_with_path(tree)[0]]
    except ValueError:  # registered without names, as Hugging Face's outputs are
        return [f"leaf {i} of {root}" for i in range(len(tree_flatten(tree)[0]))]
