"""The model behind docs/scaling.md: what sharing keys between GPUs costs, on paper.

    python bench/scaling.py          the tables of docs/scaling.md, from the constants below

Nothing here is measured. A transfer of n bytes in h hops takes h·α + n/β; a product of matrices takes its
flops over a stated rate.
"""

from dataclasses import dataclass

KEY_BYTES = 2  # bfloat16 on the wire
GRADIENT_BYTES = 4  # gradients travel and are summed in float32
NODE = 8  # GPUs joined by NVLink


@dataclass(frozen=True)
class Link:
    """α seconds a message, β bytes a second per GPU and direction."""

    alpha: float
    beta: float


@dataclass(frozen=True)
class Setting:
    """GPUs and what they compare: `dim` wide embeddings, products at `rate` flop/s, `directions` losses."""

    dim: int
    rate: float
    nvlink: Link
    infiniband: Link
    directions: int = 1

    def link(self, gpus: int) -> Link:
        """A ring is as slow as its slowest link: InfiniBand, as soon as there are two nodes."""
        return self.nvlink if gpus <= NODE else self.infiniband


# 40 % of the peak of bfloat16 products: 989e12 flop/s for an H100, 312e12 for an A800.
H100 = Setting(512, 400e12, Link(3e-6, 450e9), Link(8e-6, 50e9))
# CLIP-ViT-L/14 has 768-wide embeddings and a symmetric loss; an A800's NVLink has 400 GB/s, half of it each way.
A800 = Setting(768, 125e12, Link(3e-6, 200e9), Link(8e-6, 50e9), directions=2)
BATCHES = (2**15, 2**18, 2**20, 2**22)
GPUS = (8, 32, 128, 1024)


def compute(on: Setting, batch: int, gpus: int) -> float:
    """Forward and backward: 4·B²/W·D·2 flop per direction, similarities twice and two gradients."""
    return on.directions * 4 * batch**2 / gpus * on.dim * 2 / on.rate


def gather(on: Setting, batch: int, gpus: int) -> tuple[float, float]:
    """Seconds of communication and bytes per GPU; nothing overlaps.

    All-gather of keys, reduce-scatter of their gradients: W − 1 hops of B/W rows each. On the GPU: all
    keys, and their gradients twice, as sums and as what is sent.
    """
    link, block = on.link(gpus), batch / gpus * on.dim
    wire = (gpus - 1) * block * (KEY_BYTES + GRADIENT_BYTES)
    memory = batch * on.dim * (KEY_BYTES + 2 * GRADIENT_BYTES)
    seconds = 2 * (gpus - 1) * link.alpha + wire / link.beta
    return on.directions * seconds, on.directions * memory


def ring_hops(on: Setting, batch: int, gpus: int) -> tuple[float, float]:
    """Seconds of one hop forward (keys) and one backward (keys and gradients)."""
    link, block = on.link(gpus), batch / gpus * on.dim
    forward = link.alpha + block * KEY_BYTES / link.beta
    return forward, link.alpha + block * (KEY_BYTES + GRADIENT_BYTES) / link.beta


def ring(on: Setting, batch: int, gpus: int) -> tuple[float, float]:
    """Seconds that communication adds to compute, and bytes per GPU; a hop overlaps the block's products.

    Forward W − 1 hops, 1/4 of the flop (the similarities); backward W hops and the other 3/4. On the GPU: own
    rows with their gradients, and two blocks of keys and of gradients (one is used while another arrives).
    """
    forward, backward = ring_hops(on, batch, gpus)
    per_block = compute(on, batch, gpus) / on.directions / gpus
    exposed = (gpus - 1) * max(0.0, forward - per_block / 4)
    exposed += gpus * max(0.0, backward - 3 * per_block / 4)
    memory = batch / gpus * on.dim * (3 * KEY_BYTES + 3 * GRADIENT_BYTES)
    return on.directions * exposed, on.directions * memory


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return "0"


def size(count: float) -> str:
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def times() -> str:
    rows = []
    for batch in BATCHES:
        for gpus in GPUS:
            work = compute(H100, batch, gpus)
            shared, travelling = gather(H100, batch, gpus)[0], ring(H100, batch, gpus)[0]
            better = "ring" if travelling < shared else "gather"
            cells = [duration(x) for x in (work, shared, travelling)]
            rows.append([f"{batch:,}", f"{gpus:,}", *cells, better])
    return table(["B", "GPUs", "compute", "gather adds", "ring adds", "less added by"], rows)


def memories() -> str:
    rows = []
    for batch in BATCHES:
        for gpus in GPUS:
            logits = 4 * batch**2 / gpus
            cells = [gather(H100, batch, gpus)[1], ring(H100, batch, gpus)[1], logits]
            rows.append([f"{batch:,}", f"{gpus:,}", *map(size, cells)])
    return table(["B", "GPUs", "gather", "ring", "logits [B/W, B], float32"], rows)


def crossover(gpus: int) -> int:
    """The smallest power of two, at least one row a GPU, from which on the ring adds less time."""
    batch = gpus
    while ring(H100, batch, gpus)[0] >= gather(H100, batch, gpus)[0]:
        batch *= 2
    return batch


def hidden(gpus: int) -> float:
    """The B at which a backward hop takes as long as its block's products, α aside."""
    # B/W·D·(bytes)/β = 3/4 · 8·B²/W²·D/rate
    return (KEY_BYTES + GRADIENT_BYTES) * H100.rate * gpus / (6 * H100.link(gpus).beta)


def crossovers() -> str:
    rows = [
        [
            f"{gpus:,}",
            f"{crossover(gpus):,}",
            f"{hidden(gpus):,.0f}",
            size(gather(H100, 2**22, gpus)[1]),
        ]
        for gpus in (2, *GPUS)
    ]
    return table(
        ["GPUs", "ring adds less from B", "a hop is hidden from B", "gather at B = 4 Mi"], rows
    )


def published() -> str:
    rows = []
    for batch, gpus in ((4_000_000, 8), (12_000_000, 32)):
        cells = [
            compute(A800, batch, gpus),
            gather(A800, batch, gpus)[0],
            ring(A800, batch, gpus)[0],
        ]
        bytes_ = [gather(A800, batch, gpus)[1], ring(A800, batch, gpus)[1]]
        rows.append([f"{batch:,}", str(gpus), *map(duration, cells), *map(size, bytes_)])
    head = ["B", "GPUs", "compute", "gather adds", "ring adds", "gather", "ring"]
    return table(head, rows)


if __name__ == "__main__":
    for name, text in (
        ("times", times()),
        ("memory", memories()),
        ("crossover", crossovers()),
        ("published", published()),
    ):
        print(f"{name}\n\n{text}\n")
