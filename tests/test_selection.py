"""Which backend runs a call: every rule of `hdc_kernels/selection.py`, and every refusal word for word."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from hdc_kernels import fused_info_nce, selection
from hdc_kernels.backends import cpu, cuda
from hdc_kernels.checks import FLOATING

LIMIT = selection.PLAIN_LOGITS
NARROW = tuple(dtype for dtype in FLOATING if dtype != torch.float64)


class Shaped:
    """What `select` looks at, without the memory: a tensor's shape, dtype and device."""

    def __init__(
        self, *shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, torch.device(device)
        self.is_cpu = device == "cpu"

    def numel(self) -> int:
        return self.shape.numel()


def has(
    monkeypatch: pytest.MonkeyPatch,
    *,
    library: bool = False,
    triton: bool = False,
    cuda: bool = False,
    ampere: bool = True,
    interpreted: bool = False,
) -> None:
    """What is installed, and whether the GPU is new enough."""
    monkeypatch.setattr(selection, "_has_library", lambda: library)
    monkeypatch.setattr(selection, "_has_cuda_library", lambda: cuda)
    monkeypatch.setattr(selection, "_is_compiled_for", lambda tensor: ampere)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(selection, "_has_triton", lambda: triton)
    monkeypatch.setattr(selection, "_is_ampere", lambda tensor: ampere)
    monkeypatch.setattr(selection, "_interpreted", lambda: interpreted)


def chosen(backend: str, *pairs: tuple[Shaped, Shaped], **options: object) -> str:
    """The backend for these pairs."""
    x, y = zip(*pairs, strict=True)
    return selection.select(backend, x, y, **options)


def chosen_for(backend: str, device: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend for a small pair."""
    one = Shaped(4, 3, device=device, dtype=dtype)
    return chosen(backend, (one, one))


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", FLOATING)
def test_auto_on_a_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, triton: bool) -> None:
    """The library in every dtype; without it plain PyTorch, never Triton, whose interpreter is slow."""
    has(monkeypatch, library=True, triton=triton, interpreted=triton)
    assert chosen_for("auto", "cpu", dtype) == "cpu"
    has(monkeypatch, triton=triton, interpreted=triton)
    assert chosen_for("auto", "cpu", dtype) == "torch"


@pytest.mark.parametrize("library", [True, False])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    """Triton but for float64, whatever else is there: C++ cannot reach a GPU, and CUDA C++ was not measured yet."""
    has(monkeypatch, library=library, triton=True, cuda=True)
    assert [chosen_for("auto", "cuda", dtype) for dtype in NARROW] == ["triton"] * 3
    assert chosen_for("auto", "cuda", torch.float64) == "torch"
    has(monkeypatch, library=library, triton=True, ampere=False)
    assert [chosen_for("auto", "cuda", dtype) for dtype in FLOATING] == ["torch"] * 4
    has(monkeypatch, library=library)
    assert [chosen_for("auto", "cuda", dtype) for dtype in FLOATING] == ["torch"] * 4


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_auto_elsewhere(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Neither kernel runs there."""
    has(monkeypatch, library=True, triton=True, interpreted=True)
    assert chosen_for("auto", device) == "torch"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_auto_chunks_above_the_limit(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Logits are counted over rows, columns, problems and pairs, but not over widths."""
    has(monkeypatch)
    assert LIMIT == 4096 * 4096

    def pair(*shape: int, columns: int) -> tuple[Shaped, Shaped]:
        other = (*shape[:-2], columns, shape[-1])
        return Shaped(*shape, device=device), Shaped(*other, device=device)

    assert chosen("auto", pair(4096, 999, columns=4096)) == "torch"
    assert chosen("auto", pair(4096, 1, columns=4097)) == "chunked"
    assert chosen("auto", pair(4097, 1, columns=4096)) == "chunked"
    assert chosen("auto", pair(16, 1024, 7, columns=1024)) == "torch"
    assert chosen("auto", pair(17, 1024, 7, columns=1024)) == "chunked"
    half, one = pair(2048, 5, columns=4096), pair(1, 3, columns=1)
    assert chosen("auto", half, half) == "torch"
    assert chosen("auto", half, half, one) == "chunked"


@pytest.mark.parametrize("backend", ["torch", "chunked"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_plain_backends_run_anywhere(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    """Whoever asks for them gets them, in any size and dtype."""
    has(monkeypatch, library=True, triton=True)
    assert [chosen_for(backend, device, dtype) for dtype in FLOATING] == [backend] * 4
    huge = Shaped(2 * LIMIT, 1, device=device)
    assert chosen(backend, (huge, huge)) == backend


def test_cpu_and_triton_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton also on CPU tensors, if its interpreter is on."""
    has(monkeypatch, library=True, triton=True)
    assert [chosen_for("cpu", "cpu", dtype) for dtype in FLOATING] == ["cpu"] * 4
    assert [chosen_for("triton", "cuda", dtype) for dtype in NARROW] == ["triton"] * 3
    has(monkeypatch, triton=True, interpreted=True)
    assert [chosen_for("triton", "cpu", dtype) for dtype in NARROW] == ["triton"] * 3


def test_cuda_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """By function, dtype and width."""
    has(monkeypatch, cuda=True)
    widest = Shaped(4, 512, device="cuda", dtype=torch.bfloat16)
    for function in ("info_nce", "logsumexp"):
        assert chosen("cuda", (widest, widest), function=function) == "cuda"
    assert [chosen_for("cuda", "cuda", dtype) for dtype in NARROW] == ["cuda"] * 3


@pytest.mark.parametrize(
    ("width", "options", "found"),
    [
        (513, {}, "the embeddings have 513 dimensions"),
        (8, {"function": "softplus"}, "the loss is a sum of softplus"),
        (8, {"function": "tilted"}, "the loss weighs negatives by their hardness"),
        (8, {"single_entries": True}, "pairs are listed"),
    ],
)
def test_what_cuda_does_not_take(
    monkeypatch: pytest.MonkeyPatch, width: int, options: dict[str, object], found: str
) -> None:
    """What was given, and what may be; also where it is not that of the first pair."""
    has(monkeypatch, cuda=True)
    one, other = Shaped(4, 8, device="cuda"), Shaped(4, width, device="cuda")
    message = f"backend is 'cuda' but {found}; {selection.CUDA_TAKES}; use 'auto'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen("cuda", (one, one), (other, other), **options)


REFUSALS = [
    ("cpu", "cuda", torch.float32, {"library": True}, "the tensors are on cuda; use 'auto'"),
    ("cpu", "meta", torch.float64, {}, "the tensors are on meta; use 'auto'"),
    (
        "cpu",
        "cpu",
        torch.float32,
        {"triton": True},
        "its C++ library was not built; install a C++ compiler (g++ or clang++), then reinstall this package",
    ),
    ("triton", "cuda", torch.float32, {}, "Triton is not installed; pip install triton"),
    ("triton", "cpu", torch.float64, {}, "Triton is not installed; pip install triton"),
    ("triton", "cpu", torch.float32, {"triton": True}, "the tensors are on cpu; use 'auto'"),
    ("triton", "mps", torch.float64, {"triton": True}, "the tensors are on mps; use 'auto'"),
    ("triton", "cuda", torch.float64, {"triton": True}, "the tensors are float64; use 'auto'"),
    (
        "triton",
        "cpu",
        torch.float64,
        {"triton": True, "interpreted": True},
        "the tensors are float64; use 'auto'",
    ),
    ("cuda", "cpu", torch.float32, {"cuda": True}, "the tensors are on cpu; use 'auto'"),
    (
        "cuda",
        "cuda",
        torch.float32,
        {"library": True, "triton": True},
        "its CUDA library was not built; install nvcc (the CUDA toolkit, 12.5 or later), then reinstall this package",
    ),
    (
        "cuda",
        "cuda",
        torch.float32,
        {"cuda": True, "ampere": False},
        "its library has no code for this GPU's compute capability 7.5; if it is 8.0 or later, reinstall this "
        "package with HDC_CUDA_ARCHITECTURES=sm_75",
    ),
    (
        "cuda",
        "cuda",
        torch.float64,
        {"cuda": True},
        "the tensors are float64; it takes float32, bfloat16 and float16 embeddings of at most 512 dimensions, "
        "losses that are logsumexps, and no listed pairs; use 'auto'",
    ),
]


@pytest.mark.parametrize(("backend", "device", "dtype", "installed", "message"), REFUSALS)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    device: str,
    dtype: torch.dtype,
    installed: dict[str, bool],
    message: str,
) -> None:
    """A backend that was asked for by name is never swapped for another in silence."""
    has(monkeypatch, **installed)
    message = f"backend is '{backend}' but {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chosen_for(backend, device, dtype)


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [
        ("cuda", {"triton": True}, "triton"),
        ("cuda", {"triton": True, "ampere": False}, "torch"),
        ("cuda", {"library": True}, "torch"),
        ("cpu", {"library": True, "triton": True, "interpreted": True}, "torch"),
        ("mps", {"triton": True, "interpreted": True}, "torch"),
    ],
)
def test_clips(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: dict[str, bool], expected: str
) -> None:
    """Where the losses go to Triton, too; the C++ library has nothing for clips."""
    has(monkeypatch, **installed)
    clips = Shaped(1, 1, 4, 4, 3, device=device, dtype=torch.uint8)
    assert selection.select_for_clips("auto", clips) == expected
    assert selection.select_for_clips("torch", clips) == "torch"


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [
        ("cuda", {}, "Triton is not installed; pip install triton"),
        ("cpu", {"triton": True}, "the tensors are on cpu; use 'auto'"),
    ],
)
def test_refusals_of_clips(
    monkeypatch: pytest.MonkeyPatch, device: str, installed: dict[str, bool], message: str
) -> None:
    """The same as of embeddings."""
    has(monkeypatch, **installed)
    clips = Shaped(1, 1, 4, 4, 3, device=device, dtype=torch.uint8)
    message = f"backend is 'triton' but {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        selection.select_for_clips("triton", clips)


