"""The losses and accuracies that `fused_hd_nce` returns beside its loss, against plain Python."""

import math
from typing import Any, get_args

import equations
import pytest
import torch
from hd_nce_scales import ALPHA, BETA, STEPS, lists, pair, scales

from hdc_kernels import fused_hd_nce
from hdc_kernels.checks import FLOATING, Reduction


@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_metrics(reduction: Reduction) -> None:
    """Unweighted means per scale, whatever the reduction, and they do not change the loss."""
    spatial, temporal = scales(6)
    options: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "reduction": reduction}
    loss, metrics = fused_hd_nce(spatial, temporal, **options, return_metrics=True)
    assert torch.equal(loss, fused_hd_nce(spatial, temporal, **options))
    for k, (v_o, v_s) in enumerate(lists(spatial)):
        steps = range(STEPS[k])
        expected = math.fsum(equations.spatial_contrast(v_o, v_s, 0.07)) / 6
        assert metrics.spatial_loss[k].item() == pytest.approx(expected, rel=1e-6)
        hits = [equations.top1(*(equations.timestep(v, n) for v in (v_o, v_s))) for n in steps]
        share = sum(map(sum, hits)) / (6 * STEPS[k])
        assert metrics.spatial_accuracy[k].item() == pytest.approx(share, rel=1e-6)
    for k, views in enumerate(lists(temporal)):
        expected = math.fsum(equations.info_nce(*views, 0.07)) / 6
        assert metrics.temporal_loss[k].item() == pytest.approx(expected, rel=1e-6)
        share = sum(equations.top1(*views)) / 6
        assert metrics.temporal_accuracy[k].item() == pytest.approx(share, rel=1e-6)
    for metric in metrics:
        assert metric.shape == (3,)
        assert metric.dtype == torch.float32
        assert not metric.requires_grad


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize(("batch", "width"), [(2, 3), (7, 5), (33, 128)])
def test_a_collapsed_encoder_has_accuracy_zero(batch: int, width: int, dtype: torch.dtype) -> None:
    """All embeddings equal: every similarity ties, and a tie is a miss."""
    one = pair(width, dtype=dtype)[0].detach()
    clips, videos = one.expand(batch, 2, width), one.expand(batch, width)
    loss, metrics = fused_hd_nce(
        [(clips, clips)], [(videos, videos)], alpha=[1.0], beta=[1.0], return_metrics=True
    )
    assert loss.item() == pytest.approx(2 * math.log(batch), rel=1e-5)
    assert metrics.spatial_accuracy.tolist() == [0.0]
    assert metrics.temporal_accuracy.tolist() == [0.0]


def test_equal_views_have_accuracy_one() -> None:
    """The other end: every query finds itself."""
    views = pair(8, 4)[0]
    _, metrics = fused_hd_nce([], [(views, views)], alpha=[], beta=[1.0], return_metrics=True)
    assert metrics.temporal_accuracy.tolist() == [1.0]
    assert metrics.spatial_loss.shape == metrics.spatial_accuracy.shape == (0,)
