"""Rows from a file, a folder or the hub, as they stand there.

What a file says is text stays text: no dates, numbers or missing values are made of strings, and
nothing is taken from a cache whose key is not the content. `datasets` reads what only it can: the
hub, folders of `save_to_disk`, and how a folder's files are divided into splits.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.quiet import quiet

if TYPE_CHECKING:
    from rlhf_fast.trainer.config import RunConfig
    from rlhf_fast.trainer.given import Given

Row = dict[str, Any]
Part = list[Row] | pa.Table | datasets.Dataset


class Rows:
    """Rows of all parts, one after the other; a column that a row has not is None there."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.column_names = list(dict.fromkeys(name for part in parts for name in columns(part)))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            for row in dicts(part):
                yield {name: row.get(name) for name in self.column_names}

    def cut(self, start: int, stop: int) -> Rows:
        """Rows start … stop − 1."""
        parts = []
        for part in self.parts:
            if start < len(part) and stop > 0:
                parts.append(part_of(part, max(start, 0), min(stop, len(part))))
            start, stop = start - len(part), stop - len(part)
        return Rows(parts)

    def digest(self) -> str:
        """The same for the same rows in the same order, wherever they were read from."""
        digest = blake2b(digest_size=16)
        for row in self:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def columns(part: Part) -> list[str]:
    if isinstance(part, list):
        return list(dict.fromkeys(name for row in part for name in row))
    return part.column_names


def dicts(part: Part) -> Iterator[Row]:
    if isinstance(part, pa.Table):
        return (row for batch in part.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    return iter(part)


def part_of(part: Part, start: int, stop: int) -> Part:
    if isinstance(part, pa.Table):
        return part.slice(start, stop - start)
    return part[start:stop] if isinstance(part, list) else part.select(range(start, stop))


def load_rows(
    source: str, *, split: str = "train", subset: str | None = None, max_rows: int | None = None
) -> Rows:
    """Rows of a .jsonl/.json/.csv/.parquet file, a local folder or a hub name.

    A folder is what `save_to_disk` wrote, or holds such files. `split` and `subset` (where the
    dataset has several) mean what they mean in `datasets.load_dataset`: "train[:90%]" works too.
    A file, and a saved Dataset that has no name of its own, is the split "train".
    """
    path = Path(source).expanduser()
    with quiet():  # the log lines of datasets say what we raise
        try:
            rows = read(source, path, split, subset)
        except InputError:
            raise
        except UnicodeDecodeError as error:
            raise InputError(f"data={source} is not UTF-8 text: {error}") from None
        except Exception as error:  # the libraries below raise dozens of types: all "unreadable"
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:300]
            raise InputError(f"data={source} (split {split}) cannot be read: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"data={source} (split {split}) has no rows")
    return rows if max_rows is None else rows.cut(0, max_rows)


def read_data(config: RunConfig, given: Given) -> tuple[Rows, Rows | None]:
    """(rows of data, rows that are held out where they come from elsewhere)."""
    rows = rows_of(config, given, config.data, config.split, config.subset)
    rows = rows if config.max_rows is None else rows.cut(0, config.max_rows)
    if config.eval_data is not None:
        return rows, rows_of(config, given, config.eval_data, config.eval_split or config.split)
    if config.eval_split is not None:
        return rows, rows_of(config, given, config.data, config.eval_split, config.subset)
    return rows, None


def rows_of(
    config: RunConfig, given: Given, source: str, split: str, subset: str | None = None
) -> Rows:
    if (rows := given.get(source)) is None:
        return load_rows(source, split=split, subset=subset)
    if split != "train" or subset is not None:
        option = f"split={split}" if split != "train" else f"subset={subset}"
        raise InputError(f"{option}, but data={source} is an object: give the rows themselves")
    return rows


def read(source: str, path: Path, split: str, subset: str | None) -> Rows:
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"data={source}: expected a file ending in " + ", ".join(READERS))
        if path.stat().st_size == 0:
            raise InputError(f"data={source} is empty")
        refuse_subset(source, subset, "file")
        return chosen(source, split, ["train"], lambda name: [read_file(path)])
    if (path / "dataset_info.json").is_file():
        refuse_subset(source, subset, "saved dataset")
        saved = datasets.load_from_disk(str(path)).with_format(None)
        own = str(saved.split or "")
        # "train[:100]" is the name of what was cut out of train before it was saved
        return chosen(source, split, [own if own.isidentifier() else "train"], lambda name: [saved])
    if (path / "dataset_dict.json").is_file():
        refuse_subset(source, subset, "saved dataset")
        splits = datasets.load_from_disk(str(path)).with_format(None)
        return chosen(source, split, list(splits), lambda name: [splits[name]])
    if path.is_dir():
        return read_folder(source, path, split, subset)
    looks_local = path.suffix.lower() in READERS or source.startswith(("/", "./", "../", "~"))
    if looks_local:  # else the hub would be asked for it
        raise InputError(f"data={source}: there is no such file or folder")
    return Rows([datasets.load_dataset(source, subset, split=split).with_format(None)])


