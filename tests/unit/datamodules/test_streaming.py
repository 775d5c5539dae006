from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.shaky_server import shaky_server

from datamodules import streaming
from datamodules.cache import ShardCache, Source
from datamodules.dataset import BatchLoader, ConversationDataset, UnitTable
from datamodules.order import EveryUnitOnce
from datamodules.reader import ShardReader
from datamodules.streaming import ShardError, StreamOptions, download, redirected, scheme_of, try_again
from moextend_pl.contracts import UserError
from moextend_pl.samples.conversation import ConversationEncoder

QUICK = StreamOptions(tries=4, timeout=5.0)


@pytest.fixture
def waits(monkeypatch):
    """Notes how long would have been waited."""
    found = []
    monkeypatch.setattr(try_again, "__defaults__", (found.append,))
    return found


@pytest.fixture
def server(folder):
    with shaky_server(folder) as running:
        yield running


@pytest.fixture
def options(tmp_path):
    return StreamOptions(cache_dir=str(tmp_path / "cache"), tries=4, timeout=5.0)


def samples(place, options=None):
    reader = ShardReader(place, options)
    return [(raw.key, raw.turns, raw.images) for raw in map(reader.read, range(len(reader)))]


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".lock"))


def test_samples_over_http_are_those_of_the_folder(folder, server, options):
    assert samples(server.url, options) == samples(folder)
    asked = [name for name, _, _ in server.requests]
    assert sorted(asked) == ["00000.tar", "00001.tar", "00002.tar", "index.json", "index.safetensors"]
    assert samples(f"{server.url}/", options) == samples(folder)
    assert [name for name, _, _ in server.requests[5:]] == ["index.json"]  # all else was kept


@pytest.mark.parametrize("ranges", [True, False], ids=["goes on", "starts again"])
def test_a_connection_cut_midway_and_a_busy_server_are_tried_again(folder, server, options, waits, ranges, tmp_path):
    server.ranges = ranges
    server.faults = {"00000.tar": ["503", "cut", "cut"], "index.json": ["503"], "index.safetensors": ["cut"]}
    assert samples(server.url, options) == samples(folder)
    starts = [start for name, start, _ in server.requests if name == "00000.tar"]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert (starts[-1] > 0) == ranges
    assert len(waits) == 5
    assert all(".part" not in name for name in cached(tmp_path))


def test_a_connection_that_breaks_behind_the_last_byte_asks_for_no_more(folder, server, options, waits):
    server.faults = {"00000.tar": ["late"]}
    assert samples(server.url, options) == samples(folder)
    assert len(waits) == 1


def test_waits_double_and_differ(waits):
    def fail():
        raise OSError("busy")

    with pytest.raises(ShardError, match="tried 9 time"):
        try_again(fail, "x", StreamOptions(tries=9))
    limits = [min(0.5 * 2**number, 30.0) for number in range(8)]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))
    assert len({wait / limit for wait, limit in zip(waits, limits, strict=True)}) == 8


def test_a_dead_address_names_the_shard_and_leaves_no_file(server, options, waits, tmp_path):
    reader = ShardReader(server.url, options)
    server.faults = {"00001.tar": ["503"] * 4, "00002.tar": ["404"]}
    with pytest.raises(ShardError, match=f"{server.url}/00001.tar: cannot be fetched, tried 4 time.*503"):
        reader.read(5)
    assert len(waits) == 3
    with pytest.raises(ShardError, match="00002.tar: cannot be fetched, tried 1 time"):
        reader.read(10)
    assert len(cached(tmp_path)) == 1
    assert reader.read(5).key == "s05"  # the server is back


@pytest.mark.parametrize("name", ["index.json", "00000.tar"])
def test_a_server_that_sends_a_byte_now_and_then_is_tried_again_and_then_told(folder, server, tmp_path, waits, name):
    patience = StreamOptions(cache_dir=str(tmp_path / "cache"), tries=2, timeout=0.2)
    server.faults = {name: ["slow"]}
    assert samples(server.url, patience) == samples(folder)
    assert len(waits) == 1
    server.faults = {"index.json": ["slow"] * 2}
    begin = time.monotonic()
    with pytest.raises(
        ShardError, match=r"index.json: cannot be fetched, tried 2 .* bytes in 0 s, less than `least_kib_s`"
    ):
        ShardReader(server.url, patience)
    assert time.monotonic() - begin < 2


