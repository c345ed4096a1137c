# SPDX-License-Identifier: Apache-2.0
"""Every kind of source lists its images with a place from which their exact bytes can be read."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.image_bytes import read
from sg4v_ray.core.images import ImageLimits, Rejected
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.where import Where
from sg4v_ray.sources import listing, tables
from sg4v_ray.sources.catalogue import PaperImages
from sg4v_ray.sources.folder import Glob
from sg4v_ray.sources.index import IndexConfig, Source, run
from sg4v_ray.sources.llava import LlavaImages
from sg4v_ray.sources.tables import HfDataset, ParquetImages
from sg4v_ray.sources.tars import Tars
from sg4v_ray.sources.urls import UrlList

IMAGES = Ref(name="images")
LIMITS = ImageLimits()


@pytest.fixture
def where(tmp_path: Path) -> Where:
    return Where(root=str(tmp_path / "root"))


def index(where: Where, source: Source, **options: bool) -> dict[str, ImageRow]:
    run(IndexConfig(sources=(source,), **options), out=IMAGES, where=where)
    return {row.id: row for row in read_rows(where.storage, IMAGES, ImageRow)}


def bytes_of(rows: dict[str, ImageRow]) -> dict[str, bytes | Rejected]:
    return {key: read(row.uri, limits=LIMITS) for key, row in rows.items()}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        pytest.param("*.jpg", {"a.jpg"}, id="star stays in its folder"),
        pytest.param("**/*.jpg", {"a.jpg", "x/b.jpg", "x/y/c.jpg"}, id="two stars span folders"),
        pytest.param("x/?.jpg", {"b.jpg"}, id="question mark"),
        pytest.param("x/y/[!ab].jpg", {"c.jpg"}, id="class"),
        pytest.param("{1..2}.png", {"1.png", "2.png"}, id="range"),
        pytest.param("{00..00}.png", {"00.png"}, id="range keeps its zeros"),
    ],
)
def test_a_pattern_names_files(
    where: Where, tmp_path: Path, pattern: str, wanted: set[str]
) -> None:
    for name in ("a.jpg", "x/b.jpg", "x/y/c.jpg", "1.png", "2.png", "00.png", "note.txt"):
        write(tmp_path / "in" / name, b"1")
    assert set(index(where, Glob(pattern=f"{tmp_path}/in/{pattern}"))) == wanted


def test_a_pattern_that_names_nothing_is_refused(where: Where, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        index(where, Glob(pattern=f"{tmp_path}/*.jpg"))


def test_a_range_with_a_hole_is_refused(where: Where, tmp_path: Path) -> None:
    for number in (0, 1, 3):
        write(tmp_path / f"in/{number}.png", b"1")
    with pytest.raises(ConfigError, match=r"2 of the 5 names .* match no file, e\.g\. 2\.png"):
        index(where, Glob(pattern=f"{tmp_path}/in/{{0..4}}.png"))


def test_links_are_followed_and_never_in_circles(where: Where, tmp_path: Path) -> None:
    write(tmp_path / "far/away/a.jpg", b"1")
    write(tmp_path / "in/b.jpg", b"2")
    (tmp_path / "in/link").symlink_to(tmp_path / "far/away")
    (tmp_path / "in/round").symlink_to(tmp_path)
    (tmp_path / "in/lost.jpg").symlink_to(tmp_path / "nowhere")
    found = bytes_of(index(where, Glob(pattern=f"{tmp_path}/in/**/*.jpg")))
    assert found["b.jpg"] == b"2"
    assert found["link/a.jpg"] == b"1"
    assert isinstance(found["lost.jpg"], Rejected)
    assert len(found) == 3


def test_a_folder_that_cannot_be_read_ends_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in/a.jpg", b"1")

    def scandir(path: str) -> object:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match="cannot be read"):
        list(listing.below(str(tmp_path / "in")))


def test_names_that_are_not_utf8_are_written_out(where: Where, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s/a.tar", {"\udcff.jpg": b"1"})
    assert bytes_of(index(where, Tars(shards=str(path)))) == {"a/\\xff": b"1"}


def test_images_of_a_tar_are_read_by_their_place(where: Where, tmp_path: Path) -> None:
    make_tar(tmp_path / "s/sa_000.tar", {"1.jpg": b"one", "1.json": b"{}", "../2.JPG": b"two"})
    make_tar(tmp_path / "s/sa_001.tar", {"1.jpg": b"other"})
    rows = index(where, Tars(shards=f"{tmp_path}/s/sa_{{000..001}}.tar"))
    assert bytes_of(rows) == {
        "sa_000/1": b"one",
        "sa_000/../2": b"two",
        "sa_001/1": b"other",
    }
    assert rows["sa_000/1"].size_bytes == 3


def test_links_and_devices_of_a_tar_are_no_images(where: Where, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s/a.tar", {"good.jpg": b"1"})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("passwd.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert set(index(where, Tars(shards=str(path)))) == {"a/good"}


def test_a_tar_that_ends_early_is_refused(where: Where, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "s/a.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 6000})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ContractError, match="download a broken one again"):
        index(where, Tars(shards=str(path)))


def test_an_archive_that_was_cut_after_it_was_indexed_gives_a_reason(
    where: Where, tmp_path: Path
) -> None:
    path = make_tar(tmp_path / "s/a.tar", {"1.jpg": b"1" * 600, "2.jpg": b"2" * 6000})
    rows = index(where, Tars(shards=str(path)))
    path.write_bytes(path.read_bytes()[:3000])
    found = bytes_of(rows)
    assert found["a/1"] == b"1" * 600
    assert isinstance(found["a/2"], Rejected)
    assert found["a/2"].reason is Reject.TRUNCATED


@pytest.mark.parametrize("data", [b"no archive at all" * 100, b"\x1f\x8b compressed"])
def test_what_is_no_plain_tar_is_refused(where: Where, tmp_path: Path, data: bytes) -> None:
    write(tmp_path / "s/a.tar", data)
    with pytest.raises(ContractError, match="no whole, uncompressed tar"):
        index(where, Tars(shards=f"{tmp_path}/s/*.tar"))


@pytest.mark.parametrize("as_struct", [False, True], ids=["bytes", "struct of datasets"])
def test_images_of_parquet_are_read_by_row_group_and_row(
    where: Where, tmp_path: Path, as_struct: bool
) -> None:
    values = [f"image {n}".encode() for n in range(5)] + [None]
    column = [{"bytes": one, "path": None} for one in values] if as_struct else values
    table = pa.table({"image": column, "key": [f"k{n}" for n in range(6)]})
    (tmp_path / "p").mkdir()
    pq.write_table(table, tmp_path / "p/data.parquet", row_group_size=2)
    rows = index(where, ParquetImages(files=f"{tmp_path}/p/*.parquet", id_column="key"))
    found = bytes_of(rows)
    assert found["k3"] == b"image 3"
    assert [found[f"k{n}"] for n in range(5)] == values[:5]
    assert isinstance(found["k5"], Rejected)
    run(
        IndexConfig(sources=(ParquetImages(files=f"{tmp_path}/p/*.parquet"),)),
        out=Ref(name="images", version="v2"),
        where=where,
    )
    plain = read_rows(where.storage, Ref(name="images", version="v2"), ImageRow)
    assert [row.id for row in plain] == [f"data/{n}" for n in range(6)]


def test_parquet_may_hold_uris(where: Where, tmp_path: Path) -> None:
    image = write(tmp_path / "a.png", b"png")
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"url": [str(image)]}), tmp_path / "p/data.parquet")
    source = ParquetImages(files=f"{tmp_path}/p/data.parquet", image_column="url")
    with pytest.raises(ContractError, match="may name are given with"):
        index(where, source)
    rows = index(where, replace(source, prefixes=(str(tmp_path),)))
    assert bytes_of(rows) == {"data/0": b"png"}


def test_a_row_without_a_uri_stays_a_row(where: Where, tmp_path: Path) -> None:
    table = pa.table({"url": pa.array(["/nowhere/a.png", None], pa.string())})
    pq.write_table(table, tmp_path / "data.parquet")
    source = ParquetImages(
        files=f"{tmp_path}/data.parquet", image_column="url", prefixes=("/nowhere",)
    )
    found = bytes_of(index(where, source))
    assert list(found) == ["data/0", "data/1"]
    assert found["data/1"] == Rejected(Reject.MISSING, "the index has no URI for this image")


def test_a_table_of_uris_cannot_name_pieces_of_other_files(where: Where, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["tar:0:9:/etc/passwd"]}), tmp_path / "data.parquet")
    source = ParquetImages(
        files=f"{tmp_path}/data.parquet", image_column="url", prefixes=("/", "tar:0:9:/")
    )
    with pytest.raises(ContractError, match="names 'tar:0:9:/etc/passwd'"):
        index(where, source)


def test_a_wrong_column_is_refused_with_the_columns_that_there_are(
    where: Where, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"jpg": [b"1"], "n": [1]}), tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match="no column 'image'; it has jpg, n"):
        index(where, ParquetImages(files=f"{tmp_path}/data.parquet"))
    with pytest.raises(ConfigError, match="column 'n' is int64"):
        index(where, ParquetImages(files=f"{tmp_path}/data.parquet", image_column="n"))


def test_a_row_group_that_no_worker_could_hold_is_refused(
    where: Where, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 1000)
    pq.write_table(pa.table({"image": [bytes(2000)]}), tmp_path / "data.parquet")
    with pytest.raises(ContractError, match="smaller row groups"):
        index(where, ParquetImages(files=f"{tmp_path}/data.parquet"))


def save_to_disk(folder: Path, values: list[bytes], *, indices: bool = False) -> None:
    """Write what `datasets.Dataset.save_to_disk` writes, in the version 5 of that library."""
    folder.mkdir()
    table = pa.table({"image": [{"bytes": one, "path": None} for one in values]})
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_indices_data_files": [{"filename": "indices.arrow"}] if indices else None,
    }
    (folder / "state.json").write_text(json.dumps(state))


def test_images_of_a_saved_data_set_are_read_by_batch_and_row(where: Where, tmp_path: Path) -> None:
    values = [f"image {n}".encode() for n in range(5)]
    save_to_disk(tmp_path / "set", values)
    found = bytes_of(index(where, HfDataset(path=str(tmp_path / "set"))))
    assert list(found.values()) == values
    assert list(found) == [f"data-00000-of-00001/{n}" for n in range(5)]


def test_a_shuffled_data_set_is_refused(where: Where, tmp_path: Path) -> None:
    save_to_disk(tmp_path / "set", [b"1"], indices=True)
    with pytest.raises(ContractError, match="flatten_indices"):
        index(where, HfDataset(path=str(tmp_path / "set")))


def test_a_dict_of_splits_is_refused(where: Where, tmp_path: Path) -> None:
    write(tmp_path / "set/dataset_dict.json", b"{}")
    with pytest.raises(ConfigError, match="name one of its folders"):
        index(where, HfDataset(path=str(tmp_path / "set")))


def llava(tmp_path: Path, images: list[Any]) -> LlavaImages:
    records = [
        {"id": str(n), "conversations": [{"from": "human", "value": "<image>\nHi"}]}
        | ({"image": image} if image else {})
        for n, image in enumerate(images)
    ]
    write(tmp_path / "mix.json", json.dumps(records).encode())
    return LlavaImages(json=f"{tmp_path}/mix.json", images=f"{tmp_path}/data")


def test_a_llava_json_lists_each_of_its_images_once(where: Where, tmp_path: Path) -> None:
    write(tmp_path / "data/coco/1.jpg", b"one")
    write(tmp_path / "data/not_named.jpg", b"x")
    rows = index(where, llava(tmp_path, ["coco/1.jpg", None, "coco/1.jpg"]))
    assert bytes_of(rows) == {"coco/1.jpg": b"one"}


def test_images_that_a_llava_json_names_and_nobody_has_are_told_before_any_gpu_is_asked_for(
    where: Where, tmp_path: Path
) -> None:
    write(tmp_path / "data/1.jpg", b"one")
    source = llava(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    with pytest.raises(ContractError, match=r"llava: 1 of 3 images are there \(33\.3%\)"):
        index(where, source)
    rows = index(where, source, allow_incomplete=True)
    assert len(rows) == 3
    assert find(where.storage, IMAGES).metrics["completeness"] == {"llava": [1, 3]}


@pytest.mark.parametrize("path", ["/etc/passwd", ["a.jpg"], "../secret.jpg", "a/../../b.jpg"])
def test_a_llava_json_cannot_lead_out_of_its_folder(
    where: Where, tmp_path: Path, path: object
) -> None:
    write(tmp_path / "data/1.jpg", b"one")
    with pytest.raises(ContractError, match="no path below"):
        index(where, llava(tmp_path, [path]))


def test_a_source_of_the_paper_keeps_the_published_paths_and_counts(
    where: Where, tmp_path: Path
) -> None:
    write(tmp_path / "data/wikiart/images/a.jpg", b"one")
    source = PaperImages(name="wikiart", data_root=f"{tmp_path}/data")
    with pytest.raises(ContractError, match="wikiart: 1 of 500"):
        index(where, source)
    assert set(index(where, source, allow_incomplete=True)) == {"wikiart/images/a.jpg"}


def test_a_list_of_urls_has_its_own_ids_or_hashes(where: Where, tmp_path: Path) -> None:
    lines = "# comment\nhttps://a.org/1.jpg\n\nmine\thttps://a.org/2.jpg\ns3://b/3.jpg\n"
    lines += "https://a.org/1.jpg\n"  # again, which is no other image
    write(tmp_path / "urls.txt", lines.encode())
    rows = index(where, UrlList(path=f"{tmp_path}/urls.txt", prefixes=("s3://b",)))
    assert rows["mine"].uri == "https://a.org/2.jpg"
    assert len(rows) == 3


@pytest.mark.parametrize(
    "line", [b"no url here", b"\xff\xfe", b"tar:0:9:/etc/passwd", b"/etc/shadow", b"/d/../a"]
)
def test_a_line_without_a_url_is_refused_by_its_number(
    where: Where, tmp_path: Path, line: bytes
) -> None:
    write(tmp_path / "urls.txt", b"https://a.org/1.jpg\n" + line)
    with pytest.raises(ContractError, match="line 2"):
        index(where, UrlList(path=f"{tmp_path}/urls.txt", prefixes=("/d",)))
