"""Stored codes that are read a few at a time."""

from typing import Any, Protocol

from vsc_serve.codes import Codes


class Rows(Protocol):
    """Codes by row number; a CSR matrix is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Row numbers and latents."""

    def __getitem__(self, rows: Any, /) -> Codes:
        """Return the codes of some row numbers."""
