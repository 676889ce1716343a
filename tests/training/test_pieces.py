"""Any layout reads what any other has written: held to NumPy's indexing, over random layouts."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open

from megamtp.engine.fragments import Fragment
from megamtp.errors import UserError
from megamtp.training import pieces as pieces_module
from megamtp.training.checkpoint import Checkpoint, make_manifest, write_manifest
from megamtp.training.pieces import write_pieces

KINDS = ("weight", "exp_avg", "exp_avg_sq")
Tensors = dict[str, dict[str, np.ndarray]]  # by name and kind


class Share(NamedTuple):
    """Elements of a tensor that a rank holds, as a fragment counts them."""

    name: str
    columns: tuple[int, int] | None
    start: int
    stop: int
    is_owner: bool = True

    def of(self, array: np.ndarray) -> np.ndarray:
        matrix = array.reshape(-1, array.shape[-1])
        return (matrix if self.columns is None else matrix[:, slice(*self.columns)]).reshape(-1)[self.start : self.stop]


def random_tensors(draw: random.Random, count: int = 6) -> Tensors:
    """Mostly matrices of up to 9 x 9, some vectors and cubes; every element has another value."""
    shapes = [tuple(draw.randint(1, 9) for _ in range(draw.choice((1, 2, 2, 2, 3)))) for _ in range(count)]
    return {f"tensor{index}": numbered(shape, 10_000 * index) for index, shape in enumerate(shapes)}


def numbered(shape: tuple[int, ...], first: int = 0) -> dict[str, np.ndarray]:
    numbers = first + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return {kind: numbers + 1000 * index for index, kind in enumerate(KINDS)}


def random_layout(draw: random.Random, tensors: Tensors, tp: int, dp: int) -> list[list[Share]]:
    """The shares of tp x dp ranks: ZeRO cuts a TP rank's slices, laid end to end, at arbitrary places."""
    slices = {name: tensor_slices(draw, name, kinds["weight"], tp) for name, kinds in tensors.items()}
    ranks = []
    for tp_rank in range(tp):
        local = [cut[tp_rank] for cut in slices.values()]
        for low, high in pairwise(random_borders(draw, sum(share.stop - share.start for share in local), dp)):
            shares, position = [], 0
            for share in local:
                start, stop = max(low - position, 0), min(high - position, share.stop - share.start)
                if start < stop:
                    shares.append(share._replace(start=share.start + start, stop=share.start + stop))
                position += share.stop - share.start
            ranks.append(shares)
    return ranks


def tensor_slices(draw: random.Random, name: str, array: np.ndarray, tp: int) -> list[Share]:
    """Each TP rank's slice: uneven rows, uneven columns, or the whole tensor, which the first rank owns."""
    width = array.shape[-1]
    rows = array.size // width
    cut = draw.choice(("rows", "columns", "whole"))
    if cut == "rows" and array.ndim > 1:
        return [Share(name, None, a * width, b * width) for a, b in pairwise(random_borders(draw, rows, tp))]
    if cut == "columns" and array.ndim > 1 and width >= tp:
        borders = [0, *sorted(draw.sample(range(1, width), tp - 1)), width]
        return [Share(name, columns, 0, rows * (columns[1] - columns[0])) for columns in pairwise(borders)]
    columns = draw.choice((None, (0, width)))
    return [Share(name, columns, 0, array.size, is_owner=rank == 0) for rank in range(tp)]


def random_borders(draw: random.Random, size: int, parts: int) -> list[int]:
    return [0, *sorted(draw.choices(range(size + 1), k=parts - 1)), size]


def as_fragment(share: Share, tensors: Tensors, *, filled: bool) -> Fragment:
    """Views into larger memory, as those of a partition are; NaN everywhere if not ``filled``."""
    views = {}
    for kind in KINDS:
        flat = torch.full((share.stop - share.start + 7,), float("nan"))
        views[kind] = flat[3:-4]
        if filled:
            views[kind].copy_(torch.tensor(share.of(tensors[share.name][kind])))
    shape = tensors[share.name]["weight"].shape
    return Fragment(share.name, shape, share.start, views, share.is_owner, share.columns)


