"""Every Python block and every command of the documentation runs, or says why it does not."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from documented import (
    DATA_LANGUAGES,
    RUN_LANGUAGES,
    Page,
    check_data,
    check_prose,
    commands_of,
    labels,
    same_shape,
)
from markdown_blocks import PAGES, ROOT, Block, blocks_in, blocks_of, commands_in, commands_in_prose
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from vsc_training.smiley import main as write_smiley

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
RUN_PAGES = [
    name
    for name, page in zip(NAMES, PAGES, strict=True)
    if any(block.language in RUN_LANGUAGES and not block.reason for block in blocks_of(page))
]


def write_backbone(path: Path) -> None:
    """Write an image encoder of one multiplication, with the JSON that goes with it."""
    weight = np.random.default_rng(0).normal(size=(3 * 8 * 8, 12)).astype(np.float32) / 10
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "clip",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 12])],
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path
    )
    text = '{"height": 8, "width": 8, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}'
    path.with_suffix(".json").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, grey_folder: Path, tiny_run: Path, tiny_bundle: Path
) -> Path:
    """What the examples name: images, arrays, a run, a model, codes."""
    folder = tmp_path_factory.mktemp("documented") / "world"
    shutil.copytree(grey_folder, folder / "images")
    shutil.copytree(tiny_run, folder / "run")
    shutil.copytree(tiny_bundle, folder / "model")
    rng = np.random.default_rng(0)
    for name in ("cat.jpg", "dog.jpg", "smile.png", "frown.png", "images/cat.jpg"):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"not an image")
    paths = sorted(grey_folder.rglob("*.png"))
    bars = [np.asarray(Image.open(path)) for path in paths]
    classes = [path.parent.name == "upright" for path in paths]
    for name, part in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        arrays = {"images": np.stack(bars)[part], "labels": np.array(classes, np.int64)[part]}
        np.savez(folder / f"{name}.npz", **arrays)
    np.save(folder / "embeddings.npy", rng.normal(size=(300, 4)).astype(np.float32))
    write_backbone(folder / "clip.onnx")
    # The model is of bars: of 20 faces it would say that they are outside, unlike what pages show.
    write_smiley(["--out", str(folder / "smiley"), "--count", "19"])
    with contextlib.chdir(folder):
        Page(folder, {}).run_line("vsc encode images/ --out codes.npz")
    return folder


@pytest.fixture(scope="session")
def vector_model(prepared: Path) -> Path:
    """A model of vectors of four numbers."""
    world = Page(prepared, {})
    with contextlib.chdir(prepared):
        world.run_line("vsc train embeddings.npy --out vectors-run")
        world.run_line("vsc export vectors-run --out vectors")
    return prepared / "vectors"


@pytest.fixture
def page(request: pytest.FixtureRequest, prepared: Path, tmp_path: Path) -> Iterator[Page]:
    """A page in a folder of its own."""
    name = request.node.callspec.params["name"]
    if name == "docs/service.md":
        request.getfixturevalue("vector_model")
    folder = tmp_path / "world"
    shutil.copytree(prepared, folder)
    request.getfixturevalue("monkeypatch").chdir(folder)
    page = Page(folder, defined(name))
    yield page
    page.close()


def defined(name: str) -> dict[str, Any]:
    """What the Python blocks of a page take as the reader's own."""
    rng = np.random.default_rng(0)
    if name == "docs/export.md":
        return {"pixels": rng.integers(0, 256, (4, 8, 8, 1), np.uint8)}
    if name == "docs/metrics.md":
        rows = {"reference": rng.normal(size=(60, 5)), "queries": rng.normal(size=(20, 5))}
        labels_of = {f"{key}_labels": np.arange(len(value)) % 2 for key, value in rows.items()}
        return (
            rows
            | {"reference_labels": labels_of["reference_labels"]}
            | {"query_labels": labels_of["queries_labels"]}
        )
    return {}


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_run_or_checked_or_says_why_not(name: str) -> None:
    for block in blocks_of(ROOT / name):
        assert block.language in RUN_LANGUAGES | DATA_LANGUAGES, f"{block}: {block.language}"
        if block.language == "python":
            compile(block.text, str(block), "exec")
        elif block.language in DATA_LANGUAGES:
            check_data(block)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", RUN_PAGES)
