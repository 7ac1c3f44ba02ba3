"""A linear probe: multinomial logistic regression on frozen, standardised features."""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hdc import distributed, knn, results
from hdc.config import ProbeConfig
from hdc.data.manifest import Manifest
from hdc.errors import InputError
from hdc.features import Features, extract, load_encoder
from hdc.knn import KnnResult


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracy of the linear classifier on the videos it was fitted to, and on the test videos."""

    train_accuracy: float
    test_accuracy: float


def fit_linear(features: Tensor, ids: Tensor, classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Minimise cross-entropy + l2·|W|² by L-BFGS, from zero: a convex problem with one answer.

    Args:
        features: [rows, D]; ids: int64 [rows].

    Returns:
        weight [D, classes] and bias [classes], float64.
    """
    features = features.double()
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, ids) + l2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()


def score(
    train: Features, test: Features, manifest: Manifest, label: str, l2: float
) -> ProbeResult:
    """Fit on `train`, count on `test`; `label` names the column of classes."""
    names = manifest.labels(label).names
    train_ids, test_ids = (
        torch.from_numpy(part.manifest.labels(label, names).ids) for part in (train, test)
    )
    unseen = set(test_ids.tolist()) - set(train_ids.tolist())
    if unseen:
        raise InputError(f"{manifest.source}: class {names[min(unseen)]} has no training videos")
    mean, deviation = train.vectors.mean(0), train.vectors.std(0).clamp_min(1e-6)
    inputs = {
        "train": (train.vectors - mean) / deviation,
        "test": (test.vectors - mean) / deviation,
    }
    weight, bias = fit_linear(inputs["train"], train_ids, len(names), l2)
    accuracy = {
        part: ((inputs[part].double() @ weight + bias).argmax(1) == ids).double().mean().item()
        for part, ids in (("train", train_ids), ("test", test_ids))
    }
    return ProbeResult(accuracy["train"], accuracy["test"])


def probe(config: ProbeConfig, manifest: Manifest) -> tuple[ProbeResult, KnnResult]:
    """Extract features once, and classify by them linearly and by neighbours.

    Writes `probe.json` and `knn.json` into `config.out`.
    """
    manifest.labels(config.label)
    backbone = load_encoder(config, config.checkpoint, manifest)
    train = extract(config, backbone, manifest, "train")
    test = extract(config, backbone, manifest, "test")
    linear = distributed.on_rank0(lambda: score(train, test, manifest, config.label, config.l2))
    by_vote = knn.score(
        train, test, manifest, config.label, config.neighbors, config.knn_temperature
    )
    unreadable = [*train.unreadable, *test.unreadable]
    results.write(config, results.PROBE, asdict(linear), unreadable)
    results.write(config, results.KNN, asdict(by_vote), unreadable)
    return linear, by_vote
