"""How often `vsc encode` says that images are far outside a model's own data.

    python -m benchmarks.domain --model MODEL --own own.npz --other NAME=other.npz ...

Codes are files that `vsc encode` wrote with the model: of data like its own that it was not fitted
to, and of other data. Draws are by chance with a fixed seed and without repetition; `kind` rows are
all images of one class folder.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from vsc_serve.bundle import open_bundle
from vsc_serve.codes import CodeFile, Codes, CodeStatistics, read_codes
from vsc_serve.domain import MIN_IMAGES, ReferenceStatistics, compare, read_reference
from vsc_serve.errors import UsageError, VscError

_SIZES: Final = (5, 20, 50, 200, 1000)
_DRAWS: Final = 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one table for a model; return the exit code."""
    try:
        given = _parser().parse_args(arguments)
        reference = read_reference(open_bundle(given.model))
        if reference is None:
            raise UsageError(f"{given.model}: no reference statistics. Export the run again.")
        print(f"{given.model}: {reference}\n")
        print("| codes | images | alarms | of draws | what | similarity, lowest to highest |")
        print("|---|---|---|---|---|---|")
        own = read_codes(given.own)
        _print_draws("own data", own.codes, reference)
        for kind, codes in _kinds(own):
            _print_row(f"own data, only {kind}", [codes], reference)
        for text in given.other:
            name, _, path = text.partition("=")
            _print_draws(name, read_codes(path).codes, reference)
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _print_draws(name: str, codes: Codes, reference: ReferenceStatistics) -> None:
    rng = np.random.default_rng(0)
    for size in (size for size in _SIZES if size < codes.shape[0]):
        drawn = [rng.permutation(codes.shape[0])[:size] for _ in range(_DRAWS)]
        _print_row(name, [codes[rows] for rows in drawn], reference)
    _print_row(name, [codes], reference)


def _print_row(name: str, draws: Sequence[Codes], reference: ReferenceStatistics) -> None:
    found = [compare(reference, CodeStatistics.of(codes)) for codes in draws]
    known = [one for one in found if one is not None]
    alarms = [one.out_of_domain for one in known if one.out_of_domain]
    what = ", ".join(sorted({part for parts in alarms for part in parts}))
    range_ = f"fewer than {MIN_IMAGES}: not compared"
    if known:
        likeness = [one.similarity for one in known]
        range_ = f"{min(likeness):.2f} to {max(likeness):.2f}"
    counts = f"{draws[0].shape[0]} | {len(alarms)} | {len(draws)}"
    print(f"| {name} | {counts} | {what or '-'} | {range_} |")


def _kinds(own: CodeFile) -> Iterator[tuple[str, Codes]]:
    """Yield the codes of each class folder, of those with enough images."""
    kinds = np.array([name.rpartition("/")[0] for name in own.ids])
    for kind in np.unique(kinds) if len(np.unique(kinds)) > 1 else ():
        rows = np.flatnonzero(kinds == kind)
        if len(rows) >= MIN_IMAGES:
            yield str(kind), own.codes[rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.domain", description="How often are images said to be outside?"
    )
    parser.add_argument("--model", type=Path, required=True, help="bundle")
    parser.add_argument("--own", type=Path, required=True, help="codes of data like its own")
    parser.add_argument("--other", nargs="*", default=[], help="NAME=codes of other data")
    return parser


if __name__ == "__main__":
    sys.exit(main())
