"""Who takes part in the comparison, and what each of them computes.

A contender turns a `Case` into a loss of the case's inputs. It may find that it cannot take part, because
its package is not installed (ImportError) or does not fit the case (`Unfit`): both are reported, and
neither is an error.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import naive
import torch
import torch.nn.functional as F
from torch import Tensor

from hdc_kernels import fused_hd_nce, fused_info_nce
from hdc_kernels.backends import cpu, cuda
from hdc_kernels.checks import Backend

WIDTH = 128
TAU = 0.07
STEPS = (8, 4, 2)  # timesteps of the paper's scales: with 3 temporal problems, 17 in all
WEIGHTS = (0.25, 0.5, 1.0)

Loss = Callable[..., Tensor]


class Case(NamedTuple):
    """One problem of one size on one device."""

    problem: str  # "InfoNCE", "symmetric InfoNCE", "HD-NCE", "overhead" or one of `family.FAMILY`
    batch: int
    device: str
    dtype: str

    @property
    def width(self) -> int:
        """Of the embeddings; for "overhead", small enough that everything but the call vanishes."""
        return 8 if self.problem == "overhead" else WIDTH

    @property
    def symmetric(self) -> bool:
        return self.problem == "symmetric InfoNCE"

    @property
    def keys_are_fixed(self) -> bool:
        """Whether nobody asks for the key's gradient: a momentum encoder made it."""
        return self.problem == "MoCo"

    @property
    def flops(self) -> int:
        """The useful ones of a forward and backward pass: three products of matrices."""
        problems = sum(STEPS) + len(STEPS) if self.problem == "HD-NCE" else 1
        return 6 * problems * self.batch**2 * self.width

    def inputs(self, seed: int = 0) -> list[Tensor]:
        """Query and key; for HD-NCE the two views of each pair, spatial pairs first."""
        shapes: list[tuple[int, ...]] = [(self.batch, self.width)] * 2
        if self.problem == "HD-NCE":
            shapes = [(self.batch, steps, self.width) for steps in STEPS for _ in range(2)]
            shapes += [(self.batch, self.width)] * (2 * len(STEPS))
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        made = [torch.randn(shape, generator=generator).to(self.device, dtype) for shape in shapes]
        for tensor in made[:1] if self.keys_are_fixed else made:
            tensor.requires_grad_()
        return made


class Unfit(Exception):
    """Why a contender does not take part in a case."""


class Contender(NamedTuple):
    name: str
    note: str
    build: Callable[[Case], Loss]
    peer: bool = False  # somebody else's package
    compiles: bool = False  # for many seconds, before its first result
    rounds_to: str | None = None  # the dtype that it may round to, unless the case's


def both_ways(loss: Loss, case: Case) -> Loss:
    """For a peer of one direction: the mean of two calls if the case is symmetric."""
    if not case.symmetric:
        return loss
    return lambda query, key: (loss(query, key) + loss(key, query)) / 2


def compiled(loss: Loss) -> Loss:
    """For this shape alone, in one graph."""
    torch._dynamo.reset()
    return torch.compile(loss, fullgraph=True, dynamic=False)


def eager(case: Case) -> Loss:
    return lambda query, key: naive.info_nce(query, key, TAU, symmetric=case.symmetric)


def ours(case: Case, backend: Backend = "auto") -> Loss:
    options: dict[str, Any] = {"symmetric": case.symmetric, "backend": backend}
    return lambda query, key: fused_info_nce(query, key, temperature=TAU, **options)


def ours_in_cuda(case: Case) -> Loss:
    _need_cuda_library(case)
    return ours(case, "cuda")


