"""Negatives across ranks: each process has a part of the batch, the loss is that of the whole.

    loss = fused_info_nce(query, key, process_group=torch.distributed.group.WORLD)
    loss = fused_info_nce(query, key, process_group=Ranks(group, even_batches=True))

With a `process_group`, "mean" and "sum" return the loss of the batches of all its ranks together, the same on
every rank; "none" the terms of this rank's rows, among the keys of all. The gradients are such that
their mean over the ranks, which is what `DistributedDataParallel` makes of them, is the gradient of that loss
in a single process, also of the temperature, a scale or a bias. So each rank's gradients are W times those of its
share (of Σ upstream · terms for "none"), summed over all ranks for keys that went to others. Metrics are those
of this rank's rows.

Batches may differ in size, and be empty on some ranks; such a rank takes part all the same. What must agree:
the loss and its options, D, dtype and kind of device, and which embeddings require gradients; of these,
nothing is compared across ranks. Every rank calls the loss, and its backward pass, equally often and in the
same order. When one doesn't, the others raise once the process group's timeout is over, saying what they wait for
(with NCCL, its watchdog does). First derivatives only: a second one raises.

Checked with gloo, in 2 to 4 processes. NCCL between several GPUs is not; it wants `torch.cuda.set_device` before.

    ranks.py          the group and how to use it
    rows.py           whose rows are where; totals; `share`, which a loss calls, gathers keys or lets them travel
    collectives.py    what all ranks do together
    gather.py         everybody gets all keys
    ring.py           keys travel: the sums of `pairwise`, eager, or compiled by operators.py
    trip.py           from rank to rank, there and back, block by block
    contrast.py       InfoNCE, one way or the other
"""

from hdc_kernels.distributed.ranks import Ranks, Strategy

__all__ = ["Ranks", "Strategy"]
