# SPDX-License-Identifier: Apache-2.0
"""The report, the card and the export of finished captions say what the rows say."""

import io
import json
from pathlib import Path

import pytest

from sg4v_ray.analysis.captioning import write_report
from sg4v_ray.captions.export import export, image_of
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.llava_json import read_records
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.core.where import Where
from sg4v_ray.sources import shapes
from tests.row_artifacts import finish_rows

CAPTIONS = Ref(name="captions")


def row(key: str, uri: str, text: str | None, reject: str | None = None) -> CaptionRow:
    return CaptionRow(
        id=key,
        source="drawn",
        uri=uri,
        text=text,
        num_tokens=7,
        finish_reason="stop" if text else None,
        reject=reject,
        reject_detail=None,
    )


@pytest.fixture
def where(tmp_path: Path) -> Where:
    """Three captions and a reject; a second attempt made a caption of one of two rejects."""
    where = Where(root=str(tmp_path / "root"))
    image = tmp_path / "data" / "a.png"
    image.parent.mkdir()
    shapes.draw(3).save(image)
    home = where.storage.sub(CAPTIONS.path)
    first = [
        row("a.png", str(image), "A red circle <b>"),
        row("b.png", str(image), None, "missing"),
        row("c.png", str(image), None, "missing"),
    ]
    second = [row("c.png", "/nowhere/x/c.png", "A blue triangle")]
    home.put(
        "curves/1.json",
        json.dumps(
            [
                {"seconds": 5.0, "rows": 0, "tokens": 0, "actors": 1},
                {"seconds": 10.0, "rows": 50, "tokens": 700, "actors": 1},
            ]
        ).encode(),
    )
    finish_rows(where.storage, CAPTIONS, CaptionRow, first, second, metrics={"rows_per_s": 12.5})
    return where


def test_the_figures_count_each_row_once_from_its_newest_attempt(where: Where) -> None:
    figures = write_report(captions=CAPTIONS, where=where)
    assert figures["rows"] == 3
    assert figures["captioned"] == 2
    assert figures["rejected_by_reason"] == {"missing": 1}
    assert figures["mean_chars"] == 15.5
    assert json.loads(where.storage.get("captions/v1/report.json")) == figures


def test_the_page_shows_curve_lengths_rejects_and_images_and_loads_nothing(where: Where) -> None:
    write_report(captions=CAPTIONS, where=where)
    page = where.storage.get("captions/v1/report.html").decode()
    for title in ("Images a second", "Captions by characters", "Rejected"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "A red circle &lt;b&gt;" in page
    assert page.count("<article") == 3
    assert "http" not in page.replace("http-equiv", "")


def test_the_card_names_inputs_and_counts(where: Where) -> None:
    write_report(captions=CAPTIONS, where=where)
    card = where.storage.get("captions/v1/README.md").decode()
    assert "2 captions of 3 images" in card
    assert "| rejected: missing | 1 images |" in card


def test_the_export_has_the_published_schema_and_leaves_rejects_out(where: Where) -> None:
    name = "sharegpt4v_instruct_gpt4-vision_cap100k.json"
    assert export(captions=CAPTIONS, to=name, seed=0, hold_out=HoldOut(), where=where) == 2
    data = where.storage.get(f"captions/v1/{name}")
    records = {one["id"]: one for one in read_records(io.BytesIO(data), where="")}
    assert set(records) == {"a.png", "c.png"}
    assert records["a.png"]["image"] == "a.png"
    assert records["a.png"]["conversations"][1] == {"from": "gpt", "value": "A red circle <b>"}


def test_the_export_leaves_out_what_people_read(where: Where) -> None:
    hold_out = HoldOut(per_source=1, seed=0)
    (read,) = hold_out.of((key, "test") for key in ("a.png", "b.png", "c.png"))
    left = export(captions=CAPTIONS, to="rest.json", seed=0, hold_out=hold_out, where=where)
    assert left == len({"a.png", "c.png"} - {read}) == 1


@pytest.mark.parametrize(
    ("key", "uri", "image"),
    [
        ("coco/1.jpg", "/data/coco/1.jpg", "coco/1.jpg"),
        ("sa_0/1", "tar:1:2:/data/sa_0.tar", "tar:1:2:/data/sa_0.tar"),
        ("1.jpg", "/data/11.jpg", "/data/11.jpg"),
    ],
)
def test_a_record_names_a_path_below_the_data_folder_where_there_is_one(
    key: str, uri: str, image: str
) -> None:
    assert image_of(key, uri) == image
