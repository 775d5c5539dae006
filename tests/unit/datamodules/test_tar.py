from __future__ import annotations

import io
import tarfile

import pytest

from datamodules.tar import BLOCK, MAX_EXTENDED, TarError, belongs, walk

NAMES = ["a.json", "deep/er/b.png", "x" * 90 + "/" + "y" * 120 + ".json", "ü漢.json", "p" * 100, "q" * 101]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar(members, form=tarfile.PAX_FORMAT, change=lambda info: None):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            out.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def walked(data):
    return [(m.name, m.offset, m.size) for m in walk(io.BytesIO(data), len(data))]


def truth(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as found:
        return [(info.name, info.offset_data, info.size) for info in found if info.isreg()]


def header(name=b"a.json", size=b"00000000000\0", kind=b"0", **fields):
    block = bytearray(BLOCK)
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = size
    block[156:157] = kind
    block[257:265] = b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records, kind=b"x"):
    data = b""
    for key, value in records.items():
        body = b" " + key + b"=" + value + b"\n"
        length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
        data += str(length).encode() + body
    return header(b"pax", b"%011o\0" % len(data), kind) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


END = bytes(2 * BLOCK)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_members_are_those_that_pythons_reader_finds(form):
    names = [name for name in NAMES if form != tarfile.USTAR_FORMAT or len(name) < 100]
    data = tar([(name, b"x" * (700 * number)) for number, name in enumerate(names)], form)
    assert walked(data) == truth(data)
    assert [name for name, _, _ in walked(data)] == names


def test_times_with_fractions_and_directories_are_passed_over():
    def change(info):
        info.mtime = 1.5  # a pax record before each member, as WebDataset's writer makes them
        if not info.size:
            info.type = tarfile.DIRTYPE

    data = tar([("d", b""), ("d/a.json", b"{}")], change=change)
    assert walked(data) == truth(data)
    assert [name for name, _, _ in walked(data)] == ["d/a.json"]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_header_belongs_to_its_own_member_only(form):
    names = [name for name in NAMES if form != tarfile.USTAR_FORMAT or len(name) < 100]
    data = tar([(name, b"x" * number) for number, name in enumerate(names)], form)
    for name, offset, size in walked(data):
        block = data[offset - BLOCK : offset]
        assert belongs(block, name, size)
        assert not belongs(block, name, size + 1)
        assert not belongs(block, "other.json", size)
        assert not belongs(bytes(BLOCK), name, size)
        assert not belongs(block[:100], name, size)


KINDS = {b"1": "hard link", b"2": "symlink", b"3": "device", b"6": "fifo", b"K": "long link", b"S": "sparse", b"Z": "?"}


@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
def test_what_is_no_plain_file_is_refused(kind):
    with pytest.raises(TarError, match="byte 0.*no regular file"):
        walked(header(kind=kind) + END)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "cut short"),
        (header(), "cut short"),
        (header() + bytes(BLOCK), "cut short"),
        (bytes(BLOCK), "end marker"),
        (END + b"x", "something else"),
        (bytes(3 * 2**20), "something else"),
        (header(size=b"77777777777\0") + END, "8589934591 bytes.*cut short"),
        (header(size=b"\x80" + b"\xff" * 11) + END, "cut short"),
        (header(size=b"\xff" * 12) + END, "octal"),  # a negative number, at which Python's reader once hung
        (header(size=b"-0000000001\0") + END, "octal"),
        (header(name=b"\xff\xfe") + END, "UTF-8"),
        (header()[:-1] + b"\1" + END, "checksum"),
        (header(kind=b"5", size=b"00000001000\0") + bytes(BLOCK) + END, "no regular file"),
        (pax({b"path": b"\xff"}) + header() + END, "UTF-8"),
        (pax({b"size": b"-1"}) + header() + END, "size"),
        (pax({b"size": b"9" * 18}) + header() + END, "cut short"),
        (pax({b"GNU.sparse.major": b"1"}) + header() + END, "sparse"),
        (pax({b"path": b"b.json"}, b"g") + header() + END, "many members"),
        (header(kind=b"x", size=b"00000000010\0") + b"no recor".ljust(BLOCK, b"\0") + header() + END, "pax records"),
        (header(kind=b"x", size=b"00000000007\0") + b"9999 a=".ljust(BLOCK, b"\0") + header() + END, "pax records"),
        (
            header(kind=b"L", size=b"%011o\0" % (MAX_EXTENDED + 1)) + bytes(MAX_EXTENDED + BLOCK) + END,
            "extension header",
        ),
    ],
)
def test_damaged_and_made_up_headers_are_refused(data, sentence):
    with pytest.raises(TarError, match=sentence):
        walked(data)


def test_extension_headers_count_for_the_next_member_only():
    data = pax({b"path": b"long.json", b"mtime": b"1.5"}) + header() + header(b"b.json") + END
    assert [name for name, _, _ in walked(data)] == ["long.json", "b.json"]
    data = pax({b"comment": b"x"}, b"g") + header() + END
    assert [name for name, _, _ in walked(data)] == ["a.json"]


def test_a_large_file_of_zeros_is_not_read_whole(tmp_path):
    path = tmp_path / "zeros.tar"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    with path.open("rb") as stream, pytest.raises(TarError, match="something else"):
        list(walk(stream, 2**40))
