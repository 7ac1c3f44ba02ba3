"""MoCo (He et al. 2020): InfoNCE against a queue of keys of earlier batches."""

from typing import Literal, overload

import torch
from torch import Tensor, nn

from hdc_kernels.checks import Backend, Reduction, check_alike, check_count, check_pair
from hdc_kernels.cross_entropy import (
    InfoNCEMetrics,
    Options,
    check_label_smoothing,
    cross_entropy,
    own_and,
)
from hdc_kernels.distributed.ranks import ProcessGroups
from hdc_kernels.distributed.rows import Rows, meet
from hdc_kernels.module import Loss


class Queue(nn.Module):
    """The last K keys that it was given, in buffers: they move with the module and are in its state dict.

    A batch takes the places of the oldest keys, in any number: the last and smaller batch of an epoch, one that
    goes over the end (the rest goes to the beginning), one larger than the queue (its last K keys stay). It holds
    what this process gives it, with a `process_group` what all its ranks give it, the same keys in the same order
    on each: DDP's broadcast of buffers changes nothing.

    `keys` is replaced, never written into: a loss of earlier keys still has its gradients. Nothing is read back
    from the device, so a queue does not make the host wait and compiles into one graph.

    Args:
        size: K, the number of keys.
        dimension: D, of a key.
        dtype: of the buffer; keys are converted. That of the queries saves a conversion of all in each step.

    Buffers:
        keys: [K, D], zero where there is none yet; without a gradient.
        position: where the next key goes, int64 without a dimension.
        filled: how many places hold a key, the first of `keys`, int64 without a dimension.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.
    """

    keys: Tensor
    position: Tensor
    filled: Tensor

    def __init__(self, size: int, dimension: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_count("size", size)
        check_count("dimension", dimension)
        self.register_buffer("keys", torch.zeros(size, dimension, dtype=dtype))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, keys: Tensor, process_group: ProcessGroups | None = None) -> None:
        """Put keys [N, D] of any N in, instead of the oldest ones, with a group those of all ranks. They are detached.

        Raises:
            TypeError, ValueError: naming the argument, what was given, and what is allowed.
        """
        size, dimension = self.keys.shape
        if not isinstance(keys, Tensor):
            raise TypeError(f"keys is a {type(keys).__name__}; it must be a tensor [N, D]")
        if keys.dim() != 2 or keys.shape[1] != dimension or keys.device != self.keys.device:
            raise ValueError(
                f"keys has shape {list(keys.shape)} on {keys.device}; "
                f"it must be [N, {dimension}] on {self.keys.device}"
            )
        if process_group is not None:
            keys = meet(process_group, keys.device, len(keys))[0].by_rank(keys)
        count = len(keys)
        kept = min(count, size)
        places = torch.arange(count - kept, count, device=keys.device)
        places = (self.position + places) % size
        self.keys = self.keys.index_copy(0, places, keys[count - kept :].to(self.keys.dtype))
        self.position = (self.position + count) % size
        self.filled = (self.filled + count).clamp(max=size)

    def extra_repr(self) -> str:
        size, dimension = self.keys.shape
        return f"size={size}, dimension={dimension}, dtype={self.keys.dtype}"


