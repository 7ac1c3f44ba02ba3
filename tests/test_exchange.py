"""Weights that leave and enter: an exported encoder is the trained one, and foreign ones compute what they did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hdc
from hdc.backbones.backbone import Backbone
from hdc.backbones.c3d import C3D
from hdc.backbones.exchange import Layout, load_foreign
from hdc.backbones.r2plus1d import R2Plus1D10
from hdc.backbones.resnet3d import resnet3d_18
from hdc.cli import main
from hdc.data.synthetic import make_dataset
from hdc.errors import InputError

TINY = ["--backbone=tiny", "--clips.size=32", "--device=cpu", "--norm_eps=0.001"]
TRAIN = [*TINY, "--augment.crop_size=28", "--batch_size=5", "--epochs=1", "--log_every=1"]


class ForeignC3D(nn.Module):
    """The layout of c3d-pytorch: eight convolutions by name, no norms, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"1": (3, 64), "2": (64, 128), "3a": (128, 256), "3b": (256, 256)}
        widths |= {"4a": (256, 512), "4b": (512, 512), "5a": (512, 512), "5b": (512, 512)}
        for name, (inputs, outputs) in widths.items():
            self.add_module(f"conv{name}", nn.Conv3d(inputs, outputs, 3, padding=1))
        for name in ("fc6", "fc7", "fc8"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        def convolve(x: Tensor, *names: str) -> Tensor:
            for name in names:
                x = self.get_submodule(f"conv{name}")(x).relu()
            return x

        pool = nn.functional.max_pool3d
        x = pool(convolve(x, "1"), (1, 2, 2))
        x = pool(convolve(x, "2"), 2)
        third = convolve(x, "3a", "3b")
        fourth = convolve(pool(third, 2), "4a", "4b")
        return [third, fourth, convolve(pool(fourth, 2), "5a", "5b")]


class ForeignBasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.downsample = None
        if stride == 2:
            shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ForeignResNet18(nn.Module):
    """The layout of 3D-ResNets-PyTorch's resnet18 with shortcuts of type B."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 64, 7, (1, 2, 2), 3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.layer1 = self.layer(64, 64, 1)
        self.layer2 = self.layer(64, 128, 2)
        self.layer3 = self.layer(128, 256, 2)
        self.layer4 = self.layer(256, 512, 2)
        self.fc = nn.Linear(512, 400)

    @staticmethod
    def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            ForeignBasicBlock(inputs, outputs, stride), ForeignBasicBlock(outputs, outputs, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = nn.functional.max_pool3d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        second = self.layer2(self.layer1(x))
        third = self.layer3(second)
        return [second, third, self.layer4(third)]


class ForeignFactored(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int) -> None:
        super().__init__()
        t, d = kernel
        middle = t * d * d * inputs * outputs // (d * d * inputs + t * outputs)
        across, along = (1, stride, stride), (1 if d == 7 else stride, 1, 1)
        self.spatial_conv = nn.Conv3d(
            inputs, middle, (1, d, d), across, (0, d // 2, d // 2), bias=False
        )
        self.bn = nn.BatchNorm3d(middle)
        self.temporal_conv = nn.Conv3d(
            middle, outputs, (t, 1, 1), along, (t // 2, 0, 0), bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_conv(self.bn(self.spatial_conv(x)).relu())


class ForeignFactoredBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.halves = inputs != outputs
        if self.halves:
            self.downsampleconv = ForeignFactored(inputs, outputs, (1, 1), 2)
            self.downsamplebn = nn.BatchNorm3d(outputs)
        self.conv1 = ForeignFactored(inputs, outputs, (3, 3), 1 + self.halves)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.conv2 = ForeignFactored(outputs, outputs, (3, 3), 1)
        self.bn2 = nn.BatchNorm3d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (self.downsamplebn(self.downsampleconv(x)) if self.halves else x)).relu()


class ForeignFactoredLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block1 = ForeignFactoredBlock(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.block1(x)


class ForeignR2Plus1D(nn.Module):
    """The layout of VCOP's R2Plus1DNet((1, 1, 1, 1))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ForeignFactored(3, 64, (3, 7), 2)
        self.bn1 = nn.BatchNorm3d(64)
        self.conv2 = ForeignFactoredLayer(64, 64)
        self.conv3 = ForeignFactoredLayer(64, 128)
        self.conv4 = ForeignFactoredLayer(128, 256)
        self.conv5 = ForeignFactoredLayer(256, 512)
        self.linear = nn.Linear(512, 101)

    def forward(self, x: Tensor) -> list[Tensor]:
        third = self.conv3(self.conv2(self.bn1(self.conv1(x)).relu()))
        fourth = self.conv4(third)
        return [third, fourth, self.conv5(fourth)]


def no_norm(channels: int) -> nn.Module:
    return nn.Identity()


CASES: dict[Layout, tuple[type[nn.Module], Callable[..., Backbone], Callable[[int], nn.Module]]] = {
    "c3d-pytorch": (ForeignC3D, C3D, no_norm),
    "3d-resnets": (ForeignResNet18, resnet3d_18, nn.BatchNorm3d),
    "vcop": (ForeignR2Plus1D, R2Plus1D10, nn.BatchNorm3d),
}


def generated(layout: Layout) -> nn.Module:
    """A foreign network whose norms have statistics and scales of their own."""
    torch.manual_seed(0)
    network = CASES[layout][0]().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm3d):
            for values, low, high in (
                (layer.running_mean, -0.2, 0.2),
                (layer.running_var, 0.5, 1.5),
                (layer.weight.data, 0.5, 1.5),
                (layer.bias.data, -0.2, 0.2),
            ):
                assert values is not None
                values.uniform_(low, high)
    return network


