# SPDX-License-Identifier: Apache-2.0
"""`verify` accepts an intact artifact and names every way in which one is damaged."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import verify as job
from sg4v_ray.core import verify as module
from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find
from sg4v_ray.core.errors import ArtifactCorrupt, ArtifactMissing, ConfigError, StorageError
from sg4v_ray.core.lease import LeaseTiming, hold
from sg4v_ray.core.records import CaptionRow, ImageRow, to_table
from sg4v_ray.core.row_files import RowFile, RowIndex, hash_ids, put_table, write_index
from sg4v_ray.core.rows import row_index
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.verify import Receipt, hash64, verify
from sg4v_ray.exactly_once.parts import (
    PartFigures,
    PartFooter,
    encode_part,
    part_name,
    split_into_parts,
)

IMAGES, CAPTIONS = Ref(name="images"), Ref(name="captions")
FAST = LeaseTiming(ttl_s=0.6, heartbeat_s=0.1)
ATTEMPT = "rows/attempt-0001"
PART = f"{ATTEMPT}/part-{{:06d}}.parquet".format
NAMES = tuple(f"train/{number:05d}.jpg" for number in range(40))


def caption(key: str, *, reject: str | None = None) -> CaptionRow:
    return CaptionRow(
        id=key,
        source="s",
        uri=f"/data/{key}",
        text=None if reject else f"a red circle in {key}",
        num_tokens=0 if reject else 7,
        finish_reason=None if reject else "stop",
        reject=reject,
        reject_detail=None,
    )


def made(storage: Storage, ref: Ref, **fields: Any) -> Manifest:
    given = {"config": {"of": ref.name}, "inputs": {}, "counts": {}, **fields}
    home = begin(storage, ref, given["config"], inputs=given["inputs"])
    with hold(home, timing=FAST) as lease:
        return commit(storage, ref, lease=lease, **given)


def make_images(storage: Storage, names: tuple[str, ...] = NAMES, rows_per_file: int = 25) -> None:
    home, files = storage.sub(IMAGES.path), []
    for number, first in enumerate(range(0, len(names), rows_per_file)):
        keys = names[first : first + rows_per_file]
        rows = [ImageRow(id=key, source="s", uri=f"/{key}", size_bytes=1) for key in keys]
        path = f"rows/token/part-{number:05d}.parquet"
        files.append(put_table(home, path, to_table(ImageRow, rows)))
    made(
        storage, IMAGES, counts={"rows": len(names), "s": len(names)}, attempts=("rows/token",),
        files=tuple(files),
    )  # fmt: skip


def put_part(folder: Storage, number: int, rows: list[CaptionRow], index: str = "i") -> RowFile:
    """Write a part as the work actors do."""
    table = to_table(CaptionRow, rows)
    footer = PartFooter(
        part=number, writer="w", identity="a", index_sha256=index, software={},
        ids_sha256=hash_ids(table["id"]), figures=PartFigures(rows=len(rows)),
    )  # fmt: skip
    data = encode_part(table, footer)
    folder.put(part_name(number), data)
    return RowFile(
        path=f"{ATTEMPT}/{part_name(number)}", rows=len(rows), size_bytes=len(data),
        ids_sha256=footer.ids_sha256,
    )  # fmt: skip


def rejected(key: str) -> str | None:
    return "cut_off" if key.endswith("3.jpg") else None


def make_captions(storage: Storage, index: RowIndex, ref: Ref = CAPTIONS, **fields: Any) -> None:
    """Write captions of all rows of an index: parts of 10 rows, a tenth of the rows rejected."""
    folder, files = storage.sub(f"{ref.path}/{ATTEMPT}"), []
    for part in split_into_parts(index, 10):
        path = index.files[part.file].path
        keys = module.read_table(index.folder, path, ["id"])["id"].to_pylist()
        keys = keys[part.first : part.first + part.rows]
        rows = [caption(key, reject=rejected(key)) for key in keys]
        files.append(put_part(folder, part.number, rows, index.sha256))
    folder.put("plan.json", json.dumps({"index_sha256": index.sha256}).encode())
    bad = index.rows // 10
    made(
        storage,
        ref,
        inputs={"images@v1": find(storage, IMAGES).fingerprint, "captioner@v1": "abc"},
        counts={
            "rows": index.rows,
            "rejected": bad,
            "rejected_cut_off": bad,
            "tokens": 7 * (index.rows - bad),
            **fields.pop("counts", {}),
        },
        attempts=(ATTEMPT,),
        files=tuple(files),
        **fields,
    )


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = Storage(str(tmp_path_factory.mktemp("intact") / "root"))
    make_images(storage)
    make_captions(storage, row_index(storage, IMAGES))
    return Path(storage.root)


@pytest.fixture
def storage(intact: Path, tmp_path: Path) -> Storage:
    """A root with an index of 40 images in two files, and their captions in five parts."""
    return Storage(str(shutil.copytree(intact, tmp_path / "root")))


@pytest.fixture
def empty(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root"))


def place_of(storage: Storage, path: str, ref: Ref = CAPTIONS) -> Path:
    return Path(storage.root, ref.path, path)


def edit_manifest(
    storage: Storage, ref: Ref = CAPTIONS, name: str = "manifest.json"
) -> "ManifestEditor":
    return ManifestEditor(place_of(storage, name, ref))


class ManifestEditor:
    """Changes a manifest as a wrong commit would have written it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.data: dict[str, Any] = {}

    def __enter__(self) -> dict[str, Any]:
        self.data = json.loads(self._place.read_text())
        return self.data

    def __exit__(self, *_: object) -> None:
        self._place.write_text(json.dumps(self.data))


