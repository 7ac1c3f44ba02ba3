"""What `fused_sup_con` refuses: the argument, what was given, and what is allowed."""

from typing import Any

import pytest
import torch

from hdc_kernels.sup_con import fused_sup_con

ONES = torch.ones(3, dtype=torch.long)
X = torch.ones(3, 4)
PAIRS = torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "labels and positives: neither given; give exactly one"),
        (
            {"labels": ONES, "positives": PAIRS},
            ValueError,
            "labels and positives: both given; give exactly one",
        ),
        ({"labels": ONES.float()}, TypeError, "labels has dtype torch.float32; it must be an"),
        ({"labels": ONES[:2]}, ValueError, r"labels has shape \[2\] but embeddings has \[3, 4\]"),
        ({"labels": ONES, "other": X}, ValueError, "other is given but other_labels is not"),
        (
            {"labels": ONES, "other_labels": ONES},
            ValueError,
            "other_labels is given but other is not; give both or neither",
        ),
        (
            {"labels": ONES, "other_holds_self": True},
            ValueError,
            "other_holds_self is given but other is not; give both or neither",
        ),
        (
            {"labels": ONES, "other": X, "other_labels": ONES[:1]},
            ValueError,
            r"other_labels has shape \[1\] but other has \[3, 4\]",
        ),
        (
            {"labels": ONES, "other": X[:2], "other_labels": ONES[:2], "other_holds_self": True},
            ValueError,
            r"other has shape \[2, 4\] but embeddings has \[3, 4\]",
        ),
        (
            {"labels": ONES, "other": X[:2, :3], "other_labels": ONES[:2]},
            ValueError,
            r"embeddings has shape \[3, 4\] but other has \[2, 3\]",
        ),
        ({"labels": ONES, "other": [1]}, TypeError, "other is a list; it must be a tensor"),
        ({"positives": [[0], [1]]}, TypeError, "positives is a list; it must be a tensor of"),
        ({"positives": PAIRS.float()}, TypeError, "positives has dtype torch.float32; it must"),
        (
            {"positives": PAIRS.bool()},
            ValueError,
            r"positives has shape \[2, 1\] and dtype torch.bool; it must be .* or \[3, 3\] bool",
        ),
        (
            {"positives": PAIRS.T},
            ValueError,
            r"positives has shape \[1, 2\] and dtype torch.int64; it must be \[2, E\] integers or",
        ),
        (
            {"positives": PAIRS, "other": X, "other_labels": ONES},
            ValueError,
            "other_labels is given with positives; they go with labels only",
        ),
        ({"labels": ONES, "definition": "all"}, ValueError, "definition is 'all'; it must be one"),
        (
            {"labels": ONES, "without_positive": "nan"},
            ValueError,
            "without_positive is 'nan'; it must be one of 'exclude', 'zero'",
        ),
        (
            {"labels": ONES, "sample_weights": ONES[:2]},
            ValueError,
            r"sample_weights has shape \[2\] on cpu; it must be \[3\]",
        ),
        ({"labels": ONES, "temperature": 0}, ValueError, "temperature is 0; it must be positive"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """One line that says what was given and what is allowed."""
    with pytest.raises(error, match=message):
        fused_sup_con(X, **arguments)
    with pytest.raises(ValueError, match=r"embeddings has shape \[2, 3, 4\]; it must be \[B, D\]"):
        fused_sup_con(torch.ones(2, 3, 4), ONES)
