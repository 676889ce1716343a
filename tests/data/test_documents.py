"""Documents out of files of every kind, and the units into which files are cut."""

import gzip
import itertools
import random
import sys

import pytest

from megamtp.data.preprocess import documents
from megamtp.data.preprocess.documents import iterate_documents, read_documents
from megamtp.data.preprocess.inputs import Unit, find_files, plan_units, shard_bytes
from megamtp.errors import UserError
from tests.data.preprocessing import TEXTS, jsonl


def texts_of(*given, key="text"):
    return [text for text, _ in iterate_documents(find_files(given), key)]


def write_zstd(path, data: bytes, **options):
    zstd = pytest.importorskip("backports.zstd")
    path.write_bytes(zstd.compress(data, **options))


def write_parquet(path, values, row_group_size=16, key="text", kind=None):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"other": list(range(len(values))), key: pyarrow.array(values, kind)})
    parquet.write_table(table, path, row_group_size=row_group_size)


def write(path, texts):
    """``texts`` in the format that the name asks for."""
    if path.suffix == ".parquet":
        write_parquet(path, list(texts))
    elif path.suffix == ".zst":
        write_zstd(path, jsonl(texts))
    else:
        path.write_bytes(gzip.compress(jsonl(texts)) if path.suffix == ".gz" else jsonl(texts))
    return path


NAMES = ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet")


@pytest.fixture(params=["orjson", "json"])
def parser(request, monkeypatch):
    if request.param == "orjson":
        pytest.importorskip("orjson")
    else:
        monkeypatch.setitem(sys.modules, "orjson", None)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_texts(name, tmp_path, parser):
    assert texts_of(write(tmp_path / name, TEXTS)) == TEXTS


@pytest.mark.parametrize("name", NAMES)
def test_bytes_read_add_up(name, tmp_path):
    path = write(tmp_path / name, TEXTS)
    assert sum(n for _, n in iterate_documents([path])) == path.stat().st_size


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jsonl").write_bytes(jsonl(["b"]))
    (tmp_path / "sub" / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["a1", "a2"])))
    (tmp_path / "c.jsonl").write_bytes(jsonl(["c"]))
    (tmp_path / "notes.txt").write_bytes(jsonl(["no"]))
    assert texts_of(tmp_path) == ["b", "c", "a1", "a2"]
    assert texts_of(f"{tmp_path}/*.jsonl") == ["b", "c"]
    assert texts_of(tmp_path / "c.jsonl", tmp_path / "sub") == ["c", "a1", "a2"]
    assert texts_of(tmp_path / "notes.txt") == ["no"]
    with pytest.raises(UserError, match="given twice"):
        find_files([tmp_path, f"{tmp_path}/b.*"])
    for nothing in (tmp_path / "none.jsonl", f"{tmp_path}/*.parquet"):
        with pytest.raises(UserError, match="no such file"):
            find_files([nothing])


# --- units


