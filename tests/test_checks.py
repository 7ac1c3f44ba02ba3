"""Every refusal, word for word: the argument, what was given, and what is allowed."""

import math
import re
from decimal import Decimal
from fractions import Fraction
from numbers import Number
from typing import Any

import numpy as np
import pytest
import torch
from embeddings import leaf, randn
from equations import relative_error
from torch import nn

from hdc_kernels import (
    HDNCE,
    InfoNCE,
    fused_clip,
    fused_dclw,
    fused_hd_nce,
    fused_hn_nce,
    fused_info_nce,
    fused_siglip,
    fused_sup_con,
)
from hdc_kernels.checks import (
    FLOATING,
    check_bias,
    check_number,
    check_temperature,
    check_weights,
)
from hdc_kernels.compat.sentence_transformers import multiple_negatives_ranking

GOOD = torch.ones(4, 3)
CLIPS = torch.ones(4, 2, 3)
DTYPES = "it must be one of float64, float32, bfloat16, float16"
REDUCTIONS = "it must be one of 'mean', 'sum', 'none'"

PAIRS: list[tuple[Any, Any, type[Exception], str]] = [
    ([1.0], GOOD, TypeError, "query is a list; it must be a tensor [..., B, D]"),
    (GOOD, None, TypeError, "key is a NoneType; it must be a tensor [..., B, D]"),
    (GOOD.long(), GOOD, TypeError, f"query has dtype torch.int64; {DTYPES}"),
    (GOOD, GOOD.bool(), TypeError, f"key has dtype torch.bool; {DTYPES}"),
    (GOOD, GOOD.cfloat(), TypeError, f"key has dtype torch.complex64; {DTYPES}"),
    (GOOD[0], GOOD, ValueError, "query has shape [3]; it must be [..., B, D]"),
    (GOOD, GOOD[0, 0], ValueError, "key has shape []; it must be [..., B, D]"),
    (GOOD[:0], GOOD, ValueError, "query has shape [0, 3]; no dimension may be 0"),
    (GOOD, GOOD[:, :0], ValueError, "key has shape [4, 0]; no dimension may be 0"),
    (
        GOOD,
        GOOD[:2],
        ValueError,
        "key has shape [2, 3] but query has [4, 3]; key may have more rows, otherwise they must be equal",
    ),
    (
        GOOD,
        CLIPS,
        ValueError,
        "key has shape [4, 2, 3] but query has [4, 3]; key may have more rows, otherwise they must be equal",
    ),
    (
        GOOD,
        torch.ones(5, 2),
        ValueError,
        "key has shape [5, 2] but query has [4, 3]; key may have more rows, otherwise they must be equal",
    ),
    (
        GOOD,
        GOOD.half(),
        ValueError,
        "key has dtype torch.float16 but query has torch.float32; they must be equal",
    ),
    (
        GOOD,
        GOOD.to("meta"),
        ValueError,
        "key has device meta but query has cpu; they must be equal",
    ),
]

OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be positive and finite"),
    ({"temperature": -1}, ValueError, "temperature is -1; it must be positive and finite"),
    ({"temperature": math.inf}, ValueError, "temperature is inf; it must be positive and finite"),
    ({"temperature": math.nan}, ValueError, "temperature is nan; it must be positive and finite"),
    ({"temperature": "1"}, TypeError, "temperature is a str; it must be a number or a tensor"),
    ({"temperature": True}, TypeError, "temperature is a bool; it must be a number or a tensor"),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        "temperature is a float32 tensor [2]; "
        "as a tensor it must be floating and hold exactly one element",
    ),
    (
        {"temperature": torch.tensor(1)},
        ValueError,
        "temperature is a int64 tensor []; "
        "as a tensor it must be floating and hold exactly one element",
    ),
    ({"reduction": "avg"}, ValueError, f"reduction is 'avg'; {REDUCTIONS}"),
    ({"reduction": None}, ValueError, f"reduction is None; {REDUCTIONS}"),
    ({"backend": "abacus"}, ValueError, "backend is 'abacus'; it must be one of 'auto', 'torch'"),
]

WEIGHTS: list[tuple[Any, type[Exception], str]] = [
    (0.5, TypeError, "is a float; it must be a sequence of numbers"),
    ("1", TypeError, "is a str; it must be a sequence of numbers"),
    (GOOD[0, :1], TypeError, "is a Tensor; it must be a sequence of numbers"),
    ([True], TypeError, "holds a bool; its entries must be numbers"),
    (["1"], TypeError, "holds a str; its entries must be numbers"),
    ([-0.5], ValueError, "holds -0.5; a weight must be finite and not negative"),
    ([math.inf], ValueError, "holds inf; a weight must be finite and not negative"),
    ([math.nan], ValueError, "holds nan; a weight must be finite and not negative"),
]