def save(folder: Path, tensors: Tensors, ranks: list[list[Share]]) -> Checkpoint:
    """A checkpoint of ``ranks``, by the real writer."""
    folder.mkdir()
    entries = []
    for rank, shares in enumerate(ranks):
        held = [as_fragment(share, tensors, filled=True) for share in shares]
        entries.append(write_pieces(folder / f"rank-{rank:05d}.safetensors", held))
    manifest = make_manifest(entries, step=1, optimizer_steps=1, model={}, state={})
    write_manifest(folder, manifest)
    return Checkpoint.open(folder)


def require_read(checkpoint: Checkpoint, tensors: Tensors, shares: list[Share]) -> None:
    """Reads the shares of a rank and compares bit for bit."""
    wanted = [as_fragment(share, tensors, filled=False) for share in shares]
    checkpoint.read_into(wanted)
    for share, fragment in zip(shares, wanted, strict=True):
        for kind, view in fragment.tensors.items():
            assert np.array_equal(view.numpy(), share.of(tensors[share.name][kind])), (share, kind)
            around = torch.tensor([]).set_(view.untyped_storage())
            assert around.isnan().sum() == 7, f"{share}: written outside the view"


SIZES = [(1, 1), (1, 4), (2, 1), (2, 3), (3, 5), (4, 2)]  # tp, dp


@pytest.mark.parametrize("seed", range(8))
def test_every_layout_reads_every_layout(tmp_path, seed):
    draw = random.Random(seed)
    tensors = random_tensors(draw)
    layouts = [random_layout(draw, tensors, tp, dp) for tp, dp in SIZES]
    for index, written in enumerate(layouts):
        checkpoint = save(tmp_path / str(index), tensors, written)
        checkpoint.verify()
        for name, kinds in tensors.items():
            for kind, array in kinds.items():
                assert np.array_equal(checkpoint.tensor(name, kind).numpy(), array)
        for ranks in layouts:
            for shares in ranks:
                require_read(checkpoint, tensors, shares)


@pytest.mark.parametrize("seed", range(3))
def test_any_range_of_any_band_reads(tmp_path, seed):
    draw = random.Random(seed)
    tensors = random_tensors(draw)
    checkpoint = save(tmp_path / "saved", tensors, random_layout(draw, tensors, 3, 4))
    for tensor in checkpoint.manifest["tensors"].values():
        draw.shuffle(tensor["pieces"])  # their order means nothing
    for _ in range(300):
        name, kind = draw.choice(list(tensors)), draw.choice(KINDS)
        array = tensors[name][kind]
        left, right = sorted(draw.sample(range(array.shape[-1] + 1), 2))
        size = array.size // array.shape[-1] * (right - left)
        start, stop = sorted(draw.choices(range(size + 1), k=2))
        found = checkpoint.read(name, kind, start, stop, (left, right))
        assert found.dtype == torch.float32
        assert np.array_equal(found.numpy(), Share(name, (left, right), start, stop).of(array))


def test_ranks_without_a_fragment(tmp_path):
    """More ranks than elements."""
    tensors = {"norm": numbered((3,))}
    ranks = [[Share("norm", None, i, i + 1), Share("norm", None, i, i)] for i in range(3)] + [[], []]
    checkpoint = save(tmp_path / "saved", tensors, ranks)
    assert len(checkpoint.manifest["files"]) == 5
    checkpoint.verify()
    for shares in [[], [Share("norm", None, 1, 1)], [Share("norm", None, 0, 3)]]:
        require_read(checkpoint, tensors, shares)
    assert checkpoint.files_of([]) == []


def test_a_rank_with_two_bands_of_a_tensor(tmp_path):
    tensors = {"w": numbered((4, 6))}
    bands = [[Share("w", (0, 2), 0, 8), Share("w", (2, 6), 0, 16)]]
    checkpoint = save(tmp_path / "saved", tensors, bands)
    for shares in bands, [[Share("w", None, 5, 24)]]:
        require_read(checkpoint, tensors, shares[0])


# --- what is read


