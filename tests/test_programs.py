"""Real programs on real mounts, through the command line only: what reads a version finds its files, and what programs write is
the next version. A program that is not installed skips its test; scripts/test installs them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import importlib.util
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import FaultServer
from mounting import needs_fuse
from shelves import until, write_files

from artifactfs.model import BLOCK

pytestmark = [needs_fuse, pytest.mark.fuse]

NAME = "acme/vision/programs"
BIG = random.Random(1).randbytes(3 * BLOCK + 12345)
AWKWARD = [
    "n" * 255, "é" * 127, "🚲" * 63, "new\nline", "back\\slash", "-rf", "--help", "e\u0301", "\u00e9", " lead", "trail ",
    "tab\t", "'\"$`*?[", "日本語", ".hidden", "...", "a:b", "~", "#x#", "\x01\x7f", "%41", "a,b=c;d",
]  # fmt: skip


class Home:
    """A user's home directory, and programs run by that user."""

    def __init__(self, root: Path) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ARTIFACTFS_", "XDG_", "GIT_CONFIG"))}
        directories = {f"XDG_{which}_HOME": str(root / which.lower()) for which in ("CONFIG", "DATA", "CACHE", "STATE")}
        self.root = root
        self.environment = {**kept, "HOME": str(root), **directories, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        write_files(root, {".gitconfig": b"[user]\nname = a\nemail = a@b\n[safe]\ndirectory = *\n[init]\ndefaultBranch = main\n"})

    def run(self, *command: str | Path, code: int = 0, **options: Any) -> str:
        """The standard output of ``command``, which must exit with ``code``."""
        options["env"] = {**self.environment, **options.get("env", {})}
        done = subprocess.run([str(part) for part in command], capture_output=True, timeout=110, **options)
        out, err = (stream.decode(errors="surrogateescape") for stream in (done.stdout, done.stderr))
        assert done.returncode == code, f"{command} exits with {done.returncode}: {out}{err}"
        return out

    def shell(self, script: str, where: Path) -> str:
        return self.run("bash", "-euo", "pipefail", "-c", script, cwd=where)

    def afs(self, *arguments: str | Path, code: int = 0) -> str:
        return self.run(sys.executable, "-m", "artifactfs.cli", *arguments, code=code).strip()

    def mounts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.afs("mounts", "--all", "--json"))
        return found

    def mount(self, name: str, place: str = "mounted") -> Path:
        path = self.root / place
        path.mkdir(exist_ok=True)
        self.afs("mount", name, path)
        return path

    def stage(self, place: str = "staged", *options: str) -> Path:
        path = self.root / place
        path.mkdir(exist_ok=True)
        self.afs("stage", NAME, path, *options)
        return path

    def close(self) -> None:
        """Unmount all of this user's."""
        listing = ["findmnt", "-nlo", "TARGET", "-t", "fuse.artifactfs"]
        for place in subprocess.run(listing, check=False, capture_output=True, text=True).stdout.splitlines():
            if place.startswith(f"{self.root}/"):
                subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def shape(root: Path) -> dict[str, tuple[Any, ...]]:
    """What is below ``root``, by path: type, and a file's size and executable bit or a link's target."""
    found: dict[str, tuple[Any, ...]] = {}
    for directory, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            detail: tuple[Any, ...] = ()
            if stat.S_ISREG(status.st_mode):
                detail = (status.st_size, bool(status.st_mode & 0o100))
            elif stat.S_ISLNK(status.st_mode):
                detail = (os.readlink(path),)
            found[os.path.relpath(path, root)] = (stat.S_IFMT(status.st_mode), *detail)
    return found


def assert_same(home: Home, one: Path, other: Path) -> None:
    assert home.run("diff", "-r", "--no-dereference", one, other) == ""
    assert shape(one) == shape(other)


def needs(*programs: str) -> Callable[[Any], Any]:
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


# --- a version that is read ----------------------------------------------------------------------


