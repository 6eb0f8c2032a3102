"""Files from a server that breaks off, lies, stalls and redirects."""

import dataclasses
import email.utils
import errno
import hashlib
import os
import shutil
import socket
import time
from collections import namedtuple

import pytest

from nfnet_keras.checkpoints import download
from nfnet_keras.checkpoints.download import DownloadError, fetch
from nfnet_keras.checkpoints.manifest import Checksum

HALF = 100_000
TAG = '"first"'


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "file"


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def get(target, sha256, waits):
    """get(url): with the right checksum and without real waits."""

    def get(url, checksum=None, **options):
        checksum = checksum or Checksum("sha256", sha256, "publisher")
        return fetch(url, target, checksum, **{"progress": False, "sleep": waits.append, "timeout": 10.0, **options})

    return get


def left(target) -> list[str]:
    return sorted(os.listdir(target.parent))


def test_file(server, get, target, body, sha256, waits, capsys):
    fetched = get(server.add("/file", {"body": body}))
    assert dataclasses.astuple(fetched) == (str(target), "sha256", sha256, "publisher")
    assert target.read_bytes() == body
    assert left(target) == ["file"]
    assert waits == []
    assert capsys.readouterr() == ("", "")


def test_md5(server, get, body):
    md5 = hashlib.md5(body).hexdigest()
    assert get(server.add("/file", {"body": body}), Checksum("md5", md5.upper(), "publisher")).checksum == md5


def test_existing_file_is_replaced_only_by_a_right_one(server, get, target, body):
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(DownloadError):
        get(server.add("/wrong", {"body": b"wrong"}))
    assert target.read_bytes() == b"old"
    get(server.add("/file", {"body": body}))
    assert target.read_bytes() == body


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusal_is_final(server, get, target, status, waits):
    url = server.add("/file", {"status": status})
    with pytest.raises(DownloadError, match=rf"answered {status} .*{url}.*passed as `weights`"):
        get(url)
    assert (len(server.requests), waits) == (1, [])
    assert left(target) == []


@pytest.mark.parametrize("status", [429, 500, 503, 520])
def test_busy_server_is_tried_again(server, get, target, body, status, waits):
    busy = {"status": status}
    get(server.add("/file", busy, busy, {"body": body}))
    assert target.read_bytes() == body
    assert waits == [1.0, 2.0]


def test_busy_server_is_given_up(server, get, waits):
    with pytest.raises(DownloadError, match="gave up after 3 tries: the server answered 500"):
        get(server.add("/file", {"status": 500}), retries=2)
    assert waits == [1.0, 2.0]


def test_retry_after_is_honoured(server, get, body, waits):
    date = email.utils.formatdate(time.time() + 40, usegmt=True)
    answers = [{"status": 429, "headers": {"Retry-After": after}} for after in ("7", date, "nonsense")]
    get(server.add("/file", *answers, {"body": body}))
    assert waits[0] == 7
    assert 30 < waits[1] <= 40
    assert waits[2] == 4


def test_long_retry_after_is_an_error(server, get):
    with pytest.raises(DownloadError, match="come back in 3600 s"):
        get(server.add("/file", {"status": 503, "headers": {"Retry-After": "3600"}}))
    assert len(server.requests) == 1


def test_cut_off_is_resumed(server, get, target, body, waits):
    get(server.add("/file", {"body": body, "etag": TAG, "cut": HALF}, {"body": body, "etag": TAG}))
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-"]
    assert server.requests[1][1]["If-Range"] == TAG
    assert waits == [1.0]
    assert left(target) == ["file"]


def test_reset_connection_is_resumed(server, get, target, body):
    get(server.add("/file", {"body": body, "etag": TAG, "cut": HALF, "reset": True}, {"body": body, "etag": TAG}))
    assert target.read_bytes() == body
    assert len(server.requests) == 2


def test_cut_off_is_resumed_by_date(server, get, target, body):
    dated = {"body": body, "headers": {"Last-Modified": "Tue, 16 Feb 2021 12:00:00 GMT"}}
    get(server.add("/file", {**dated, "cut": HALF}, {**dated, "etag": "Tue, 16 Feb 2021 12:00:00 GMT"}))
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(("etag", "asked"), [(None, None), ('W/"weak"', None), (TAG, f"bytes={HALF}-")])
def test_without_range_support_or_strong_validator_it_starts_again(server, get, target, body, etag, asked):
    whole = {"body": body, "etag": etag, "ranges": False}
    get(server.add("/file", {**whole, "cut": HALF}, whole))
    assert target.read_bytes() == body
    assert server.ranges() == [None, asked]


def test_cut_off_for_ever(server, get, target, body):
    with pytest.raises(DownloadError, match="gave up after 5 tries: the connection broke after 100 kB of 205 kB"):
        get(server.add("/file", {"body": body, "etag": TAG, "ranges": False, "cut": HALF}))
    assert not target.exists()