class CountedFile:
    """A file that counts in ``read`` the elements read of it, by its name; an entry for each opening."""

    def __init__(self, opened: list[str], read: Counter, path: Path):
        self.file, self.name, self.read = safe_open(path, "pt"), path.name, read
        opened.append(path.name)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def get_slice(self, key):
        return CountedSlice(self, self.file.get_slice(key))


class CountedSlice:
    def __init__(self, file: CountedFile, flat):
        self.file, self.flat, self.get_shape = file, flat, flat.get_shape

    def __getitem__(self, where: slice) -> torch.Tensor:
        found = self.flat[where]
        self.file.read[self.file.name] += found.numel()
        return found


@pytest.fixture
def counted(monkeypatch):
    """(names of the files opened, in order; elements read by file) from now on."""
    opened, read = [], Counter()
    monkeypatch.setattr(pieces_module, "safe_open", lambda path, framework: CountedFile(opened, read, path))
    return opened, read


WIDE = {f"layers.{i}.wo": numbered((16, 24), 10_000 * i) for i in range(20)}


def grid_layout(tp: int, dp: int, cut: str) -> list[list[Share]]:
    """Even rows or columns of ``WIDE`` on ``tp`` ranks, each tensor's slice cut into ``dp`` equal runs."""
    size = 16 * 24 // tp
    ranks = [[] for _ in range(tp * dp)]
    for name in WIDE:
        for rank, shares in enumerate(ranks):
            tp_rank, dp_rank = divmod(rank, dp)
            first, columns = (
                (tp_rank * size, None) if cut == "rows" else (0, (tp_rank * 24 // tp, tp_rank * 24 // tp + 24 // tp))
            )
            run = first + dp_rank * size // dp, first + (dp_rank + 1) * size // dp
            shares.append(Share(name, columns, *run))
    return ranks


@pytest.mark.parametrize(
    ("written", "reading", "files", "elements"),
    [
        ((4, 4, "rows"), (4, 1, "rows"), 4, 1 / 4),
        ((1, 1, "rows"), (4, 1, "rows"), 1, 1 / 4),
        ((1, 16, "rows"), (4, 4, "rows"), 1, 1 / 16),
        ((4, 4, "columns"), (4, 1, "columns"), 4, 1 / 4),
        ((4, 1, "columns"), (2, 1, "columns"), 2, 1 / 2),
        ((4, 4, "columns"), (1, 4, "rows"), 4, 1 / 4),
        ((2, 2, "columns"), (2, 4, "columns"), 1, 1 / 8),
        ((4, 1, "columns"), (4, 1, "rows"), 4, 1 / 4),
        # Columns of whole rows: from the first to the last one that is wanted, in memory that is only mapped.
        ((4, 1, "rows"), (4, 1, "columns"), 4, 4 * (3 * 24 + 6) / (16 * 24)),
    ],
    ids=str,
)
def test_a_rank_reads_its_part_and_opens_each_file_once(tmp_path, counted, written, reading, files, elements):
    checkpoint = save(tmp_path / "saved", WIDE, grid_layout(*written))
    opened, read = counted
    for shares in grid_layout(*reading):
        opened.clear()
        read.clear()
        require_read(checkpoint, WIDE, shares)
        assert len(opened) == len(set(opened)) == files
        assert read.total() == len(WIDE) * len(KINDS) * 16 * 24 * elements
        assert opened == checkpoint.files_of([as_fragment(share, WIDE, filled=False) for share in shares])


@pytest.mark.parametrize("seed", range(3))
def test_files_of_are_those_that_hold_a_wanted_element(tmp_path, seed):
    draw = random.Random(seed)
    tensors = random_tensors(draw)
    numbers = {name: np.arange(kinds["weight"].size).reshape(kinds["weight"].shape) for name, kinds in tensors.items()}
    ranks = random_layout(draw, tensors, 3, 4)
    checkpoint = save(tmp_path / "saved", tensors, ranks)
    for share in (share for shares in random_layout(draw, tensors, 4, 5) for share in shares):
        expected = [
            f"rank-{rank:05d}.safetensors"
            for rank, shares in enumerate(ranks)
            for stored in shares
            if stored.is_owner and stored.name == share.name
            if np.intersect1d(share.of(numbers[share.name]), stored.of(numbers[share.name])).size
        ]
        assert checkpoint.files_of([as_fragment(share, tensors, filled=False)]) == expected


# --- damage


@pytest.fixture(params=range(4))
def cut_apart(request, tmp_path) -> tuple[Checkpoint, Tensors]:
    draw = random.Random(request.param)
    tensors = random_tensors(draw, count=3) | {"wide": numbered((7, 11))}
    return save(tmp_path / "saved", tensors, random_layout(draw, tensors, 3, 2)), tensors


def whole(tensors: Tensors, name: str) -> list[Fragment]:
    return [as_fragment(Share(name, None, 0, tensors[name]["weight"].size), tensors, filled=False)]


def test_a_missing_piece_is_found(cut_apart):
    checkpoint, tensors = cut_apart
    for name, tensor in checkpoint.manifest["tensors"].items():
        for _ in range(len(tensor["pieces"])):
            lost = tensor["pieces"].pop(0)
            wanted = whole(tensors, name)
            for read in (checkpoint.read_into, checkpoint.files_of):
                with pytest.raises(UserError, match=rf"{name} .* is not wholly there; use an earlier checkpoint"):
                    read(wanted)
            assert all(view.isnan().all() for view in wanted[0].tensors.values())
            for kept in tensor["pieces"]:  # what is there still reads
                require_read(checkpoint, tensors, [Share(name, kept["columns"], kept["start"], kept["stop"])])
            tensor["pieces"].append(lost)
        checkpoint.read_into(whole(tensors, name))


def test_elements_held_twice_are_found(cut_apart):
    checkpoint, tensors = cut_apart
    for name, tensor in checkpoint.manifest["tensors"].items():
        for piece in list(tensor["pieces"]):
            tensor["pieces"].append(piece | {"start": piece["stop"] - 1})
            with pytest.raises(UserError, match=f"{name} .* is there twice"):
                checkpoint.read_into(whole(tensors, name))
            tensor["pieces"].pop()


def test_a_hole_as_large_as_an_overlap_is_found(tmp_path):
    """Counting elements would find them complete."""
    tensors = {"w": numbered((4, 6))}
    ranks = [[Share("w", columns, 0, 12)] for columns in ((0, 3), (3, 6))]
    checkpoint = save(tmp_path / "saved", tensors, ranks)
    for columns in ([0, 3], [2, 5], [1, 4]):
        checkpoint.manifest["tensors"]["w"]["pieces"][1]["columns"] = columns
        with pytest.raises(UserError, match="is there twice|is not wholly there"):
            checkpoint.read_into(whole(tensors, "w"))


def test_a_truncated_file_is_found(tmp_path):
    tensors = {"w": numbered((4, 6))}
    checkpoint = save(tmp_path / "saved", tensors, [[Share("w", None, 0, 10)], [Share("w", None, 10, 24)]])
    file = checkpoint.path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="rank-00001.safetensors: has .* bytes, .* expected"):
        Checkpoint.open(checkpoint.path)
    with pytest.raises(UserError, match="rank-00001.safetensors: damaged"):
        checkpoint.verify(checkpoint.files_of(whole(tensors, "w")))
    with pytest.raises(UserError, match="rank-00001.safetensors: cannot be read"):
        checkpoint.read_into(whole(tensors, "w"))
    require_read(checkpoint, tensors, [Share("w", None, 2, 10)])


def test_a_piece_that_is_shorter_than_the_manifest_says_is_found(tmp_path):
    tensors = {"w": numbered((4, 6))}
    checkpoint = save(tmp_path / "saved", tensors, [[Share("w", None, 0, 10)]])
    checkpoint.manifest["tensors"]["w"]["pieces"][0]["stop"] = 24
    with pytest.raises(UserError, match=r"rank-00000.safetensors: cannot be read: w: \[10\], expected \[24\]"):
        checkpoint.read_into(whole(tensors, "w"))