class Shown:
    """A folder, and the version of it that is mounted."""

    def __init__(self, home: Home, source: Path) -> None:
        self.home = home
        self.source = source
        home.afs("log", NAME, source, "--type", "dataset")
        self.path = home.mount(NAME + ":latest")

    def both(self, script: str) -> str:
        """What the shell prints for ``script`` in the mount; it prints the same in the folder."""
        shown, expected = self.home.shell(script, self.path), self.home.shell(script, self.source)
        assert shown == expected
        return shown


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The standard library of this interpreter: thousands of files."""
    home = Home(tmp_path_factory.mktemp("library"))
    ignored = shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "*.a")
    shutil.copytree(sysconfig.get_path("stdlib"), home.root / "source", symlinks=True, ignore=ignored)
    yield Shown(home, home.root / "source")
    home.close()


@pytest.mark.slow
def test_the_standard_library_equals_its_source(library: Shown, tmp_path: Path) -> None:
    assert_same(library.home, library.source, library.path)
    assert library.home.run("rsync", "-nrc", "--out-format=%n", f"{library.source}/", f"{library.path}/") == ""
    assert library.home.run("rsync", "-nrlc", "--delete", "--out-format=%n", f"{library.path}/", f"{library.source}/") == ""
    library.home.shell(f"tar cf - . | tar xf - -C '{tmp_path}'", library.path)
    assert_same(library.home, library.source, tmp_path)


@pytest.mark.slow
def test_the_standard_library_is_searched_and_imported(library: Shown) -> None:
    assert library.both("grep -rc 'import os' . | sort | tail -n +1").count("\n") > 500
    library.both("find . -type f -size +100k -printf '%p %s %y\\n' | sort")
    library.both("find . -type f -print0 | xargs -0 du --apparent-size -b | sort -k2")
    library.both("find . -type f -print0 | sort -z | xargs -0 -n 200 stat -c '%n %s %F %h'")
    library.both("ls -R")
    library.home.shell("ls -lR && du -a && tar cf /dev/null .", library.path)
    script = f"import sys; sys.path.insert(0, {str(library.path)!r}); import difflib; print(difflib.__file__)"
    assert library.home.run(sys.executable, "-c", script).strip() == str(library.path / "difflib.py")


@pytest.mark.slow
def test_the_standard_library_is_read_by_several_processes(library: Shown) -> None:
    script = "find . -type f -print0 | sort -z | xargs -0 sha1sum | sha1sum"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        sums = set(pool.map(lambda where: library.home.shell(script, where), [library.path] * 3 + [library.source]))
    assert len(sums) == 1


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """What programs make, and what is awkward about names and files."""
    home = Home(tmp_path_factory.mktemp("zoo"))
    source = home.root / "source"
    files: dict[str, bytes | str | None] = {
        "big.bin": BIG, "zero": b"", "hollow/a/b": None, "bin/run.sh": b"#!/bin/sh\necho ran $(basename $0)\n",
        "bin/link": "run.sh",
        "dangling": "nowhere", "outside": "../../etc", "far": "x/" * 2000, "directory": "names",
        "pkg/__init__.py": b"from .m import value\n", "pkg/m.py": b"value = 42\n", "/".join(["deep"] * 100): b"bottom",
        **{f"names/{name}": name.encode() for name in AWKWARD}, **{f"names-of-directories/{name}/x": b"x" for name in AWKWARD},
    }  # fmt: skip
    write_files(source, files)
    shutil.copy2("/bin/ls", source / "bin/program")
    os.link(source / "zero", source / "zero-too")
    for mode in ("delete", "wal"):
        with contextlib.closing(sqlite3.connect(source / f"{mode}.db")) as database:
            database.execute(f"pragma journal_mode = {mode}")
            fill(database)
    with contextlib.closing(sqlite3.connect(home.root / "live.db")) as database:  # as a program that was killed leaves it
        database.execute("pragma journal_mode = wal")
        fill(database)
        for suffix in ("", "-wal", "-shm"):
            shutil.copy2(home.root / f"live.db{suffix}", source / f"live.db{suffix}")
    home.run("git", "init", "-q", source / "repo")
    write_files(source / "repo", {f"f{number}": bytes([number]) * 1000 for number in range(20)})
    home.shell("git add . && git commit -qm one && echo two > f1 && git commit -qam two && git branch other", source / "repo")
    home.shell("git clone -q --bare repo packed.git && git -C packed.git gc -q", source)
    assert not os.listdir(source / "packed.git/refs/heads")  # without this empty directory it is no repository
    yield Shown(home, source)
    home.close()


def fill(database: sqlite3.Connection) -> None:
    database.execute("create table t (x)")
    database.executemany("insert into t values (?)", [(number,) for number in range(5000)])
    database.commit()


def test_everything_is_there(zoo: Shown) -> None:
    assert_same(zoo.home, zoo.source, zoo.path)
    assert sorted(os.listdir(zoo.path / "names")) == sorted(AWKWARD)
    assert all((zoo.path / "names" / name).read_text() == name for name in AWKWARD)
    assert zoo.both("ls -a hollow hollow/a/b").split() == ["hollow:", ".", "..", "a", "hollow/a/b:", ".", ".."]
    zoo.both("find . -printf '%y %P %l\\n' | sort")
    zoo.both("find . -type f -size +1M -o -type f -perm /111 | sort")
    zoo.both("grep -rl ran . | grep -v ^./live | sort")
    zoo.both("cat ./names/-rf; wc -c -- names/--help; head -c5 names/*")
    zoo.both("find . -type f -print0 | sort -z | xargs -0 stat -c '%n %s %F'")
    zoo.both("find . -type f -exec du -l --apparent-size -b {} + | sort -k2")
    zoo.both("test -x bin/run.sh -a ! -x zero -a -L dangling -a ! -e dangling -a -d directory/. && echo yes")
    zoo.home.shell("ls -lR . && ls -i . && du -a --apparent-size . && df . && df -i . && stat -f .", zoo.path)
    assert zoo.home.shell("find . -newer zero", zoo.path) == ""
    assert zoo.home.shell("find . -type f ! -newer zero ! -links 1", zoo.path) == ""


def test_programs_run_from_a_mount(zoo: Shown) -> None:
    assert zoo.home.run(zoo.path / "bin/run.sh") == "ran run.sh\n"
    assert zoo.home.run(zoo.path / "bin/link") == "ran link\n"
    assert zoo.home.run(zoo.path / "bin/program", "-d", "/") == "/\n"
    out = zoo.home.run(sys.executable, "-c", "import pkg; print(pkg.value, pkg.__file__)", env={"PYTHONPATH": str(zoo.path)})
    assert out.split() == ["42", str(zoo.path / "pkg/__init__.py")]


def test_ways_to_read(zoo: Shown, tmp_path: Path) -> None:
    big = zoo.path / "big.bin"
    with open(big, "rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == BIG
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as private:
            private[:5] = b"local"
            assert private[:6] == b"local" + BIG[5:6] and os.pread(file.fileno(), 5, 0) == BIG[:5]
        ours, theirs = socket.socketpair()
        received = bytearray()
        drain = threading.Thread(target=lambda: [received.extend(data) for data in iter(lambda: theirs.recv(1 << 16), b"")])
        drain.start()
        sent = 0
        while sent < len(BIG):
            sent += os.sendfile(ours.fileno(), file.fileno(), sent, 1 << 20)
        ours.close()
        drain.join()
        theirs.close()
        assert received == BIG
        read, write = os.pipe()
        assert os.read(read, os.splice(file.fileno(), write, 4096, offset_src=BLOCK)) == BIG[BLOCK : BLOCK + 4096]
        os.close(read)
        os.close(write)
    direct = os.open(big, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 2 * BLOCK) as buffer:
        assert os.preadv(direct, [buffer], BLOCK) == 2 * BLOCK
        assert buffer[:] == BIG[BLOCK : 3 * BLOCK]
    os.close(direct)
    digest = hashlib.sha1(BIG).hexdigest()
    assert zoo.home.shell("dd if=big.bin bs=1M iflag=direct status=none | sha1sum", zoo.path).split()[0] == digest
    zoo.home.run("cp", "--reflink=auto", "--sparse=always", big, tmp_path / "copy")
    shutil.copyfile(big, tmp_path / "copied")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "copied").read_bytes() == BIG


def test_copies_of_a_mount(zoo: Shown, tmp_path: Path) -> None:
    """With extended attributes too, which are there to be read."""
    zoo.home.run("cp", "-a", zoo.path, tmp_path / "cp")
    zoo.home.run("cp", "-r", "--preserve=all", zoo.path, tmp_path / "all")
    zoo.home.run("rsync", "-aHX", f"{zoo.path}/", tmp_path / "rsync")
    for copy in ("cp", "all", "rsync"):
        assert_same(zoo.home, zoo.source, tmp_path / copy)
    attributes = zoo.home.run("getfattr", "-d", "-m", "^user.artifactfs", zoo.path / "big.bin")
    assert f'user.artifactfs.version="{NAME}:v0"' in attributes and f'user.artifactfs.cached="{len(BIG)}"' in attributes
    assert zoo.home.run("getfattr", "-h", "-d", zoo.path / "dangling") == ""


@needs("zip", "unzip")
def test_zipping_a_mount(zoo: Shown, tmp_path: Path) -> None:
    zoo.home.run("zip", "-qry", tmp_path / "all.zip", "repo", "bin", "big.bin", "hollow", "dangling", cwd=zoo.path)
    zoo.home.run("unzip", "-q", tmp_path / "all.zip", "-d", tmp_path / "out")
    assert_same(zoo.home, zoo.source / "repo", tmp_path / "out/repo")
    assert_same(zoo.home, zoo.source / "bin", tmp_path / "out/bin")
    assert (tmp_path / "out/big.bin").read_bytes() == BIG


def test_git_repositories_in_a_version(zoo: Shown, tmp_path: Path) -> None:
    for repo in ("repo", "packed.git"):
        git = ["git", "-C", str(zoo.path / repo)]
        zoo.home.run(*git, "fsck", "--strict")
        assert zoo.home.run(*git, "log", "--format=%s").split() == ["two", "one"]
        assert len(zoo.home.run(*git, "branch").splitlines()) == 2
        zoo.home.run("git", "clone", "-q", zoo.path / repo, tmp_path / repo)
        zoo.home.run("git", "-C", tmp_path / repo, "fsck")
        assert (tmp_path / repo / "f1").read_bytes() == b"two\n"
    assert zoo.home.run("git", "-C", zoo.path / "repo", "status", "--short") == ""
    assert zoo.home.run("git", "-C", zoo.path / "repo", "grep", "-c", "two") == "f1:1\n"


def test_databases_in_a_version(zoo: Shown) -> None:
    query = "pragma integrity_check; select count(*), sum(x) from t"
    for where in ("delete.db", "live.db", f"file:{zoo.path}/wal.db?immutable=1"):
        assert zoo.home.run("sqlite3", "-readonly", where, query, cwd=zoo.path) == "ok\n5000|12497500\n"
    zoo.home.shell("! sqlite3 delete.db 'delete from t'", zoo.path)


def test_offsets_beyond_4_gib(tmp_path: Path) -> None:
    home = Home(tmp_path)
    size = 5 << 30
    marks = {0: b"first", 1 << 32: b"four GiB", size - 3: b"end"}
    with open(tmp_path / "huge", "w+b") as file:
        for offset, mark in marks.items():
            os.pwrite(file.fileno(), mark, offset)
        content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with FaultServer({"/huge": content}) as server:  # a reference, because nothing has to read it all
        server.faults.etag = '"one"'
        home.afs("log", NAME, "--type", "dataset", "--reference", server.url("/huge"))
        huge = home.mount(NAME + ":latest") / "huge"
        assert huge.stat().st_size == size
        with open(huge, "rb") as file, mmap.mmap(file.fileno(), 1 << 20, prot=mmap.PROT_READ, offset=1 << 32) as mapped:
            assert all(os.pread(file.fileno(), len(mark), offset) == mark for offset, mark in marks.items())
            assert mapped[:8] == b"four GiB"
        assert home.run("tail", "-c3", huge) == "end"
        home.run("umount", huge.parent)


# --- a stage that is written to ------------------------------------------------------------------

BASE: dict[str, bytes | str | None] = {
    "text": b"one two\n", "run.sh": b"#!/bin/sh\necho hi\n", "data/big.bin": BIG, "gone/file": b"x", "link": "text", "void": None,
}  # fmt: skip


class Staged:
    """A stage at work."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.path = home.stage()

    def run(self, *command: str | Path, code: int = 0, **options: Any) -> str:
        return self.home.run(*command, code=code, cwd=self.path, **options)

    def shell(self, script: str) -> str:
        return self.home.shell(script, self.path)

    def finish(self) -> Path:
        """Unmount it; where the new version is mounted, which equals a copy of the stage taken before."""
        copy = self.home.root / "copy"
        self.home.run("cp", "-a", self.path, copy)
        version = self.home.afs("unmount", self.path)
        assert version == f"{NAME}:v1"
        assert os.listdir(self.path) == []
        mounted = self.home.mount(version)
        assert_same(self.home, copy, mounted)
        return mounted


