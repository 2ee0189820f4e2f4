"""Answers of `vsc search`, printed for people and for programs."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from vsc_serve.cli.options import print_json, print_text
from vsc_serve.console import say
from vsc_serve.errors import InputError, UsageError

if TYPE_CHECKING:
    from vsc_serve.index.exact import Hit, SharedFeature

Form = Literal["table", "json", "trec", "paths"]
"""How answers are printed: for people, as JSON, as a TREC run, or the ids alone."""

_RUN: Final = "vsc"
"""Name of the run in a TREC run file."""

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


def print_one(answer: Answer, facts: dict[str, Any], form: Form) -> None:
    """Print the hits of one query; `facts` go before them in JSON."""
    if form == "json":
        hits = [{"id": found.id, "row": found.hit.row} | found.to_json() for found in answer.found]
        print_json(facts | {"query_active": answer.active, "hits": hits})
        return
    if not answer.active:
        say("query", f"the code of {answer.query} {_EMPTY}")
    if form == "table":
        _print_hits(answer)
    else:
        _print_lines(answer, form)


def print_many(batches: Iterator[list[Answer]], form: Form) -> None:
    """Print answers as they come.

    Raises:
        InputError: No query could be read; or an id does not fit into the format.
        UsageError: There is none.
    """
    errors: list[Answer] = []
    answered = 0
    for answers in batches:
        for answer in answers:
            _print_answer(answer, form)
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


def print_groups(groups: Sequence[Sequence[str]], form: Form) -> None:
    """Print groups of ids: a line of JSON each, or one id a line with an empty line between groups.

    Raises:
        InputError: An id does not fit into the format.
        UsageError: A TREC run has no groups.
    """
    if form == "trec":
        raise UsageError("--format trec: groups are no answers to queries. Use json or paths.")
    for number, group in enumerate(groups):
        if form == "json":
            print_json({"group": number, "ids": list(group)})
            continue
        if number:
            sys.stdout.write("\n")
        for name in group:
            if form == "paths":
                _print_path(name)
            else:
                print_text(name)


def _print_answer(answer: Answer, form: Form) -> None:
    if form == "json":
        print_json(answer.to_json())
    elif answer.error is not None:
        say("skipped", f"{answer.query}: {answer.error}")
    elif form != "table":
        _print_lines(answer, form)
    else:
        print_text(answer.query if answer.active else f"{answer.query} {_EMPTY}")
        _print_hits(answer, "  ")


def _print_lines(answer: Answer, form: Form) -> None:
    """Print hits for other programs, one a line."""
    for rank, found in enumerate(answer.found, 1):
        if form == "paths":
            _print_path(found.id)
        else:
            query, name = _trec_word(answer.query), _trec_word(found.id)
            _print_exactly(f"{query} Q0 {name} {rank} {found.hit.score!r} {_RUN}")


def _print_path(name: str) -> None:
    if "\n" in name:
        raise InputError(
            f"the id {name!r} holds an end of line, and --format paths has one id a line. Use"
            " --format json."
        )
    _print_exactly(name)


def _trec_word(name: str) -> str:
    if len(name.split()) != 1 or name.strip() != name:
        raise InputError(
            f"the id {name!r} holds white space, where a TREC run file splits. Use --format json,"
            " or encode with other ids."
        )
    return name


def _print_exactly(line: str) -> None:
    """Print a line for a program, as the bytes that a name of a file has."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line.encode("utf-8", "surrogateescape") + b"\n")


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
