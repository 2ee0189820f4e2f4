"""`python -m benchmarks.index`: queries a second of exact search, on synthetic codes.

Codes have the statistics of trained ones: J latents of unequal popularity, a Poisson number of them
active in a row, signed values. Every contender answers the same queries, one after the other and in
a batch, in this process; medians of the rounds, contenders in turn within a round.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from vsc_serve.codes import CodeFile, Codes, build_csr, canonical
from vsc_serve.cpus import usable_cpus
from vsc_serve.index.base import Part, open_index
from vsc_serve.index.exact import search_many
from vsc_serve.index.inverted import ExactIndex

_TOP = 10


def synthetic(rows: int, latents: int, active: float, seed: int) -> Codes:
    """Return codes with a Poisson number of active latents, of Dirichlet popularity."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(active, rows).clip(0, latents)
    popularity = np.random.default_rng(0).dirichlet(np.full(latents, 2.0))
    indices = rng.choice(latents, int(counts.sum()), p=popularity)
    values = rng.normal(size=len(indices)).astype(np.float32)
    return canonical(build_csr(values, indices, np.concatenate([[0], np.cumsum(counts)]), latents))


def plain(codes: Codes, queries: Codes) -> None:
    """Score all rows by scipy's product with each dense query, and take the best."""
    for query in queries.toarray():
        scores = codes @ query
        best = np.argpartition(-scores, _TOP)[:_TOP]
        best[np.argsort(-scores[best])]


def measure(contenders: dict[str, Callable[[Codes], object]], queries: Codes, rounds: int) -> None:
    """Print the median time of a query of each contender."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, search in contenders.items():
            start = time.perf_counter()
            search(queries)
            taken[name].append((time.perf_counter() - start) / queries.shape[0])
    slowest = median(taken["X @ q"])
    for name, times in taken.items():
        middle = median(times)
        print(
            f"  {name:<28} {middle * 1e3:8.2f} ms/query {1 / middle:8.0f} queries/s"
            f"  {middle / slowest:5.2f} of X @ q"
        )


def compare(rows: int, latents: int, active: float, queries: int, rounds: int) -> None:
    """Build an index, check that it is right, and measure it."""
    codes, asked = synthetic(rows, latents, active, 1), synthetic(queries, latents, active, 2)
    ids = [f"images/{row:08}.jpg" for row in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ExactIndex.build([Part(Path("codes"), CodeFile(codes, ids, {}))], Path(folder) / "idx")
        built = time.perf_counter() - start
        start = time.perf_counter()
        index = open_index(Path(folder) / "idx")
        opened = time.perf_counter() - start
        facts = index.facts()
        found, expected = index.search(asked), search_many(codes, asked)
        assert found.rows.tolist() == expected.rows.tolist()
        print(
            f"{rows:,} rows, J = {latents}, {facts['active']:.1f} active: built in {built:.1f} s,"
            f" opened in {opened * 1e3:.0f} ms, {facts['bytes'] / 1e6:.0f} MB,"
            f" {facts['postings_per_query']:,.0f} postings a query; hits equal those of all rows"
        )

        def one_by_one(queries: Codes) -> None:
            for row in range(queries.shape[0]):
                index.search(queries[[row]], top=_TOP, metric="dot")

        contenders: dict[str, Callable[[Codes], object]] = {
            "X @ q": lambda queries: plain(codes, queries),
            "index, one by one": one_by_one,
            f"index, batch, {usable_cpus()} cpus": lambda queries: index.search(
                queries, top=_TOP, metric="dot"
            ),
            "index, batch, cosine": lambda queries: index.search(queries, top=_TOP),
            "vsc search without an index": lambda queries: search_many(
                codes, queries, top=_TOP, metric="dot"
            ),
        }
        measure(contenders, asked, rounds)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--latents", type=int, default=256)
    parser.add_argument("--active", type=float, default=11.0)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for rows in given.rows:
        compare(rows, given.latents, given.active, given.queries, given.rounds)


main()
