"""What a disk may hold after a power cut: a log of file-system operations, and the states that each prefix allows.

`recorded(root)` logs what is done below `root`; `crash_states(events)` plays the log on a model of a disk that keeps no
more than fsync(2) promises:
- content is kept by an fsync of the file after the write; without one it may be the old, half of the new, zeros or new;
- an entry (made, renamed, removed) is kept by an fsync of the folder that holds it, never by one of the file; without
  one each may be lost alone, but two of the same name or the same file keep their order;
- a rename is whole or not there.
"""

import io
import linecache
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

Tree = dict[str, bytes | None]  # path below the root -> content, or None for a folder


@dataclass(frozen=True)
class Event:
    """One operation; `mark` is none of the disk's but says what the program had promised from here on."""

    kind: str  # create | write | truncate | fsync | mkdir | rename | unlink | mark | settle
    path: str  # below the root; a mark's name
    detail: Any = None  # write: (offset, bytes), truncate: length, rename: new path, mark: value
    site: str = ""  # fsync: the function and line of the product that asked for it


class Log:
    """What happened below `root`, in order."""

    def __init__(self, root: Path) -> None:
        self.root = str(root.resolve())
        self.events: list[Event] = []

    def mark(self, name: str, value: object) -> None:
        """Everything after this may be cut off, but what `value` stands for was promised."""
        self.events.append(Event("mark", name, value))

    def settle(self) -> None:
        """All so far has reached the disk, by the passing of time, and is history: cuts come after it."""
        self.events.append(Event("settle", ""))

    def add(self, kind: str, path: str | None, detail: object = None, site: str = "") -> None:
        if path is not None:
            self.events.append(Event(kind, path, detail, site))

    def place(self, path: Any, parent: int | None = None) -> str | None:
        """`path`, or what a descriptor is open on, below the root; None elsewhere."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            full = os.path.join(os.readlink(f"/proc/self/fd/{parent}") if parent is not None else "", os.fspath(path))
        full = os.path.abspath(full)
        return os.path.relpath(full, self.root) if full == self.root or full.startswith(self.root + "/") else None


@contextmanager
def recorded(root: Path) -> Iterator[Log]:
    """Logs the operations of this block; at its end the log must explain everything that lies in `root`."""
    log = Log(root)
    with ExitStack() as patches:
        for name, replacement in {**_entries(log), **_contents(log)}.items():
            patches.enter_context(mock.patch.object(os, name, replacement))
        opened = _opener(log)
        patches.enter_context(mock.patch("io.open", opened))
        patches.enter_context(mock.patch("builtins.open", opened))
        yield log
    disk = Disk()
    for event in log.events:
        disk.apply(event)
    assert disk.tree(set(), lambda file: file.data) == tree_of(root), "an operation escaped the log"


def _entries(log: Log) -> dict[str, Callable]:
    real = {name: getattr(os, name) for name in ("mkdir", "unlink", "rmdir", "rename")}

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        real["mkdir"](path, mode, dir_fd=dir_fd)
        log.add("mkdir", log.place(path, dir_fd))

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        real["unlink"](path, dir_fd=dir_fd)
        log.add("unlink", log.place(path, dir_fd))

    def rmdir(path: Any, *, dir_fd: int | None = None) -> None:
        real["rmdir"](path, dir_fd=dir_fd)
        log.add("unlink", log.place(path, dir_fd))

    def rename(src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        real["rename"](src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        log.add("rename", log.place(src, src_dir_fd), log.place(dst, dst_dir_fd))

    return {"mkdir": mkdir, "unlink": unlink, "remove": unlink, "rmdir": rmdir, "rename": rename, "replace": rename}


def _contents(log: Log) -> dict[str, Callable]:
    real = {name: getattr(os, name) for name in ("open", "write", "truncate")}

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = log.place(path, dir_fd)
        existed = os.path.lexists(os.path.join(log.root, place)) if place else True
        descriptor = real["open"](path, flags, mode, dir_fd=dir_fd)
        if not existed:
            log.add("create", place)
        elif flags & os.O_TRUNC:
            log.add("truncate", place, 0)
        return descriptor

    def write(descriptor: int, content: Any) -> int:
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if log.place(descriptor) else 0
        count = real["write"](descriptor, content)
        log.add("write", log.place(descriptor), (offset, bytes(content)[:count]))
        return count

    def truncate(path: Any, length: int) -> None:
        real["truncate"](path, length)
        log.add("truncate", log.place(path), length)

    def fsync(descriptor: int) -> None:
        # nothing is asked of the disk of the machine that tests; the model alone decides what is kept
        log.add("fsync", log.place(descriptor), site=_site())

    synced = {"fsync": fsync, "fdatasync": fsync}
    return {"open": open_, "write": write, "truncate": truncate, "ftruncate": truncate, **synced}


def _opener(log: Log) -> Callable:
    real = io.open

    class Logged(io.FileIO):
        def write(self, content: Any) -> int:
            offset = self.seek(0, os.SEEK_END) if "a" in self.mode else self.tell()
            count = super().write(content) or 0
            log.add("write", log.place(self.fileno()), (offset, bytes(content)[:count]))
            return count

        def truncate(self, length: int | None = None) -> int:
            log.add("truncate", log.place(self.fileno()), self.tell() if length is None else length)
            return super().truncate(length)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        place = None if isinstance(file, int) else log.place(file)
        if place is None or not set(mode) & set("wxa+"):
            return real(file, mode, buffering, *rest, **named)
        existed = os.path.lexists(file)
        raw = Logged(file, mode.replace("b", "").replace("t", ""))
        if not existed:
            log.add("create", place)
        elif "w" in mode:
            log.add("truncate", place, 0)
        if "b" in mode and buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **named)

    return opened


def _site() -> str:
    """The function and the text of the line, in the product, that asked for an fsync; sync() itself stands for none."""
    frame = sys._getframe(2)
    while frame.f_back and (not frame.f_globals["__name__"].startswith("train.") or frame.f_code.co_name == "sync"):
        frame = frame.f_back
    return f"{frame.f_code.co_name}: {linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}"


@dataclass(eq=False)
class File:
    """A file: what the program sees, and what an fsync has made safe."""

    data: bytes = b""
    safe: bytes = b""


@dataclass(eq=False)
class Change:
    """An entry of a folder that is gone, new, or both (a rename), and not yet safe."""

    gone: str
    new: str
    node: "File | Folder"


@dataclass(eq=False)
class Folder:
    """A folder: what the program sees, what is safe, and what happened between."""

    entries: dict[str, "File | Folder"] = field(default_factory=dict)
    safe: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, gone: str, new: str, node: "File | Folder") -> None:
        if gone:
            del self.entries[gone]
        if new:
            self.entries[new] = node
        self.pending.append(Change(gone, new, node))

    def settle(self) -> None:
        self.safe = dict(self.entries)
        self.pending.clear()

    def dependents(self, first: Change) -> set[Change]:
        """`first` and what cannot have happened without it."""
        return _linked(self.pending[self.pending.index(first) :])

    def requirements(self, last: Change) -> set[Change]:
        """`last` and what must have happened before it."""
        return _linked(self.pending[self.pending.index(last) :: -1])


def _linked(changes: list[Change]) -> set[Change]:
    """The first of `changes` and all that share a name or a file with it, directly or through others."""
    taken, names, nodes = {changes[0]}, {changes[0].gone, changes[0].new} - {""}, {changes[0].node}
    for change in changes[1:]:
        if change.node in nodes or {change.gone, change.new} & names:
            taken.add(change)
            names |= {change.gone, change.new} - {""}
            nodes.add(change.node)
    return taken


class Disk:
    """The model; the root itself is safe."""

    def __init__(self) -> None:
        self.root = Folder()

    def apply(self, event: Event) -> None:
        """The operation, as the running program sees it and as far as it makes anything safe."""
        kind, detail = event.kind, event.detail
        parent, _, name = event.path.rpartition("/")
        if kind == "settle":
            for folder in self.folders():
                folder.settle()
            for file in self.files():
                file.safe = file.data
        elif kind in ("create", "mkdir"):
            self.folder(parent).change("", name, Folder() if kind == "mkdir" else File())
        elif kind == "unlink":
            self.folder(parent).change(name, "", self.folder(parent).entries[name])
        elif kind == "rename":
            assert detail.rpartition("/")[0] == parent, "a rename from folder to folder is not modelled"
            self.folder(parent).change(name, detail.rpartition("/")[2], self.folder(parent).entries[name])
        elif kind == "write":
            file, (offset, content) = self.file(event.path), detail
            start = file.data[:offset].ljust(offset, b"\0")
            file.data = start + content + file.data[offset + len(content) :]
        elif kind == "truncate":
            file = self.file(event.path)
            file.data = file.data[:detail].ljust(detail, b"\0")
        elif kind == "fsync":
            self.sync(self.find(event.path))

    def sync(self, node: File | Folder) -> None:
        if isinstance(node, Folder):
            node.settle()
        else:
            node.safe = node.data

    def find(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for name in path.split("/") if path not in ("", ".") else ():
            assert isinstance(node, Folder)
            node = node.entries[name]
        return node

    def folder(self, path: str) -> Folder:
        node = self.find(path)
        assert isinstance(node, Folder)
        return node

    def file(self, path: str) -> File:
        node = self.find(path)
        assert isinstance(node, File)
        return node

    def nodes(self) -> list[File | Folder]:
        """Everything that a power cut now may leave, oldest first."""
        found: dict[File | Folder, None] = {self.root: None}
        waiting: list[File | Folder] = [self.root]
        while waiting:
            node = waiting.pop()
            if isinstance(node, Folder):
                inside = [*node.safe.values(), *node.entries.values(), *(change.node for change in node.pending)]
                waiting += [child for child in inside if child not in found]
                found |= dict.fromkeys(inside)
        return list(found)

    def folders(self) -> list[Folder]:
        return [node for node in self.nodes() if isinstance(node, Folder)]

    def files(self) -> list[File]:
        return [node for node in self.nodes() if isinstance(node, File)]

    def tree(self, lost: set[Change], content: Callable[[File], bytes]) -> Tree:
        """What lies there when the changes `lost` are, and files hold `content`."""
        tree: Tree = {}

        def visit(folder: Folder, prefix: str) -> None:
            entries = dict(folder.safe)
            for change in folder.pending:
                if change not in lost:
                    entries.pop(change.gone, None)
                    if change.new:
                        entries[change.new] = change.node
            for name, node in entries.items():
                tree[prefix + name] = content(node) if isinstance(node, File) else None
                if isinstance(node, Folder):
                    visit(node, f"{prefix}{name}/")

        visit(self.root, "")
        return tree

    def after_a_power_cut(self, chance: random.Random) -> Iterator[tuple[str, Tree]]:
        """The classes of states: all or none of what is not safe, each part of it alone, and one at random."""
        pending = [(folder, change) for folder in self.folders() for change in folder.pending]
        changes = {change for _, change in pending}
        dirty = [file for file in self.files() if file.data != file.safe]
        yield "all kept", self.tree(set(), _new)
        yield "all lost", self.tree(changes, _old)
        yield "entries lost", self.tree(changes, _new)
        for kind, content in (("content lost", _old), ("content torn", _half), ("content zero", _zeros)):
            if dirty:
                yield kind, self.tree(set(), content)
            for number, file in enumerate(dirty if len(dirty) > 1 else ()):
                yield f"{kind} in dirty file {number}", self.tree(set(), _only(file, content))
        for number, (folder, change) in enumerate(pending):
            yield f"change {number} lost", self.tree(folder.dependents(change), _new)
            yield f"only change {number} kept", self.tree(changes - folder.requirements(change), _new)
            yield f"only change {number} kept, no content", self.tree(changes - folder.requirements(change), _old)
        lost: set[Change] = set()
        for folder, change in pending:
            lost |= folder.dependents(change) if chance.random() < 0.3 else set()
        choice = {file: chance.choice((_new, _old, _half, _zeros)) for file in dirty}
        yield "at random", self.tree(lost, lambda file: choice.get(file, _new)(file))


def _new(file: File) -> bytes:
    return file.data


def _old(file: File) -> bytes:
    return file.safe


def _half(file: File) -> bytes:
    return file.data[: (_kept(file) + len(file.data)) // 2]


def _zeros(file: File) -> bytes:
    return file.data[: _kept(file)].ljust(len(file.data), b"\0")


def _kept(file: File) -> int:
    """How many bytes at the start are safe already."""
    pairs = zip(file.safe, file.data, strict=False)
    return next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(file.safe), len(file.data)))


def _only(damaged: File, content: Callable[[File], bytes]) -> Callable[[File], bytes]:
    return lambda file: content(file) if file is damaged else file.data


@dataclass(frozen=True)
class State:
    """A disk after a power cut, and what had been promised before it."""

    label: str
    tree: Tree
    marks: dict[str, Any]

    def key(self) -> tuple:
        """Equal for states between which no program could tell a difference."""
        return frozenset(self.tree.items()), repr(sorted(self.marks.items()))


def crash_states(events: list[Event], seed: int = 0) -> dict[tuple, State]:
    """Every state that a power cut after any of the operations may leave, each once, in the order of the log.

    What comes before the last `settle` is the past, in which none happens.
    """
    disk, marks, chance = Disk(), {}, random.Random(seed)
    states: dict[tuple, State] = {}
    begin = max((number for number, event in enumerate(events) if event.kind == "settle"), default=0)
    for number, event in enumerate(events):
        disk.apply(event)
        if event.kind == "mark":
            marks = {**marks, event.path: event.detail}
        for kind, tree in disk.after_a_power_cut(chance) if number >= begin else ():
            label = f"cut after operation {number} ({event.kind} {event.path}), {kind}, seed {seed}"
            state = State(label, tree, marks)
            states.setdefault(state.key(), state)
    return states


def tree_of(root: Path) -> Tree:
    """What lies in `root`."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }


def materialise(tree: Tree, root: Path) -> None:
    """Makes `root` hold exactly `tree`."""
    root.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)
