"""Rows arrive as they stand in the file, whatever its format, and as they stand there now."""

import csv
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_fast.trainer.data.read import load_rows
from rlhf_fast.trainer.errors import InputError

# What a reader may take for a date, a number, a Boolean, something missing, or two lines.
TEXTS = [
    "2024-01-02", "2024-01-02T10:00:00", "2024-01-02 10:00:00+02:00", "10:30", "007", "1", "1.10",
    "1e5", "12345678901234567890123", "NA", "N/A", "null", "None", "nan", "true", "False", "inf",
    "  spaces ", "two\nlines", 'a "quoted", word', "\u2028é", "<|end|>", "-", "#1",
]  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> str:
    """Rows in the format that the path's ending, or its lack of one, stands for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


FORMATS = ["d.jsonl", "d.json", "d.csv", "d.parquet", "saved"]
FILES = FORMATS[:4]


@pytest.mark.parametrize("name", FORMATS)
def test_text_stays_text(tmp_path, name):
    rows = [{"prompt": text, "other": text} for text in TEXTS]
    assert list(load_rows(write_rows(tmp_path / name, rows))) == rows


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("layout", ["{}", "data/{}"])
def test_text_of_a_folders_files_stays_text(tmp_path, name, layout):
    """As the hub lays them out: which file is which split, by its name or its folder."""
    ending = Path(name).suffix
    rows = [{"prompt": text} for text in TEXTS]
    write_rows(tmp_path / layout.format(f"train-00000-of-00002{ending}"), rows)
    write_rows(tmp_path / layout.format(f"train-00001-of-00002{ending}"), rows[:3])
    write_rows(tmp_path / layout.format(f"test-00000-of-00001{ending}"), rows[:2])
    (tmp_path / "README.md").write_text("# A dataset\n")
    assert list(load_rows(str(tmp_path))) == rows + rows[:3]
    assert list(load_rows(str(tmp_path), split="test")) == rows[:2]
    across = load_rows(str(tmp_path), split=f"train[{len(rows) - 1}:]+test[:1]")
    assert list(across) == [*rows[-1:], *rows[:3], *rows[:1]]
    with pytest.raises(InputError, match="no split 'validation'; its splits are "):
        load_rows(str(tmp_path), split="validation")


def test_subsets_of_a_folder(tmp_path):
    for name in ("easy", "hard"):
        write_rows(tmp_path / name / "train.jsonl", [{"prompt": name}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: easy/*.jsonl\n"
        "- config_name: hard\n  data_files: hard/*.jsonl\n---\n"
    )
    assert list(load_rows(str(tmp_path), subset="hard")) == [{"prompt": "hard"}]
    with pytest.raises(InputError, match="easy"):
        load_rows(str(tmp_path), subset="other")


@pytest.mark.parametrize("name", [*FORMATS, "dict", "folder"])
def test_what_replaced_a_file_is_read(tmp_path, name):
    """Under the same name, size and time."""
    for word in ("old", "new"):
        rows = [{"prompt": f"the {word} one"}]
        path = tmp_path / name
        if name == "dict":
            made = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
            made.save_to_disk(path)
        else:
            write_rows(path / "train.jsonl" if name == "folder" else path, rows)
        for file in [path, *path.rglob("*")]:
            os.utime(file, ns=(10**18, 10**18))
        assert list(load_rows(str(path))) == rows


@pytest.mark.parametrize("kind", ["a saved Dataset", "of a split", "cut before", "formatted"])
def test_splits_of_a_saved_dataset(tmp_path, kind):
    rows = [{"prompt": text, "n": i} for i, text in enumerate(TEXTS)]
    name = {"of a split": "test", "cut before": "train[:90]"}.get(kind)
    saved = datasets.Dataset.from_list(rows, split=name)
    if kind == "formatted":
        saved.set_format("numpy", columns=["n"])
    saved.save_to_disk(tmp_path / "d")
    own, other = ("test", "train") if kind == "of a split" else ("train", "test")
    assert list(load_rows(str(tmp_path / "d"), split=own)) == rows
    assert list(load_rows(str(tmp_path / "d"), split=f"{own}[:3]")) == rows[:3]
    with pytest.raises(InputError, match=f"no split '{other}'; its splits are '{own}'"):
        load_rows(str(tmp_path / "d"), split=other)


def test_splits_of_a_saved_dict(tmp_path):
    rows = [{"prompt": text} for text in TEXTS]
    made = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=made, test=made.select(range(3))).save_to_disk(tmp_path)
    for split, want in {
        "train[:5]": rows[:5], "test": rows[:3], "train[20:]+test": rows[20:] + rows[:3],
        "train[:25%]": rows[: len(rows) // 4], "all": rows + rows[:3],
    }.items():  # fmt: skip
        assert list(load_rows(str(tmp_path), split=split)) == want
    with pytest.raises(InputError, match="has no rows"):
        load_rows(str(tmp_path), split="test[5:]")
    with pytest.raises(InputError, match="subset=x, but data=.* is a saved dataset"):
        load_rows(str(tmp_path), subset="x")


def test_json_values_stay_what_they_are(tmp_path):
    """Numbers of any size, columns of mixed types, messages with different keys."""
    rows = [
        {"n": 10**40, "mixed": 1, "talk": [{"role": "user", "content": "a"}]},
        {"n": 0.1, "mixed": "1", "talk": [{"role": "user", "content": "b", "name": "c"}]},
        {"mixed": None, "other": {"deep": [1, "2024-01-02"]}},
    ]
    for name in ("d.jsonl", "d.json"):
        got = list(load_rows(write_rows(tmp_path / name, rows)))
        filled = [{"n": None, "mixed": None, "talk": None, "other": None} | row for row in rows]
        assert got == filled and type(got[0]["n"]) is int


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.json", '{"a": "1"}\n{"a": "2"}\n'),
        ("array.jsonl", '\n[{"a": "1"},\n {"a": "2"}]'),
        ("pretty.json", '{\n "a": "1"\n}\n{\n "a": "2"\n}'),
        ("blank.jsonl", '\ufeff{"a": "1"}\r\n\r\n{"a": "2"}'),
        ("D.JSONL", '{"a": "1"}\n{"a": "2"}\n'),
        ("bom.csv", "\ufeffa\r\n1\r\n\r\n2\r\n"),
    ],
)
def test_forms_of_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert list(load_rows(str(tmp_path / name))) == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.jsonl", '{"a": 1}\n["b"]\n', "row 1 is .*expected an object"),
        ("d.json", '{"a": 1}\n{"a": \n', "JSON parse error: .* in row 1, line 3"),
        ("d.csv", "a,b\n1,2\n3\n", "row 1 has 1 fields, but the first line names 2 .line 3"),
        ("d.csv", "a,b\n1,2,3\n", "row 0 has 3 fields"),
        ("d.csv", "a,a\n1,2\n", "names a column twice"),
        ("d.csv", 'a\n"1\n', "cannot be read: unexpected end of data"),
        ("d.parquet", "PAR1", "cannot be read: "),
        ("d.jsonl", "\n\n", "has no rows"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_long_field_of_a_csv(tmp_path):
    limit = csv.field_size_limit()
    text = "x" * (2 * limit)
    assert list(load_rows(write_rows(tmp_path / "d.csv", [{"a": text}]))) == [{"a": text}]
    assert csv.field_size_limit() == limit  # the process's own


def test_digest_is_of_the_rows(tmp_path):
    rows = [{"prompt": text} for text in TEXTS]
    digests = {load_rows(write_rows(tmp_path / name, rows)).digest() for name in FORMATS}
    assert len(digests) == 1
    for other in (rows[::-1], rows[1:], [{"ask": text} for text in TEXTS]):
        assert load_rows(write_rows(tmp_path / "e.jsonl", other)).digest() not in digests


def test_a_folder_of_another_format(tmp_path):
    """Read by datasets, but not through its cache."""
    for text in ("one\ntwo\n", "six\nten\n"):
        (tmp_path / "train.txt").write_text(text)
        os.utime(tmp_path / "train.txt", ns=(10**18, 10**18))
        assert [row["text"] for row in load_rows(str(tmp_path))] == text.split()