@pytest.fixture(scope="module")
def based(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home directory of a user who has logged one version."""
    made = Home(tmp_path_factory.mktemp("based") / "home")
    made.afs("log", NAME, write_files(made.root.parent / "base", BASE), "--type", "dataset")
    return made.root


@pytest.fixture
def home(based: Path, tmp_path: Path) -> Iterator[Home]:
    """With one version of a collection."""
    made = Home(shutil.copytree(based, tmp_path / "home"))
    yield made
    made.close()


@pytest.fixture
def staged(home: Home) -> Staged:
    return Staged(home)


def wheel(directory: Path, name: str) -> Path:
    """A pure Python distribution with a console script."""
    path = directory / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(30):
            archive.writestr(f"{name}/m{number}.py", f"value = {number}\n")
        archive.writestr(f"{name}/__init__.py", "def main():\n    print('installed')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name} = {name}:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_pip_and_virtual_environments(staged: Staged, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    package = wheel(tmp_path, "tiny")
    staged.run(*pip, "install", "-q", "--no-index", "--target", "site", package)
    staged.run(sys.executable, "-m", "venv", "--without-pip", "venv")
    staged.run(*pip, "--python", staged.path / "venv/bin/python", "install", "-q", "--no-index", package)
    assert staged.run("venv/bin/tiny") == "installed\n"
    with_site = {"PYTHONPATH": "site"}
    assert staged.run(sys.executable, "-c", "import tiny.m7; print(tiny.m7.value)", env=with_site) == "7\n"
    mounted = staged.finish()
    with_site = {"PYTHONPATH": str(mounted / "site")}
    assert staged.run(sys.executable, "-c", "import tiny; tiny.main()", env=with_site) == "installed\n"
    assert staged.run(mounted / "venv/bin/python", "-c", "import tiny.m3; print(tiny.m3.value)") == "3\n"


def test_pip_from_an_index(staged: Staged) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    try:
        staged.run(*pip, "install", "-q", "--no-deps", "--target", "site", "six==1.17.0")
    except AssertionError as error:
        if "Could not find a version" not in str(error):
            raise
        pytest.skip("the package index cannot be reached")
    mounted = staged.finish()
    found = staged.run(sys.executable, "-c", "import six; print(six.__file__)", env={"PYTHONPATH": str(mounted / "site")})
    assert found.strip() == str(mounted / "site/six.py")


def test_git(staged: Staged, tmp_path: Path) -> None:
    write_files(tmp_path / "src", {f"d{number % 5}/f{number}": os.urandom(number * 99) for number in range(60)})
    staged.shell(
        f"""
        git init -q repo && cp -r {tmp_path}/src/. repo && cd repo
        git add . && git commit -qm one && git fsck --strict
        git checkout -qb side && git rm -qr d1 && git commit -qm removed && git checkout -q main && git merge -q side
        git worktree add -q ../tree side && git -C ../tree status --short
        git mv d2 moved && git commit -qm moved && git gc -q && git fsck --strict && test -z "$(git status --short)"
        cd .. && git clone -q repo cloned && git clone -q --bare --no-hardlinks repo bare.git
        git -C cloned fsck && git -C bare.git fsck
        """
    )
    mounted = staged.finish()
    for repo in ("repo", "cloned", "bare.git"):
        staged.home.run("git", "-C", mounted / repo, "fsck", "--strict")
        assert len(staged.home.run("git", "-C", mounted / repo, "log", "--format=%s").split()) == 3


_DATABASE_WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=100, isolation_level=None)
for _ in range(15):
    database.execute("begin immediate")
    count = database.execute("select count(*) from t").fetchone()[0]
    database.execute("insert into t values (?)", (count,))
    database.execute("commit")
database.close()
"""


def test_databases_written_by_four_processes(staged: Staged) -> None:
    modes = ("wal", "delete", "truncate")
    for mode in modes:
        with contextlib.closing(sqlite3.connect(staged.path / f"{mode}.db")) as database:
            assert database.execute(f"pragma journal_mode = {mode}").fetchone() == (mode,)
            database.execute("create table t (x)")
            database.commit()
        writers = [subprocess.Popen([sys.executable, "-c", _DATABASE_WRITER, staged.path / f"{mode}.db"]) for _ in range(4)]
        assert [writer.wait(100) for writer in writers] == [0, 0, 0, 0]
        with contextlib.closing(sqlite3.connect(staged.path / f"{mode}.db")) as database:
            database.execute("delete from t where x % 2")
            database.commit()
            database.execute("vacuum")
    mounted = staged.finish()
    for mode in modes:
        answer = staged.run(
            "sqlite3", f"file:{mounted}/{mode}.db?immutable=1", "pragma integrity_check; select count(x), sum(x) from t"
        )
        assert answer == "ok\n30|870\n"


def test_archives_and_copies(staged: Staged, tmp_path: Path) -> None:
    source = write_files(tmp_path / "src", {**BASE, **{f"many/{number}": os.urandom(number * 50) for number in range(50)}})
    os.link(source / "text", source / "hard")
    os.link(source / "text", source / "many/hard")
    (source / "text").chmod(0o4711)
    with zipfile.ZipFile(tmp_path / "src.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(source.rglob("*")):
            archive.write(path, path.relative_to(source))
    staged.shell(
        f"""
        mkdir untarred && tar -C {source} -cf all.tar . && tar -C untarred -xf all.tar && tar -C untarred --compare -f all.tar
        tar -C untarred -xf all.tar  # over what is there
        unzip -q {tmp_path}/src.zip -d unzipped && unzip -qo {tmp_path}/src.zip -d unzipped
        rsync -aH {source}/ synced/ && test -z "$(rsync -aHnci --delete {source}/ synced/)"
        rsync -a --inplace {source}/many/ many/ && rsync -a --append-verify {source}/data/ data/
        cp -a {source} copied && cp -r --preserve=all synced copied-again && mv copied-again moved
        mv synced/data {tmp_path}/out && mv {tmp_path}/out synced/data
        """
    )
    for name in ("untarred/text", "synced/text", "copied/text"):
        status = os.stat(staged.path / name)
        assert (status.st_nlink, stat.S_IMODE(status.st_mode)) == (3, 0o4711)
        precision = 10**9 if name.startswith("untarred") else 1
        assert status.st_mtime_ns // precision == os.stat(source / "text").st_mtime_ns // precision
    mounted = staged.finish()
    assert_same(staged.home, source, mounted / "copied")
    assert_same(staged.home, source, mounted / "synced")


def test_editors_and_small_tools(staged: Staged) -> None:
    staged.shell(
        r"""
        sed -i s/two/three/ text && grep -q three text && sed -i.bak 1d run.sh && test -f run.sh.bak
        printf 'x\n' | tee -a text > /dev/null && truncate -s 100 void/holes && install -m 755 text installed
        split -b 1M data/big.bin part. && cat part.* | cmp - data/big.bin
        gzip -k part.aa && gunzip -c part.aa.gz | cmp - part.aa && shred -u part.ab
        dd if=data/big.bin of=direct bs=4k count=20 oflag=direct conv=fsync status=none && cmp -n 81920 direct data/big.bin
        dd if=/dev/zero of=data/big.bin bs=4k seek=3 count=1 conv=notrunc status=none
        touch -d 2001-02-03T04:05:06.123456789Z text && test "$(stat -c %y text)" = "2001-02-03 04:05:06.123456789 +0000"
        mkdir -p a/b/c && mv a d && mv -T d void/d && mkdir e && mv void/d/b e && chmod -R go-rwx e
        cp --sparse=always data/big.bin sparse && ln sparse hard && rm sparse && ln -s hard soft && ln -sf text soft
        flock lock true && find . -name 'part.*' -delete && rm -r gone && mkfifo pipe && rm pipe
        echo a > '-dash' && echo b > $'new\nline' && echo c > "$(printf 'n%.0s' {1..255})"
        """
    )
    text = staged.path / "text"
    # As editors save: a new file, synced, moved over the old one
    with open(staged.path / "text.tmp", "xb") as file:
        file.write(b"saved\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged.path / "text.tmp", text)
    directory = os.open(staged.path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)
    # and with the old one moved aside, its mode and times given to the new one
    os.rename(text, staged.path / "text~")
    text.write_bytes(b"saved again\n")
    shutil.copystat(staged.path / "text~", text)
    os.unlink(staged.path / "text~")
    if shutil.which("vim"):
        staged.run("vim", "-u", "NONE", "-es", "-c", "set backup backupcopy=no", "-c", "%s/again/twice/", "-c", "wq", "text")
        assert text.read_bytes() == b"saved twice\n"
    if shutil.which("ed"):
        staged.run("ed", "-s", "text", input=b"1s/saved/ed/\nw\nq\n")
    assert b"three" not in (staged.finish() / "text").read_bytes()


@needs("make", "cc", "ar")
def test_make_of_a_c_project(staged: Staged) -> None:
    rules = "prog: main.o libx.a\n\t$(CC) -o $@ main.o libx.a\nlibx.a: a.o b.o\n\t$(AR) rcs $@ a.o b.o\ncheck: prog\n\t./prog\n"
    main = b"int a(void);\nint b(void);\nint main(void) { return a() + b() != 42; }\n"
    files = {"a.c": b"int a(void) { return 40; }\n", "b.c": b"int b(void) { return 2; }\n", "main.c": main}
    write_files(staged.path / "project", {**files, "Makefile": rules.encode()})
    staged.run("make", "-s", "-j4", "-C", "project", "check")
    assert "up to date" in staged.run("make", "-C", "project", "prog")
    os.utime(staged.path / "project/a.c")
    assert "a.c" in staged.run("make", "-C", "project", "check")
    assert staged.home.run(staged.finish() / "project/prog") == ""


@needs("npm", "node")
def test_npm_install(staged: Staged, tmp_path: Path) -> None:
    manifest = {"name": "tiny", "version": "1.0.0", "main": "index.js", "bin": {"tiny": "cli.js"}}
    write_files(
        tmp_path / "tiny",
        {
            "package.json": json.dumps(manifest).encode(),
            "index.js": b"module.exports = 42;\n",
            "cli.js": b"#!/usr/bin/env node\nconsole.log(require('./index'));\n",
        },
    )
    staged.home.run("npm", "pack", "--silent", cwd=tmp_path / "tiny")
    (staged.path / "app").mkdir()
    options = ["--offline", "--no-audit", "--no-fund", "--silent", "--prefix", "app"]
    staged.run("npm", "install", *options, tmp_path / "tiny/tiny-1.0.0.tgz")
    assert staged.run("app/node_modules/.bin/tiny") == "42\n"
    mounted = staged.finish()
    assert staged.home.run("node", "-p", "require('tiny')", cwd=mounted / "app") == "42\n"


@needs("fio")
def test_fio_verifies_what_it_wrote(staged: Staged) -> None:
    verify = ["--fallocate=none", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--output=/dev/null"]
    for engine, *more in (("psync",), ("mmap",), ("sync",), ("libaio", "--iodepth=8"), ("libaio", "--iodepth=8", "--direct=1")):
        job = ["--name=job", f"--filename={engine}{''.join(more)}", "--size=2m", "--bs=4k", "--rw=randrw", f"--ioengine={engine}"]
        staged.run("fio", *job, *more, *verify)
    together = ["--name=together", "--directory=.", "--numjobs=4", "--size=1m", "--bs=16k", "--rw=randwrite", "--ioengine=psync"]
    staged.run("fio", *together, *verify)
    staged.finish()


# --- formats of data sets and models -------------------------------------------------------------


def _numpy(path: Path) -> Callable[[Path], None]:
    import numpy

    values = numpy.arange(200_000, dtype="f4").reshape(-1, 50)
    numpy.savez(path / "a.npz", values=values)
    mapped = numpy.lib.format.open_memmap(path / "a.npy", mode="w+", dtype="f4", shape=values.shape)
    mapped[:] = values
    mapped.flush()
    del mapped

    def check(where: Path) -> None:
        assert (numpy.load(where / "a.npy", mmap_mode="r") == values).all()
        with numpy.load(where / "a.npz") as archive:
            assert (archive["values"] == values).all()

    return check


def _h5py(path: Path) -> Callable[[Path], None]:
    import h5py

    with h5py.File(path / "a.h5", "w") as file:
        file["kept"] = list(range(50_000))
        file.create_dataset("chunked", data=[[1.5] * 100] * 500, chunks=(50, 50), compression="gzip")
        file["dropped"] = [0] * 1000
    with h5py.File(path / "a.h5", "a") as file:
        file["kept"][7] = -1
        del file["dropped"]

    def check(where: Path) -> None:
        with h5py.File(where / "a.h5", "r") as file:
            assert sorted(file) == ["chunked", "kept"]
            assert file["kept"][6:9].tolist() == [6, -1, 8] and float(file["chunked"][:].sum()) == 75_000

    return check


def _lmdb(path: Path) -> Callable[[Path], None]:
    import lmdb

    for name, options in (("plain", {}), ("mapped", {"writemap": True})):
        with lmdb.open(str(path / name), map_size=32 << 20, **options) as database:
            for batch in range(10):
                with database.begin(write=True) as transaction:
                    for number in range(100):
                        transaction.put(f"{batch}-{number}".encode(), b"v" * 500)

    def check(where: Path) -> None:
        for name in ("plain", "mapped"):
            with lmdb.open(str(where / name), readonly=True, lock=False) as database, database.begin() as transaction:
                assert transaction.stat()["entries"] == 1000 and transaction.get(b"9-99") == b"v" * 500

    return check


def _pyarrow(path: Path) -> Callable[[Path], None]:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.table({"x": list(range(20_000)), "part": [number % 3 for number in range(20_000)]})
    pyarrow.parquet.write_table(table, path / "a.parquet")
    pyarrow.feather.write_feather(table, path / "a.arrow", compression="uncompressed")
    pyarrow.parquet.write_to_dataset(table, path / "parts", partition_cols=["part"])

    def check(where: Path) -> None:
        assert pyarrow.parquet.read_table(where / "a.parquet", memory_map=True).equals(table)
        assert pyarrow.feather.read_table(where / "a.arrow", memory_map=True).equals(table)
        assert pyarrow.parquet.read_table(where / "parts").num_rows == 20_000

    return check


def _zarr(path: Path) -> Callable[[Path], None]:
    import zarr

    array = zarr.open_array(path / "a.zarr", mode="w", shape=(500, 100), chunks=(50, 50), dtype="f4")
    array[:] = 5
    array[3] = 1

    def check(where: Path) -> None:
        found = zarr.open_array(where / "a.zarr", mode="r")
        assert float(found[3].sum()) == 100 and float(found[:].sum()) == 499 * 500 + 100

    return check


def _safetensors(path: Path) -> Callable[[Path], None]:
    import numpy
    from safetensors.numpy import load_file, save_file

    for factor in (1, 2):  # the second over the first
        save_file({"w": numpy.full((300, 300), factor, dtype="f4")}, path / "a.safetensors")

    def check(where: Path) -> None:
        assert (load_file(where / "a.safetensors")["w"] == 2).all()

    return check


def _zip_of_records(path: Path) -> Callable[[Path], None]:
    """As torch.save writes: a zip of stored records whose data begin at multiples of 64, which torch.load maps."""
    data = bytes(range(256)) * 4096
    with open(path / "model.pt", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for number in range(3):
            info = zipfile.ZipInfo(f"model/data/{number}")
            padding = -(file.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            archive.writestr(info, data)

    def check(where: Path) -> None:
        with open(where / "model.pt", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for info in zipfile.ZipFile(file).infolist():
                start = info.header_offset + 30 + len(info.filename) + len(info.extra)
                assert start % 64 == 0 and mapped[start : start + len(data)] == data

    return check


FORMATS = {
    "numpy": _numpy,
    "h5py": _h5py,
    "lmdb": _lmdb,
    "pyarrow": _pyarrow,
    "zarr": _zarr,
    "safetensors": _safetensors,
    "zipfile": _zip_of_records,
}


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """Everything written into one stage, checked there, committed, and mounted: a check of one format."""
    home = Home(tmp_path_factory.mktemp("formats"))
    path = home.stage("staged", "--type", "model")
    checks = {}
    for name, write in FORMATS.items():
        if importlib.util.find_spec(name) is not None:
            (path / name).mkdir()
            checks[name] = write(path / name)
            checks[name](path / name)
    home.run("cp", "-a", path, home.root / "copy")
    home.afs("unmount", path)
    mounted = home.mount(NAME + ":latest")

    def check(name: str) -> None:
        assert_same(home, home.root / "copy" / name, mounted / name)
        checks[name](mounted / name)

    yield check
    home.close()


@pytest.mark.parametrize("name", FORMATS)
def test_formats(formats: Callable[[str], None], name: str) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install --group programs")
    formats(name)


# --- how stages end ------------------------------------------------------------------------------


def test_umount_alone_commits(home: Home) -> None:
    path = home.stage()
    home.shell("echo new > new && tar -cf tarred text && rm -r gone && chmod +x text", path)
    home.run("cp", "-a", path, home.root / "copy")
    home.run("umount", path)
    until(lambda: [record["state"] for record in home.mounts()] == ["committed"])
    assert json.loads(home.afs("info", NAME, "--json"))["version"] == "v1"
    assert_same(home, home.root / "copy", home.mount(NAME + ":v1"))


def test_what_was_closed_survives_kill_9(home: Home) -> None:
    path = home.stage()
    home.shell("git init -q repo && cp -r data repo && git -C repo add . && git -C repo commit -qm one", path)
    home.shell(
        "for n in {1..100}; do echo $n > f$n; done; mkdir d; ln f1 d/hard; ln -s ../f2 d/soft; rm -r gone; mv text moved", path
    )
    home.run("cp", "-a", path, home.root / "copy")
    (record,) = home.mounts()
    writer = subprocess.Popen(["bash", "-c", "while echo line >> open; do :; done"], cwd=path, stderr=subprocess.DEVNULL)
    until(lambda: (path / "open").exists() and (path / "open").stat().st_size > 1000)
    os.kill(record["pid"], signal.SIGKILL)
    writer.wait(20)
    with pytest.raises(OSError) as caught:
        os.listdir(path)
    assert caught.value.errno == errno.ENOTCONN
    until(lambda: [found["state"] for found in home.mounts()] == ["dead"])
    home.afs("stage", "--resume", path)
    assert (path / "open").read_bytes().replace(b"line\n", b"") == b""
    (path / "open").unlink()
    assert_same(home, home.root / "copy", path)
    home.run("git", "-C", path / "repo", "fsck", "--strict")
    assert home.afs("unmount", path) == f"{NAME}:v1"
    assert_same(home, home.root / "copy", home.mount(NAME + ":latest"))


def test_two_stages_at_once(home: Home) -> None:
    one, two = home.stage("one"), home.stage("two")
    (one / "from-one").write_bytes(b"1")
    (two / "from-two").write_bytes(b"2")
    (two / "text").unlink()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert set(pool.map(lambda path: home.afs("unmount", path), [one, two])) == {f"{NAME}:v1", f"{NAME}:v2"}
    rows = json.loads(home.afs("versions", NAME, "--json"))
    assert sorted(row["version"] for row in rows) == ["v0", "v1", "v2"]
    sets = [{row["path"] for row in json.loads(home.afs("ls", f"{NAME}:v{number}", "--json"))} for number in (1, 2)]
    assert sorted(("from-one" in names, "from-two" in names, "text" in names) for names in sets) == [
        (False, True, False), (True, False, True),
    ]  # fmt: skip


def test_expected_base_and_discard(home: Home) -> None:
    mine, theirs = home.stage("mine", "--expect-base"), home.stage("theirs")
    (mine / "a").write_bytes(b"a")
    (theirs / "b").write_bytes(b"b")
    assert home.afs("status", mine) == "A  a"
    assert home.afs("unmount", theirs) == f"{NAME}:v1"
    home.afs("unmount", mine, code=4)
    assert [record["state"] for record in home.mounts()] == ["failed"]
    home.afs("stage", "--resume", mine)  # nothing of it is lost
    assert (mine / "a").read_bytes() == b"a"
    assert home.afs("unmount", "--discard", mine) == ""
    assert home.mounts() == []
    assert len(json.loads(home.afs("versions", NAME, "--json"))) == 2


_WRITER = """
import sqlite3, sys
database = sqlite3.connect("live.db", timeout=60, isolation_level=None)
database.execute("pragma journal_mode = " + sys.argv[1])
database.execute("create table t (x)")
while True:
    database.execute("begin immediate")
    database.executemany("insert into t values (?)", [(n,) for n in range(10)])
    database.execute("commit")
"""


def rows(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database, contextlib.suppress(sqlite3.OperationalError):
        return int(database.execute("select count(*) from t").fetchone()[0])
    return 0  # not made yet


@pytest.mark.parametrize("mode", ["wal", "truncate"])
def test_commits_while_a_database_is_written_are_of_one_moment(home: Home, mode: str) -> None:
    path = home.stage()
    with subprocess.Popen([sys.executable, "-c", _WRITER, mode], cwd=path) as writer:
        try:
            until(lambda: (path / "live.db").exists())
            for number in (1, 2):
                until(lambda number=number: rows(path / "live.db") > number * 200)
                assert home.afs("commit", path) == f"{NAME}:v{number}"
                assert writer.poll() is None
        finally:
            writer.kill()
    assert home.afs("unmount", path) == f"{NAME}:v3"
    counts = []
    for number in (1, 2, 3):
        copy = home.root / f"v{number}"
        home.afs("get", f"{NAME}:v{number}", copy)
        sound, count = home.run("sqlite3", copy / "live.db", "pragma integrity_check; select count(*) from t").split()
        assert sound == "ok" and int(count) % 10 == 0
        counts.append(int(count))
    assert counts == sorted(set(counts))
