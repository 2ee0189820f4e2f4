"""Documentation keeps up with the command line."""

import re
from pathlib import Path

import pytest
import typer.main

import vsc_export.cli
import vsc_training.cli
from vsc_serve.cli import app

ROOT = Path(__file__).parents[1]
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def command_options() -> dict[str, set[str]]:
    """Every command with its long options."""
    found, described = {}, set()  # `vsc index search` is `vsc search`
    groups = [("", app), ("", vsc_training.cli.app), ("", vsc_export.cli.app)]
    groups += [(f"{one.name} ", one.typer_instance) for one in app.registered_groups if one.name]
    for prefix, group in groups:
        for registered in group.registered_commands:
            assert registered.callback is not None
            command = typer.main.get_command_from_info(
                registered, pretty_exceptions_short=True, rich_markup_mode=None
            )
            options = {
                option
                for parameter in command.params
                for option in parameter.opts
                if option.startswith("--")
            }
            if registered.callback is not None and registered.callback not in described:
                found[f"{prefix}{command.name}"] = options
            described.add(registered.callback)
    return found


@pytest.mark.parametrize("command", sorted(command_options()))
def test_every_command_and_option_is_documented(command: str) -> None:
    match = re.search(rf"^## vsc {command}\b.*?(?=^## |\Z)", CLI_PAGE, re.M | re.S)
    assert match, f"docs/cli.md has no section for vsc {command}"
    missing = {option for option in command_options()[command] if option not in match[0]}
    assert not missing


def test_the_page_documents_no_option_that_is_not_there() -> None:
    known = set().union(*command_options().values()) | {"--version", "--nproc-per-node"}
    assert set(re.findall(r"--[a-z][a-z-]+", CLI_PAGE)) <= known


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_document_names_a_machine_path() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("training/*.md")]
    for page in pages:
        assert not re.search(
            r"(?<![\w.])/(home|root|work|opt|tmp)/", page.read_text(encoding="utf-8")
        )
