"""Files are written completely or not at all, and checked before they are read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from open_mythos import files
from open_mythos.install import cache_dir


def test_write_replaces_a_file_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    files.write(path, "new\n")
    assert path.read_text() == "new\n" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("broken", ["write_bytes", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch, broken: str) -> None:
    path = tmp_path / "a.txt"
    files.write(path, "old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, broken) if broken == "write_bytes" else (os, broken)), full)
    with pytest.raises(OSError, match=re.escape(str(path))):
        files.write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="cannot reserve disk space")
def test_too_little_disk_space_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="new"), files.replacing_folder(tmp_path / "new", room=1 << 60):
        pytest.fail("the body was run")
    with files.replacing_folder(tmp_path / "new", room=1 << 20) as partial:
        (partial / "a").write_text("a")
    assert os.listdir(tmp_path) == ["new"] and os.listdir(tmp_path / "new") == ["a"]


def test_a_symlink_is_replaced_and_not_followed(tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "link"
    outside.write_text("mine")
    link.symlink_to(outside)
    files.write(link, "new")
    assert outside.read_text() == "mine" and link.read_text() == "new" and not link.is_symlink()


def test_a_kill_during_a_write_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from open_mythos import files
from open_mythos.install import cache_dir
name = sys.argv[2]
real = getattr(os, name)
def killed(*args, **options):
    if sys.argv[3] == "after":
        real(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, name, killed)
files.write(sys.argv[1], "new")
"""
    for call in ("replace", "fsync"):
        for when in ("before", "after"):
            path = tmp_path / f"{call}-{when}"
            path.write_text("old")
            done = subprocess.run([sys.executable, "-c", code, str(path), call, when])
            assert done.returncode == -9 and path.read_text() in ("old", "new")
            files.write(path, "last")
            assert path.read_text() == "last"


def test_the_size_is_checked_before_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(ValueError, match=r"huge.json has 53,687,091,200 bytes, but at most"):
        files.read_json(path)


def test_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        files.read_bytes(tmp_path / "pipe")
    with pytest.raises(OSError, match="nowhere"):
        files.read_bytes(tmp_path / "nowhere")


def test_symlinks_out_of_a_folder_are_refused_except_into_a_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    folder, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text('{"a": 1}')
    (folder / "out.json").symlink_to(tmp_path / "secret")
    (folder / "blob.json").symlink_to("../../blobs/abc")
    (folder / "beside.json").symlink_to("blob.json")
    with pytest.raises(ValueError, match="link out of its folder"):
        files.inside(folder, "out.json", "index.json")
    assert all(files.read_json(files.own(folder / name)) == {"a": 1} for name in ("blob.json", "beside.json"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[1]", "is a list; expected an object"),
        (b"3", "is 3; expected an object"),
        (b'{"b": 1}', "lacks 'a'"),
        (b'{"a": 1.5}', "a is 1.5; expected a whole number"),
        (b'{"a": true}', "a is True; expected a whole number"),
        (b'{"a": 1, "c": [1, NaN]}', r"c\[1\] is nan; expected a finite number"),
        (b'{"a": 1, "c": [1, "x"]}', r"c\[1\] is 'x'; expected a number or null"),
    ],
)
def test_json_errors_name_file_field_value_and_expected_type(tmp_path, content, message) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some.json.*{message}"):
        files.read_json(path, {"a": int, "c?": [(float, type(None))]})
    path.write_text(json.dumps({"a": 1, "c": [1, 2.5, None]}))
    assert files.read_json(path, {"a": int, "c?": [(float, type(None))]})["a"] == 1


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "a\\b", "", ".", "..", 3, None, ["a"], "C:a", "a\0"])
def test_file_names_outside_their_folder_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match="which is not a file in its folder"):
        files.inside(tmp_path, name, "index.json")
    assert files.inside(tmp_path, "a.b", "index.json") == tmp_path / "a.b"


def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPEN_MYTHOS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "open_mythos"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_dir() == tmp_path / "other" / "open_mythos"