@pytest.mark.parametrize(
    ("layout", "wrapper"),
    [("c3d-pytorch", ""), ("3d-resnets", "module."), ("vcop", "module.base_network.")],
)
@torch.inference_mode()
def test_equal_outputs(layout: Layout, wrapper: str) -> None:
    """With the source's kind of norm the encoder computes what the source does, block by block."""
    foreign = generated(layout)
    _, build, norm = CASES[layout]
    backbone = build(norm).eval()
    weights = {wrapper + name: value for name, value in foreign.state_dict().items()}
    exchanged = load_foreign(backbone, weights, layout)
    heads = [name for name in weights if ".fc" in f".{name}" or "linear" in name]
    assert list(exchanged.dropped) == heads
    assert exchanged.untouched == ()
    clip = torch.rand(1, 3, 16, 32, 32) * 2 - 1
    for ours, theirs in zip(backbone(clip).values(), foreign(clip), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", CASES)
def test_into_instance_norm(layout: Layout) -> None:
    """Convolutions and scales arrive; what has no place is named, and so is what stays as it was."""
    foreign = generated(layout).state_dict()
    backbone = CASES[layout][1]()
    exchanged = load_foreign(backbone, foreign, layout)
    own = backbone.state_dict()
    copied = len(foreign) - len(exchanged.dropped)
    assert copied + len(exchanged.untouched) == len(own)
    for name in exchanged.dropped:
        assert name.endswith(("running_mean", "running_var", "num_batches_tracked")) or (
            "fc" in name or "linear" in name
        )
    if layout == "c3d-pytorch":
        assert torch.equal(own["block3.4.weight"], foreign["conv3b.weight"])
        assert len(exchanged.untouched) == 16
        assert all(own[name].eq(1).all() for name in exchanged.untouched if "weight" in name)
    else:
        assert exchanged.untouched == ()


def test_misfits_are_named_and_nothing_is_copied() -> None:
    weights = ForeignC3D().state_dict()
    backbone = C3D()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    del weights["conv4a.bias"]
    weights["conv9.weight"] = torch.zeros(1)
    weights["conv1.weight"] = torch.zeros(64, 1, 3, 3, 3)
    with pytest.raises(InputError) as error:
        load_foreign(backbone, weights, "c3d-pytorch")
    assert str(error.value) == (
        "the weights do not fit layout c3d-pytorch: 1 unknown, e.g. conv9.weight; "
        "1 missing, e.g. block4.1.bias; 1 of another shape, e.g. block1.0.weight"
    )
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_shortcuts_without_weights_are_refused() -> None:
    """Type A, which pads with zeros, is another network."""
    weights = {k: v for k, v in ForeignResNet18().state_dict().items() if "downsample" not in k}
    with pytest.raises(InputError, match=r"9 missing, e.g. block3.0.shortcut.0.weight"):
        load_foreign(resnet3d_18(), weights, "3d-resnets")
    with pytest.raises(InputError, match="layout is 'r3d'; it must be one of c3d-pytorch, "):
        load_foreign(resnet3d_18(), weights, "r3d")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run of two steps, a probe in the same folder, a finetuning beside it."""
    videos, out = tmp_path_factory.mktemp("secret"), tmp_path_factory.mktemp("runs") / "run"
    make_dataset(videos / "toys", train=10, test=5, seed=0)
    places = [f"--data={videos / 'toys'}", f"--out={out}"]
    assert main(["pretrain", *places, *TRAIN]) == 0
    weights = f"--checkpoint={out / 'checkpoint.pt'}"
    assert main(["probe", *places, weights, "--crop_size=28", *TINY]) == 0
    beside = [places[0], f"--out={out.parent / 'recognize'}", weights, "--splits=[1]"]
    assert main(["recognize", *beside, *TRAIN]) == 0
    return out


def test_exported_encoder_is_the_trained_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    assert main(["export", str(run), str(target)]) == 0
    assert f"wrote {target}/backbone.safetensors" in capsys.readouterr().out.replace("\n", "")
    trained = torch.load(run / "checkpoint.pt", weights_only=True)["model"]
    for source in (target, target / "backbone.safetensors", str(target)):
        backbone = hdc.load_backbone(source)
        assert not backbone.training
        assert backbone.block1[1].eps == 1e-3
        for name, value in backbone.state_dict().items():
            assert torch.equal(value, trained[f"backbone.{name}"])
    assert main(["export", str(run / "checkpoint.pt"), str(target)]) == 0  # again, over itself


def test_card(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path)]) == 0
    card = (tmp_path / "README.md").read_text()
    assert "- data: `toys`, split 1\n- epochs: 1; steps done: 2, of 5 videos each\n" in card
    probe, votes, tested = (
        json.loads((run / name).read_text())
        for name in ("probe.json", "knn.json", "../recognize/split1/test.json")
    )
    where = "- `toys`, split 1: "
    assert f"{where}linear probe, {100 * probe['test_accuracy']:.1f} %\n" in card
    weighted, majority = (f"{100 * votes[name]:.1f} %" for name in ("weighted", "majority"))
    vote = f"{where}vote of the 10 nearest, {weighted} (weighted by similarity), {majority} (majority)\n"
    assert vote in card
    videos, clips = (f"{100 * tested[f'{of}_accuracy']:.1f} %" for of in ("video", "clip"))
    shares = f"{videos} of videos, {clips} of clips"
    assert f"- `toys`: finetuned, split 1: {shares}; mean: {shares}\n" in card
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss {last['loss']:.4g}" in card
    assert "temperature: 0.07" in card
    assert "secret" not in card  # the path to the data is nobody's business
    assert str(run) not in card


def test_card_leaves_out_what_other_weights_reached(run: Path, tmp_path: Path) -> None:
    """Only the pretraining's own results, not those of its classifier; and that one has its own card."""
    (tmp_path / "runs").mkdir()
    copy = shutil.copytree(run, tmp_path / "runs" / "run")
    found = json.loads((copy / "probe.json").read_text())
    (copy / "probe.json").write_text(json.dumps(found | {"weights_sha256": "of others"}))
    assert main(["export", str(copy), str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "vote of the" in card
    assert "linear probe" not in card
    tuned = run.parent / "recognize" / "split1"
    assert main(["export", str(tuned), str(tmp_path / "tuned")]) == 0
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "split 1: action recognition, " in card
    assert "vote of the" not in card


def test_damaged_exports_are_refused(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path)]) == 0
    file = tmp_path / "backbone.safetensors"
    weights = load_file(file)
    with pytest.raises(InputError, match=r"there is no file .+; hdc-train export writes one"):
        hdc.load_backbone(tmp_path / "nowhere")
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        hdc.load_backbone(tmp_path)
    save_file(weights, file)
    with pytest.raises(InputError, match="was not written by hdc-train export"):
        hdc.load_backbone(tmp_path)
    options = json.dumps({"backbone": "tiny", "norm_eps": 1e-5, "norm_affine": True})
    metadata = {"format": "hdc-backbone-1", "options": options}
    extra = {k: v for k, v in weights.items() if k != "block1.0.weight"} | {"x": torch.ones(1)}
    save_file(extra, file, metadata)
    with pytest.raises(InputError, match=r"1 unknown, e.g. x; 1 missing, e.g. block1.0.weight"):
        hdc.load_backbone(tmp_path)


def test_export_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("my project")
    for source, message in (
        (run, "README.md is not of hdc-train export; choose another folder"),
        (tmp_path / "nowhere", "there is no checkpoint"),
    ):
        target = tmp_path if source == run else tmp_path / "model"
        assert main(["export", str(source), str(target)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert (tmp_path / "README.md").read_text() == "my project"
