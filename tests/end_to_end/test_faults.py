"""A run whose mount, store, disk, worker or process goes away, at any moment.

It ends with an exit code that is not 0, leaves an output that is untouched or whole, and gives the
bytes of a run without a fault when the same command is given again. Every kind of fault is tried at
three random moments; `VSC_FAULT_MOMENTS=60` tries sixty of each, twenty for each form of output.
"""

import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
from PIL import Image

SUPPORT: Final = Path(__file__).parents[1] / "support" / "faulty"
MODEL: Final = Path(__file__).parents[1] / "data" / "archive" / "bundle-v1-csr"
MOMENTS: Final = int(os.environ.get("VSC_FAULT_MOMENTS", "3"))
IMAGES: Final = 40
EARLIER: Final = 15
"""Images in an output that is there before."""
SHARD_ROWS: Final = 12
RUN_S: Final = 60

FORMS: Final = {"npz": "codes.npz", "folder": "codes", "parquet": "codes.parquet"}
KINDS: Final = ("mount", "store", "disk", "worker", "SIGKILL", "SIGTERM", "SIGINT")
ARCHIVES: Final = ("images.zip", "images.tar", "images.parquet", "images.npy")
LOST: Final = ("ESTALE", "EIO", "ENOTCONN", "ETIMEDOUT", "unmount")
FULL: Final = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG")
ANSWERS: Final = (401, 403, 429, 500, 503, "cut off", "closed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="names of open files are in /proc"),
]


class Result(NamedTuple):
    """How a command has ended."""

    code: int
    talk: str


class Commands:
    """Runs `vsc`: see `fork_vsc`."""

    def __init__(self) -> None:
        self.given: Path | str = os.devnull
        """File with what commands read from standard input."""
        path = os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, SUPPORT / "fork_vsc.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        )

    def run(self, *arguments: object, largest_file: int | None = None, **fault: object) -> Result:
        """Run a command with a fault."""
        given = [str(one) for one in arguments]
        request = {"arguments": given, "fault": fault, "largest_file": largest_file}
        request["given"] = str(self.given)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], RUN_S)[0], f"{given} hangs"
        return Result(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End."""
        self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    running = Commands()
    yield running
    running.close()


def encoded(number: int) -> bytes:
    """An image; every tenth is none."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return b"broken" if number % 10 == 7 else buffer.getvalue()


def write_archives(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 1), np.uint8)
    np.save(folder / "images.npy", pixels)
    with (
        zipfile.ZipFile(folder / "images.zip", "w") as zipped,
        tarfile.open(folder / "images.tar", "w") as tarred,
    ):
        for number in range(IMAGES):
            content, name = encoded(number), f"{number:02}.png"
            zipped.writestr(zipfile.ZipInfo(name), content)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tarred.addfile(member, io.BytesIO(content))
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [encoded(number) for number in range(IMAGES)]})
    parquet.write_table(table, folder / "images.parquet", row_group_size=9)


