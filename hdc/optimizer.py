"""SGD as Keras runs it in the paper: momentum, time-based decay per step, L2 on weights only."""

from dataclasses import dataclass

import torch
from torch import nn

from hdc.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent.

    Attributes:
        lr: learning rate of the first step.
        momentum: SGD momentum.
        decay: the rate of step s is lr / (1 + decay·s), Keras' `decay`.
        weight_decay: on the weights of convolutions and linear layers, not on biases and norms. The
            paper's L2 regularizer λ = 5e-5 adds λΣw² to the loss, which is weight_decay = 2λ.
        clip_norm: scale gradients down to this norm; null leaves them alone.
    """

    lr: float = 0.1
    momentum: float = 0.9
    decay: float = 1e-4
    weight_decay: float = 1e-4
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise InputError(f"optimizer.lr is {self.lr}; it must be positive")
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.momentum is {self.momentum}; it must be in [0, 1)")
        for name in ("decay", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"optimizer.{name} is {getattr(self, name)}; it must not be negative"
                )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(
                f"optimizer.clip_norm is {self.clip_norm}; it must be positive, or null"
            )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over two groups: decayed weights, and biases and norms without decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = name == "weight" and isinstance(module, (nn.Conv3d, nn.Linear))
            (decayed if is_weight else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


def set_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> float:
    """Set and return the learning rate of step `step`, counting from 0."""
    rate = config.lr / (1 + config.decay * step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
