"""Files by URL: told from paths, read and listed as they are, every failure one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from data.urls import (
    MissingUrlError,
    UnreachableError,
    Url,
    UrlError,
    _s3_options,
    is_url,
    location,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/a/", Url("s3://bucket/a")),
        ("hf://datasets/a/b", Url("hf://datasets/a/b")),
        ("file:///a/b%20c", Path("/a/b c")),
        ("a/b", Path("a/b")),
        ("/a//b", Path("/a/b")),
        ("s3:/bucket", Path("s3:/bucket")),
        ("C:\\a", Path("C:\\a")),
    ],
)
def test_a_url_is_told_from_a_path(text, expected):
    assert location(text) == expected
    assert is_url(text) == isinstance(expected, Url)


def test_a_scheme_alone_is_refused():
    with pytest.raises(ValueError, match=r"s3:// names no bucket or host, give one: s3://NAME"):
        location("s3://")


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_files_and_folders_are_read_listed_and_removed(store, request, tmp_path):
    folder = request.getfixturevalue(store) / "a"
    assert (folder.files(), folder.folders()) == ({}, [])
    (folder / "one").write_bytes(b"12345")
    (folder / "b" / "two").write_bytes(b"x")
    with (folder / "three").open("wb") as file:
        file.write(b"123")
    assert (folder.files(), folder.folders()) == ({"one": 5, "three": 3}, ["b"])
    assert ((folder / "one").read_bytes(2), (folder / "one").size()) == (b"12", 5)
    assert [(folder / name).is_file() for name in ("one", "b", "four")] == [True, False, False]
    (folder / "one").copy_to(folder / "four")
    (folder / "four").download(tmp_path / "four")
    assert (tmp_path / "four").read_bytes() == b"12345"
    (folder / "five").upload(tmp_path / "four")
    assert (folder / "five").read_bytes() == b"12345"
    for _ in range(2):
        (folder / "one").remove()
        (folder / "b").remove_folder()
    assert (folder.files(), folder.folders()) == ({"three": 3, "four": 5, "five": 5}, [])
    with pytest.raises(MissingUrlError, match=f"{folder}/six does not exist, check bucket"):
        (folder / "six").read_bytes()


def failure(url, monkeypatch, **environment):
    """Return what reading and writing a URL of S3 raise in this environment, one line each."""
    import s3fs

    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    _s3_options.cache_clear()
    lines = []
    for action in (url.read_bytes, url.is_file, url.files, lambda: url.write_bytes(b"x")):
        with pytest.raises(UrlError) as caught:
            action()
        lines.append(str(caught.value))
        assert "\n" not in lines[-1]
        assert str(url) in lines[-1]
    return caught.type, lines


def test_no_server_is_one_line_at_once(s3, monkeypatch):
    kind, lines = failure(s3 / "x", monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert kind is UnreachableError
    assert all("cannot be reached" in line and "AWS_ENDPOINT_URL" in line for line in lines)


def test_no_credentials_is_one_line(s3, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    _, lines = failure(s3 / "x", monkeypatch, **nothing)
    assert all("no credentials" in line and "set AWS_ACCESS_KEY_ID" in line for line in lines)


def test_another_bucket_is_one_line(s3):
    missing = Url("s3://no-such-bucket/x")
    for action in (missing.read_bytes, lambda: missing.write_bytes(b"x")):
        with pytest.raises(MissingUrlError, match="s3://no-such-bucket/x does not exist, check bu"):
            action()


def test_a_missing_package_is_named():
    # In a process of its own: this one may have imported it.
    script = (
        "import sys; sys.modules['s3fs'] = None\nfrom data.urls import Url\nUrl('s3://a/b').files()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "s3://a/b: s3fs is not installed, run pip install s3fs" in done.stderr.splitlines()[-1]


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(UrlError, match="ftps://a/b: fsspec has no scheme ftps, give a folder, s3:"):
        Url("ftps://a/b").files()