def awkward_lines(seed: int) -> bytes:
    """Lines of all lengths, blank ones, CRLF, and perhaps no newline at the end."""
    rng = random.Random(seed)
    lines = []
    for i in range(60):
        kind = rng.random()
        if kind < 0.15:
            lines.append(rng.choice([b"\n", b"  \n", b"\r\n"]))
        else:
            size = rng.choice([0, 1, 5, 40, 700])
            lines.append(jsonl([f"{i}" + "ä" * size]).rstrip() + rng.choice([b"\n", b"\r\n"]))
    return b"".join(lines).rstrip(b"\r\n" if seed % 2 else b"")


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("seed", [0, 1])
def test_units_hold_each_line_once_and_in_order(unit_bytes, seed, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(awkward_lines(seed))
    expected = texts_of(path)
    assert len(expected) > 40
    units = list(plan_units([path], unit_bytes=unit_bytes))
    assert len(units) == -(-path.stat().st_size // unit_bytes)
    assert [text for unit in units for text, _ in read_documents(unit, "text")] == expected
    for unit in units:
        assert 0 <= sum(n for _, n in read_documents(unit, "text")) <= unit.n_bytes


@pytest.mark.parametrize("n_shards", [1, 2, 3, 7, 40])
def test_shards_in_order_are_the_whole(n_shards, tmp_path):
    files = [write(tmp_path / f"{i}{name[1:]}", [f"{i}:{text}" for text in TEXTS]) for i, name in enumerate(NAMES)]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    files.insert(2, tmp_path / "empty.jsonl")
    shards = [list(plan_units(files, i, n_shards, unit_bytes=100)) for i in range(n_shards)]
    texts = [text for unit in itertools.chain(*shards) for text, _ in read_documents(unit, "text")]
    assert texts == texts_of(*files) and len(texts) == 4 * len(TEXTS)
    sizes = [shard_bytes(files, i, n_shards) for i in range(n_shards)]
    assert sizes == [sum(unit.n_bytes for unit in shard) for shard in shards]
    assert sum(sizes) == sum(file.stat().st_size for file in files)


def test_shards_of_one_file_are_even(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(["x"] * 1000))
    sizes = [shard_bytes([path], i, 3) for i in range(3)]
    assert max(sizes) - min(sizes) <= 1


# --- what is wrong with a file

MALFORMED = [
    (b"{", "not valid JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    (b'{"text": "\xed\xa0\xbd"}', "not UTF-8 at byte 10"),
    (b"[1]", "found list"),
    (b'{"content": "x"}', r"no text under key 'text' \(found keys \['content'\]\)"),
    (b'{"text": null}', "no text under key"),
    (rb'{"text": "\ud83d"}', "surrogate"),
    (rb'{"text": "\udc00\ud800"}', "surrogate"),
]


@pytest.mark.parametrize("line, expected", MALFORMED)
def test_malformed_line(line, expected, tmp_path, parser):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(["good"]) + b"\n" + line + b"\n" + jsonl(["after"]))
    with pytest.raises(UserError, match=expected) as error:
        texts_of(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)
    skipped = []
    unit = Unit(path, 0, path.stat().st_size)
    texts = [text for text, _ in read_documents(unit, "text", lambda describe: skipped.append(describe()))]
    assert texts == ["good", "after"] and skipped == [str(error.value)]


@pytest.mark.parametrize(
    "line, text",
    [
        (rb'{"text": "\ud83d\ude42"}', "🙂"),
        (rb'{"text": "\u0000\ufffd\uffff"}', "\x00\ufffd\uffff"),
        ('{"text": "Ã© \ufdd0"}'.encode(), "Ã© \ufdd0"),
        (b'{"text": "x", "n": NaN, "big": 123456789012345678901234567890}', "x"),
        (b'  {"text": "a\\u2028b\xe2\x80\xa8c"}\r', "a\u2028b\u2028c"),
        (b'{"text": "first", "text": "last"}', "last"),
    ],
)
def test_odd_lines_that_are_fine(line, text, tmp_path, parser):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b"\n")
    assert texts_of(path) == [text]


def test_line_numbers_far_into_a_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(TEXTS) * 50 + b"oops\n" + jsonl(TEXTS))
    line = 50 * len(TEXTS) + 1
    units = plan_units([path], unit_bytes=1000)
    with pytest.raises(UserError, match=rf"x.jsonl:{line}: "):
        for unit in units:
            list(read_documents(unit, "text"))
    write_zstd(tmp_path / "x.jsonl.zst", path.read_bytes())
    with pytest.raises(UserError, match=rf"x.jsonl.zst:{line}: "):
        texts_of(tmp_path / "x.jsonl.zst")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
