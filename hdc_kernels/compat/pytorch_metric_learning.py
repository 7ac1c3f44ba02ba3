"""pytorch-metric-learning 2.9: `from hdc_kernels.compat.pytorch_metric_learning import NTXentLoss`.

Also `SupConLoss` and `CrossBatchMemory`. With the peer's default distance, the cosine. Instead of wrapping a loss in
the peer's `DistributedLossWrapper`, give it a `process_group`: value and gradients are then those of the global
batch (the peer's value is W times that).
"""

import torch
from torch import Tensor, nn

from hdc_kernels.checks import check_count, check_labels, check_pair, check_temperature
from hdc_kernels.distributed.ranks import ProcessGroups, check_process_group
from hdc_kernels.sup_con import Definition, fused_sup_con


class _LabelLoss(nn.Module):
    """What the peer's losses have in common: their call, and that they can be given a memory."""

    definition: Definition

    def __init__(
        self, temperature: float | Tensor, process_group: ProcessGroups | None = None
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_process_group(process_group)
        self.temperature = temperature
        self.process_group = process_group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The mean loss, without a dimension; 0 where there is no pair.

        Args:
            embeddings: [B, D], not normalised.
            labels: [B], any integers.
            indices_tuple: must be None: pairs picked by a miner would need the matrix of pairs.
            ref_emb, ref_labels: [N, D] and [N], what to compare with instead of each other; every row is
                another sample, also where `ref_labels` is the same object as `labels` (the peer
                then takes row i for sample i, and leaves it out).

        Raises:
            TypeError, ValueError: naming the argument, what was given, and what is allowed.
        """
        _refuse_pairs(indices_tuple)
        if (ref_emb is None) != (ref_labels is None):
            given = "ref_emb" if ref_labels is None else "ref_labels"
            raise ValueError(f"{given} is given alone; ref_emb and ref_labels go together")
        return self.against(embeddings, labels, ref_emb, ref_labels)

    def against(
        self,
        embeddings: Tensor,
        labels: Tensor,
        other: Tensor | None,
        other_labels: Tensor | None,
        *,
        other_holds_self: bool = False,
    ) -> Tensor:
        """The loss of these anchors; see `fused_sup_con`."""
        return fused_sup_con(
            embeddings,
            _on_device_of(embeddings, labels),
            temperature=self.temperature,
            definition=self.definition,
            other=other,
            other_labels=None if other_labels is None else other_labels.to(embeddings.device),
            other_holds_self=other_holds_self,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class NTXentLoss(_LabelLoss):
    """`fused_sup_con` with "each": the mean over all pairs of an anchor and a positive.

    Args:
        temperature: τ.
        process_group: as in `fused_sup_con`; the peer's loss has none.
    """

    definition: Definition = "each"

    def __init__(
        self, temperature: float | Tensor = 0.07, *, process_group: ProcessGroups | None = None
    ) -> None:
        super().__init__(temperature, process_group)


class SupConLoss(_LabelLoss):
    """`fused_sup_con` with "out": the mean over all anchors with a positive.

    An anchor whose loss is 0 counts; the peer's default reducer leaves it out. Embeddings that all have one
    label have a loss, too; with the peer it is 0. Arguments: see `NTXentLoss`.
    """

    definition: Definition = "out"

    def __init__(
        self, temperature: float | Tensor = 0.1, *, process_group: ProcessGroups | None = None
    ) -> None:
        super().__init__(temperature, process_group)


class CrossBatchMemory(nn.Module):
    """Compares a batch with earlier ones, too.

    The batch enters the memory first, which keeps the `memory_size` newest embeddings without their
    gradients; then the loss is taken of the batch against the memory, in which each anchor skips itself. A
    batch larger than the memory is compared with all of itself (the peer refuses it). The memory is saved
    with the module, and how much of it is filled. With the loss's `process_group`, each rank has a memory of its
    own batches, and its anchors are compared with those of all.

    Args:
        loss: this module's `NTXentLoss` or `SupConLoss`.
        embedding_size: D.
        memory_size: how many embeddings are kept.
        miner: must be None.
    """

    embedding_memory: Tensor  # [memory_size, D], oldest first, of which `filled` rows are in use
    label_memory: Tensor  # [memory_size]

    def __init__(
        self, loss: _LabelLoss, embedding_size: int, memory_size: int = 1024, miner: None = None
    ) -> None:
        super().__init__()
        if not isinstance(loss, _LabelLoss):
            raise TypeError(
                f"loss is a {type(loss).__name__}; it must be an NTXentLoss or SupConLoss of this module"
            )
        check_count("embedding_size", embedding_size)
        check_count("memory_size", memory_size)
        _refuse_pairs(miner, "miner")
        self.loss = loss
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        """Forget everything."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.long))
        self.filled = 0

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of the batch against the memory, without a dimension.

        Args:
            embeddings: [B, D], not normalised.
            labels: [B], any integers.
            indices_tuple: must be None.
            enqueue_mask: [B] bool; if given, only those that it marks enter the memory, and only the
                others are anchors.

        Raises:
            TypeError, ValueError: naming the argument, what was given, and what is allowed.
        """
        _refuse_pairs(indices_tuple)
        labels = self._check(embeddings, labels, enqueue_mask)
        entering = slice(None) if enqueue_mask is None else enqueue_mask
        memory = self._enqueue(embeddings[entering], labels[entering])
        if enqueue_mask is None:
            return self.loss.against(embeddings, labels, *memory, other_holds_self=True)
        return self.loss.against(embeddings[~enqueue_mask], labels[~enqueue_mask], *memory)

    def _check(self, embeddings: Tensor, labels: Tensor, enqueue_mask: Tensor | None) -> Tensor:
        """The labels on the device of the embeddings; raises before anything enters the memory."""
        empty = self.loss.process_group is not None
        check_pair(("embeddings", "embeddings"), (embeddings, embeddings), "[B, D]", empty=empty)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings has shape {list(embeddings.shape)}; it must be [B, {self.embedding_size}]"
            )
        labels = _on_device_of(embeddings, labels)
        check_labels("labels", labels, "embeddings", embeddings)
        if enqueue_mask is None:
            return labels
        if not isinstance(enqueue_mask, Tensor) or enqueue_mask.dtype != torch.bool:
            given = type(enqueue_mask).__name__
            if isinstance(enqueue_mask, Tensor):
                given += f" of {enqueue_mask.dtype}"
            raise TypeError(f"enqueue_mask is a {given}; it must be a tensor [B] of bool")
        if enqueue_mask.shape != labels.shape:
            raise ValueError(
                f"enqueue_mask has shape {list(enqueue_mask.shape)} but labels has "
                f"{list(labels.shape)}; they must be equal"
            )
        return labels

    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the memory holds now, with these in front: an anchor finds itself in its own row."""
        stay = max(0, min(self.filled, self.memory_size - len(embeddings)))
        old = slice(self.filled - stay, self.filled)
        self.filled = min(stay + len(embeddings), self.memory_size)
        found = []
        for name, new in (
            ("embedding_memory", embeddings.detach()),
            ("label_memory", labels.long()),
        ):
            memory = getattr(self, name).to(new)
            # A copy: the loss may still need it when the next batch is written to the memory.
            found.append(torch.cat((new, memory[old])))
            memory[: self.filled] = torch.cat((memory[old], new))[-self.filled :]
            setattr(self, name, memory)
        return found[0], found[1]

    def get_extra_state(self) -> int:
        return self.filled

    def set_extra_state(self, state: int) -> None:
        self.filled = state

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"


def _on_device_of(embeddings: Tensor, labels: Tensor) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels is a {type(labels).__name__}; it must be a tensor of integers")
    return labels.to(embeddings.device)


def _refuse_pairs(given: object, name: str = "indices_tuple") -> None:
    if given is not None:
        raise ValueError(
            f"{name} is a {type(given).__name__}; only None is implemented, "
            "which takes every pair that the labels allow"
        )