@overload
def fused_moco(
    query: Tensor,
    key: Tensor,
    queue: Queue | Tensor,
    *,
    temperature: float | Tensor = ...,
    sample_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def fused_moco(
    query: Tensor,
    key: Tensor,
    queue: Queue | Tensor,
    *,
    temperature: float | Tensor = ...,
    sample_weights: Tensor | None = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    normalize: bool = ...,
    backend: Backend = ...,
    process_group: ProcessGroups | None = ...,
    return_metrics: Literal[True],
) -> tuple[Tensor, InfoNCEMetrics]: ...


def fused_moco(
    query: Tensor,
    key: Tensor,
    queue: Queue | Tensor,
    *,
    temperature: float | Tensor = 0.07,
    sample_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: Backend = "auto",
    process_group: ProcessGroups | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEMetrics]:
    """log( 1 + Σ_k exp((sim(q_i, n_k) − sim(q_i, k_i))/τ) ), n_k the keys of a queue, with cosine similarity.

    Args:
        query: [B, D], float64, float32, bfloat16 or float16.
        key: [B, D], the positives: `key[i]` is that of `query[i]`, and no negative of any other. Same dtype
            and device. In MoCo, a momentum encoder made it without gradients; here, it gets one if it needs one.
        queue: a `Queue`, of which only the places that hold a key count; while there is none, the loss is 0. Or
            any keys [K, D] of the same dtype and device.
        temperature: τ > 0; a number, or a tensor with one element, which then gets its gradient.
            The value of a tensor is not checked.
        sample_weights, label_smoothing: as in `fused_info_nce`; smoothing counts the keys that there are.
        reduction: "mean" over the queries, their "sum", or "none" for one value per query, [B].
        normalize: divide by the L2 norm first, in the queue, too. With False, the similarity is the
            plain dot product.
        backend, return_metrics: as in `fused_info_nce`.
        process_group: as in `fused_info_nce`, for the mean or sum over all ranks' queries. The queue is this rank's.

    Returns:
        A scalar, or [B] for "none"; float64 for float64 inputs, float32 for all others. With
        `return_metrics` a pair of it and `InfoNCEMetrics`.
        A NaN in the input gives a NaN loss. A zero vector has similarity 0 and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was given, and what is allowed.

    Equals: the cross-entropy of the logits that MoCo's `builder.MoCo` returns, with its queue's keys in rows;
    `info_nce.info_nce(query, key, queue, temperature=τ)` of info-nce-pytorch.
    """
    check_pair(("query", "key"), (query, key), "[B, D]", empty=process_group is not None)
    options = Options(
        temperature,
        reduction,
        normalize,
        backend,
        sample_weights,
        label_smoothing,
        return_metrics,
    )
    options.check(query.shape[:1], query.device)
    width = query.shape[1]
    empty: Tensor | None = None
    if isinstance(queue, Queue):
        empty = torch.arange(len(queue.keys), device=queue.keys.device) >= queue.filled
        queue = queue.keys.to(query.dtype)
    if not isinstance(queue, Tensor):
        raise TypeError(f"queue is a {type(queue).__name__}; it must be a Queue or a tensor [K, D]")
    if queue.dim() != 2 or queue.shape[1] != width or not len(queue):
        raise ValueError(
            f"queue has shape {list(queue.shape)}; it must be [K, D], here [K, {width}] with K ≥ 1"
        )
    check_alike(("query", "queue"), (query, queue))
    across: Rows | None = None
    if process_group is not None:
        (across,) = meet(process_group, query.device, len(query))

    def own_and_filled(_: Tensor, keys: Tensor) -> tuple[Tensor, int | Tensor]:
        own, others = keys.tensor_split([len(query)])
        if empty is None:
            return own + others.sum(0), len(others) + 1
        others = others.masked_fill(empty.unsqueeze(1), 0.0)
        return own + others.sum(0), (~empty).sum() + 1

    keys, mask = own_and(key, queue, empty)
    return cross_entropy(query, keys, options, mask=mask, columns=own_and_filled, queries=across)


class MoCo(Loss):
    """`fused_moco` with a queue of its own: compares a batch with it, then puts the keys in (in training only).

    Args:
        size: the number of keys in the queue, K.
        dimension: D, of a key.
        temperature: pass an `nn.Parameter` to learn it.
        dtype: of the queue.
        label_smoothing, reduction, normalize, backend: as in `fused_moco`.
        process_group: as in `fused_moco`; the keys of all its ranks are put in.

    Attributes:
        queue: the `Queue`. It starts empty; `module.queue.enqueue(torch.randn(K, D))` makes it start with random
            negatives, as the paper's code does.
    """

    def __init__(
        self,
        size: int = 65536,
        dimension: int = 128,
        temperature: float | Tensor = 0.07,
        *,
        dtype: torch.dtype = torch.float32,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: Backend = "auto",
        process_group: ProcessGroups | None = None,
    ) -> None:
        check_label_smoothing(label_smoothing)
        super().__init__(
            temperature,
            label_smoothing=label_smoothing,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            process_group=process_group,
        )
        self.queue = Queue(size, dimension, dtype=dtype)

    def forward(
        self, query: Tensor, key: Tensor, *, sample_weights: Tensor | None = None
    ) -> Tensor:
        """See `fused_moco`."""
        loss: Tensor = fused_moco(
            query, key, self.queue, sample_weights=sample_weights, **self.options
        )
        if self.training:
            self.queue.enqueue(key, self.process_group)
        return loss