class Store(ThreadingHTTPServer):
    """A web server with images that cannot be read from some request on."""

    daemon_threads = True
    answer: int | str = 200
    at: int = 0
    seen: int = 0

    @property
    def urls(self) -> str:
        """All images, one a line."""
        place = f"http://127.0.0.1:{self.server_port}"
        return "".join(f"{place}/{number:02}.png\n" for number in range(IMAGES))

    def begin(self, answer: int | str = 200, at: int = 0) -> None:
        """Give another answer from the request of this number on."""
        self.answer, self.at, self.seen = answer, at, 0


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Store

    def do_HEAD(self) -> None:
        self.give(has_body=False)

    def do_GET(self) -> None:
        self.give(has_body=True)

    def give(self, *, has_body: bool) -> None:
        self.server.seen += 1
        answer = self.server.answer if self.server.seen >= self.server.at else 200
        if answer == "closed":
            self.close_connection = True
            return
        body = encoded(int(self.path.strip("/").removesuffix(".png")))
        self.send_response(answer if isinstance(answer, int) else 200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body[:-9] if answer == "cut off" else body)
        self.close_connection = answer == "cut off"

    def log_message(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """A command: what it reads, what it writes, and whether something is there already."""

    given: str
    form: str
    mode: str
    """`new`, `force` or `update`."""
    workers: int

    def arguments(self, given: object, out: Path) -> list[object]:
        fixed = ["--shard-rows", SHARD_ROWS, "--batch-size", 4, "--device", "cpu"]
        how = [] if self.mode == "new" else [f"--{self.mode}"]
        workers = ["--workers", self.workers]
        return ["encode", given, "--out", out, "--model", MODEL, *fixed, *workers, *how]


class Site:
    """Inputs, and the outputs of runs without a fault."""

    def __init__(self, folder: Path, commands: Commands, store: Store) -> None:
        self.folder, self.commands, self.store = folder, commands, store
        self.mount, self.out_folder = folder / "mount", folder / "out"
        for place, count in ((self.mount / "images", IMAGES), (folder / "earlier", EARLIER)):
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number:02}.png").write_bytes(encoded(number))
        write_archives(self.mount)
        commands.given = folder / "urls"
        commands.given.write_text(store.urls)
        self._known: dict[object, Any] = {}

    def place(self, given: str) -> object:
        """Return what a run reads: a path, or a list of URLs on standard input."""
        return "-" if given == "store" else self.mount / given

    @contextmanager
    def out(self, run: Run) -> Iterator[Path]:
        """Give the output of a run, with what is there before it, in a folder of its own."""
        self.out_folder.mkdir()
        if run.mode != "new":
            write_tree(self.out_folder, self._earlier(run))
        try:
            yield self.out_folder / FORMS[run.form]
        finally:
            shutil.rmtree(self.out_folder)

    def whole(self, run: Run) -> dict[str, bytes]:
        """Return the output of a run without a fault."""

        def make() -> dict[str, bytes]:
            with self.out(run) as out:
                self._done(*run.arguments(self.place(run.given), out))
                return tree(out.parent)

        return self._once((run.given, run.form, run.mode == "update"), make)

    def count(self, run: Run, place: Path | None, *, only_changes: bool = False) -> int:
        """Return how many events below a place, or in all, a run without a fault has."""

        def make() -> int:
            mark = self.folder / "count"
            fault = {"place": str(place or ""), "only_changes": only_changes, "mark": str(mark)}
            with self.out(run) as out:
                self._done(*run.arguments(self.place(run.given), out), **fault)
            return int(mark.read_text())

        return self._once((run, place, only_changes), make)

    def count_requests(self, run: Run) -> int:
        """Return how many requests a run sends to the store."""

        def make() -> int:
            self.store.begin()
            with self.out(run) as out:
                self._done(*run.arguments("-", out))
            return self.store.seen

        return self._once((run, "requests"), make)

    def _earlier(self, run: Run) -> dict[str, bytes]:
        """Return the output that a run is to replace: codes of other images."""

        def make() -> dict[str, bytes]:
            folder = self.folder / "before"
            folder.mkdir()
            self._done(*run.arguments(self.folder / "earlier", folder / FORMS[run.form]))
            found = tree(folder)
            shutil.rmtree(folder)
            return found

        return self._once((run.form, run.mode, "earlier"), make)

    def _done(self, *arguments: object, **fault: object) -> None:
        result = self.commands.run(*arguments, **fault)
        assert result.code == 0, result.talk

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Iterator[Site]:
    with Store(("127.0.0.1", 0), Request) as store:
        thread = threading.Thread(target=store.serve_forever, args=(0.01,))
        thread.start()
        yield Site(tmp_path_factory.mktemp("faults"), commands, store)
        store.shutdown()
        thread.join()