def ours_in_bfloat16(case: Case) -> Loss:
    if case.device != "cpu" or case.dtype != "float32":
        raise Unfit("of float32 on CPUs")
    if not (cpu.is_available() and cpu.multiplies_bfloat16()):
        raise Unfit("needs a CPU that multiplies bfloat16")

    def loss(query: Tensor, key: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return ours(case)(query, key)
        finally:
            torch.set_float32_matmul_precision(before)

    return loss


def linear_cross_entropy(case: Case) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch 2.13 or later")
    target = torch.arange(case.batch, device=case.device)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        scaled = F.normalize(query, dim=-1) / TAU
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(scaled, F.normalize(key, dim=-1), target, options=options)

    return both_ways(loss, case)


def info_nce_pytorch(case: Case) -> Loss:
    from info_nce import info_nce  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return both_ways(lambda query, key: info_nce(query, key, temperature=TAU), case)


def metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if case.batch > 512:
        raise Unfit("holds O(B³) numbers")
    labels = torch.arange(case.batch, device=case.device)
    of_keys = labels.clone()  # were it the same tensor, no row would be its own positive
    nt_xent = NTXentLoss(temperature=TAU)
    return both_ways(
        lambda query, key: nt_xent(query, labels, ref_emb=key, ref_labels=of_keys), case
    )


def keops(case: Case) -> Loss:
    from pykeops.torch import LazyTensor  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        logits = (LazyTensor(query[:, None]) | LazyTensor(key[None])) / TAU
        lse = logits.logsumexp(1)
        if case.symmetric:
            lse = (lse + logits.logsumexp(0)) / 2
        return (lse.view(-1) - (query * key).sum(-1) / TAU).mean()

    return loss


def inf_cl(case: Case) -> Loss:
    _need_gpu(case)
    from inf_cl import cal_flash_loss  # type: ignore[import-not-found, import-untyped, unused-ignore]

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        return cal_flash_loss(query, key, scale=1 / TAU, head_dim=case.width).mean()

    return both_ways(loss, case)


def memeff(case: Case) -> Loss:
    _need_gpu(case)
    from memeff import MemoryEfficientCLIPLoss, MemoryEfficientQwen3Loss  # type: ignore[import-not-found, import-untyped, unused-ignore]

    # stable=False: by default its gradient is rescaled. A margin of 2 turns its masking off.
    if case.symmetric:
        return MemoryEfficientCLIPLoss(temperature=TAU, stable=False)
    return MemoryEfficientQwen3Loss(temperature=TAU, margin=2.0, stable=False)


def flex_attention(case: Case) -> Loss:
    _need_gpu(case)
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = torch.compile(flex_attention, dynamic=False)
    values = torch.zeros(1, 1, case.batch, 16, device=case.device, dtype=getattr(torch, case.dtype))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        _, lse = attend(query[None, None], key[None, None], values, scale=1 / TAU, return_lse=True)
        return (lse.view(-1) - (query * key).sum(-1).float() / TAU).mean()

    return both_ways(loss, case)


def _need_gpu(case: Case) -> None:
    if case.device != "cuda":
        raise Unfit("needs a GPU")


def _need_cuda_library(case: Case) -> None:
    _need_gpu(case)
    if not cuda.is_available():
        raise ImportError("the CUDA library of hdc_kernels, which needs nvcc")


def _pairs(views: tuple[Tensor, ...]) -> tuple[list[naive.Pair], list[naive.Pair]]:
    pairs = list(zip(views[::2], views[1::2], strict=True))
    return pairs[: len(STEPS)], pairs[len(STEPS) :]


def hd_loop(case: Case) -> Loss:
    return lambda *views: naive.hd_nce_loop(*_pairs(views), WEIGHTS, TAU)


def hd_bmm(case: Case) -> Loss:
    return lambda *views: naive.hd_nce_bmm(*_pairs(views), WEIGHTS, TAU)


def hd_ours(case: Case) -> Loss:
    return partial(_fused_hd_nce, fused_hd_nce)


def hd_ours_in_cuda(case: Case) -> Loss:
    _need_cuda_library(case)
    return partial(_fused_hd_nce, partial(fused_hd_nce, backend="cuda"))


def hd_ours_with_metrics(case: Case) -> Loss:
    return lambda *views: _fused_hd_nce(partial(fused_hd_nce, return_metrics=True), *views)[0]


def _fused_hd_nce(loss: Callable[..., Any], *views: Tensor) -> Any:
    return loss(*_pairs(views), alpha=WEIGHTS, beta=WEIGHTS, temperature=TAU)


def product(case: Case) -> Loss:
    return lambda query, key: (query * key).sum()


OURS = "ours"
OURS_IN_CUDA = "ours, CUDA C++"
OURS_IN_BFLOAT16 = "ours, bfloat16 products"
EAGER = "eager"
COMPILED = "eager, compiled"

INFO_NCE = [
    Contender(EAGER, "F.normalize, matmul, F.cross_entropy", eager),
    Contender(COMPILED, "the same under torch.compile", lambda c: compiled(eager(c)), compiles=True),
    Contender(OURS, "fused_info_nce", ours),
    Contender("ours, compiled", "the same under torch.compile", lambda c: compiled(ours(c)), compiles=True),
    Contender(OURS_IN_BFLOAT16, 'under set_float32_matmul_precision("medium")', ours_in_bfloat16, rounds_to="bfloat16"),
    Contender(OURS_IN_CUDA, 'fused_info_nce(backend="cuda")', ours_in_cuda),
    Contender("linear_cross_entropy", "PyTorch's own, in chunks; one direction a call", linear_cross_entropy),
    Contender("info-nce-pytorch", "info_nce(); one direction a call", info_nce_pytorch, peer=True),
    Contender("pytorch-metric-learning", "NTXentLoss with labels 0 … B−1", metric_learning, peer=True),
    Contender("KeOps", "logsumexp of a LazyTensor", keops, peer=True, compiles=True),
    Contender("Inf-CL", "cal_flash_loss; one direction a call", inf_cl, peer=True),
    Contender("memeff", "Qwen3 loss without masking; CLIP loss if symmetric", memeff, peer=True),
    Contender("FlexAttention", "return_lse, with 16 columns of values", flex_attention, compiles=True),
]  # fmt: skip

HD_NCE = [
    Contender(EAGER, "one bmm over all 17 problems", hd_bmm),
    Contender("eager, loop", "17 InfoNCE, one after the other", hd_loop),
    Contender(COMPILED, "the bmm under torch.compile", lambda c: compiled(hd_bmm(c)), compiles=True),
    Contender(OURS, "fused_hd_nce", hd_ours),
    Contender(OURS_IN_CUDA, 'fused_hd_nce(backend="cuda")', hd_ours_in_cuda),
    Contender("ours, with metrics", "the same with return_metrics=True", hd_ours_with_metrics),
    Contender("ours, compiled", "the same under torch.compile", lambda c: compiled(hd_ours(c)), compiles=True),
]  # fmt: skip

OVERHEAD = [
    Contender("(q·k).sum()", "a product and a sum, for comparison: another function", product),
    Contender(EAGER, "F.normalize, matmul, F.cross_entropy", eager),
    Contender(OURS, "fused_info_nce", ours),
]


def prepare(contender: Contender, case: Case) -> Loss | dict[str, str]:
    """Its loss, or why there is none: {"status": "missing" or "unfit", "reason": ...}."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return contender.build(case)
    except ImportError as error:
        return {"status": "missing", "reason": f"not installed: {error.name or error}"}
    except Unfit as reason:
        return {"status": "unfit", "reason": str(reason)}
