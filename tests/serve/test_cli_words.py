"""The command line names options where the library names parameters, and knows its choices."""

import importlib
import logging
from typing import Any, get_args

import pytest

from vsc_serve import options, session
from vsc_serve.cli.translate import OptionFormatter, as_options
from vsc_serve.convert import FORMATS
from vsc_serve.convert.plan import Sign
from vsc_serve.index.metrics import Metric
from vsc_serve.index.queries import QueryRule
from vsc_serve.pipeline.job import OnError
from vsc_serve.sources import Ids


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (
            "a.npz: exists already. Choose another `out`",
            "a.npz: exists already. Choose another --out",
        ),
        ("replace it with `force=True`.", "replace it with --force."),
        ('Leave `sign` out, or `view="gamma"`.', "Leave --sign out, or --view gamma."),
        ("`device='cuda'`: none", "--device cuda: none"),
        ("Encode with `max_active=16000`.", "Encode with --max-active 16000."),
        ("`share=1/99`: 40 inputs", "--shard 1/99: 40 inputs"),
        ("`is_update` compares", "--update compares"),
        ("or `recipe.batch_size=4`", "or --set batch_size=4"),
        ("a lower `recipe.learning_rate`, or", "a lower --set learning_rate=, or"),
        ("no `labels` in it; a `b`.png", "no `labels` in it; a `b`.png"),
        ("run `vsc doctor` in `./model`", "run `vsc doctor` in `./model`"),
    ],
)
def test_parameters_become_options(message: str, shown: str) -> None:
    assert as_options(message) == shown


def test_log_messages_name_options_too() -> None:
    record = logging.LogRecord("vsc", logging.WARNING, "", 0, "no `workers` in %s", ("a\nb",), None)
    line = OptionFormatter("%(levelname)s %(message)s").format(record)
    assert line == "WARNING no --workers in a\\nb"


@pytest.mark.parametrize(
    ("module", "name", "choices"),
    [
        ("encode", "_View", get_args(options.View)),
        ("encode", "_Ids", get_args(Ids)),
        ("encode", "_OnError", get_args(OnError)),
        ("finder", "Metric", get_args(Metric)),
        ("queries", "Rule", get_args(QueryRule)),
        ("convert", "_Sign", get_args(Sign)),
        ("convert", "_Format", tuple(FORMATS)),
        ("options", "Device", get_args(session.Device)),
    ],
)
def test_choices_of_options_are_those_of_the_library(
    module: str, name: str, choices: tuple[Any, ...]
) -> None:
    offered = getattr(importlib.import_module(f"vsc_serve.cli.{module}"), name)
    assert sorted(get_args(offered)) == sorted(choices)