class Moment:
    """One fault of one run, chosen by a seed."""

    def __init__(self, kind: str, number: int, site: Site) -> None:
        self.kind, self.site = kind, site
        self._rng = np.random.default_rng([KINDS.index(kind), number])
        self.mark = site.folder / "mark"
        self.mark.unlink(missing_ok=True)
        form = list(FORMS)[number % len(FORMS)]
        modes = ["new", "force"] if form == "parquet" else ["new", "force", "update"]
        mode = self.choose(modes)
        given = "store" if kind == "store" else "images"
        if kind == "mount" and self._rng.random() < 0.4:
            given = self.choose(ARCHIVES[: 3 if mode == "update" else None])
        workers = 2 if kind == "worker" else int(self._rng.random() < 0.2)
        self.run = Run(given, form, mode, workers)
        choose_fault = self._signal if kind.startswith("SIG") else getattr(self, f"_{kind}")
        self._fault: dict[str, Any] = choose_fault()

    def choose(self, among: Sequence[Any]) -> Any:
        return among[self._rng.integers(len(among))]

    def happen(self, out: Path) -> Result:
        """Run the command with the fault."""
        command = self.run.arguments(self.site.place(self.run.given), out)
        if self.kind == "store":
            self.site.store.begin(self.choose(ANSWERS), self._request)
        return self.site.commands.run(*command, mark=str(self.mark), **self._fault)

    def pass_by(self) -> None:
        """Let everything work again."""
        self.site.store.begin()
        gone = Path(f"{self.site.mount}.gone")
        if gone.exists():
            self.site.mount.rmdir()
            gone.rename(self.site.mount)

    def _at(self, count: int) -> int:
        return int(self._rng.integers(1, count + 1))

    def _mount(self) -> dict[str, object]:
        place = self.site.mount
        fault: dict[str, object] = {"action": self.choose(LOST), "place": str(place)}
        if self.run.workers and self.run.given == "images":
            return fault | {"role": "worker", "at": self._at(IMAGES)}
        return fault | {"role": "main", "at": self._at(self.site.count(self.run, place))}

    def _store(self) -> dict[str, object]:
        self._request = self._at(self.site.count_requests(self.run))
        return {}

    def _disk(self) -> dict[str, object]:
        how = self.choose(FULL)
        if how == "EFBIG":
            largest = max(map(len, self.site.whole(self.run).values()))
            return {"largest_file": self._at(largest - 1)}
        place, only_changes = self.site.out_folder, how in ("ENOSPC", "EDQUOT", "EROFS")
        at = self._at(self.site.count(self.run, place, only_changes=only_changes))
        fault = {"action": how, "place": str(place), "role": "main", "at": at}
        return fault | {"only_changes": only_changes}

    def _worker(self) -> dict[str, object]:
        fault: dict[str, object] = {"action": "SIGKILL", "role": "worker"}
        if self._rng.random() < 0.5:
            return fault | {"place": str(self.site.mount), "at": self._at(IMAGES // 4)}
        return fault | {"at": int(2 ** self._rng.uniform(0, 12))}

    def _signal(self) -> dict[str, object]:
        place = self.choose([None, self.site.out_folder])
        at = self._at(self.site.count(self.run, place))
        return {"action": self.kind, "place": str(place or ""), "role": "main", "at": at}


def may_end_with(moment: Moment) -> tuple[int, ...]:
    """Return the exit codes that a fault may lead to."""
    if moment.kind == "SIGKILL":
        return (-signal.SIGKILL,)
    if moment.kind == "worker":
        return (0, 5)  # a worker that is lost is replaced, unless it is lost before it has begun
    if moment.kind == "disk" or moment.run.given in ARCHIVES:
        return (0, 3)  # 0 where only tidying up fails, or the archive was open already
    if moment.kind == "SIGTERM":
        return (130, -signal.SIGTERM)  # it ends a program that is still being imported
    return (130,) if moment.kind == "SIGINT" else (3,)


@pytest.mark.parametrize("number", range(MOMENTS))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_goes_away_the_output_is_untouched_or_whole_and_the_same_command_makes_it(
    kind: str, number: int, site: Site
) -> None:
    moment = Moment(kind, number, site)
    before = {} if moment.run.mode == "new" else site._earlier(moment.run)
    whole = site.whole(moment.run)
    with site.out(moment.run) as out:
        try:
            result = moment.happen(out)
        finally:
            moment.pass_by()
        context = f"{moment.run}\n{result.talk}"
        assert result.code in may_end_with(moment), context
        assert "Traceback" not in result.talk, context
        left = output_of(tree(out.parent), out)
        assert left in [output_of(before, out), output_of(whole, out)], context
        if "nothing was written" in result.talk:
            assert tree(out.parent) == before, context
        if not result.code:
            assert left == output_of(whole, out), context
        command = moment.run.arguments(site.place(moment.run.given), out)
        again = site.commands.run(*command)
        if again.code == 2 and moment.run.mode == "new":
            assert left == output_of(whole, out), again.talk
            assert "exists already" in again.talk
            again = site.commands.run(*command, "--force")
        assert again.code == 0, f"{context}\nagain:\n{again.talk}"
        assert tree(out.parent) == whole, context


def output_of(files: dict[str, bytes], out: Path) -> dict[str, bytes]:
    """Return what a reader of an output sees: the file, or the shards of the folder."""
    if out.suffix:
        return {name: content for name, content in files.items() if name == out.name}
    shards = {name: content for name, content in files.items() if name.startswith(f"{out.name}/")}
    return {
        name: content
        for name, content in shards.items()
        if name.endswith((".npz", "/manifest.json", "/errors.jsonl"))
    }
