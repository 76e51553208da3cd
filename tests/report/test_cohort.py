"""The page and the table of many scans, without a browser."""

import csv
from pathlib import Path

import pytest

from resunet_jax.report.cohort import COHORT_COLUMNS, cohort_row, write_cohort_csv, write_cohort_page
from tests.report.example import HOSTILE, example_report


def test_a_row_has_all_columns() -> None:
    row = cohort_row(example_report(warnings=["a", "b"]))
    assert list(row) == list(COHORT_COLUMNS)
    assert (row["name"], row["left_percent"], row["right_lung_ml"], row["warnings"]) == ("scan_1", 15.0, None, "a | b")


def test_each_column_has_its_own_value() -> None:
    report = example_report(uncertainty={"pairwise_dice": 0.8})
    report["lung"]["right_ml"] = 2321.0
    report["infection"] |= {"volume_interval_ml": [400.0, 700.0], "involvement_interval_percent": [9.0, 16.0]}
    expected = {
        "lung_ml": 4321.0,
        "left_lung_ml": 2000.0,
        "right_lung_ml": 2321.0,
        "infection_ml": 543.2,
        "involvement_percent": 12.57,
        "left_percent": 15.0,
        "right_percent": 10.9,
        "grade": 2,
        "ground_glass_ml": 443.2,
        "consolidation_ml": 100.0,
        "infection_mean_hu": -412.0,
        "lesions": 3,
        "seconds": 12.3,
        "infection_low_ml": 400.0,
        "infection_high_ml": 700.0,
        "involvement_low_percent": 9.0,
        "involvement_high_percent": 16.0,
        "pairwise_dice": 0.8,
    }
    row = cohort_row(report)
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r=1"])
def test_a_name_is_no_formula(tmp_path: Path, name: str) -> None:
    write_cohort_csv(tmp_path / "a.csv", [example_report(name, warnings=[name])])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == f"'{name}"
    assert row["warnings"] == f"'{name}"
    assert row["infection_mean_hu"] == "-412.0"
    assert row["right_lung_ml"] == ""


def test_numbers_of_the_csv_are_rounded(tmp_path: Path) -> None:
    report = example_report()
    report["infection"]["involvement_percent"] = 0.01234567
    write_cohort_csv(tmp_path / "a.csv", [report])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["involvement_percent"] == "0.0123"


def test_the_csv_is_utf8(tmp_path: Path) -> None:
    reports = [example_report("Łódź, 1"), example_report('a"b')]
    write_cohort_csv(tmp_path / "a.csv", reports)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["Łódź, 1", 'a"b']


def test_the_page_links_and_escapes(tmp_path: Path) -> None:
    reports = [example_report(HOSTILE, warnings=[HOSTILE]), example_report("a b#1"), example_report("javascript:x")]
    write_cohort_page(tmp_path / "index.html", reports)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<img" not in html
    assert html.count("</script>") == 1
    assert 'href="a%20b%231_report.html"' in html
    assert 'href="javascript%3Ax_report.html"' in html
    assert "3 scans, 1 with warnings" in html
    assert "http" not in html.replace("http-equiv", "")


def test_cells_of_the_page_have_a_value_to_sort_by(tmp_path: Path) -> None:
    write_cohort_page(tmp_path / "index.html", [example_report("a", warnings=["x", "y"]), example_report("b")])
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert '<td data-value="12.57">12.6</td>' in html
    assert '<td data-value="2">x<br>y</td>' in html
    assert "2 scans, 1 with warnings" in html


def test_no_scans(tmp_path: Path) -> None:
    write_cohort_page(tmp_path / "index.html", [])
    assert "0 scans" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_agreement_is_a_column_where_members_were_compared(tmp_path: Path) -> None:
    asked = example_report("a", uncertainty={"members": 4, "pairwise_dice": 0.8412, "interval": None})
    asked["infection"] |= {"volume_interval_ml": [400.0, 700.0], "involvement_interval_percent": None}
    row, old = cohort_row(asked), cohort_row(example_report("b"))  # a report of before has none of these keys
    assert (row["infection_low_ml"], row["infection_high_ml"], row["involvement_low_percent"]) == (400, 700, None)
    assert (row["pairwise_dice"], old["pairwise_dice"], old["infection_low_ml"]) == (0.8412, None, None)
    for name, reports in (("with", [asked, example_report("b")]), ("without", [example_report("b")])):
        write_cohort_page(tmp_path / f"{name}.html", reports)
    assert "Agreement" in (tmp_path / "with.html").read_text(encoding="utf-8")
    assert ">0.84<" in (tmp_path / "with.html").read_text(encoding="utf-8")
    assert "Agreement" not in (tmp_path / "without.html").read_text(encoding="utf-8")