def problems_of(storage: Storage, ref: Ref = CAPTIONS) -> list[str]:
    """Return the sentences about the problems, without the first and the last line."""
    with pytest.raises(ArtifactCorrupt) as caught:
        verify(storage, ref)
    first, *lines, advice = str(caught.value).split("\n  ")
    assert first.startswith(f"{ref} at {storage.root}/{ref.path} is not as its manifest lists it")
    assert advice.startswith("Restore the named files from a copy and verify again.")
    return lines


def test_an_intact_artifact_gets_a_receipt(storage: Storage) -> None:
    manifest, index = find(storage, CAPTIONS), row_index(storage, CAPTIONS)
    receipt = verify(storage, CAPTIONS)
    assert replace(receipt, seconds=0.0) == Receipt(
        artifact="captions@v1",
        manifest="manifest.json",
        fingerprint=manifest.fingerprint,
        format=2,
        rows=40,
        ids_checked=40,
        attempts=1,
        files=5,
        digests=0,
        size_bytes=sum(one.size_bytes for one in manifest.files),
        ids_sha256=index.sha256,
        hashes="ids of each row file, pages",
        index="the 40 ids of images@v1, in the same order",
        counts={"rows": 40, "tokens": 252, "rejected": 4, "rejected_cut_off": 4},
        inputs=manifest.inputs,
        seconds=0.0,
    )
    images = verify(storage, IMAGES)
    assert (images.rows, images.files, images.counts) == (40, 2, {"rows": 40})
    assert images.index == "none, the rows are not made from one"


def test_it_writes_nothing_and_shows_progress_only_if_asked(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {one: one.stat().st_mtime_ns for one in Path(storage.root).rglob("*")}
    verify(storage, CAPTIONS)
    assert capsys.readouterr().err == ""
    verify(storage, CAPTIONS, progress=True)
    assert "verify rows: 100%" in capsys.readouterr().err
    assert {one: one.stat().st_mtime_ns for one in Path(storage.root).rglob("*")} == before


def flip_middle(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 4] ^= 1  # the second half of a small file is its footer
    file.write_bytes(bytes(data))


def rename_column(file: Path) -> None:
    """Damage the first of the two schemas in a footer."""
    data = file.read_bytes()
    place = data.index(b"finish_reason")
    file.write_bytes(data[:place] + b"F" + data[place + 1 :])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing."),
    "cut": (
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        r"has \d+ bytes, the manifest lists \d+.",
    ),
    "longer": (
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        r"has \d+ bytes, the manifest lists \d+.",
    ),
    "flipped byte": (flip_middle, "is damaged: .*(CRC|checksum).*"),
    "zeros": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "is damaged: .*"),
    "renamed column": (rename_column, "is damaged: its two schemas differ."),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(storage: Storage, kind: str) -> None:
    damage, text = DAMAGE[kind]
    file = place_of(storage, PART(2))
    damage(file)
    (line,) = problems_of(storage)
    assert re.fullmatch(re.escape(f"{file} ") + text, line)