@pytest.mark.parametrize("damage", ["cut at the end", "cut early", "flipped", "something else", "empty"])
def test_damaged_file(name, damage, tmp_path):
    rng = random.Random(0)
    path = write(tmp_path / name, ["".join(rng.choices("abcdefgh ", k=500)) for _ in range(200)])
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut at the end": data[:-9],
            "cut early": data[:40],
            "flipped": data[:middle] + bytes([data[middle] ^ 0x55]) * 40 + data[middle + 40 :],
            "something else": b"plain text\n",
            "empty": b"",
        }[damage]
    )
    if damage == "empty" and name != "x.parquet":
        assert texts_of(path) == []  # as zcat and zstdcat see it
        return
    with pytest.raises(UserError, match=f"{name}(:|, row )") as error:
        texts_of(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_random_damage_is_told_in_a_line(name, tmp_path):
    """Where it is noticed at all: a zstd frame need not have a checksum."""
    rng = random.Random(1)
    whole = write(tmp_path / name, TEXTS * 3).read_bytes()
    noticed = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 30])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(data)
        try:
            texts_of(tmp_path / name)
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
            noticed += 1
    assert noticed > 50


def test_zstd_with_a_long_window(tmp_path):
    zstd = pytest.importorskip("backports.zstd")
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    write_zstd(tmp_path / "x.jsonl.zst", jsonl(TEXTS), options=options)
    assert texts_of(tmp_path / "x.jsonl.zst") == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_in_one_file(suffix, tmp_path):
    """As ``cat a.gz b.gz`` makes them."""
    a, b = (write(tmp_path / f"{name}.jsonl{suffix}", [name]) for name in "ab")
    (tmp_path / f"both.jsonl{suffix}").write_bytes(a.read_bytes() + b.read_bytes())
    assert texts_of(tmp_path / f"both.jsonl{suffix}") == ["a", "b"]


@pytest.mark.parametrize("package, name", [("backports", "x.jsonl.zst"), ("pyarrow", "x.parquet")])
def test_without_the_package(package, name, tmp_path, monkeypatch):
    path = write(tmp_path / name, TEXTS)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "backports":
        monkeypatch.setattr(documents, "_zstd", lambda: None)
    with pytest.raises(UserError, match="pip install"):
        texts_of(path)


def test_parquet_values_that_are_no_text(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a", None, "c"], row_group_size=1)
    with pytest.raises(UserError, match="a.parquet, row 2: no text"):
        texts_of(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", [b"a"])
    with pytest.raises(UserError, match="b.parquet, row 1: holds bytes"):
        texts_of(tmp_path / "b.parquet")
    write_parquet(tmp_path / "c.parquet", [1])
    with pytest.raises(UserError, match="c.parquet, row 1: no text"):
        texts_of(tmp_path / "c.parquet")
    write_parquet(tmp_path / "d.parquet", ["a"], key="content")
    with pytest.raises(UserError, match="d.parquet: no column 'text'"):
        texts_of(tmp_path / "d.parquet")
    assert texts_of(tmp_path / "d.parquet", key="content") == ["a"]
    write_parquet(tmp_path / "e.parquet", ["large", "strings"], kind="large_string")
    assert texts_of(tmp_path / "e.parquet") == ["large", "strings"]


def test_parquet_that_is_not_utf8(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    values = pyarrow.array([b"fine", b"\xff\xfe"]).cast("string", safe=False)
    write_parquet(tmp_path / "x.parquet", values)
    with pytest.raises(UserError, match="row 2: not UTF-8 at byte 0"):
        texts_of(tmp_path / "x.parquet")


def test_a_file_that_vanishes(tmp_path):
    files = [write(tmp_path / name, TEXTS) for name in NAMES]
    units = [unit for unit in plan_units(files)]
    for file in files:
        file.unlink()
    for unit in units:
        with pytest.raises(UserError, match=f"{unit.file.name}: cannot read"):
            list(read_documents(unit, "text"))
    with pytest.raises(UserError, match="x.jsonl: cannot read"):
        list(plan_units(files))