def test_what_a_page_shows_runs(name: str, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr("vsc_serve.service.server.run", lambda app, **_: served.append(app))
    for block in blocks_of(ROOT / name):
        if not block.reason:
            page.run(block)
    assert len(served) == (name == "docs/service.md")


@pytest.mark.parametrize("name", NAMES)
def test_a_command_in_prose_has_the_options_it_names(name: str) -> None:
    for command in commands_in_prose(ROOT / name):
        check_prose(command)


# The checks above can fail


def shown(text: str) -> list[Block]:
    return list(blocks_in(text, ROOT / "page.md"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```python\nfrom vsc_serve.service import gone\n```", "cannot import name 'gone'"),
        ("```python\nraise ValueError('wrong')\n```", "wrong"),
        ("```sh\nvsc encode images/ --out x.npz --fast\n```", "--fast"),
        ("```sh\nvsc encode nothing/ --out x.npz\n```", "nothing"),
        ("    vsc info gone.npz\n", "gone.npz"),
        ("```sh\ntest -f gone.npz\n```", "exit 1"),
        ("```sh\ntrue   # one\nfalse  # two\n```", "exit 1"),
        ("```console\n$ vsc info codes.npz\nmodel  x\n```", "entries"),
        ('```sh\necho \'{"a": 1}\'\n```\n```json\n{"b": 1}\n```', "other fields"),
        ('```json\n{"a": 1,}\n```', "line 1"),
        ("```text\nvsc encode images/ --out x.npz\n```", "a command"),
    ],
)
@pytest.mark.parametrize("name", ["README.md"])
def test_a_block_that_is_wrong_fails(page: Page, name: str, text: str, reason: str) -> None:
    *before, last = shown(text)
    for block in before:
        page.run(block)
    with pytest.raises((AssertionError, ImportError, ValueError), match=reason):
        page.run(last)


def test_a_block_is_found_with_its_language_and_its_reason() -> None:
    found = shown(
        "<!-- not run: needs Docker -->\n```sh\ndocker run x\n```\n\n```\nplain\n```\n\n"
        "- in a list:\n\n  ```python\n  pass\n  ```\n\n"
        "text\n\n    vsc info x\n\ntext\n\n    a = b\n"
    )
    assert [(block.language, block.reason) for block in found] == [
        ("sh", "needs Docker"),
        ("no language", None),
        ("python", None),
        ("sh", None),
        ("text", None),
    ]
    assert found[0].line == 2


@pytest.mark.parametrize(
    "command",
    [
        "vsc encoder images/",
        "vsc encode --outt x",
        "vsc info a b",
        "vsc search x --like y --top no",
    ],
)
def test_a_command_in_prose_that_is_wrong_fails(command: str) -> None:
    assert list(commands_in(f"Call `{command}` and | `vsc info x` |, not `vsc.commands`.")) == [
        command,
        "vsc info x",
    ]
    with pytest.raises(AssertionError):
        check_prose(command)


def test_lines_are_joined_and_compared_by_their_labels() -> None:
    assert list(commands_of("a \\\n   b  # c\n# d\n\ne\n")) == ["a b  # c", "e"]
    assert labels("wrote  x\n 1.0000  a\n+0.3 b\n") == {"wrote", "#"}
    assert same_shape({"a": [1, 2], "b": "x"}, {"a": [7.5], "b": "y"})
    assert not same_shape({"a": ["1"]}, {"a": [1]})
    assert not same_shape({"a": 1, "b": 2}, {"a": 1})