def test_getting_on_is_no_failure(server, get, target, monkeypatch, body, waits):
    monkeypatch.setattr(download, "_MEBIBYTE", 10_000)
    step = {"body": body, "etag": TAG, "cut": 20_000}
    get(server.add("/file", *[step] * 12, {"body": body, "etag": TAG}), retries=1)
    assert target.read_bytes() == body
    assert waits == [1.0] * 10


def test_second_call_goes_on(server, get, target, body):
    url = server.add("/file", {"body": body, "etag": TAG, "cut": HALF})
    with pytest.raises(DownloadError):
        get(url, retries=0)
    assert left(target) == ["file.part", "file.part.json"]
    server.answers.clear()
    get(server.add("/file", {"body": body, "etag": TAG}))
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_whole_part_needs_no_network(server, get, target, body):
    url = server.add("/file", {"body": body, "etag": TAG, "cut": HALF})
    with pytest.raises(DownloadError):
        get(url, retries=0)
    (target.parent / "file.part").write_bytes(body)
    get(url)
    assert left(target) == ["file"]
    assert len(server.requests) == 1


def test_part_that_nobody_can_check_is_not_used(server, get, target, body):
    url = server.add("/file", {"body": body, "etag": TAG, "cut": HALF})
    with pytest.raises(DownloadError, match="gave up"):
        get(url, retries=0)
    with pytest.raises(DownloadError, match="states no SHA-256"):
        fetch(url, target, progress=False)


@pytest.mark.parametrize("note", ["{", "[]", '{"url": "elsewhere"}', "null"])
def test_part_with_a_broken_note_is_not_used(server, get, target, body, note):
    target.parent.mkdir()
    (target.parent / "file.part").write_bytes(b"something")
    (target.parent / "file.part.json").write_text(note)
    get(server.add("/file", {"body": body, "etag": TAG}))
    assert target.read_bytes() == body
    assert server.ranges() == [None]


def test_changed_between_part_and_resumption(server, get, target, body):
    get(server.add("/file", {"body": bytes(len(body)), "etag": '"old"', "cut": HALF}, {"body": body, "etag": TAG}))
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("change", ["etag", "length", "statement"])
def test_server_that_ignores_if_range(server, get, target, body, waits, change):
    """It sends the rest of another file, but its headers show that."""
    old = {"body": body, "etag": TAG, "cut": HALF, "headers": {"X-Linked-Etag": "0" * 64}}
    rest = {"status": 206, "headers": {"Content-Range": f"bytes {HALF}-{len(body) - 1}/{len(body)}", "ETag": TAG}}
    rest = {"body": b"!" * (len(body) - HALF), "ranges": False, **rest}
    rest["headers"]["X-Linked-Etag"] = "0" * 64
    if change == "etag":
        rest["headers"]["ETag"] = '"other"'
    elif change == "length":
        rest["headers"]["Content-Range"] = f"bytes {HALF}-{len(body)}/{len(body) + 1}"
    else:
        rest["headers"]["X-Linked-Etag"] = "1" * 64
    get(server.add("/file", old, rest, {"body": body}))
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-", None]
    # Noticed by the headers, before the body: the second wait is for nothing.
    assert waits == [1.0, 0.0]


def test_wrong_joined_file_is_fetched_anew_once(server, get, target, body):
    url = server.add("/file", {"body": bytes(len(body)), "etag": TAG, "cut": HALF}, {"body": body, "etag": TAG})
    get(url)
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-", None]


def test_wrong_joined_file_and_wrong_anew(server, get, target, body):
    wrong = {"body": bytes(len(body)), "etag": TAG}
    with pytest.raises(DownloadError, match="wrong checksum"):
        get(server.add("/file", {**wrong, "cut": HALF}, wrong))
    assert server.ranges() == [None, f"bytes={HALF}-", None]
    assert left(target) == []


def test_part_longer_than_the_server_has(server, get, target, body):
    gone = {"status": 416, "ranges": False}
    get(server.add("/file", {"body": body * 2, "etag": TAG, "cut": HALF}, gone, {"body": body, "etag": '"new"'}))
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-", None]


def test_wrong_bytes(server, get, target, body, sha256):
    wrong = b"x" + body[1:]
    with pytest.raises(DownloadError, match="wrong checksum") as caught:
        get(server.add("/file", {"body": wrong}))
    assert sha256 in str(caught.value)
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert left(target) == []
    assert len(server.requests) == 1


def test_stalling_server(server, get, target, body):
    stall = {"body": body, "etag": TAG, "cut": HALF, "hold": server.released}
    get(server.add("/file", stall, {"body": body, "etag": TAG}), timeout=0.3)
    assert target.read_bytes() == body
    assert server.ranges() == [None, f"bytes={HALF}-"]


def test_server_that_never_answers(get, waits):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match="no answer in time"):
            get(url, timeout=0.1, retries=1)
    assert waits == [1.0]
    with pytest.raises(DownloadError, match=r"cannot be reached: .*refused"):
        get(url)
    assert waits == [1.0]


def test_unknown_host_is_final(get, waits, monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError, match=r"cannot be reached: .*name resolution"):
        get("http://host/file")
    assert waits == []