def test_a_server_that_never_comes_to_an_end_of_its_headers_is_told(server, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(streaming, "USUAL_TEXT", 4096)
    server.faults = {"index.json": ["slow head"] * 2}
    with pytest.raises(ShardError, match=r"index.json: cannot be fetched, tried 2"):
        ShardReader(server.url, StreamOptions(cache_dir=str(tmp_path / "cache"), tries=2, timeout=0.2))


def test_a_server_sends_within_itself_and_to_hosts_that_are_named(folder, server, options, tmp_path):
    with shaky_server(folder) as other:
        server.faults = {"index.json": ["/other/index.json"], "00000.tar": [f"{other.url}/00000.tar"]}
        reader = ShardReader(server.url, options)
        port = other.url.split(":")[2].split("/")[0]
        with pytest.raises(ShardError, match=rf"sends to http://127.0.0.1:{port}, which is refused.*redirect_hosts"):
            reader.read(0)
        assert other.requests == []
        server.faults = {"00000.tar": [f"{other.url}/00000.tar"]}
        trusting = StreamOptions(cache_dir=options.cache_dir, redirect_hosts=[f"127.0.0.1:{port}"])
        assert samples(server.url, trusting) == samples(folder)
        assert [name for name, _, _ in other.requests] == ["00000.tar"]


def test_a_server_that_sends_in_a_circle_is_told(server, options):
    server.faults = {"index.json": ["/set/index.json"] * 9}
    with pytest.raises(ShardError, match="sent elsewhere 5 times"):
        ShardReader(server.url, options)


@pytest.mark.parametrize(
    ("address", "target", "followed"),
    [
        ("http://a.org/x", "y", "http://a.org/y"),
        ("http://a.org/x", "https://a.org/y", "https://a.org/y"),
        ("https://a.org:443/x", "//a.org/y", "https://a.org/y"),
        ("https://a.org/x", "https://cdn.org/y", "https://cdn.org/y"),
        ("https://a.org/x", "http://a.org/y", None),
        ("https://a.org/x", "http://cdn.org/y", None),
        ("http://a.org/x", "http://b.org/y", None),
        ("http://a.org/x", "http://a.org:8080/y", None),
        ("http://a.org/x", "http://127.0.0.1/y", None),
        ("http://a.org/x", "http://[::1]/y", None),
        ("http://a.org/x", "file:///etc/passwd", None),
        ("http://a.org/x", "http://a.org@b.org/y", None),
        ("http://a.org/x", "s3://cdn.org/y", None),
    ],
)
def test_only_the_own_host_and_named_ones_are_followed(address, target, followed):
    if followed:
        assert redirected(address, target, ["cdn.org"]) == followed
        return
    with pytest.raises(ShardError, match="which is refused"):
        redirected(address, target, ["cdn.org"])


def test_a_server_that_is_not_there_is_named(options, waits):
    with pytest.raises(ShardError, match=r"http://127.0.0.1:9/set/index.json: cannot be fetched, tried 4"):
        ShardReader("http://127.0.0.1:9/set", options)


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"x", lambda data: data + b"x"], ids=["other", "longer"])
def test_a_file_that_is_not_the_indexed_one_never_enters_the_cache(folder, server, options, tmp_path, change):
    reader = ShardReader(server.url, options)
    path = folder / "00000.tar"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ShardError, match="00000.tar.*the index says"):
        reader.read(0)
    assert len(cached(tmp_path)) == 1  # the arrays of the index


def test_a_killed_download_leaves_no_final_name(folder, tmp_path):
    size = (folder / "00000.tar").stat().st_size
    digest = hashlib.sha256((folder / "00000.tar").read_bytes()).hexdigest()
    cache = ShardCache(tmp_path / "cache", 10**9)

    def die_midway(brought, pieces):
        brought.out.write(next(pieces)[:600])
        brought.out.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    with shaky_server(folder) as server:
        address = f"{server.url}/00000.tar"
        child = os.fork()
        if child == 0:
            streaming._Brought.take = die_midway
            cache.open(address, size, digest, QUICK)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert cached(tmp_path) == [f"{digest}.part"]
        handle = cache.open(address, size, digest, QUICK)
    assert os.pread(handle, size, 0) == (folder / "00000.tar").read_bytes()
    os.close(handle)
    assert cached(tmp_path) == [digest]


def test_what_was_not_used_for_longest_goes_first(folder, server, tmp_path):
    sizes = [(folder / f"0000{i}.tar").stat().st_size for i in range(3)]
    digests = [hashlib.sha256((folder / f"0000{i}.tar").read_bytes()).hexdigest() for i in range(3)]
    cache = ShardCache(tmp_path / "cache", sum(sizes) - 1)

    def use(number):
        handle = cache.open(f"{server.url}/0000{number}.tar", sizes[number], digests[number], QUICK)
        time.sleep(0.02)
        return handle

    handles = [use(0), use(1), use(0), use(2)]
    assert cached(tmp_path) == sorted([digests[0], digests[2]])
    assert os.pread(handles[1], sizes[1], 0) == (folder / "00001.tar").read_bytes()  # open ones stay readable
    handles.append(use(1))
    assert digests[0] not in cached(tmp_path)
    assert len(cached(tmp_path)) == 2
    for handle in handles:
        os.close(handle)