SCALES: list[tuple[Any, Any, type[Exception], str]] = [
    ([], [], ValueError, "spatial and temporal are both empty; give at least one pair"),
    (
        CLIPS,
        [],
        TypeError,
        "spatial is a Tensor; it must be a sequence of pairs of tensors [B, N, D]",
    ),
    (
        [(CLIPS, CLIPS)],
        None,
        TypeError,
        "temporal is a NoneType; it must be a sequence of pairs of tensors [B, D]",
    ),
    (
        [CLIPS],
        [],
        TypeError,
        "spatial[0] is a Tensor; it must be a pair (v_o, v_s) of [B, N, D]",
    ),
    (
        [],
        [(GOOD, GOOD), [GOOD, GOOD, GOOD]],
        TypeError,
        "temporal[1] is a list of 3; it must be a pair (v_o, v_t) of [B, D]",
    ),
    (
        [(CLIPS, 1.0)],
        [],
        TypeError,
        "spatial[0] v_s is a float; it must be a tensor [B, N, D]",
    ),
    ([(GOOD, GOOD)], [], ValueError, "spatial[0] v_o has shape [4, 3]; it must be [B, N, D]"),
    ([], [(CLIPS, CLIPS)], ValueError, "temporal[0] v_o has shape [4, 2, 3]; it must be [B, D]"),
    (
        [(CLIPS, CLIPS), (CLIPS[:, :0], CLIPS)],
        [],
        ValueError,
        "spatial[1] v_o has shape [4, 0, 3]; no dimension may be 0",
    ),
    (
        [(CLIPS, CLIPS.mT)],
        [],
        ValueError,
        "spatial[0] v_s has shape [4, 3, 2] but spatial[0] v_o has [4, 2, 3]; they must be equal",
    ),
    (
        [(CLIPS, CLIPS)],
        [(GOOD[:3], GOOD[:3])],
        ValueError,
        "temporal[0] has batch size, dtype and device 3, float32, cpu but the first pair has "
        "4, float32, cpu; every scale must come from the same batch",
    ),
    (
        [(CLIPS, CLIPS), (CLIPS.double(), CLIPS.double())],
        [],
        ValueError,
        "spatial[1] has batch size, dtype and device 4, float64, cpu but the first pair has "
        "4, float32, cpu; every scale must come from the same batch",
    ),
    (
        [],
        [(GOOD, GOOD), (GOOD.to("meta"), GOOD.to("meta"))],
        ValueError,
        "temporal[1] has batch size, dtype and device 4, float32, meta but the first pair has "
        "4, float32, cpu; every scale must come from the same batch",
    ),
]


@pytest.mark.parametrize(("query", "key", "error", "message"), PAIRS)
def test_info_nce_refuses_pairs(query: Any, key: Any, error: type[Exception], message: str) -> None:
    """Both arguments are looked at, each under its own name."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fused_info_nce(query, key)


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """By both functions when called, by both modules when made, not a day later in the first step."""
    for call in (
        lambda: fused_info_nce(GOOD, GOOD, **options),
        lambda: InfoNCE(**options),
        lambda: fused_hd_nce([], [(GOOD, GOOD)], alpha=[], beta=[1.0], **options),
        lambda: HDNCE(**options),
    ):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            call()


@pytest.mark.parametrize(("spatial", "temporal", "error", "message"), SCALES)
def test_hd_nce_refuses_scales(
    spatial: Any, temporal: Any, error: type[Exception], message: str
) -> None:
    """The message names the task, the scale and the view."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fused_hd_nce(spatial, temporal, alpha=[1.0], beta=[1.0])


@pytest.mark.parametrize(("weights", "error", "message"), WEIGHTS)
def test_weights_are_refused(weights: Any, error: type[Exception], message: str) -> None:
    """Both sets, by the function and by the module."""
    pairs = {"spatial": [(CLIPS, CLIPS)], "temporal": [(GOOD, GOOD)]}
    for name in ("alpha", "beta"):
        given = {"alpha": [1.0], "beta": [1.0], name: weights}
        with pytest.raises(error, match=f"^{name} {re.escape(message)}$"):
            fused_hd_nce(**pairs, **given)
        with pytest.raises(error, match=f"^{name} {re.escape(message)}$"):
            HDNCE(**given)


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        ([1.0, 2.0], [1.0], "alpha has 2 weights but spatial has 1 scales; one weight per scale"),
        ([1.0], [], "beta has 0 weights but temporal has 1 scales; one weight per scale"),
    ],
)
def test_one_weight_per_scale(alpha: list[float], beta: list[float], message: str) -> None:
    """By the function at once; the module hears of the scales only when it is called."""
    pairs = {"spatial": [(CLIPS, CLIPS)], "temporal": [(GOOD, GOOD)]}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fused_hd_nce(**pairs, alpha=alpha, beta=beta)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        HDNCE(alpha, beta)(**pairs)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("temperature", [1, 0.07, torch.ones(1), nn.Parameter(torch.tensor(0.5))])
