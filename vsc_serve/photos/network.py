"""The convolutions of EfficientNet-lite0, in the order in which they compute.

As EfficientNet-B0 (Tan and Le 2019, table 1) without squeeze-and-excitation and with ReLU6: a stem,
sixteen inverted bottlenecks, a head. Every convolution is followed by a batch normalisation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

SIDE: Final = 224
"""Height and width of the input."""
DIMENSIONS: Final = 1280
"""Length of an embedding."""
CLASSES: Final = 1000
"""Classes of ImageNet, which the layer after the embedding tells apart."""
EPSILON: Final = 1e-3
"""Added to the variance by every batch normalisation."""


class _Stage(NamedTuple):
    expansion: int
    kernel: int
    channels: int
    blocks: int
    stride: int


_STAGES: Final = (
    _Stage(1, 3, 16, 1, 1),
    _Stage(6, 3, 24, 2, 2),
    _Stage(6, 5, 40, 2, 2),
    _Stage(6, 3, 80, 3, 2),
    _Stage(6, 5, 112, 3, 1),
    _Stage(6, 5, 192, 4, 2),
    _Stage(6, 3, 320, 1, 1),
)
_STEM: Final = 32


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution with the batch normalisation after it."""

    name: str
    """Name of the kernel in the package's file, without `.weight`."""
    norm: str
    """Name of the batch normalisation there."""
    channels: tuple[int, int]
    """Channels in and out."""
    kernel: int = 1
    """Height and width of the kernel."""
    stride: int = 1
    side: int
    """Height and width of its input."""
    is_depthwise: bool = False
    """Whether each channel is convolved on its own."""
    is_clipped: bool = True
    """Whether ReLU6 follows."""
    adds_input_of: str = ""
    """Name of the convolution whose input is added to the output, or nothing."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the kernel: (out, in, height, width)."""
        into, out = self.channels
        return out, 1 if self.is_depthwise else into, self.kernel, self.kernel

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Padding of TensorFlow's "same", (top, left, bottom, right): the odd one goes last."""
        total = max((-(-self.side // self.stride) - 1) * self.stride + self.kernel - self.side, 0)
        before, after = total // 2, total - total // 2
        return before, before, after, after


def convolutions() -> Iterator[Conv]:
    """Yield all convolutions, from the pixels to the mean over all places."""
    yield Conv(name="_conv_stem", norm="_bn0", channels=(3, _STEM), kernel=3, stride=2, side=SIDE)
    number, channels, side = 0, _STEM, SIDE // 2
    for stage in _STAGES:
        for block in range(stage.blocks):
            stride = 1 if block else stage.stride
            yield from _bottleneck(f"_blocks.{number}.", stage, channels, stride, side)
            number, channels, side = number + 1, stage.channels, -(-side // stride)
    yield Conv(name="_conv_head", norm="_bn1", channels=(channels, DIMENSIONS), side=side)


def _bottleneck(part: str, stage: _Stage, channels: int, stride: int, side: int) -> Iterator[Conv]:
    """Yield what widens, convolves each channel on its own, and narrows."""
    wide = stage.expansion * channels
    first = f"{part}_depthwise_conv"
    if stage.expansion > 1:
        first = f"{part}_expand_conv"
        yield Conv(name=first, norm=f"{part}_bn0", channels=(channels, wide), side=side)
    yield Conv(
        name=f"{part}_depthwise_conv",
        norm=f"{part}_bn1",
        channels=(wide, wide),
        kernel=stage.kernel,
        stride=stride,
        side=side,
        is_depthwise=True,
    )
    yield Conv(
        name=f"{part}_project_conv",
        norm=f"{part}_bn2",
        channels=(wide, stage.channels),
        side=-(-side // stride),
        is_clipped=False,
        adds_input_of=first if stride == 1 and channels == stage.channels else "",
    )
