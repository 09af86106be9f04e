"""Small networks on a CLIP's embeddings, such as LAION's aesthetic predictors and NSFW detectors, from safetensors.

A file holds weights and no architecture, so the order of the layers is read off their names, and what lies between
them is said in words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmfoundry.pipeline.errors import ConfigError, DamagedInput, MissingInput

Activation = Literal["none", "relu", "gelu", "silu", "tanh"]
Output = Literal["none", "sigmoid", "softmax"]
_ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
_NORM_EPS = 1e-12  # keeps a variance of zero from giving infinities; Keras' and LAION's trained ones are far above


class EmbeddingHead(nn.Module):
    """Linear layers with an activation in between, normalisations by fixed statistics before them, one number out."""

    def __init__(self, layers: Sequence[nn.Module], activation: Activation, output: Output, output_index: int):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation, self.output, self.output_index = activation, output, output_index

    def forward(self, embeddings_bD: Tensor) -> Tensor:
        """(b, D) embeddings to (b,) numbers."""
        hidden = embeddings_bD
        last = max(number for number, layer in enumerate(self.layers) if isinstance(layer, nn.Linear))
        activate = _ACTIVATIONS[self.activation]()
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if isinstance(layer, nn.Linear) and number != last:
                hidden = activate(hidden)
        if self.output == "softmax":
            hidden = hidden.softmax(dim=-1)
        elif self.output == "sigmoid":
            hidden = hidden.sigmoid()
        return hidden[:, self.output_index]


class FixedNorm(nn.Module):
    """Batch normalisation as it acts after training: by the means and variances that it holds."""

    def __init__(self, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None):
        super().__init__()
        self.scale = nn.Buffer((variance + _NORM_EPS).rsqrt() * (1 if weight is None else weight))
        self.shift = nn.Buffer((0 if bias is None else bias) - mean * self.scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scale and shift each feature."""
        return hidden * self.scale + self.shift


def load_head(
    file: Path,
    *,
    layers: Sequence[str] = (),
    activation: Activation = "none",
    output: Output = "none",
    output_index: int = 0,
) -> EmbeddingHead:
    """Read a head, in float32 on the CPU, in evaluation mode.

    Args:
        file: safetensors. A layer is what comes before the last dot of a name: `layers.0.weight`, `layers.0.bias`; a
            weight of two dimensions is a linear layer, `running_mean` and `running_var` make a normalisation.
        layers: the layers' names in order; by default by the numbers in them (`layers.2` before `layers.10`).
        activation: after every linear layer but the last.
        output: what is done to the last layer's output.
        output_index: which of the last layer's outputs is the score.
    Raises:
        MissingInput: no such file.
        DamagedInput: not a safetensors file.
        ConfigError: no layers that fit one another in this order; names and shapes are given.
    """
    if not file.is_file():
        raise MissingInput(f"{file}: no such file; a head's weights are read from safetensors only")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise DamagedInput(f"{file}: not a whole safetensors file ({error})") from error
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, _, part = name.rpartition(".")
        grouped.setdefault(layer, {})[part] = value.float()
    order = list(layers) or sorted(grouped, key=_by_numbers)
    unknown = [name for name in order if name not in grouped]
    if unknown or set(order) != set(grouped):
        raise ConfigError(f"{file}: layers must name each of {', '.join(sorted(grouped, key=_by_numbers))} once")
    built = [_layer(name, grouped[name], file) for name in order]
    _check_chain(order, built, output_index, file)
    return EmbeddingHead(built, activation, output, output_index).eval().requires_grad_(False)


def width_of(head: EmbeddingHead) -> int:
    """The width of the embeddings that a head reads."""
    return next(layer.in_features for layer in head.layers if isinstance(layer, nn.Linear))


def _by_numbers(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _layer(name: str, parts: dict[str, Tensor], file: Path) -> nn.Linear | FixedNorm:
    weight, bias = parts.get("weight"), parts.get("bias")
    if weight is not None and weight.ndim == 2:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        try:
            linear.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(f"{file}: {name}: weight and bias do not fit one another") from error
        return linear
    if "running_mean" in parts and "running_var" in parts:
        return FixedNorm(parts["running_mean"], parts["running_var"], weight, bias)
    shapes = ", ".join(f"{part} {tuple(value.shape)}" for part, value in parts.items())
    raise ConfigError(f"{file}: {name} ({shapes}) is neither a linear layer nor a normalisation with statistics")


def _check_chain(names: Sequence[str], layers: Sequence[nn.Linear | FixedNorm], output_index: int, file: Path) -> None:
    width: int | None = None
    for name, layer in zip(names, layers, strict=True):
        wants = layer.in_features if isinstance(layer, nn.Linear) else layer.scale.numel()
        if width is not None and wants != width:
            raise ConfigError(f"{file}: {name} wants {wants} numbers, but {width} come; name the layers in order")
        width = layer.out_features if isinstance(layer, nn.Linear) else wants
    if not any(isinstance(layer, nn.Linear) for layer in layers):
        raise ConfigError(f"{file}: there is no linear layer in it")
    assert width is not None
    if not 0 <= output_index < width:
        raise ConfigError(f"{file}: output_index is {output_index}, but there are {width} outputs")