def test_everything_allowed_is_accepted(temperature: Any, dtype: torch.dtype) -> None:
    """Equal embeddings: log B whatever the temperature, so nothing was refused and nothing misread."""
    query, clips = GOOD.to(dtype), CLIPS.to(dtype)
    loss = fused_info_nce(query, query, temperature=temperature)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    loss = fused_hd_nce(
        [[clips, clips]], ((query, query),), alpha=(1,), beta=[0], temperature=temperature
    )
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize("number", [Fraction, np.float64, np.float32, np.float16, np.int64])
def test_every_real_number_is_one(number: Any) -> None:
    """NumPy's and those of the standard library are what they are as a float."""
    two, x = number(2), torch.eye(4, 3)
    cases = [
        (fused_info_nce, (x, x), {"temperature": two}),
        (fused_info_nce, (x, x), {"temperature": two, "backend": "torch"}),
        (fused_siglip, (x, x), {"temperature": two, "bias": -two}),
        (fused_dclw, (x, x), {"temperature": two, "sigma": two}),
        (fused_hn_nce, (x, x), {"temperature": two, "alpha": two, "beta": two}),
        (fused_sup_con, (x, torch.arange(4) % 2), {"temperature": two}),
        (fused_hd_nce, ([], [(x, x)]), {"alpha": (), "beta": [two], "temperature": two}),
        (fused_clip, (x, x), {"temperature": two, "label_smoothing": number(1) / 2}),
        (multiple_negatives_ranking, ([x, x],), {"scale": two}),
    ]
    for loss, inputs, options in cases:
        plain = {
            name: float(value) if isinstance(value, Number) else value
            for name, value in options.items()
        }
        if loss is fused_hd_nce:
            plain["beta"] = [2.0]
        found = loss(*inputs, **options)
        assert found.dtype == torch.float32
        assert found == loss(*inputs, **plain)
    module = torch.compile(InfoNCE(two), backend="aot_eager", fullgraph=True)
    assert module(x, x) == fused_info_nce(x, x, temperature=2.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, t: fused_info_nce(x, y, temperature=t, label_smoothing=t),
        lambda x, y, t: fused_siglip(x, y, temperature=t, bias=-t),
        lambda x, y, t: fused_dclw(x, y, temperature=t, sigma=t),
        lambda x, y, t: fused_hn_nce(x, y, temperature=t, alpha=t, beta=t, tau_plus=t / 9),
        lambda x, y, t: fused_hd_nce([], [(x, y)], alpha=[], beta=[t], temperature=t),
    ],
)
def test_numbers_may_change_between_compiled_calls(loss: Any) -> None:
    """From the second one on, the compiler does not know their values: no check may need one."""
    x, y = leaf(6, 8), randn(6, 8, seed=1)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for number in (0.1, 0.2, 0.3):
        found, exact = compiled(x, y, number), loss(x, y, number)
        assert relative_error(found, exact) < 1e-12
        slopes = [torch.autograd.grad(value, x)[0] for value in (found, exact)]
        assert relative_error(*slopes) < 1e-12


@pytest.mark.parametrize("value", [np.bool_(True), np.ones(1), 1j, Decimal(1)])
def test_what_is_no_real_number(value: Any) -> None:
    """It may behave like one."""
    for call, name in (
        (lambda: check_temperature(value), "temperature"),
        (lambda: check_bias("bias", value), "bias"),
        (lambda: check_number("beta", value), "beta"),
        (lambda: check_weights("alpha", [value]), "alpha"),
    ):
        with pytest.raises(TypeError, match=f"^{name} (is|holds) a {type(value).__name__};"):
            call()


def test_a_temperature_tensor_is_not_read() -> None:
    """Its value may be on another device; what it leads to shows in the loss, not in an error."""
    assert fused_info_nce(GOOD, GOOD, temperature=torch.tensor(math.nan)).isnan()
