"""A file is whole or not there, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from medmae.errors import InputError
from medmae.imaging.files import replaced_file


def test_the_file_replaces_the_old_one_only_when_complete(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replaced_file(path) as target:
        target.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_permissions_follow_the_umask_like_any_other_output(tmp_path):
    before = os.umask(0o027)
    try:
        with replaced_file(tmp_path / "a.bin") as target:
            target.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("code", "remedy"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "permissions"), (errno.EROFS, "read-only")]
)
def test_when_the_system_refuses_the_message_has_a_remedy_and_nothing_is_left(tmp_path, monkeypatch, code, remedy):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=remedy) as caught, replaced_file(path) as target:
        target.write(b"new")
    assert caught.value.problem.where == str(path) and caught.value.problem.found == os.strerror(code)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_a_write_that_really_fails_midway_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(InputError, match="cannot be written"), replaced_file(tmp_path / "a.bin") as target:
            target.write(bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match="change its permissions"), replaced_file(locked / "a.bin"):
        pass


def test_a_path_through_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"), replaced_file(tmp_path / "file" / "a.bin"):
        pass


def test_an_error_of_the_writer_passes_through_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), replaced_file(tmp_path / "sub" / "a.bin"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "sub") == []


def test_kill_9_while_writing_leaves_the_old_file_readable(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    script = (
        "import os, sys, signal; from medmae.imaging.files import replaced_file\n"
        "with replaced_file(sys.argv[1]) as target:\n"
        "    target.write(b'half'); target.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr.decode()
    assert path.read_bytes() == b"old"
