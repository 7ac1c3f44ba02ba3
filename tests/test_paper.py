"""The paper's figures, read off its pages a second time."""

import csv

import pytest

from hdc.paper import DATASETS, TABLES
from hdc.presets import PRESETS

K = (1, 5, 10, 20, 50)
# The rows of Tables 3, 4 and 5 as they are printed; of two figures for random weights, the one in parentheses.
TABLE_3 = """
random,resnet3d-18,43.8,19.1
HDC,resnet3d-18,68.5,38.1
random,c3d,51.4,22.5
HDC,c3d,72.3,39.3
random,r2plus1d-10,56.2,22.0
HDC,r2plus1d-10,76.2,39.8
"""
TABLES_4_AND_5 = """
table4,ucf101,random,16.7,27.5,33.7,41.4,53.0
table4,ucf101,HDC,33.9,49.6,55.7,61.6,69.9
table5,hmdb51,random,7.4,20.5,31.9,44.5,66.3
table5,hmdb51,HDC,14.6,28.8,36.1,44.8,57.9
"""
PRESET = {"random": None, "HDC": "table1-hdc"}


def test_table_3() -> None:
    table = TABLES["table3"]
    assert (table.command, table.splits) == ("recognize", (1, 2, 3))
    for row, line in zip(table.rows.values(), csv.reader(TABLE_3.split()), strict=True):
        method, backbone, ucf101, hmdb51 = line
        assert (row.backbone, row.preset) == (backbone, PRESET[method])
        assert row.figures == {"ucf101": {1: float(ucf101)}, "hmdb51": {1: float(hmdb51)}}


def test_tables_4_and_5() -> None:
    rows = [row for name in ("table4", "table5") for row in TABLES[name].rows.values()]
    for row, line in zip(rows, csv.reader(TABLES_4_AND_5.split()), strict=True):
        name, dataset, method, *shares = line
        assert row in TABLES[name].rows.values()
        assert (row.backbone, row.preset) == ("c3d", PRESET[method])
        assert row.figures == {dataset: dict(zip(K, map(float, shares), strict=True))}
        assert (TABLES[name].command, TABLES[name].splits) == ("retrieve", (1,))


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_ablations(name: str) -> None:
    """tests/test_presets.py has their figures; a row's short name is its preset's without the table."""
    table = TABLES[name]
    assert (table.command, table.splits) == ("recognize", (1,))
    for short, row in table.rows.items():
        assert row.backbone == "resnet3d-18"
        assert list(row.figures) == ["ucf101"]
        if row.preset:
            assert row.preset == f"{name}-{short}"
        else:
            assert (short, row.figures) == ("scratch", {"ucf101": {1: None}})


def test_section_4() -> None:
    """Section 4.1: 72.3 and 39.3 with augmentation in Temporal Contrast, 68.9 and 38.0 without."""
    rows = TABLES["section4"].rows
    figures = {"hdc": (72.3, 39.3), "tc-unaugmented": (68.9, 38.0)}
    for name, (ucf101, hmdb51) in figures.items():
        assert rows[name].figures == {"ucf101": {1: ucf101}, "hmdb51": {1: hmdb51}}
        assert rows[name].backbone == "c3d"


def test_names() -> None:
    """Every preset is a row, and what a row names is there."""
    rows = [row for table in TABLES.values() for row in table.rows.values()]
    assert {row.preset for row in rows if row.preset} == set(PRESETS)
    assert {dataset for row in rows for dataset in row.figures} <= set(DATASETS)
