"""Weights under the names their authors gave them, read from a file for the network of a recipe."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hifusion.checkpoint import load_tensors
from hifusion.errors import InputError
from hifusion.models import MODELS
from hifusion.models.published import unwrapped


def published_weights(path: Path, network: str, config: Any) -> dict[str, Tensor]:
    """The state of a network, float32, of a checkpoint that its authors' code has saved.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or one of ``torch.save`` that holds tensors alone: nothing in it is executed.
    network
        One of ``hifusion.models.MODELS`` that can be imported.
    config
        Its configuration: what weights do not say (levels, pixel scale, heads) is taken from it, the rest must agree.

    Raises
    ------
    InputError
        A file that cannot be read so, names that are missing or unexpected, or sizes that are not the configuration's.
    """
    given = unwrapped(_read(Path(path)))
    build = MODELS[network].module.from_reference  # type: ignore[attr-defined]
    wanted = [name for name in inspect.signature(build).parameters if name != "state_dict"]
    options = {name: config if name == "config" else getattr(config, name) for name in wanted}
    try:
        found = build(given, **options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    here, there = dataclasses.asdict(config), dataclasses.asdict(found.config)
    unlike = [f"{key} is {there[key]}, the recipe's {here[key]}" for key in here if there[key] != here[key]]
    if unlike:
        keys = " ".join(f"--set model.{key.split()[0]}=..." for key in unlike if not key.startswith("n_genes"))
        advice = "give the panel it was trained on (--set panel=FILE)" if "n_genes" in unlike[0] else f"give {keys}"
        raise InputError(f"{path}: {'; '.join(unlike)}; {advice}")
    state: dict[str, Tensor] = found.float().state_dict()
    return state


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch tells of a file that is not its own in many ways
        raise InputError(
            f"{path}: holds more than tensors, or is damaged; save the state dict alone, "
            "torch.save(model.state_dict(), FILE), and give that"
        ) from error
    if not isinstance(given, dict):
        raise InputError(
            f"{path}: holds a {type(given).__name__}, no state dict; save model.state_dict() and give that"
        )
    return given