def test_web_page(server, get, target):
    page = {"body": b"<html>log in</html>", "headers": {"Content-Type": "text/html; charset=utf-8"}}
    with pytest.raises(DownloadError, match="a web page"):
        get(server.add("/file", page))
    assert left(target) == []


@pytest.mark.parametrize("length", [True, False])
def test_empty_file(server, get, target, length):
    with pytest.raises(DownloadError, match="an empty file"):
        get(server.add("/file", {"length": length}))
    assert not target.exists()


def test_no_length(server, get, target, body):
    get(server.add("/file", {"body": body, "length": False}))
    assert target.read_bytes() == body


def test_no_length_and_cut_off(server, get, target, body):
    with pytest.raises(DownloadError, match="wrong checksum"):
        get(server.add("/file", {"body": body, "length": False, "cut": HALF}))
    assert left(target) == []


def test_redirect_with_checksum(server, target, body, sha256, waits):
    linked = {"status": 302, "headers": {"Location": "/storage", "X-Linked-Etag": f'"{sha256}"', "ETag": '"abc"'}}
    url = server.add("/file", linked)
    server.add(
        "/storage", {"body": body, "etag": f'"{"0" * 64}"', "cut": HALF}, {"body": body, "etag": f'"{"0" * 64}"'}
    )
    fetched = fetch(url, target, Checksum("sha256", None, "server"), progress=False, sleep=waits.append)
    assert (fetched.algorithm, fetched.checksum, fetched.source) == ("sha256", sha256, "server")
    assert target.read_bytes() == body
    assert server.ranges() == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]


@pytest.mark.parametrize("header", ["ETag", "x-amz-meta-sha256"])
def test_checksum_of_the_last_answer(server, target, body, sha256, header):
    fetched = fetch(server.add("/file", {"body": body, "headers": {header: sha256.upper()}}), target, progress=False)
    assert fetched.source == "server"


def test_wrong_statement(server, target, body):
    with pytest.raises(DownloadError, match="wrong checksum"):
        fetch(server.add("/file", {"body": body, "etag": f'"{"1" * 64}"'}), target, progress=False)
    assert left(target) == []


@pytest.mark.parametrize("etag", [None, TAG, f'"{"a" * 63}"'])
def test_no_statement(server, target, body, etag):
    with pytest.raises(DownloadError, match="states no SHA-256, so the file cannot be checked"):
        fetch(server.add("/file", {"body": body, "etag": etag}), target, progress=False)
    assert left(target) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/file", "relative", "http://", "data:,x"])
def test_other_addresses(get, url, target):
    with pytest.raises(DownloadError, match="only http and https"):
        get(url)
    assert not target.parent.exists()


@pytest.mark.parametrize("location", ["ftp://127.0.0.1/file", "file:///etc/hostname"])
def test_redirect_to_other_addresses(server, get, location):
    with pytest.raises(DownloadError):
        get(server.add("/file", {"status": 302, "headers": {"Location": location}}))


def test_redirect_in_a_circle(server, get):
    url = server.add("/file", {"status": 302, "headers": {"Location": "/file"}})
    with pytest.raises(DownloadError, match="302"):
        get(url)


def test_https_is_not_left():
    download._check_address("https://b.org/file", "https://a.org/file")
    download._check_address("http://b.org/file", "http://a.org/file")
    download._check_address("http://localhost:1/file", "https://a.org/file")
    with pytest.raises(DownloadError, match="from https to http"):
        download._check_address("http://b.org/file", "https://a.org/file")


def test_no_room(server, get, target, body, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(DownloadError, match=r"no room: 205 kB are to come, 1 kB are free.*KERAS_HOME") as caught:
        get(server.add("/file", {"body": body}))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full(server, get, target, body):
    target.parent.mkdir()
    (target.parent / "file.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="the disk is full") as caught:
        get(server.add("/file", {"body": body}))
    assert caught.value.errno == errno.ENOSPC
    assert not target.exists()


@pytest.mark.parametrize("obstacle", ["file", "no permission"])
def test_folder_cannot_be_written(server, get, target, body, obstacle):
    if obstacle == "file":
        target.parent.write_text("not a folder")
    elif os.getuid() == 0:
        pytest.skip("root may write anywhere")
    else:
        target.parent.mkdir(mode=0o500)
    with pytest.raises(DownloadError, match="cannot write the file"):
        get(server.add("/file", {"body": body}))


def test_a_line_where_there_is_no_terminal(server, get, body, capsys):
    get(server.add("/file.npz", {"body": body, "etag": TAG, "cut": HALF}, {"body": body, "etag": TAG}), progress=True)
    assert capsys.readouterr() == ("", "downloading file.npz, 205 kB\n")


def test_a_moving_line_on_a_terminal(server, get, body, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    get(server.add("/file.npz", {"body": body}), progress=True)
    assert capsys.readouterr().err.endswith("\rdownloading file.npz: 205 kB of 205 kB, 100 % \n")
