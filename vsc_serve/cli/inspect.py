"""`vsc info` and `vsc doctor`: what is there."""

from pathlib import Path
from typing import Annotated

import typer

from vsc_serve.cli.options import JsonOption, print_json, print_text
from vsc_serve.cli.translate import as_options


def info(
    path: Annotated[Path, typer.Argument(help="A run, a bundle, or a codes file.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what a run, a bundle or a codes file is."""
    from vsc_serve.analysis.describe import describe

    facts = describe(path)
    if as_json:
        print_json(facts, indent=2)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print_text(f"{name:<{width}}  {value}")


def doctor(*, as_json: JsonOption = False) -> None:
    """Say what is installed, which engines load, and what to do."""
    from vsc_serve.analysis.doctor import examine

    findings = examine()
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            print_text(f"{finding.mark:<5} {finding.name:<16} {as_options(finding.text)}")
    if any(finding.mark == "FAIL" for finding in findings):
        raise typer.Exit(1)