def test_refusals_reach_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function, which otherwise falls back to plain PyTorch."""
    has(monkeypatch)
    x = torch.ones(4, 3)
    for backend in ("cpu", "triton", "cuda"):
        with pytest.raises(ValueError, match=f"^backend is '{backend}' but "):
            fused_info_nce(x, x, backend=backend)
    plain = fused_info_nce(x, x, backend="torch")
    assert torch.equal(fused_info_nce(x, x), plain)


def test_implementation() -> None:
    """The module of that name, with all that a backend has, once."""
    module = selection.implementation("cpu")
    assert module is cpu
    for part in ("LSE_DTYPE", "forward", "backward", "step"):
        assert hasattr(module, part)


@pytest.fixture
def forget_triton() -> Iterator[None]:
    """Whether Triton is there is asked once a process: not here."""
    selection._find_triton.cache_clear()
    yield
    selection._find_triton.cache_clear()


@pytest.mark.usefixtures("forget_triton")
@pytest.mark.parametrize("found", [True, False])
def test_what_is_installed_is_looked_for(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    """The library is asked itself, Triton's presence the import system, without importing it."""
    monkeypatch.setattr(cpu, "is_available", lambda: found)
    monkeypatch.setattr(cuda, "is_available", lambda: found)
    assert selection._has_library() is found
    assert selection._has_cuda_library() is found
    asked = []

    def find_spec(name: str) -> object:
        asked.append(name)
        return object() if found else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert selection._has_triton() is found
    assert asked == ["triton"]


def test_the_compiler_is_not_imported() -> None:
    """It takes a second, which nobody who does not compile should wait for."""
    code = "import sys, hdc_kernels; print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


def test_constants_are_pytorchs() -> None:
    """The mark that `torch.compiler.assume_constant_result` leaves on a function."""

    def ours() -> bool:
        return True

    def theirs() -> bool:
        return True

    selection.constant(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
