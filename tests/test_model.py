"""The embeddings that reach the loss, against the paper's definitions written out."""

import pytest
import torch
from torch import Tensor

from hdc.backbones import build_backbone
from hdc.model import HDC

STEPS = {3: 4, 4: 2, 5: 1}  # timesteps of the tiny encoder's blocks for 16 frames


@pytest.fixture
def views() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return tuple(torch.rand(3, 2, 3, 16, 28, 28) * 2 - 1)


def build(spatial: tuple[int, ...] = (3, 4, 5), temporal: tuple[int, ...] = (3, 4, 5)) -> HDC:
    """With projections that differ, as after training."""
    torch.manual_seed(0)
    model = HDC(build_backbone("tiny"), spatial, temporal, dim=24)
    for projections in (model.project_o, model.project_s, model.project_t):
        for layer in projections.values():
            layer.reset_parameters()
    return model


def test_shapes(views: tuple[Tensor, Tensor, Tensor]) -> None:
    spatial, temporal = build()(*views)
    assert [(o.shape, s.shape) for o, s in spatial] == [
        ((2, STEPS[k], 24), (2, STEPS[k], 24)) for k in (3, 4, 5)
    ]
    assert [(o.shape, t.shape) for o, t in temporal] == [((2, 24), (2, 24))] * 3


@pytest.mark.parametrize("k", [3, 4, 5])
def test_embeddings(k: int, views: tuple[Tensor, Tensor, Tensor]) -> None:
    """Spatial: one projected spatial mean per timestep. Temporal: the projected mean over all of it."""
    model = build()
    spatial, temporal = model(*views)
    (spatial_o, spatial_s), (temporal_o, temporal_t) = spatial[k - 3], temporal[k - 3]

    def expected(view: Tensor, name: str, mean_over: tuple[int, ...]) -> Tensor:
        layer = getattr(model, name)[str(k)]
        pooled = model.backbone(view)[k].mean(mean_over)
        return torch.einsum("bc...,dc->b...d", pooled, layer.weight) + layer.bias

    o, s, t = views
    torch.testing.assert_close(spatial_o, expected(o, "project_o", (3, 4)))
    torch.testing.assert_close(spatial_s, expected(s, "project_s", (3, 4)))
    torch.testing.assert_close(temporal_o, expected(o, "project_o", (2, 3, 4)))
    torch.testing.assert_close(temporal_t, expected(t, "project_t", (2, 3, 4)))


def test_projection_of_o_is_shared(views: tuple[Tensor, Tensor, Tensor]) -> None:
    """g_o is linear, so the mean of v_o over time in SC is v_o of TC; one loss trains it for both."""
    model = build()
    spatial, temporal = model(*views)
    for (spatial_o, _), (temporal_o, _) in zip(spatial, temporal, strict=True):
        torch.testing.assert_close(spatial_o.mean(1), temporal_o)
    weight = model.project_o["5"].weight
    for embedding in (spatial[2][0], temporal[2][0]):
        (gradient,) = torch.autograd.grad(embedding.sum(), weight, retain_graph=True)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("spatial", "temporal", "layers"),
    [
        ((5,), (), {"o": ["5"], "s": ["5"], "t": []}),
        ((), (4, 5), {"o": ["4", "5"], "s": [], "t": ["4", "5"]}),
        ((3, 5), (4,), {"o": ["3", "4", "5"], "s": ["3", "5"], "t": ["4"]}),
    ],
)
def test_only_what_is_contrasted(
    spatial: tuple[int, ...],
    temporal: tuple[int, ...],
    layers: dict[str, list[str]],
    views: tuple[Tensor, Tensor, Tensor],
) -> None:
    model = build(spatial, temporal)
    assert {name: list(getattr(model, f"project_{name}")) for name in "ost"} == layers
    o, s, t = views
    pairs = model(o, s if spatial else None, t if temporal else None)
    assert [len(task) for task in pairs] == [len(spatial), len(temporal)]
    assert all(
        pair[0].shape[:-1] == (2, STEPS[k]) for pair, k in zip(pairs[0], spatial, strict=True)
    )


def test_projections_start_equal_and_are_not_tied() -> None:
    model = HDC(build_backbone("tiny"))
    for k in ("3", "4", "5"):
        o, s, t = (getattr(model, f"project_{name}")[k].weight for name in "ost")
        assert torch.equal(o, s)
        assert torch.equal(o, t)
        assert len({o.data_ptr(), s.data_ptr(), t.data_ptr()}) == 3


def test_default_projection_is_128_wide() -> None:
    assert HDC(build_backbone("tiny")).project_o["3"].out_features == 128
