"""The image data of a JPEG: which scans there are, and a file with nothing else in it."""

import re
from typing import Final, NamedTuple

from vsc_serve.images.jpeg_header import (
    DHT,
    EOI,
    SOS,
    Header,
    Segment,
    end_of_scan,
    read_segments,
)

_COM, _APP0, _APP14, _APP15 = 0xFE, 0xE0, 0xEE, 0xEF
_RESTART: Final = re.compile(rb"\xff[\xd0-\xd7]")
_LAST: Final = 63
"""Last coefficient of a block."""
_ALL: Final = 2**64 - 1
"""A bit for each coefficient."""


class Scan(NamedTuple):
    """One pass over the image: which coefficients it brings, and where its data lie."""

    components: bytes
    """Identifiers."""
    first: int
    """First coefficient in zigzag order; the frame's kind says more."""
    last: int
    before: int
    """Bits left out of the coefficients by the scans before; 0 for a first scan."""
    after: int
    """Bits left out of them after this scan; 0 when they are complete."""
    start: int
    """Where the entropy-coded data begin."""
    end: int
    """Where they end."""
    zero_runs: tuple[int, ...]
    """Symbol that a run of zero bits means in the AC table of each component."""


def read_scans(content: bytes, header: Header) -> list[Scan]:
    """Return the scans of a file, as far as they can be told."""
    scans: list[Scan] = []
    symbols: dict[int, int] = {}
    position = 2
    while True:
        for segment in read_segments(content, position):
            position = segment.end
            if segment.marker == DHT:
                symbols |= _zero_symbols(segment.body)
            elif segment.marker == SOS:
                break
        else:
            return scans
        scan = _read_scan(content, segment, header, symbols)
        if scan is None:
            return scans
        scans.append(scan)
        position = scan.end


def _read_scan(
    content: bytes, segment: Segment, header: Header, symbols: dict[int, int]
) -> Scan | None:
    count = segment.body[0] if segment.body else 0
    if len(segment.body) < 4 + 2 * count:
        return None
    first, last, bits = segment.body[1 + 2 * count : 4 + 2 * count]
    if header.is_sequential:
        first, last, bits = 0, _LAST, 0
    tables = segment.body[2 : 1 + 2 * count : 2]
    return Scan(
        components=segment.body[1 : 1 + 2 * count : 2],
        first=first,
        last=min(last, _LAST),
        before=bits >> 4,
        after=bits & 15,
        start=segment.end,
        end=end_of_scan(content, segment.end),
        zero_runs=tuple(symbols.get(table & 15, 0) for table in tables),
    )


def _zero_symbols(body: bytes) -> dict[int, int]:
    """Return the symbol that zero bits mean in each AC table: the first one has that code."""
    found: dict[int, int] = {}
    while len(body) > 17:
        if body[0] >> 4 == 1:
            found[body[0] & 15] = body[17]
        body = body[17 + sum(body[1:17]) :]
    return found


def has_all_scans(header: Header, scans: list[Scan]) -> bool:
    """Tell whether scans bring every bit of every coefficient of every component."""
    missing = dict.fromkeys(header.frame.body[6 : 6 + 3 * header.components : 3], _ALL)
    for scan in scans:
        brought = (_ALL >> (_LAST - scan.last)) & (_ALL << scan.first)
        for name in scan.components:
            if scan.after == 0 and name in missing:
                missing[name] &= ~brought
    return not any(missing.values())


def without_metadata(content: bytes, header: Header) -> bytes:
    """Return a file with the same image data and nothing else that a decoder may stumble over.

    Application data and comments go (colour conversion needs JFIF's and Adobe's), bytes between
    segments, what follows the image, and values of a sequential scan header that have no meaning
    (Samsung phones write others). An end marker is there in any case.
    """
    parts = [content[:2]]
    position = 2
    while True:
        for segment in read_segments(content, position):
            position = segment.end
            parts.append(_cleaned(segment, header))
            if segment.marker == SOS:
                break
        else:
            return b"".join([*parts, bytes([0xFF, EOI])])
        if header.has_one_scan:
            end = _end_of_image(content, position, header)
            return b"".join([*parts, content[position:end], bytes([0xFF, EOI])])
        end = end_of_scan(content, position)
        parts.append(content[position:end])
        position = end


def _cleaned(segment: Segment, header: Header) -> bytes:
    marker, body = segment.marker, segment.body
    if marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14:
        body = b"JFIF\0\1\1" + body[7:]
    elif marker == _APP14 and body.startswith(b"Adobe"):
        pass
    elif _APP0 <= marker <= _APP15 or marker == _COM:
        return b""
    elif marker == SOS and header.is_sequential and len(body) > 3:
        body = body[:-3] + bytes([0, _LAST, 0])
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2) + body


def count_restarts(content: bytes, header: Header) -> int:
    """Return how many restart markers there are in the first scan."""
    start = next(read_segments(content, header.scan)).end
    return sum(1 for _ in _RESTART.finditer(content, start, end_of_scan(content, start)))


def _end_of_image(content: bytes, start: int, header: Header) -> int:
    """Return where the only scan is complete: some scanners go on with more intervals."""
    end = end_of_scan(content, start)
    if header.restart_interval:
        for number, found in enumerate(_RESTART.finditer(content, start, end)):
            if number == header.restarts:
                return found.start()
    return end