def test_swapped_files_are_named(storage: Storage) -> None:
    one, other = place_of(storage, PART(0)), place_of(storage, PART(1))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    with edit_manifest(storage) as manifest:  # only their hashes tell
        for file, place in zip(manifest["files"], (one, other), strict=False):
            file["size_bytes"] = place.stat().st_size
    lines = problems_of(storage)
    assert [line.partition(" has ")[0] for line in lines] == [str(one), str(other)]
    assert all("has other ids than the manifest lists: sha256" in line for line in lines)


def test_a_wrong_number_of_rows_is_named(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        manifest["files"][1]["rows"] = 11
        manifest["files"][2]["rows"] = 4
    one, other = place_of(storage, PART(1)), place_of(storage, PART(2))
    assert problems_of(storage) == [
        f"{one} has 10 rows, the manifest lists 11.",
        f"{other} has 5 rows, the manifest lists 4.",
    ]


def test_another_hash_in_a_footer_is_named(storage: Storage) -> None:
    rows = [caption(key, reject=rejected(key)) for key in NAMES[:10]]
    table = to_table(CaptionRow, rows)
    footer = PartFooter(
        part=0, writer="w", identity="a", index_sha256="i", ids_sha256="0" * 64, software={},
        figures=PartFigures(rows=10),
    )  # fmt: skip
    data = encode_part(table, footer)
    place_of(storage, PART(0)).write_bytes(data)
    with edit_manifest(storage) as manifest:
        manifest["files"][0]["size_bytes"] = len(data)
    assert problems_of(storage) == [
        f"{place_of(storage, PART(0))} has another hash of its ids in its footer."
    ]


def make_parts(storage: Storage, *parts: tuple[str, ...], **counts: int) -> None:
    """Write captions without an index from lists of ids."""
    folder = storage.sub(f"{CAPTIONS.path}/{ATTEMPT}")
    files = [
        put_part(folder, number, [caption(key) for key in keys])
        for number, keys in enumerate(parts)
    ]
    rows = sum(map(len, parts))
    made(
        storage, CAPTIONS, counts={"rows": rows, "tokens": 7 * rows, "rejected": 0, **counts},
        attempts=(ATTEMPT,), files=tuple(files),
    )  # fmt: skip


def test_a_double_id_within_a_file_is_named(empty: Storage) -> None:
    make_parts(empty, ("a", "b"), ("c", "d", "c"))
    place = place_of(empty, PART(1))
    assert problems_of(empty) == [f"The id 'c' occurs twice: in {place} and in {place}."]


def test_a_double_id_between_files_is_named(empty: Storage) -> None:
    make_parts(empty, ("a", "b"), ("c",), ("b", "a"))
    first, last = place_of(empty, PART(0)), place_of(empty, PART(2))
    assert set(problems_of(empty)) == {
        f"The id {key!r} occurs twice: in {first} and in {last}." for key in "ab"
    }


def test_a_file_that_is_listed_twice_is_a_double_id(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        manifest["files"].append(manifest["files"][0])
    assert any("occurs twice" in line for line in problems_of(storage))


def test_equal_hashes_of_different_ids_are_no_double_id(
    storage: Storage, empty: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "hash64", lambda ids: np.array([len(one) for one in ids.to_pylist()], np.uint64)
    )
    assert verify(storage, CAPTIONS).rows == 40
    with edit_manifest(storage, IMAGES) as manifest:
        manifest["files"] += manifest["files"][1:]
        manifest["counts"]["rows"] += 15
    lines = problems_of(storage, IMAGES)
    assert [line.split("'")[1] for line in lines] == sorted(NAMES[25:])[:10]


def test_hashes_depend_on_the_ids_alone() -> None:
    ids = [f"{number:x}" * (number % 9) for number in range(20_000)] + ["ö", "a\0", "a", "\0", ""]
    whole = hash64(pa.array(ids, pa.large_string()))
    pieces = hash64(pa.chunked_array([ids[:7], [], ids[7:12_000], ids[12_000:]]))
    assert np.array_equal(whole, pieces)
    assert np.array_equal(hash64(pa.array(["x", *ids]).slice(1)), whole)
    assert len(np.unique(whole)) == len(set(ids))
    for empty in (pa.array([], pa.string()), pa.chunked_array([], pa.string())):
        assert len(hash64(empty)) == 0


def test_a_foreign_file_in_the_folder_is_no_problem(storage: Storage) -> None:
    put_part(storage.sub(f"{CAPTIONS.path}/{ATTEMPT}"), 77, [caption(NAMES[0])])
    place_of(storage, f"{ATTEMPT}/notes.txt").write_text("x")
    assert verify(storage, CAPTIONS).files == 5


@pytest.mark.parametrize(
    ("name", "count"), [("rows", 41), ("rejected", 0), ("rejected_cut_off", 5), ("tokens", 1)]
)
def test_a_wrong_count_is_named(storage: Storage, name: str, count: int) -> None:
    with edit_manifest(storage) as manifest:
        right = manifest["counts"][name]
        manifest["counts"][name] = count
    text = f"The manifest counts {count} for {name!r}, the files have {right}."
    assert problems_of(storage) == [text]


def test_a_reason_that_only_the_rows_or_only_the_manifest_has_is_named(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        manifest["counts"]["rejected_repeats"] = manifest["counts"].pop("rejected_cut_off")
    assert sorted(problems_of(storage)) == [
        "The manifest counts 0 for 'rejected_cut_off', the files have 4.",
        "The manifest counts 4 for 'rejected_repeats', the files have 0.",
    ]


def test_only_counts_that_the_manifest_has_are_compared(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        manifest["counts"] = {"questions": 7}
    assert verify(storage, CAPTIONS).counts == {}


def test_rows_without_files_are_a_wrong_count(empty: Storage) -> None:
    made(empty, CAPTIONS, counts={"rows": 2})
    assert problems_of(empty) == ["The manifest counts 2 for 'rows', the files have 0."]
    made(empty, Ref(name="scores"), counts={"questions": 2}, metrics={"accuracy": 0.5})
    assert verify(empty, Ref(name="scores")).files == 0


def retry(storage: Storage, number: int, again: list[CaptionRow], **counts: int) -> None:
    """Commit a retry of some rows."""
    earlier = find(storage, CAPTIONS)
    attempt = f"rows/attempt-{number:04d}"
    file = put_part(storage.sub(f"{CAPTIONS.path}/{attempt}"), 0, again)
    with hold(storage.sub(CAPTIONS.path), timing=FAST) as lease:
        commit(
            storage,
            CAPTIONS,
            config=earlier.config,
            inputs=earlier.inputs,
            counts=earlier.counts | counts,
            attempts=(*earlier.attempts, attempt),
            files=(*earlier.files, replace(file, path=f"{attempt}/{part_name(0)}")),
            lease=lease,
        )


def test_rows_of_a_retry_count_instead_of_those_that_they_replace(storage: Storage) -> None:
    again = [NAMES[place] for place in (3, 13, 23, 33)]
    rows = [caption(again[0]), caption(again[1]), *(caption(one, reject="x") for one in again[2:])]
    retry(storage, 2, rows, rejected=2, rejected_cut_off=0, rejected_x=2, tokens=266)
    receipt = verify(storage, CAPTIONS)
    assert (receipt.manifest, receipt.attempts) == ("manifest-0002.json", 2)
    assert (receipt.rows, receipt.ids_checked, receipt.files) == (40, 44, 6)
    assert receipt.counts["rejected_x"] == 2

    rows = [caption(one) for one in again[2:]]
    retry(storage, 3, rows, rejected=0, rejected_x=0, tokens=280)
    assert verify(storage, CAPTIONS).counts["tokens"] == 280
    with edit_manifest(storage, name="manifest-0003.json") as manifest:
        manifest["counts"]["tokens"] = 266
    assert problems_of(storage) == ["The manifest counts 266 for 'tokens', the files have 280."]


def test_rows_are_checked_in_blocks_of_any_size(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry(storage, 2, [caption(NAMES[3]), caption(NAMES[33])], rejected=2, rejected_cut_off=2)
    with edit_manifest(storage, name="manifest-0002.json") as manifest:
        manifest["counts"]["tokens"] = 266
    whole = verify(storage, CAPTIONS)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 15)
    assert replace(verify(storage, CAPTIONS), seconds=whole.seconds) == whole


def test_a_retry_of_an_unknown_row_is_named(storage: Storage) -> None:
    retry(storage, 2, [caption("train/new.jpg")], rows=41, tokens=259)
    folder = place_of(storage, "rows/attempt-0002")
    assert problems_of(storage)[0] == (
        f"{folder} has the id 'train/new.jpg', which the first attempt does not have (such ids: 1)."
    )


def test_a_double_id_within_a_retry_is_named(storage: Storage) -> None:
    retry(storage, 2, [caption(NAMES[3]), caption(NAMES[3])])
    assert any(f"The id {NAMES[3]!r} occurs twice" in line for line in problems_of(storage))


def test_another_order_than_that_of_the_index_is_named(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        manifest["files"].insert(2, manifest["files"].pop(0))
    assert problems_of(storage) == [
        f"{PART(1)} has other ids than images@v1: row 0 has the id 'train/00010.jpg', the index "
        "has 'train/00000.jpg' there."
    ]


def test_rows_that_the_index_has_more_are_named(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        del manifest["files"][-1]
        manifest["counts"] = {"rows": 35}
    assert problems_of(storage) == ["The first attempt has 35 rows, images@v1 has 40."]


def test_other_ids_than_those_of_the_index_are_named(storage: Storage) -> None:
    keys = [*NAMES[35:39], "train/0003x.jpg"]
    file = put_part(storage.sub(f"{CAPTIONS.path}/{ATTEMPT}"), 4, [caption(one) for one in keys])
    with edit_manifest(storage) as manifest:
        manifest["files"][-1] = asdict(file)
    assert problems_of(storage) == [
        f"{PART(4)} has other ids than images@v1: row 39 has the id 'train/0003x.jpg', the index "
        "has 'train/00039.jpg' there."
    ]


def test_a_damaged_index_is_named(storage: Storage) -> None:
    place_of(storage, "rows/token/part-00001.parquet", IMAGES).write_bytes(b"x")
    (line,) = problems_of(storage)
    assert line.startswith("The index images@v1 cannot be read: ")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda home: shutil.rmtree(home), "images@v1 is not below this root"),
        (
            lambda home: (home / "manifest.json").write_text(
                (home / "manifest.json")
                .read_text()
                .replace('"fingerprint": "', '"fingerprint": "f')
            ),
            "images@v1 was made again from another config",
        ),
    ],
)
def test_an_index_that_is_gone_or_another_is_not_compared(
    storage: Storage, change: Callable[[Path], object], line: str
) -> None:
    change(Path(storage.root, IMAGES.path))
    receipt = verify(storage, CAPTIONS)
    assert line in receipt.index
    assert receipt.index.endswith(", not compared")


def test_rows_of_a_sample_are_compared_with_the_sample_that_was_used(storage: Storage) -> None:
    ref = Ref(name="teacher-captions")
    folder = storage.sub(ref.path)
    table = module.read_table(storage.sub(IMAGES.path), "rows/token/part-00001.parquet", None)
    other = write_index(folder.sub(f"chosen-{'0' * 16}"), [table.slice(0, 3)])
    used = write_index(folder.sub(f"chosen-{'1' * 16}"), [table])
    make_captions(storage, used, ref, counts={"rejected": 1, "rejected_cut_off": 1, "tokens": 98})
    assert verify(storage, ref).index == f"the 15 ids of chosen-{'1' * 16}, in the same order"

    plan = place_of(storage, f"{ATTEMPT}/plan.json", ref)
    plan.unlink()
    assert verify(storage, ref).index == "sample, not compared"
    plan.write_text(json.dumps({"index_sha256": other.sha256}))
    assert "The first attempt has 15 rows, chosen-0000000000000000 has 3." in problems_of(
        storage, ref
    )


def make_folder(storage: Storage, below: str) -> None:
    home = storage.sub("model/v1")
    digests = {}
    for name in ("config.json", "weights.bin") if below else ("samples.arrow", "weights.bin"):
        home.put(f"{below}{name}", name.encode())
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    made(storage, Ref(name="model"), digests=digests)


@pytest.mark.parametrize("below", ["model/", ""])
def test_files_with_digests_are_checked(empty: Storage, below: str) -> None:
    ref = Ref(name="model")
    make_folder(empty, below)
    receipt = verify(empty, ref)
    assert (receipt.digests, receipt.hashes) == (2, "sha256 of each other file")
    assert receipt.size_bytes == len("config.json" if below else "samples.arrow") + 11

    weights = place_of(empty, f"{below}weights.bin", ref)
    weights.write_bytes(b"weights.bim")
    (line,) = problems_of(empty, ref)
    assert line.startswith(f"{weights} was changed: sha256 ")
    weights.unlink()
    assert problems_of(empty, ref) == [f"{weights} is missing."]


def as_format_1(storage: Storage, ref: Ref) -> None:
    with edit_manifest(storage, ref) as manifest:
        del manifest["files"], manifest["format"]
        manifest["facts"], manifest["made"] = manifest.pop("metrics"), manifest.pop("provenance")


def test_format_1_has_no_hashes_and_no_order(storage: Storage) -> None:
    as_format_1(storage, CAPTIONS)
    as_format_1(storage, IMAGES)
    one, other = place_of(storage, PART(0)), place_of(storage, PART(1))
    one.rename(one.with_name("x")), other.rename(one), one.with_name("x").rename(other)
    receipt = verify(storage, CAPTIONS)
    assert receipt.hashes == "none recorded (format 1)"
    assert receipt.index == "the 40 ids of images@v1, order not compared (format 1)"
    assert receipt.counts["tokens"] == 252

    keys = [*NAMES[:9], "train/0000x.jpg"]
    put_part(storage.sub(f"{CAPTIONS.path}/{ATTEMPT}"), 1, [caption(key) for key in keys])
    lines = problems_of(storage)
    assert (
        "The ids are not those of images@v1: 40 rows instead of 40, 1 ids are missing, e.g. "
        "'train/00009.jpg'."
    ) in lines


@pytest.mark.parametrize("data", [b"", b'{"name": ', b"{}", b"[]", b'{"nam": 1}', b"\xff"])
def test_a_damaged_manifest_is_named(storage: Storage, data: bytes) -> None:
    place = place_of(storage, "manifest.json")
    place.write_bytes(data)
    with pytest.raises(ArtifactCorrupt, match=f"{place} is not a manifest of .*Restore it from"):
        verify(storage, CAPTIONS)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("name", "pictures", "it is that of pictures@v1. Restore it"),
        ("files", [], "it lists no row files. Restore it"),
    ],
)
def test_a_manifest_of_another_artifact_or_without_files_is_refused(
    storage: Storage, key: str, value: object, sentence: str
) -> None:
    with edit_manifest(storage) as manifest:
        manifest[key] = value
    with pytest.raises(ArtifactCorrupt, match=sentence):
        verify(storage, CAPTIONS)


@pytest.mark.parametrize(
    ("added", "sentence"),
    [
        ({"format": 3, "seal": 1}, "has format 3, this version reads formats up to 2; install"),
        ({"seal": 1}, r"has fields that this version does not know \(seal\); install"),
    ],
)
def test_a_manifest_of_a_newer_version_is_not_read(
    storage: Storage, added: dict[str, int], sentence: str
) -> None:
    with edit_manifest(storage) as manifest:
        manifest |= added
    with pytest.raises(ConfigError, match=sentence):
        verify(storage, CAPTIONS)


def test_a_changed_fingerprint_is_found(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        found, manifest["fingerprint"] = manifest["fingerprint"], "0" * 16
    assert problems_of(storage) == [
        f"manifest.json has the fingerprint {'0' * 16}, its identity and inputs have {found}."
    ]


def test_a_file_outside_the_attempts_is_named(storage: Storage) -> None:
    with edit_manifest(storage) as manifest:
        manifest["files"].append(manifest["files"][0] | {"path": "rows/other/part.parquet"})
    assert problems_of(storage) == [
        "The manifest lists rows/other/part.parquet, which belongs to none of its attempts."
    ]


def test_all_problems_are_collected_the_first_of_each_kind_first(empty: Storage) -> None:
    make_parts(empty, *((f"id-{number}",) for number in range(15)))
    for number in range(12):
        place_of(empty, PART(number)).unlink()
    damaged = place_of(empty, PART(13))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with edit_manifest(empty) as manifest:
        manifest["files"].append(manifest["files"][0] | {"path": "rows/other/part.parquet"})
    with pytest.raises(ArtifactCorrupt, match=r"\(14 problems\)"):
        verify(empty, CAPTIONS)
    lines = problems_of(empty)
    assert len(lines) == 11
    assert "belongs to none of its attempts" in lines[0]
    assert lines[1] == f"{place_of(empty, PART(0))} is missing."
    assert lines[2].startswith(f"{place_of(empty, PART(13))} is damaged")
    assert lines[3] == f"{place_of(empty, PART(1))} is missing."
    assert lines[-1] == "There are 4 more problems."


def test_a_disk_that_fails_is_no_damaged_artifact(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = Storage.get

    def fails(self: Storage, path: str) -> bytes:
        if path.endswith("000003.parquet"):
            raise OSError("Input/output error")
        return get(self, path)

    monkeypatch.setattr(Storage, "get", fails)
    with pytest.raises(
        StorageError, match=r"000003.parquet cannot be read or written: Input/output error\. "
    ):
        verify(storage, CAPTIONS)


def test_a_bucket(s3: dict[str, str]) -> None:
    storage = Storage("s3://sg4v-test/verify")
    make_images(storage)
    make_captions(storage, row_index(storage, IMAGES))
    assert verify(storage, CAPTIONS).index == "the 40 ids of images@v1, in the same order"
    storage.delete(f"{CAPTIONS.path}/{PART(0)}")
    data = storage.get(f"{CAPTIONS.path}/{PART(3)}")
    storage.put(f"{CAPTIONS.path}/{PART(3)}", data[:-1])
    assert problems_of(storage) == [
        f"{storage.uri(CAPTIONS.path)}/{PART(0)} is missing.",
        f"{storage.uri(CAPTIONS.path)}/{PART(3)} has {len(data) - 1} bytes, the manifest lists "
        f"{len(data)}.",
    ]
    make_folder(storage, "model/")
    assert verify(storage, Ref(name="model")).digests == 2
    for root in ("s3://sg4v-test/elsewhere", "s3://sg4v-none/x"):
        with pytest.raises((ArtifactMissing, StorageError)):
            verify(Storage(root), CAPTIONS)


@pytest.fixture
def call(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run the job with flags and return its output."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["verify", *flags])
        job.run()
        return capsys.readouterr().out

    yield run


def test_the_job_prints_a_table_and_a_summary(
    storage: Storage, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(storage.root).parent)
    *table, summary = call("captions@v1", "--root", "root").splitlines()
    assert "index        the 40 ids of images@v1, in the same order" in table
    sha256 = row_index(storage, CAPTIONS).sha256
    assert re.fullmatch(
        rf"verified captions@v1: 40 ids, each exactly once, 5 files, [\d.]+ kB, sha256 {sha256}",
        summary,
    )


def test_the_job_prints_json(storage: Storage, call: Callable[..., str]) -> None:
    receipt = json.loads(call("images@v1", f"--root={storage.root}", "--json", "--no-progress"))
    assert Receipt(**receipt) == replace(verify(storage, IMAGES), seconds=receipt["seconds"])


@pytest.mark.parametrize(
    ("address", "root", "error", "text"),
    [
        ("captions", ".", ConfigError, "'captions' has no version; write NAME@VERSION"),
        ("Captions@v1", ".", ConfigError, "artifact name 'Captions' must be lower-case"),
        ("captions@v2", ".", ArtifactMissing, "captions@v2 is not finished"),
        ("captions@v1", "elsewhere", ConfigError, "there is no folder .*/elsewhere; check --root"),
        ("captions@v1", "ftp://x", ConfigError, "has the scheme 'ftp'"),
    ],
)
def test_a_wrong_address_or_root_is_one_sentence(
    storage: Storage,
    call: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    root: str,
    error: type[Exception],
    text: str,
) -> None:
    monkeypatch.chdir(storage.root)
    with pytest.raises(error, match=text) as caught:
        call(address, "--root", root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_270_000_000, "1.27 GB"), (999_600, "1 MB")],
)
def test_sizes_have_three_digits(size_bytes: int, text: str) -> None:
    assert job.size_text(size_bytes) == text
