"""SGD as Keras runs it: what decays, and how the rate falls."""

import pytest
import torch
from torch import nn

from hdc.backbones import build_backbone
from hdc.errors import InputError
from hdc.model import HDC
from hdc.optimizer import OptimizerConfig, build_optimizer, set_rate


@pytest.mark.parametrize("backbone", ["tiny", "c3d"])
def test_only_weights_of_convolutions_and_linear_layers_decay(backbone: str) -> None:
    with torch.device("meta"):
        model = HDC(build_backbone(backbone))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = build_optimizer(model, OptimizerConfig()).param_groups
    assert decayed["weight_decay"] == 1e-4
    assert plain["weight_decay"] == 0
    # Kernels have five dimensions and matrices two; biases, scales and shifts have one.
    assert {names[p] for p in decayed["params"]} == {n for p, n in names.items() if p.dim() > 1}
    assert {names[p] for p in plain["params"]} == {n for p, n in names.items() if p.dim() == 1}


def test_first_step_without_gradient_shrinks_weights_alone() -> None:
    """λΣw² with λ = 5e-5 pulls with 2λw: one step at rate 0.1 takes 1e-5 of a weight."""
    model = nn.Sequential(nn.Linear(3, 2), nn.InstanceNorm3d(2, affine=True))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    config = OptimizerConfig()
    optimizer = build_optimizer(model, config)
    set_rate(optimizer, config, 0)
    optimizer.step()
    expected = torch.full((2, 3), 1 - 1e-5)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=0, atol=1e-7)
    for kept in (model[0].bias, model[1].weight, model[1].bias):
        assert torch.equal(kept, torch.ones_like(kept))


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.1), (1878, 0.0842), (10 * 1878, 0.0347), (50 * 1878, 0.0096)]
)
def test_rates(step: int, rate: float) -> None:
    config = OptimizerConfig()
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert set_rate(optimizer, config, step) == pytest.approx(rate, abs=5e-5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate] * 2, abs=5e-5)


def test_momentum() -> None:
    """Two steps with gradient 1 move by lr and then by lr·1.9."""
    layer = nn.Linear(1, 1)
    nn.init.zeros_(layer.bias)
    config = OptimizerConfig(lr=0.5, weight_decay=0.0)
    optimizer = build_optimizer(layer, config)
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.zeros(1, 1), torch.ones(1)
        optimizer.step()
    assert layer.bias.item() == pytest.approx(-0.5 - 0.95)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"decay": -1.0},
        {"weight_decay": -1e-4},
        {"clip_norm": 0.0},
    ],
)
def test_wrong_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"optimizer.{next(iter(wrong))} is"):
        OptimizerConfig(**wrong)
