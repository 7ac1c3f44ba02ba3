"""Every snippet of Python in the README runs, in six lines at most, on tensors of the shapes that it speaks of."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
BATCH, D = 6, 128


class TextEncoder(nn.Embedding):
    def forward(self, *, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens)


def names() -> dict[str, Any]:
    """What the snippets take as given."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, D)

    scales = {f"{view}{k}": rows(BATCH, k) for view in "os" for k in (3, 4, 5)}
    scales |= {f"{view}{k}": rows(BATCH) for view in "pt" for k in (3, 4, 5)}
    return scales | {
        "torch": torch,
        "query": rows(BATCH),
        "key": rows(BATCH),
        "momentum_key": rows(BATCH),
        "hard": rows(BATCH, 3),
        "product_ids": torch.arange(BATCH) // 2,
        "w": torch.rand(BATCH),
        "learnable_tau": torch.tensor(0.1, requires_grad=True),
        "first_views": rows(BATCH),
        "second_views": rows(BATCH),
        "image": rows(BATCH),
        "text": rows(BATCH),
        "embeddings": rows(BATCH),
        "labels": torch.arange(BATCH) // 2,
        "pairs": torch.tensor([[0, 1], [1, 0]]),
        "image_encoder": nn.Linear(3, D),
        "text_encoder": TextEncoder(BATCH, D),
        "pixels": torch.randn(BATCH, 3),
        "tokens": {"tokens": torch.arange(BATCH)},
        "clips": torch.randint(256, (2, 4, 32, 32, 3), dtype=torch.uint8),
        "boxes": torch.tensor([[0.0, 0.0, 32.0, 32.0], [30.0, 2.0, -20.0, 20.0]]),
        "colors": torch.eye(3).expand(2, 3, 3),
        "contrast": torch.ones(2),
    }


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet: str) -> None:
    dense = [line for line in snippet.splitlines() if line]
    assert len(dense) <= 6
    known = names()
    exec(snippet, known)
    loss = known.get("loss")
    assert loss is None or loss.isfinite()
