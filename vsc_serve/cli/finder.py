"""Hits of the queries of `vsc search`: both stages, and what makes up a score."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vsc_serve.cli.answers import Answer, Found
from vsc_serve.cli.rerank import SecondStage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vsc_serve.codes import Codes
    from vsc_serve.index.base import Searchable
    from vsc_serve.index.exact import Hit
    from vsc_serve.pipeline import Batch

Metric = Literal["cosine", "dot", "jaccard", "hamming"]
"""The same as `index.metrics.Metric`; a test compares them."""


@dataclass(frozen=True, kw_only=True)
class Finder:
    """Finds the hits of queries, and says why."""

    rows: "Searchable"
    """What is searched."""
    stage: SecondStage | None
    """Scores the first stage's hits again, if there is one."""
    top: int
    """Hits wanted."""
    depth: int
    """Hits wanted of the first stage."""
    metric: Metric
    """Score of the first stage."""
    has_shared: bool
    """Hits say what makes up their score."""
    among: "NDArray[np.bool_] | None" = None
    """Rows to search; None for all."""
    without_itself: bool = False
    """Leave out the row that has the id and the code of the query."""

    def answers(self, batches: "Iterator[Batch]") -> Iterator[list[Answer]]:
        """Answer queries batch by batch; those that could not be read come last."""
        rejected: list[Answer] = []
        for batch in batches:
            rejected += [Answer(name, 0, [], reason) for name, reason in batch.rejected]
            yield self._of_batch(batch)
        yield rejected

    def _of_batch(self, batch: "Batch") -> list[Answer]:
        codes = batch.rows.codes
        hits = self._hits(batch)
        queries = zip(batch.ids, (codes[[place]] for place in range(len(hits))), hits, strict=True)
        return [
            Answer(name, code.nnz, self._found(place, batch, code, of_query))
            for place, (name, code, of_query) in enumerate(queries)
        ]

    def _hits(self, batch: "Batch") -> "list[list[Hit]]":
        """Return the hits of each query, none of one whose code is empty."""
        queries, targets = batch.rows.codes, batch.rows.targets
        depth = self.depth + self.without_itself
        nearest = self.rows.search(queries, top=depth, metric=self.metric, among=self.among)
        actives = (queries.indptr[1:] - queries.indptr[:-1]).tolist()
        if self.stage is None or targets is None:
            hits = [nearest.hits(place) if active else [] for place, active in enumerate(actives)]
            return self._others(batch, hits) if self.without_itself else hits
        candidates = [
            rows if active else rows[:0] for rows, active in zip(nearest.rows, actives, strict=True)
        ]
        return self.stage.rerank(candidates, targets, self.top)

    def _others(self, batch: "Batch", hits: "list[list[Hit]]") -> "list[list[Hit]]":
        """Leave the queries themselves out of their hits."""
        named = zip(batch.ids, hits, strict=True)
        return [
            [hit for hit in of_query if not self._is_itself(hit, name, batch.rows.codes[[place]])][
                : self.depth
            ]
            for place, (name, of_query) in enumerate(named)
        ]

    def _is_itself(self, hit: "Hit", name: str, code: "Codes") -> bool:
        from vsc_serve.index.combine import are_equal

        return self.rows.id_of(hit.row) == name and are_equal(self.rows.rows[[hit.row]], code)

    def _found(self, place: int, batch: "Batch", code: "Codes", hits: "list[Hit]") -> list[Found]:
        from vsc_serve.index.exact import explain

        named = [(self.rows.id_of(hit.row), hit) for hit in hits]
        targets = batch.rows.targets
        if not self.has_shared:
            return [Found(name, hit, None) for name, hit in named]
        if self.stage is not None and targets is not None:
            parts = zip(named, self.stage.explain(hits, targets[place]), strict=True)
            return [Found(name, hit, shared, bias) for (name, hit), (shared, bias) in parts]
        return [
            Found(name, hit, explain(self.rows.rows, hit.row, code, metric=self.metric))
            for name, hit in named
        ]
