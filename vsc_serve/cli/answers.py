"""Answers of `vsc search`, printed for people and for programs."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from vsc_serve.cli.options import print_json, print_text
from vsc_serve.console import say
from vsc_serve.errors import InputError, UsageError

if TYPE_CHECKING:
    from vsc_serve.index.exact import Hit, SharedFeature

_EMPTY: Final = "is empty: no latent is active, so nothing is like it"


@dataclass(frozen=True)
class Found:
    """A hit with its id, and what it shares with the query."""

    id: str
    hit: "Hit"
    shared: "list[SharedFeature] | None"
    """None where it was not asked for."""
    bias: float | None = None
    """What the bias of a linear map adds to the score of a second stage."""

    def to_json(self) -> dict[str, Any]:
        """Return it for programs, without the number of its row."""
        shared = {} if self.shared is None else {"shared": list(map(asdict, self.shared))}
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"id": self.id, "score": self.hit.score} | shared | bias


@dataclass(frozen=True)
class Answer:
    """Answer to a query."""

    query: str
    """Its id."""
    active: int
    """Its active latents; without any, nothing is like it."""
    found: list[Found]
    """Best first."""
    error: str | None = None
    """Why it has no code."""

    def to_json(self) -> dict[str, Any]:
        """Return it as a line for programs."""
        hits = [found.to_json() for found in self.found]
        empty = {} if self.active or self.error else {"empty": True}
        error = {} if self.error is None else {"error": self.error}
        return {"query": self.query, "hits": hits} | empty | error


def print_one(answer: Answer, facts: dict[str, Any], *, as_json: bool) -> None:
    """Print the hits of `--like`; `facts` go before them in JSON."""
    if as_json:
        hits = [{"id": found.id, "row": found.hit.row} | found.to_json() for found in answer.found]
        print_json(facts | {"query_active": answer.active, "hits": hits})
        return
    if not answer.active:
        say("query", f"the code of {answer.query} {_EMPTY}")
    _print_hits(answer)


def print_many(batches: Iterator[list[Answer]], *, as_json: bool) -> None:
    """Print answers as they come.

    Raises:
        InputError: No query could be read.
        UsageError: There is none.
    """
    errors: list[Answer] = []
    answered = 0
    for answers in batches:
        for answer in answers:
            _print_answer(answer, as_json=as_json)
        errors += [answer for answer in answers if answer.error is not None]
        answered += len(answers)
        sys.stdout.flush()
    if not answered:
        raise UsageError("there is no query")
    if len(errors) == answered:
        raise InputError(
            f"none of {len(errors)} queries can be read; the first: {errors[0].query}:"
            f" {errors[0].error}"
        )
    if errors:
        say("skipped", f"{len(errors):,} of {answered:,} queries cannot be read")


def _print_answer(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print_json(answer.to_json())
    elif answer.error is not None:
        say("skipped", f"{answer.query}: {answer.error}")
    else:
        print_text(answer.query if answer.active else f"{answer.query} {_EMPTY}")
        _print_hits(answer, "  ")


def _print_hits(answer: Answer, indent: str = "") -> None:
    for found in answer.found:
        print_text(f"{indent}{found.hit.score:7.4f}  {found.id}")
        for feature in found.shared or []:
            print_text(
                f"{indent}         {feature.score:+.3f}  feature {feature.latent:<5}"
                f" query {feature.query:+.2f}, hit {feature.hit:+.2f}"
            )
        if found.bias is not None:
            print_text(f"{indent}         {found.bias:+.3f}  bias of the linear map")