def refuse_subset(source: str, subset: str | None, kind: str) -> None:
    if subset is not None:
        raise InputError(f"subset={subset}, but data={source} is a {kind}, which has none")


def read_folder(source: str, path: Path, split: str, subset: str | None) -> Rows:
    """Which of its files are which split is for datasets to say; nothing is read through it."""
    builder = datasets.load_dataset_builder(str(path), subset)
    files = builder.config.data_files

    def parts(name: str) -> list[Part]:
        paths = [Path(file) for file in files[name]]
        if all(file.suffix.lower() in READERS for file in paths):
            return [read_file(file) for file in paths if file.stat().st_size]
        return [list(builder.as_streaming_dataset(split=name))]  # other formats, past the cache

    return chosen(source, split, list(map(str, files)), parts)


def chosen(source: str, split: str, names: list[str], parts: Callable[[str], list[Part]]) -> Rows:
    """The rows that `split` names: "test", "train[:5%]", "train[10:20]+test", "all"."""
    if split == "all" and "all" not in names:
        split = "+".join(names)
    asked = {term.split("[")[0].split("(")[0].strip() for term in split.split("+")}
    if not asked <= set(names):
        raise InputError(
            f"data={source} has no split {split!r}; its splits are " + ", ".join(map(repr, names))
        )
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        raise InputError(f"split={split}: {' '.join(str(error).split())}") from None
    rows = {name: Rows(parts(name)) for name in asked}
    cuts = instruction.to_absolute({name: len(found) for name, found in rows.items()})
    return Rows([
        part for cut in cuts for part in rows[cut.splitname].cut(cut.from_, cut.to).parts
    ])  # fmt: skip


# ------------------------------------------------------------------------------------ files


def read_file(path: Path) -> Part:
    return READERS[path.suffix.lower()](path)


def read_jsonl(path: Path) -> list[Row]:
    """One object a line; one array of objects in the whole file is taken, too."""
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                break
        else:
            return []
        if line.lstrip().startswith("["):
            return read_json(path)
        file.seek(0)
        rows = []
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise not_json(error, len(rows), f"line {number}") from None
    return objects(rows)


def read_json(path: Path) -> list[Row]:
    """An array of objects, or objects one after the other."""
    text = path.read_text(encoding="utf-8-sig")
    decoder, at, rows = json.JSONDecoder(), 0, []
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise not_json(error, len(rows), f"line {error.lineno}") from None
        rows.append(value)
    return objects(rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows)


def not_json(error: Exception, row: int, where: str) -> ValueError:
    return ValueError(f"JSON parse error: {getattr(error, 'msg', error)} in row {row}, {where}")


def objects(rows: list[Any]) -> list[Row]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is {str(row)[:60]!r}, expected an object of columns")
    return rows


def read_csv(path: Path) -> list[Row]:
    """Every value is text: a CSV does not say more, and "NA" or "007" may be meant."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        limit = csv.field_size_limit(sys.maxsize)  # the process's own: 128 KiB
        try:
            lines = csv.reader(file, strict=True)
            head = next((line for line in lines if line), [])
            if len(set(head)) < len(head):
                raise ValueError(f"its first line {head} names a column twice")
            rows = []
            for line in lines:
                if len(line) != len(head) and line:
                    raise ValueError(
                        f"row {len(rows)} has {len(line)} fields, but the first line names "
                        f"{len(head)} (line {lines.line_num})"
                    )
                if line:
                    rows.append(dict(zip(head, line, strict=True)))
        finally:
            csv.field_size_limit(limit)
    return rows


def read_parquet(path: Path) -> pa.Table:
    return pq.ParquetFile(path).read()


READERS: dict[str, Callable[[Path], Part]] = {
    ".jsonl": read_jsonl, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet,
}  # fmt: skip
