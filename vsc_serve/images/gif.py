"""The first frame of a GIF: where it lies, and a file that Pillow opens without its own limits."""

from typing import Final

from vsc_serve.images.compositing import Box

_TABLE_OF_COLOURS: Final = 0x80
_EXTENSION, _IMAGE, _TRAILER, _GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9
_DISPOSAL: Final = 0b00011100
_LARGEST_SIDE: Final = 0xFFFF


def prepare_gif(content: bytes) -> bytes:
    """Return a file whose first frame Pillow reads whatever its size.

    Pillow holds a frame that is larger than the canvas, and the area to be cleared after a frame,
    against a limit of the whole process. So the canvas is made large enough here, and nothing is to
    be cleared, which changes no pixel of the first frame.

    Args:
        content: The file; one that is cut off before its first frame is returned as it is.
    """
    changed = bytearray(content)
    controls, frame = _find_first_frame(content)
    for position in controls:
        changed[position + 3] &= ~_DISPOSAL & 0xFF
    if frame is not None:
        for place, side in ((6, frame.right), (8, frame.bottom)):
            canvas = int.from_bytes(content[place : place + 2], "little")
            larger = min(max(canvas, side), _LARGEST_SIDE)
            changed[place : place + 2] = larger.to_bytes(2, "little")
    return bytes(changed)


def find_first_frame(content: bytes) -> Box | None:
    """Return where the first frame lies on the canvas; None where a file has none."""
    return _find_first_frame(content)[1]


def _find_first_frame(content: bytes) -> tuple[list[int], Box | None]:
    """Return where the graphic control extensions before the first frame are, and its box."""
    controls: list[int] = []
    try:
        position = 13 + _table_bytes(content[10])
        while content[position] not in (_IMAGE, _TRAILER):
            if content[position] != _EXTENSION:
                position += 1
                continue
            if content[position + 1] == _GRAPHIC_CONTROL and content[position + 2]:
                controls.append(position)
            position = _after_blocks(content, position + 2)
        if content[position] == _TRAILER or position + 9 > len(content):
            return controls, None
    except IndexError:
        return controls, None
    left, top, width, height = (
        int.from_bytes(content[place : place + 2], "little")
        for place in range(position + 1, position + 9, 2)
    )
    return controls, Box(left, top, left + width, top + height)


def _table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & _TABLE_OF_COLOURS else 0


def _after_blocks(content: bytes, position: int) -> int:
    while content[position]:
        position += 1 + content[position]
    return position + 1
