"""JPEG headers: size, components, kind, rotation.

Words are those of the standard (ITU-T T.81, annex B).
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

from vsc_serve.images.orientation import find_orientation

SOI, EOI, SOS, DHT = 0xD8, 0xD9, 0xDA, 0xC4
_DRI, _APP1, _FILL = 0xDD, 0xE1, 0xFF
_FRAMES: Final = frozenset({*range(0xC0, 0xD0)} - {DHT, 0xC8, 0xCC})
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1, 0xC5, 0xC9, 0xCD})
_LOSSLESS: Final = frozenset({0xC3, 0xC7, 0xCB, 0xCF})
_FIRST_ARITHMETIC: Final = 0xC9
_RESTARTS: Final = range(0xD0, 0xD8)
_WITHOUT_LENGTH: Final = frozenset({0x00, 0x01, *_RESTARTS, SOI, EOI, _FILL})
"""Bytes after 0xFF that begin no segment: stuffing, TEM, restart markers, fill bytes."""
_IN_SCAN: Final = frozenset({0x00, *_RESTARTS, _FILL})
"""Bytes that may follow 0xFF within entropy-coded data."""
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


class Segment(NamedTuple):
    """One marker with what belongs to it."""

    marker: int
    start: int
    """Where the marker begins."""
    body: bytes
    """Payload, after the length."""

    @property
    def end(self) -> int:
        """Where what comes next begins."""
        return self.start + 4 + len(self.body)


class Header(NamedTuple):
    """JPEG header: everything before the first scan."""

    frame: Segment
    exif: bytes
    xmp: bytes
    scan: int
    """Where the first start-of-scan segment begins."""
    scan_components: int
    """Components in the first scan."""
    restart_interval: int
    """Coded units between two restart markers; 0 where there are none."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        body = self.frame.body
        return int.from_bytes(body[3:5]), int.from_bytes(body[1:3])

    @property
    def components(self) -> int:
        """Number of colour components, as far as the frame names them."""
        return min(self.frame.body[5], (len(self.frame.body) - 6) // 3)

    @property
    def is_huffman(self) -> bool:
        """Whether it is Huffman-coded, as nearly all are, and not arithmetic-coded."""
        return self.frame.marker < _FIRST_ARITHMETIC

    @property
    def is_lossless(self) -> bool:
        """Whether it has no blocks of coefficients, and no reduced scale."""
        return self.frame.marker in _LOSSLESS

    @property
    def is_sequential(self) -> bool:
        """Whether a scan holds all of its components: baseline and the like."""
        return self.frame.marker in _SEQUENTIAL

    @property
    def has_one_scan(self) -> bool:
        """Whether one scan holds everything, so that rows are decoded as the data come."""
        return self.is_sequential and self.scan_components == self.components

    @property
    def orientation(self) -> int:
        """How the image is turned, 1 to 8 as EXIF numbers it."""
        return find_orientation(self.exif, self.xmp) if self.exif or self.xmp else 1

    @property
    def sampling(self) -> list[tuple[int, int]]:
        """Horizontal and vertical sampling factors of each component."""
        factors = self.frame.body[7 : 6 + 3 * self.components : 3]
        return [(factor >> 4 or 1, factor & 15 or 1) for factor in factors]

    @property
    def restarts(self) -> int:
        """How many restart markers an image has that lies in one scan."""
        if self.restart_interval == 0:
            return 0
        across, down = 8, 8
        if self.components > 1:
            across *= max(h for h, _ in self.sampling)
            down *= max(v for _, v in self.sampling)
        units = -(-self.size[0] // across) * -(-self.size[1] // down)
        return -(-units // self.restart_interval) - 1

    @property
    def coefficient_bytes(self) -> int:
        """Memory for all coefficients, two bytes each, where several scans bring them."""
        most = max(h for h, _ in self.sampling) * max(v for _, v in self.sampling)
        samples = sum(h * v for h, v in self.sampling) / most * self.size[0] * self.size[1]
        return 2 * int(samples)


def read_header(content: bytes) -> Header | None:
    """Read what comes before the image data.

    Args:
        content: The file.

    Returns:
        The header; None where there is none that leads to image data.
    """
    frame, exif, xmp, interval, position = None, b"", b"", 0, 2
    try:
        while True:  # one step a segment: small files spend much of their time here
            position = content.index(b"\xff", position)
            marker = content[position + 1]
            if marker in _WITHOUT_LENGTH:
                position += 1 if marker == _FILL else 2
                continue
            end = position + 2 + (content[position + 2] << 8 | content[position + 3])
            if marker == SOS:
                if frame is None or len(frame.body) < 9 or not frame.body[5] or end > len(content):
                    return None
                return Header(frame, exif, xmp, position, content[position + 4], interval)
            if marker in _FRAMES:
                frame = Segment(marker, position, content[position + 4 : end])
            elif marker == _DRI:
                interval = content[position + 4] << 8 | content[position + 5]
            elif marker == _APP1 and content.startswith(_EXIF, position + 4):
                exif += content[position + (10 if exif else 4) : end]
            elif marker == _APP1 and content.startswith(_XMP, position + 4):
                xmp = content[position + 4 + len(_XMP) : end]
            position = end
    except (ValueError, IndexError):  # it ends
        return None


def read_segments(content: bytes, position: int) -> Iterator[Segment]:
    """Yield whole segments; bytes between them are passed over, as libjpeg does."""
    while 0 <= (position := content.find(b"\xff", position)) < len(content) - 3:
        marker = content[position + 1]
        if marker == EOI:
            return
        if marker in _WITHOUT_LENGTH:
            position += 1 if marker == _FILL else 2
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        if end > len(content):
            return
        yield Segment(marker, position, content[position + 4 : end])
        position = end


def end_of_scan(content: bytes, position: int) -> int:
    """Return where entropy-coded data end: at a marker that is no restart marker."""
    while 0 <= (position := content.find(b"\xff", position)) < len(content) - 1:
        if content[position + 1] not in _IN_SCAN:
            return position
        position += 1 if content[position + 1] == _FILL else 2
    return len(content)
