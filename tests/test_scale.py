"""All gradients of a loss, scaled and rounded by one launch, beside PyTorch's own product and rounding.

In Triton's interpreter where there is no GPU.
"""

import math

import pytest
import torch
from gpu_problems import DEVICE
from torch import Tensor

from hdc_kernels import call, fused_hd_nce

scale = pytest.importorskip("hdc_kernels.backends.triton.scale", exc_type=ModuleNotFoundError)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of float16's range

HALVES = torch.bfloat16, torch.float16


def gradients(*shapes: tuple[int, ...]) -> list[Tensor]:
    """From 1e-4 to 1e4."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(g * torch.randn(g.shape, generator=generator).mul(4).exp()).to(DEVICE) for g in found]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("factor", [-0.37, 65536.0, 1e-7])
def test_equals_a_product_in_float32_rounded_once(dtype, factor):
    """A loss scale of 65,536 and a subnormal number are none of float16's."""
    made = gradients((), (3, 20, 50), (2, 2, 1024), (2049,), (1, 1), (5, 7, 4))
    dtypes = torch.float32, *[dtype] * 4, torch.float32
    upstream = torch.tensor(factor, device=DEVICE)
    before = [g.clone() for g in made]
    found = scale.scale(made, upstream, dtypes)
    assert all(map(torch.equal, made, before))
    for g, ours, kind in zip(made, found, dtypes, strict=True):
        assert ours.dtype == kind
        assert ours.shape == g.shape
        assert torch.equal(ours, (g * factor).to(kind))


@pytest.mark.parametrize("dtype", HALVES)
def test_layouts_are_kept(dtype):
    """As timesteps are, [B, N, D] seen in [N, B, D], and as pooling leaves them, [B, D, N] seen as [B, N, D]."""
    plain, swapped, pooled = gradients((4, 6, 8), (6, 4, 8), (4, 8, 6))
    made = [plain, swapped.transpose(0, 1), pooled.mT]
    for g, ours in zip(
        made, scale.scale(made, torch.tensor(3.0, device=DEVICE), [dtype] * 3), strict=True
    ):
        assert ours.stride() == g.stride()
        assert torch.equal(ours, (g * 3).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_not_finite_stays_so(dtype):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0, 70000.0, -1e39]
    made = torch.tensor(values, device=DEVICE)
    (found,) = scale.scale([made], torch.tensor([2.0], device=DEVICE), [dtype])
    expected = (made * 2).to(dtype)
    assert torch.equal(found.nan_to_num(1.0), expected.nan_to_num(1.0))
    assert found[0].isnan()
    assert torch.equal(found.signbit()[1:], expected.signbit()[1:])


def vjp(loss, inputs, upstream):
    """By torch.func, which wraps tensors while it records."""
    with torch.no_grad():
        return torch.func.vjp(loss, *inputs)[1](upstream)


def second(loss, inputs, upstream):
    """What a first derivative is when there is to be another."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss(*leaves), leaves, upstream, create_graph=True)


def eager(loss, inputs, upstream):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss(*leaves), leaves, upstream)


def compiled(loss, inputs, upstream):
    torch.compiler.reset()
    return eager(torch.compile(loss, fullgraph=True, backend="aot_eager"), inputs, upstream)


@pytest.mark.parametrize("way", [eager, compiled, second, vjp])
def test_a_loss_takes_it_where_triton_fits(monkeypatch, way):
    """And has the same gradients as without it, by embeddings and by the temperature."""
    launches = []

    def launch(*arguments):
        launches.append(len(arguments[0]))
        return scale_tensors(*arguments)

    scale_tensors = scale.scale
    monkeypatch.setattr(scale, "scale", launch)
    inputs = [*gradients((6, 3, 4), (6, 3, 4), (6, 5), (6, 5)), torch.tensor(0.3, device=DEVICE)]
    inputs = [t.to(torch.float16) for t in inputs]

    def loss(a, b, c, d, temperature):
        return fused_hd_nce([(a, b)], [(c, d)], alpha=[1.0], beta=[0.5], temperature=temperature)

    upstream = torch.tensor(-2.7, device=DEVICE)
    found = []
    for fits in (True, False):
        monkeypatch.setattr(call, "suits_triton", lambda _, fits=fits: fits)
        found.append(way(loss, inputs, upstream))
        assert launches == [5]
    assert all(g.dtype == torch.float16 and g.any() for g in found[0])
    assert all(map(torch.equal, *found))
