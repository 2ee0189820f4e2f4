"""Reference statistics of a bundle: its codes of rows that were trained on, and of others.

`python -m vsc_export.reference MODEL "held out=images/"` adds them to a bundle of an older version,
from data like that which it was fitted to.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsc_export.operating_points import posterior, squared_error
from vsc_serve.atomic import atomic_file
from vsc_serve.bundle import MANIFEST, STATISTICS, open_bundle, sha256
from vsc_serve.codes import CodeStatistics, dense_to_csr, threshold, threshold_logit
from vsc_serve.decoder import Decoder
from vsc_serve.domain import OwnCodes, ReferenceStatistics, reference_of
from vsc_serve.encoder import Encoder
from vsc_serve.errors import VscError
from vsc_serve.options import GUARD_BAND
from vsc_serve.session import Session
from vsc_training.checkpoint import load_held_out, load_samples
from vsc_training.data import split_rows
from vsc_training.evaluation.dataset import load_labelled
from vsc_training.model import VSC, DataSpec


def own_rows(
    run: Path, validation_share: float, calibration: NDArray[Any] | None = None
) -> dict[str, NDArray[Any]]:
    """Return the rows that show what a model's own data is: held out, trained on, calibration.

    Args:
        run: Folder of the run.
        validation_share: Of its recipe.
        calibration: Rows that tau is chosen on, where others than the run's are given.
    """
    samples, none = load_samples(run), np.empty(0)
    rows = {
        "held out": load_held_out(run, validation_share),
        "training": samples[split_rows(samples, validation_share)[0]],
        "calibration": none if calibration is None else calibration,
    }
    return {name: part for name, part in rows.items() if len(part)}


def measure_reference(
    model: VSC, encoder: Session, decoder: Session, groups: dict[str, NDArray[Any]], tau: float
) -> ReferenceStatistics:
    """Measure the codes that exported graphs give of a model's own rows.

    Args:
        model: Says what a row is.
        encoder: The bundle's encoder.
        decoder: The bundle's decoder.
        groups: Rows by what they are.
        tau: Tau of the bundle.
    """

    def measure(of: str, rows: NDArray[Any]) -> OwnCodes:
        logit, mu = posterior(model, encoder, rows)
        code = threshold(logit, mu, tau)
        near = float((np.abs(logit - threshold_logit(tau)) <= GUARD_BAND).mean())
        return OwnCodes(of, dense_to_csr(code), near, squared_error(model, decoder, rows, code))

    return reference_of([measure(of, rows) for of, rows in groups.items()], tau)


def add_reference(model: Path, data: Mapping[str, Path]) -> ReferenceStatistics:
    """Measure data with a bundle that is there, and write its reference statistics.

    Graphs, weights and `model_digest` stay as they are.

    Args:
        model: The bundle.
        data: Folders or files of data like that which it was fitted to, by what they are.
    """
    manifest = open_bundle(model).manifest
    spec = DataSpec(pixel_spec=manifest.pixel_spec, input_dim=manifest.input_dim)
    encoder, decoder = Encoder.open(model, device="cpu"), Decoder.open(model, device="cpu")
    groups = [
        _measure(encoder, decoder, of, load_labelled(path, spec).examples.rows)
        for of, path in data.items()
    ]
    reference = reference_of(groups, manifest.tau)
    _write(model / STATISTICS, reference.to_json())
    manifest.files[STATISTICS] = sha256(model / STATISTICS)
    _write(model / MANIFEST, manifest.to_json())
    return reference


def _measure(encoder: Encoder, decoder: Decoder, of: str, rows: NDArray[Any]) -> OwnCodes:
    codes, decisions = encoder.encode_counted(rows)
    found, targets = CodeStatistics.of(codes.codes, decisions=decisions), encoder.targets(rows)
    drawn = decoder.decode(codes.codes).reshape(targets.shape)
    error = float(np.square(drawn - targets).sum(1).mean())
    return OwnCodes(of, codes.codes, found.near_share or 0.0, error)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Add reference statistics to a bundle; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vsc_export.reference", description="Record what a model's own data is."
    )
    parser.add_argument("model", type=Path, help="bundle")
    parser.add_argument("data", nargs="+", help='NAME=PATH: "held out=images/"')
    try:
        given = parser.parse_args(arguments)
        named = (text.partition("=") for text in given.data)
        reference = add_reference(given.model, {name: Path(path) for name, _, path in named})
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    for group in reference.groups:
        sys.stdout.write(f"{group}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
