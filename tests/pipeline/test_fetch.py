"""Remote videos: only what is allowed is asked for, only public addresses, within limits."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import checked_http, fetch
from pipeline.checked_http import is_public
from pipeline.fetch import Fetcher
from pipeline.graph import preprocess
from pipeline.source import Source, content_digest, identify, is_unread
from pipeline.survey import survey
from schemas.config import (
    BucketConfig,
    ExecutorConfig,
    LimitsConfig,
    PreprocessConfig,
    QuarantineConfig,
    SourcesConfig,
)
from schemas.errors import ClipError, ManifestError, RunError
from schemas.manifest import ManifestRow
from tests.videos import make_video


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path -> bytes); counts whole bodies asked for in `sent`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.tagged = True
        self.sent: list[str] = []
        self.failing = 0
        """How many of the next answers are a 503."""
        self.paused_s = 0.0
        self.stop = threading.Event()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path[1:]
        if self.server.failing:
            self.server.failing -= 1
            self.send_error(503)
            return
        if self.server.stop.wait(self.server.paused_s):
            return
        if name.startswith("to="):
            self.send_response(302)
            self.send_header("Location", name[3:])
            self.end_headers()
        elif name.isdecimal():
            self.send_error(int(name))
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            self._write(b"x" * 65536, 0.0)
        elif name == "drip":
            self.send_response(200)
            self.end_headers()
            self._write(b"x", 0.02)
        elif name == "drip_header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self._write(b"x", 0.02)
        elif name.startswith("length="):
            self.send_response(200)
            self.send_header("Content-Length", name[7:])
            self.end_headers()
        elif name == "rude":
            self.wfile.write(b"HTTP/1.1 404 \x1b[31m" + b"x" * 9000 + b"\r\n\r\n")
        elif name == "short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        elif self.path in self.server.files:
            data = self.server.files[self.path]
            self.server.sent.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            if self.server.tagged:
                self.send_header("ETag", f'"{hash(data)}"')
            self.end_headers()
            self._write(data, None)
        else:
            self.send_error(404)

    def _write(self, data: bytes, every_s: float | None) -> None:
        """Once, or again and again, until the other end has enough."""
        try:
            self.wfile.write(data)
            while every_s is not None and not self.server.stop.wait(every_s):
                self.wfile.write(data)
        except OSError:
            return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(checked_http, "is_public", lambda address: True)
    monkeypatch.setattr(fetch, "PAUSES_S", (0.01, 0.01))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.stop.set()
        running.shutdown()
        thread.join()


def fetcher(server: Server, **limits: Any) -> Fetcher:
    sources = SourcesConfig(schemes=("http",), hosts=(f"127.0.0.1:{server.server_port}",))
    return Fetcher(sources, LimitsConfig(**limits))


def read(local: fetch.Local) -> bytes:
    with local:
        return Path(local.path).read_bytes()


def failure(fetcher: Fetcher, url: str) -> ClipError:
    with pytest.raises(ClipError) as caught:
        fetcher.local(url)
    assert caught.value.stage == "fetch"
    return caught.value


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "::1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "::"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "fe80::1%eth0", "fd00::1", "100.64.0.1", "224.0.0.1"),
        *("2002:7f00:1::", "64:ff9b::a00:1", "255.255.255.255", "ff02::1", "localhost", "0x7f000001"),
        *(
            "fec0::1",
            "64:ff9b:1::7f00:1",
            "::127.0.0.1",
            "::ffff:0:127.0.0.1",
            "4000::1",
            "1000::1",
            "5f00::1",
        ),
        *("3fff::1", "2001:db8::1", "2001:0:7f00:1::1", "100::1", "168.63.129.16", "::ffff:168.63.129.16"),
    ],
)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_not(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "2130706433"]
)
def test_an_allowed_name_of_this_machine_is_never_connected_to(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        port = listening.getsockname()[1]
        sources = SourcesConfig(schemes=("http",), hosts=(f"{host.strip('[]')}:{port}",))
        with pytest.raises((ClipError, OSError)) as caught:
            Fetcher(sources, LimitsConfig()).local(f"http://{host}:{port}/x.mp4")
        assert "not public" in str(caught.value) or isinstance(caught.value, socket.gaierror)
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_a_download_is_the_file_and_is_removed(server: Server) -> None:
    server.files["/a.mp4"] = b"a" * 3_000_000
    local = fetcher(server).local(f"{server.base}/a.mp4")
    assert read(local) == server.files["/a.mp4"]
    assert not Path(local.path).exists()
    assert fetcher(server).local("/some/file").path == "/some/file"


def test_redirects_are_followed_and_held_against_the_settings(server: Server) -> None:
    server.files["/a.mp4"] = b"abc"
    good = f"{server.base}/to={server.base}/to=/a.mp4"
    assert read(fetcher(server).local(good)) == b"abc"
    for target in (
        "http://other.example/a.mp4",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "//evil.example/a",
    ):
        error = failure(fetcher(server), f"{server.base}/to={target}")
        assert error.reason == "fetch_refused"
        assert "redirected" in error.message
    loop = failure(fetcher(server), f"{server.base}/to=" + "/to=" * 9 + "/a.mp4")
    assert (loop.reason, server.sent) == ("fetch_failed", ["/a.mp4"])


@pytest.mark.parametrize(
    ("status", "passes"), [(404, False), (403, False), (500, True), (503, True), (429, True)]
)
def test_errors_that_may_pass_are_told_from_those_that_do_not(
    server: Server, status: int, passes: bool
) -> None:
    with pytest.raises(ConnectionError if passes else ClipError, match=str(status)):
        fetcher(server).local(f"{server.base}/{status}")


def test_size_is_bounded_declared_or_not(server: Server) -> None:
    server.files["/a.mp4"] = b"a" * 1001
    small = fetcher(server, max_bytes=1000)
    assert failure(small, f"{server.base}/a.mp4").reason == "limit_bytes"
    assert failure(small, f"{server.base}/endless").reason == "limit_bytes"


@pytest.mark.parametrize("how", ["drip", "drip_header"])
def test_time_is_bounded(server: Server, how: str) -> None:
    started = time.monotonic()
    assert failure(fetcher(server, clip_timeout_s=0.5), f"{server.base}/{how}").reason == "timeout"
    assert time.monotonic() - started < 10


def test_a_body_that_breaks_off_is_no_file(server: Server) -> None:
    with pytest.raises(ConnectionError, match="10 of 1000"):
        fetcher(server).local(f"{server.base}/short")


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize("mode", ["content", "sampled"])
def test_identity_is_content_and_is_read_again_only_if_it_may_have_changed(
    server: Server, mode: Any, tagged: bool, tmp_path: Path
) -> None:
    server.tagged = tagged
    server.files["/a.mp4"] = b"a" * 1000
    (tmp_path / "a.mp4").write_bytes(b"a" * 1000)
    url, get = f"{server.base}/a.mp4", fetcher(server)
    source = identify([url], mode=mode, known={}, fetcher=get)[url]
    assert source.digest.startswith(mode)
    if mode == "content":
        assert source.digest == f"content:{content_digest(str(tmp_path / 'a.mp4'))}"
    known = {(url, source.size, source.mtime_ns): f"{mode}:recorded"}
    again = get.digest(url, mode, known=known)
    assert again == (Source(f"{mode}:recorded", 1000, source.mtime_ns) if tagged else source)
    assert read(get.local(url, expect=source)) == b"a" * 1000
    server.files["/a.mp4"] = b"b" * 1000
    assert get.digest(url, mode, known=known) != source
    with pytest.raises(RunError, match="was replaced"):
        get.local(url, expect=source)
    del server.files["/a.mp4"]
    with pytest.raises(RunError, match="could be fetched when it was listed"):
        get.local(url, expect=source)


def test_what_cannot_be_fetched_is_listed_with_what_cannot_be_read(server: Server, tmp_path: Path) -> None:
    server.files["/a.mp4"] = b"a"
    paths = [f"{server.base}/a.mp4", f"{server.base}/500", str(tmp_path / "gone")]
    with pytest.raises(ManifestError) as caught:
        identify(paths, mode="content", known={}, fetcher=fetcher(server))
    assert [line.split(": ")[0] for line in caught.value.problems] == paths[1:]


def test_a_url_that_was_fetched_before_is_not_given_up_when_it_is_refused(server: Server) -> None:
    url, get = f"{server.base}/404", fetcher(server)
    new = identify([url], mode="content", known={}, fetcher=get)[url]
    assert is_unread(new)
    again = {(url, new.size, new.mtime_ns): new.digest}
    assert identify([url], mode="content", known=again, fetcher=get)[url] == new
    with pytest.raises(ManifestError, match="was fetched before, and now"):
        identify([url], mode="content", known={(url, 5, 5): "content:of-old"}, fetcher=get)


def test_an_answer_that_passes_is_asked_for_again(server: Server) -> None:
    server.files["/a.mp4"] = b"abc"
    server.failing = 2
    assert read(fetcher(server).local(f"{server.base}/a.mp4")) == b"abc"
    server.failing = 2
    assert fetcher(server).digest(f"{server.base}/a.mp4", "content", known={}).size == 3
    server.failing = 3
    with pytest.raises(ConnectionError, match="503"):
        fetcher(server).local(f"{server.base}/a.mp4")


@pytest.mark.parametrize("target", ["http://[", "//[::1/x", "http://a..b.test/", f"http://{'a' * 64}.test/"])
def test_a_redirect_to_what_is_no_url_is_a_failure_of_the_file(server: Server, target: str) -> None:
    sources = SourcesConfig(schemes=("http",), hosts=(f"127.0.0.1:{server.server_port}", "*.test"))
    error = failure(Fetcher(sources, LimitsConfig()), f"{server.base}/to={target}")
    assert error.reason in ("fetch_failed", "fetch_refused")


@pytest.mark.parametrize(
    ("url", "location"), [("http://a.test/", "s3://a.test/x"), ("https://a.test/x", "http://a.test/x")]
)
def test_a_redirect_leads_to_the_web_and_never_out_of_encryption(url: str, location: str) -> None:
    sources = SourcesConfig(schemes=("http", "https", "s3"), hosts=("a.test",))
    with pytest.raises(ClipError) as caught:
        checked_http.redirected(url, location, sources)
    assert caught.value.reason == "fetch_refused"
    assert checked_http.redirected("http://a.test/", "https://a.test/x", sources) == "https://a.test/x"


def test_a_size_of_thousands_of_digits_is_a_failure_of_the_file(server: Server) -> None:
    assert failure(fetcher(server), f"{server.base}/length={'9' * 5000}").reason == "fetch_failed"


def test_what_a_server_says_is_shown_short_and_without_control_characters(server: Server) -> None:
    message = failure(fetcher(server), f"{server.base}/rude").message
    assert "[31m" in message
    assert message.isprintable()
    assert len(message) < 400


def test_time_is_one_for_all_redirects_of_a_file(server: Server) -> None:
    server.files["/a.mp4"] = b"abc"
    server.paused_s = 0.4
    url = f"{server.base}/to=/to=/to=/to=/a.mp4"
    assert failure(fetcher(server, clip_timeout_s=1.0), url).reason == "timeout"


def test_a_connection_that_comes_after_the_time_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is over while the name is looked up; what answers then would never be cut."""
    look_up = socket.getaddrinfo

    def slow(*given: Any, **named: Any) -> Any:
        time.sleep(0.6)
        return look_up(*given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    started = time.monotonic()
    assert failure(fetcher(server, clip_timeout_s=0.3), f"{server.base}/drip_header").reason == "timeout"
    assert time.monotonic() - started < 10


def test_rows_are_fetched_ahead_and_neighbours_share(server: Server, tmp_path: Path) -> None:
    for name in "abc":
        server.files[f"/{name}"] = name.encode()
    get = fetcher(server)
    urls = [f"{server.base}/{name}" for name in "aaaabc"]
    listed = {url: get.digest(url, "content", known={}) for url in urls}
    server.sent.clear()
    (tmp_path / "d").write_bytes(b"d")
    wanted = [(i, url, listed[url]) for i, url in enumerate(urls)]
    wanted.append((6, str(tmp_path / "d"), Source("content:unused", 1, 1)))
    held = list(get.ahead(wanted, files=2))
    assert [i for i, _ in held] == list(range(7))
    assert sorted(server.sent) == ["/a", "/b", "/c"]
    assert [Path(local.path).read_bytes() for _, local in held] == [b"a"] * 4 + [b"b", b"c", b"d"]
    for _, local in held[:3]:
        local.close()
    assert read(held[3][1]) == b"a"
    assert not Path(held[0][1].path).exists()
    for _, local in held[4:]:
        local.close()
    started = get.ahead(wanted, files=4)
    next(started)[1].close()
    started.close()


def test_a_survey_fetches_what_it_looks_at(server: Server, tmp_path: Path) -> None:
    server.files["/a.mp4"] = make_video(tmp_path / "a.mp4", num_frames=9).read_bytes()
    config = PreprocessConfig(
        manifest="unused",
        output="unused",
        buckets=(BucketConfig(num_frames=9, height=64, width=96),),
        sources=SourcesConfig(schemes=("http",), hosts=(f"127.0.0.1:{server.server_port}",)),
    )
    rows = [
        ManifestRow(i, url, url, "x") for i, url in enumerate([f"{server.base}/a.mp4", f"{server.base}/404"])
    ]
    (_, placed), (_, refused) = survey(rows, config)
    assert not isinstance(placed, ClipError)
    assert placed.num_available == 9
    assert isinstance(refused, ClipError)
    assert refused.reason == "fetch_failed"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_over_urls_gives_what_a_run_over_files_gives(server: Server, tmp_path: Path) -> None:
    for name, num_frames in (("a.mp4", 9), ("b.mp4", 24)):
        server.files[f"/{name}"] = make_video(tmp_path / name, num_frames=num_frames).read_bytes()
    rows: list[dict[str, Any]] = [{"video": name, "caption": name} for name in ("a.mp4", "b.mp4")]
    rows.append({"video": "b.mp4", "caption": "its start", "end_s": 0.5})
    shards: dict[str, list[str]] = {}
    for kind in ("files", "urls", "urls"):
        base = f"{server.base}/" if kind == "urls" else ""
        manifest = tmp_path / f"{kind}.jsonl"
        manifest.write_text("".join(json.dumps(row | {"video": base + row["video"]}) + "\n" for row in rows))
        config = PreprocessConfig(
            manifest=str(manifest),
            output=str(tmp_path / kind),
            buckets=(BucketConfig(num_frames=9, height=32, width=48),),
            sources=SourcesConfig(schemes=("http",), hosts=(f"127.0.0.1:{server.server_port}",)),
            executor=ExecutorConfig(kind="local", workers=1),
        )
        server.sent.clear()
        again = kind in shards
        summary, ran = preprocess(config)
        assert (summary["kept"], ran) == (3, not again)
        shards[kind] = sorted(path.name for path in (tmp_path / kind / "latents").rglob("*.tar"))
    assert shards["files"] == shards["urls"]
    assert sorted(server.sent) == ["/a.mp4", "/b.mp4"]  # asked for their tags
    server.files["/a.mp4"] = make_video(tmp_path / "a.mp4", num_frames=12).read_bytes()
    summary, ran = preprocess(config)
    assert (summary["kept"], ran) == (3, True)

    # A URL that was never there costs its row; once it is there, it is taken.
    with manifest.open("a") as file:
        file.write(json.dumps({"video": f"{server.base}/c.mp4", "caption": "c"}) + "\n")
    config = config.model_copy(update={"quarantine": QuarantineConfig(max_rate=1.0)})
    summary, ran = preprocess(config)
    assert (summary["kept"], summary["reasons"], ran) == (3, {"fetch_failed": 1}, True)
    assert preprocess(config)[1] is False
    server.files["/c.mp4"] = make_video(tmp_path / "c.mp4", num_frames=10).read_bytes()
    summary, ran = preprocess(config)
    assert (summary["kept"], summary["reasons"], ran) == (4, {}, True)


def test_a_server_that_only_listens_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and never answers, not even the greeting of TLS."""
    monkeypatch.setattr(checked_http, "is_public", lambda address: True)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host = f"127.0.0.1:{listening.getsockname()[1]}"
        get = Fetcher(SourcesConfig(schemes=("https",), hosts=(host,)), LimitsConfig(clip_timeout_s=0.3))
        started = time.monotonic()
        assert failure(get, f"https://{host}/a.mp4").reason == "timeout"
        assert time.monotonic() - started < 10


def test_an_object_of_s3_is_fetched_from_an_allowed_bucket() -> None:
    s3fs = pytest.importorskip("s3fs")
    from tests.object_server import serving

    with serving("videos", attempts=1) as server:
        store = s3fs.S3FileSystem()
        store.pipe("videos/a.mp4", b"a" * 1000)
        url = "s3://videos/a.mp4"
        get = Fetcher(SourcesConfig(schemes=("s3",), hosts=("videos",)), LimitsConfig(max_bytes=1000))
        for mode in ("content", "sampled"):
            source = get.digest(url, mode, known={})
            assert source.size == 1000
            assert read(get.local(url, expect=source)) == b"a" * 1000
        assert failure(get, "s3://videos/gone.mp4").reason == "fetch_failed"
        assert failure(get, "s3://others/a.mp4").reason == "fetch_refused"
        store.pipe("videos/a.mp4", b"b" * 1001)
        assert failure(get, url).reason == "limit_bytes"
        server.deal("500", method="GET", path="a.mp4", times=20)
        store.pipe("videos/a.mp4", b"b")
        with pytest.raises(OSError, match=r"500|Internal|max retries|made up"):
            get.local(url)
