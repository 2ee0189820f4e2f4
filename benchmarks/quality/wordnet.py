"""Definitions of WordNet, from Debian's package `wordnet-base`."""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vsc_serve.errors import UsageError

_FILES: Final = ("data.adj", "data.adv", "data.noun", "data.verb")


def read_definitions(folder: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Read the definition of every sense in WordNet's data files (man page wndb).

    Args:
        folder: Where `data.noun` and the others are.

    Returns:
        Definitions without their example sentences, each text once, and the number of the
        lexicographer file of each: 45 topics such as noun.animal or verb.motion.

    Raises:
        UsageError: A file is not there.
    """
    found: dict[str, int] = {}
    for name in _FILES:
        if not (folder / name).is_file():
            raise UsageError(f"{folder}: no {name}, a data file of WordNet.")
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            head, separator, gloss = line.partition(" | ")
            if separator and not line.startswith(" "):
                definition = gloss.split('; "')[0].strip()
                found.setdefault(definition, int(head.split()[1]))
    return list(found), np.array(list(found.values()), np.int64)