def test_files_that_other_processes_delete_and_those_of_other_users_do_not_stop_a_download(
    folder, server, options, monkeypatch
):
    class Gone:
        name = "x.part"

        def stat(self):
            raise FileNotFoundError

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("datamodules.cache.os.scandir", lambda _: [Gone()])
    monkeypatch.setattr("datamodules.cache.os.utime", refuse)
    assert samples(server.url, options) == samples(folder)


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_cache_that_cannot_be_made_is_told_by_the_name_of_the_option(server, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"file.*`cache_dir`"):
        ShardReader(server.url, StreamOptions(cache_dir=str(tmp_path / place)))


def test_a_shard_larger_than_the_cache_is_told(server, tmp_path):
    small = StreamOptions(cache_dir=str(tmp_path / "cache"), cache_gib=1e-6)
    with pytest.raises(ShardError, match=r"index.safetensors.*cache_gib"):
        ShardReader(server.url, small)


def test_a_damaged_size_in_the_cache_is_mended(folder, server, options, tmp_path):
    assert samples(server.url, options) == samples(folder)
    for path in (tmp_path / "cache").iterdir():
        if not path.name.startswith("."):
            path.write_bytes(path.read_bytes()[:-5])
    assert samples(server.url, options) == samples(folder)


def test_readers_that_share_a_cache_download_each_shard_once(folder, server, options):
    found = []
    threads = [threading.Thread(target=lambda: found.append(samples(server.url, options))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [samples(folder)] * 6
    names = [name for name, _, _ in server.requests if name != "index.json"]
    assert sorted(names) == ["00000.tar", "00001.tar", "00002.tar", "index.safetensors"]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_stream(folder, server, options, spec, workers):
    def keys(place, streaming):
        dataset = ConversationDataset(UnitTable([place], streaming=streaming), ConversationEncoder(spec))
        loader = BatchLoader(dataset, EveryUnitOnce(range(11), 2, 0, 1), workers)
        return [key for batch in loader for key in batch["keys"]]

    assert keys(server.url, options) == keys(folder, None)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_object_stores_are_read_through_fsspec(folder, options, scheme, monkeypatch):
    class Store(MemoryFileSystem):
        protocol = scheme
        store = {}  # noqa: RUF012 -- as its base has it
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix(f"{scheme}://"))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Store)
    for path in folder.iterdir():
        Store().pipe_file(f"/bucket/train/{path.name}", path.read_bytes())
    assert samples(f"{scheme}://bucket/train", options) == samples(folder)


def test_a_missing_package_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ShardError, match="pip install s3fs"):
        ShardReader("s3://bucket/train", options)


def test_a_file_address_is_a_folder(folder):
    assert samples(f"file://{folder}") == samples(folder)


def test_an_endless_index_is_not_read_to_its_end(server, folder, options, monkeypatch):
    monkeypatch.setattr("datamodules.index.MAX_INDEX_BYTES", 100)
    for place in (server.url, folder):
        with pytest.raises(UserError, match="at most 100 bytes"):
            ShardReader(place, options)


REFUSED = [
    "-",
    "pipe:cat x",
    "pipe:rm -rf /",
    "hf://x/y",
    "ftp://x/y",
    "data:x",
    "file:x",
    "s3:x",
    "a::s3://x",
    "http:/x",
]


@pytest.mark.parametrize("place", REFUSED)
def test_row_22_commands_and_unknown_schemes_are_refused_with_the_allowed_ones(place, spec):
    for opened in (scheme_of, Source, ShardReader, lambda name: UnitTable([name])):
        with pytest.raises(UserError, match="refused") as caught:
            opened(place)
        assert "file://, http://, https://, s3://, gs://" in str(caught.value)
        assert repr(place) in str(caught.value)


def test_options_that_make_no_sense_are_refused():
    for wrong in ({"cache_gib": 0}, {"tries": 0}, {"timeout": -1}):
        with pytest.raises(UserError, match="above 0"):
            StreamOptions(**wrong)


def test_more_than_the_index_says_is_not_stored(server, folder, tmp_path):
    with pytest.raises(ShardError, match=f"{server.url}/00000.tar: the index says 600 bytes, more came"):
        download(f"{server.url}/00000.tar", tmp_path / "x", 600, "0" * 64, QUICK)
    assert (tmp_path / "x").stat().st_size <= 600
