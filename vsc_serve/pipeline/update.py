"""Codes of an earlier run, so that only new and changed images are encoded again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from vsc_serve.codes import CodeFile, CodeRows, read_codes, stack_rows, take_rows
from vsc_serve.executors.digests import save_digests
from vsc_serve.options import EncodeOptions

_SAME: Final = ("model_digest", "tau", "view", "max_active", "stored_tau", "engine")


class PreviousCodes:
    """The rows of an earlier codes file.

    Args:
        stored: What it holds, with digests.
    """

    def __init__(self, stored: CodeFile) -> None:
        self._rows = CodeRows(codes=stored.codes, gamma=stored.gamma, sigma=stored.sigma)
        self._digests = stored.digests or []

    def save_digests(self, path: Path) -> None:
        """Write the digests for the workers."""
        save_digests(path, self._digests)

    def merge(self, fresh: CodeRows, reused: Sequence[int]) -> CodeRows:
        """Put fresh and earlier rows in their order.

        Args:
            fresh: Rows that were just made.
            reused: For each row wanted, the earlier one it repeats, or -1 for the next fresh one.
        """
        wanted = np.array(reused, np.int64)
        is_old = wanted >= 0
        both = stack_rows([fresh, take_rows(self._rows, wanted[is_old])], fresh.codes.shape[1])
        order = np.empty(len(wanted), np.int64)
        order[~is_old] = np.arange(fresh.codes.shape[0])
        order[is_old] = fresh.codes.shape[0] + np.arange(int(is_old.sum()))
        return take_rows(both, order)


def open_previous(
    path: Path, provenance: dict[str, Any], options: EncodeOptions
) -> tuple[PreviousCodes | None, str]:
    """Open the codes that are to be updated.

    Args:
        path: Codes file or folder of shards; need not be there.
        provenance: What the new codes come from.
        options: How they are encoded.

    Returns:
        The codes; or None, and why all is encoded.

    Raises:
        InputError: What is there is no codes file.
    """
    if not path.exists():
        return None, f"{path} is not there yet"
    stored = read_codes(path)
    if stored.digests is None:
        return None, f"{path} was made without `is_update` and has no digests"
    for name in _SAME:
        if stored.meta.get(name) != provenance.get(name):
            return None, f"{path} has another {name}: {stored.meta.get(name)}"
    if (stored.gamma is not None) != options.uncertainty:
        return None, f"{path} was made {'without' if options.uncertainty else 'with'} `uncertainty`"
    return PreviousCodes(stored), ""
