from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from goldsmith import storage
from goldsmith.errors import CheckpointError, MachineError
from goldsmith.storage import (
    FolderLock,
    JsonLinesWriter,
    fail_point,
    free_bytes,
    replace_folder,
    require_space,
    verify_manifest,
    write_atomic,
    write_manifest,
)


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(storage.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"12345")
    (folder / "inner" / "b.bin").write_bytes(b"67890")
    write_manifest(folder)
    return folder


def test_manifest_holds(folder):
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin: missing"),
        (lambda f: (f / "a.bin").write_bytes(b"1234"), "4 bytes, the manifest says 5"),
        (lambda f: (f / "inner" / "b.bin").write_bytes(b"67891"), "sha256 differs"),
        (lambda f: (f / "MANIFEST.json").unlink(), "missing or unreadable"),
        (lambda f: (f / "MANIFEST.json").write_text("{"), "missing or unreadable"),
        (lambda f: (f / "MANIFEST.json").write_text("[]"), "missing or unreadable"),
        (lambda f: (f / "MANIFEST.json").write_text('{"files": []}'), "missing or unreadable"),
        (lambda f: (f / "MANIFEST.json").write_text('{"files": {"a.bin": {"bytes": 5}}}'), "missing or unreadable"),
    ],
)
def test_manifest_finds_damage(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(folder)


def test_replace_folder_replaces_an_old_one(tmp_path):
    for name, content in (("new", "1"), ("final", "0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(content)
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_lock_refuses_a_second_holder_and_goes_with_the_first(tmp_path):
    with FolderLock(tmp_path / "run"), pytest.raises(MachineError, match=f"in use by process {os.getpid()}"):
        FolderLock(tmp_path / "run").__enter__()
    with FolderLock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("removed", ["file", "folder"])
def test_a_lock_that_its_last_holder_removed_is_made_again(tmp_path, monkeypatch, removed):
    """Between the opening and the locking: whoever comes next would lock another file, and both would hold one."""
    folder = tmp_path / "run"
    own = fcntl.flock
    calls = []

    def removed_before_the_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            (folder / ".lock").unlink()
            if removed == "folder":
                folder.rmdir()
        own(file, how)

    monkeypatch.setattr(storage.fcntl, "flock", removed_before_the_first)
    with FolderLock(folder):
        assert (folder / ".lock").read_text().strip() == str(os.getpid())
        with pytest.raises(MachineError, match="in use"):
            FolderLock(folder).__enter__()
    assert len(calls) == 3


def test_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, os, signal; from pathlib import Path; from goldsmith.storage import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    with FolderLock(tmp_path):
        pass


def test_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        FolderLock(tmp_path / "file" / "run").__enter__()


def test_json_lines_are_cut_back_to_the_offset(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonLinesWriter(path)
    writer.append({"step": 1})
    offset = writer.sync()
    writer.append({"step": 2, "text": "é\ud800"})
    writer.close()
    assert len(path.read_bytes().splitlines()) == 2
    writer = JsonLinesWriter(path, offset=offset)
    writer.append({"step": 2})
    writer.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_json_lines_shorter_than_the_offset_is_damage(tmp_path):
    (tmp_path / "m.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="3 bytes, but the checkpoint was written when it had 10"):
        JsonLinesWriter(tmp_path / "m.jsonl", offset=10)


def test_json_lines_refuse_what_is_not_json(tmp_path):
    writer = JsonLinesWriter(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        writer.append({"nll": float("nan")})


def test_space(tmp_path, monkeypatch):
    assert free_bytes(tmp_path / "not" / "there") > 0
    require_space(tmp_path, 1, "a byte")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(MachineError, match="0 kB free, but two checkpoints needs 5 MB"):
        require_space(tmp_path, 5 * 2**20, "two checkpoints")


def test_fail_points(monkeypatch):
    monkeypatch.setattr(storage, "_passings", storage.Counter())
    fail_point("checkpoint.begin")
    monkeypatch.setenv("GOLDSMITH_FAIL_POINT", "checkpoint.begin:2!enospc")
    fail_point("checkpoint.begin")
    fail_point("export.begin")
    with pytest.raises(OSError, match="No space left"):
        fail_point("checkpoint.begin")
    fail_point("checkpoint.begin")


def test_every_fail_point_is_listed():
    """A fail-point that is not in the list would never be tested."""
    import re
    from pathlib import Path

    source = "".join(path.read_text() for path in Path(storage.__file__).parent.rglob("*.py"))
    assert set(re.findall(r'fail_point\("([^"]+)"\)', source)) == set(storage.FAIL_POINTS)
