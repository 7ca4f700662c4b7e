"""Rows of any dataset: local files and folders, saved arrow directories, the Hugging Face hub.

JSON, CSV and text files are read by `ptp.data.readers`, all else by `datasets`. Rows are memory-mapped in either case.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ptp.data.readers import LINE_KINDS, READER_VERSION, as_dataset, read_rows
from ptp.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON",
    ".csv": "CSV",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
EXPECTED = f"expected {', '.join(KINDS)}, of which {', '.join(LINE_KINDS)} may be gzipped (.gz)"

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Names of files and folders that say which split they hold."""

NOT_DATA = ("README", "LICENSE", "LICENCE", "NOTICE", "SOURCE", "CITATION", "dataset_info", "dataset_infos")
"""Files of these names lie beside data and hold none; capitals tell a note from a document of that title."""

LONGEST_REASON = 300
"""Characters of another library's message that are passed on."""


@dataclass(frozen=True)
class Source:
    """Rows of a dataset, memory-mapped.

    name: how a person would name them. fingerprint: hash of their content; for local data of the bytes of the files,
    wherever they lie, for data of the hub of repository and commit; and of the choice of rows.
    """

    rows: Dataset
    name: str
    fingerprint: str


@dataclass(frozen=True)
class _Splits:
    """The splits of a dataset: their names, and by name the rows of one and a hash of what they are made from."""

    names: Sequence[str]
    rows: Callable[[str], Dataset]
    content: Callable[[str], str]


def load_source(
    path: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    whole_files: bool = False,
) -> Source:
    """The rows of a local file or folder, or of a dataset of the hub.

    path: a .json (list of objects or object per line), .jsonl, .csv, .txt, .md, each also gzipped, .parquet or .arrow
    file; a folder of files of one such kind, read in the order of their paths, which form splits if their names or
    those of their folders say so; a directory written by `save_to_disk`; a dataset repository; a hub id.
    config, revision: as `datasets.load_dataset` takes them. split: a name, slices such as "train[:1000]", sums of them;
    without one, the only split there is, or "train". whole_files: of .txt and .md files, a row is a file, not a line.

    Raises `DataError` for data that is not there, cannot be read (naming file and line) or is empty; `ConfigError` for
    a setting that the data has no use for.
    """
    local = Path(path).expanduser()
    with _quiet(errors_too=local.exists()):
        splits = _find(path, local, config, revision, whole_files)
        choice = _choice(path, splits.names, split)
        rows, content = _choose(path, splits, choice)
    asked = f", split {choice}" if split is not None or len(splits.names) > 1 else ""
    name = path + (f", config {config}" if config else "") + asked
    if not len(rows):
        raise DataError(f"{name} holds no rows")
    return Source(rows, name, _digest(content, choice))


def _choice(path: str, names: Sequence[str], split: str | None) -> str:
    if split is not None:
        return split.strip()
    if len(names) != 1 and "train" not in names:
        raise DataError(f"{path} has the splits {', '.join(names)}; choose one of them with split")
    return "train" if "train" in names else names[0]


def _choose(path: str, splits: _Splits, choice: str) -> tuple[Dataset, list[str]]:
    """Rows of a choice such as "train[:1000]+test", and the content hashes of the splits they come from."""
    from datasets import ReadInstruction, concatenate_datasets

    names = list(dict.fromkeys(re.split(r"[\[(]", part)[0].strip() for part in choice.split("+")))
    if unknown := [name for name in names if name not in splits.names]:
        raise DataError(f"{path} has no split {unknown[0]!r}; it has: {', '.join(splits.names)}")
    content = [splits.content(name) for name in names]
    rows = {name: splits.rows(name) for name in names}
    try:
        ranges = ReadInstruction.from_spec(choice).to_absolute({name: len(rows[name]) for name in names})
        # An empty range may begin behind the last row, which `select` refuses.
        parts = [rows[part.splitname].select(range(part.from_, part.to) or []) for part in ranges]
        # A dataset may have been saved with a format that shows some columns only, or as tensors.
        return concatenate_datasets(parts).with_format(None), content
    except (ValueError, AssertionError) as error:
        raise DataError(f"{path}: split {choice!r} cannot be taken ({_reason(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Where splits come from


def _find(path: str, local: Path, config: str | None, revision: str | None, whole_files: bool) -> _Splits:
    if not local.exists() and _looks_local(path):
        raise DataError(f"no such file or folder: {path}")
    if local.exists() and revision is not None:
        raise ConfigError(f"revision is for datasets of the hub; {path} is local")
    saved = any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if config is not None and (local.is_file() or saved):
        raise ConfigError(f"config is for repositories with configurations; {path} is none")
    if local.is_file():
        if _kind(local) is None:
            raise DataError(f"{path}: unknown kind of file '{''.join(local.suffixes[-2:])}'; {EXPECTED}")
        return _file_splits({"train": [local]}, whole_files)
    if local.is_dir() and not saved and config is None and not _has_configurations(local):
        return _file_splits(_folder_files(local), whole_files)
    if saved:
        return _saved_splits(local)
    return _repository_splits(local, config) if local.is_dir() else _hub_splits(path, config, revision)


def _looks_local(path: str) -> bool:
    remote = path.startswith(("hf://", "buckets/"))
    known = path.removesuffix(".gz").endswith(tuple(KINDS))
    return not remote and (known or path.startswith((".", "/", "~")) or path.count("/") > 1)


def _hub_splits(path: str, config: str | None, revision: str | None) -> _Splits:
    import datasets

    loaded = _load_dataset(path, path, name=config, revision=revision)
    commits = {Path(file["filename"]).parent.name for rows in loaded.values() for file in rows.cache_files}
    if datasets.config.HF_HUB_OFFLINE and revision is not None and revision not in commits:
        # Offline, the library takes the latest commit it has, whatever was asked for.
        held = ", ".join(sorted(commits))
        raise DataError(f"{path}: revision {revision!r} is not known offline; the latest commit in the cache is {held}")
    # The library makes this fingerprint from repository, config, commit and split.
    return _Splits(list(loaded), loaded.__getitem__, lambda name: _digest(path, loaded[name]._fingerprint))


def _repository_splits(folder: Path, config: str | None) -> _Splits:
    from datasets.exceptions import DatasetGenerationError

    files = _files_below(folder)
    # Names belong to the content: they may say which split a file is of.
    content = _digest(config, [(file.relative_to(folder).as_posix(), _file_digest(file)) for file in files])
    try:
        loaded = _load_dataset(str(folder), str(folder), name=config, cache_dir=str(_cache(content)))
    except DataError as error:
        if isinstance(error.__cause__, (DatasetGenerationError, UnicodeDecodeError)):
            for file in files:
                if (kind := _kind(file)) in LINE_KINDS:
                    # Reading names the malformed line, which the library does not.
                    collections.deque(read_rows([file], kind), maxlen=0)
        raise
    return _Splits(list(loaded), loaded.__getitem__, lambda name: content)


def _saved_splits(folder: Path) -> _Splits:
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # Whatever a damaged directory makes the library raise.
        raise DataError(f"{folder}: not a readable arrow directory ({_reason(error)})") from None
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)

    def content(name: str) -> str:
        return _digest([_file_digest(Path(file["filename"])) for file in splits[name].cache_files])

    return _Splits(list(splits), splits.__getitem__, content)


def _file_splits(files: dict[str, list[Path]], whole_files: bool) -> _Splits:
    kind = str(_kind(next(iter(files.values()))[0]))

    @functools.cache
    def content(name: str) -> str:
        return _digest(READER_VERSION, kind, whole_files, [_file_digest(file) for file in files[name]])

    def rows(name: str) -> Dataset:
        if kind in LINE_KINDS:
            arrow = _cache(content(name)).with_suffix(".arrow")
            return as_dataset(lambda: read_rows(files[name], kind, whole_files), arrow)
        return _binary_rows(files[name], kind, _cache(content(name)))

    return _Splits(list(files), rows, content)


def _binary_rows(files: list[Path], kind: str, cache: Path) -> Dataset:
    """Rows of parquet or arrow files."""
    import pyarrow as pa
    from pyarrow import parquet

    for file in files if kind == "parquet" else []:
        try:
            parquet.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            # Names the damaged file, which the library does not.
            raise DataError(f"{file}: not a readable parquet file ({_reason(error)})") from None
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    patterns = [re.sub(r"([*?\[])", r"[\1]", str(file.absolute())) for file in files]
    return _load_dataset(where, kind, data_files=patterns, cache_dir=str(cache))["train"]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _folder_files(folder: Path) -> dict[str, list[Path]]:
    """Data files of a folder by the split they say they hold, all under "train" where none says so."""
    files = [file for file in _files_below(folder) if _kind(file) and _stem(file) not in NOT_DATA]
    if not files:
        raise DataError(f"{folder} holds no data files; {EXPECTED}")
    kinds = [_kind(file) for file in files]
    if len(set(kinds)) > 1:
        mixed = ", ".join(f"{kind} ({kinds.count(kind)})" for kind in dict.fromkeys(kinds))
        raise DataError(f"{folder} mixes kinds of files: {mixed}; name one file, or a folder with files of one kind")
    splits: dict[str | None, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    others = splits.pop(None, [])
    named = {name: members for name, members in splits.items() if name is not None}
    if named and others:
        # Guessing would either lose files or train on a test set.
        one = next(iter(named.values()))[0]
        raise DataError(f"{one} says which split it holds, {others[0]} does not; name one file, or move them apart")
    return named or {"train": others}


def _split_of(file: PurePath) -> str | None:
    """The split that the name of a file says it holds, or else the names of its folders, innermost first."""
    if shard := re.match(r"(.+)-\d{5}-of-\d{5}", _stem(file)):
        return SPLITS.get(shard[1], shard[1])
    names = [re.sub(r"[-_]?\d+$", "", _stem(file)), *reversed(file.parent.parts)]
    return next((SPLITS[name.lower()] for name in names if name.lower() in SPLITS), None)


def _files_below(folder: Path) -> list[Path]:
    """Files of a folder and its folders in the order of their paths, hidden ones left out."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return [folder / file for file in files if not any(part.startswith((".", "__")) for part in file.parts)]


def _stem(file: PurePath) -> str:
    return file.name.split(".")[0]


def _kind(file: PurePath) -> str | None:
    name = file.name.lower()
    kind = KINDS.get(PurePath(name.removesuffix(".gz")).suffix)
    return None if name.endswith(".gz") and kind not in LINE_KINDS else kind


def _has_configurations(folder: Path) -> bool:
    """Whether the head of a dataset card says which files make up which configuration."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    return text.startswith("---") and re.search(r"^configs:", text.split("---")[1], re.MULTILINE) is not None


# ---------------------------------------------------------------------------------------------------------------------
# The `datasets` library


def _load_dataset(where: str, *arguments: str, **settings: Any) -> DatasetDict:
    """All splits that `datasets.load_dataset` gives, its errors as one line."""
    import datasets
    from huggingface_hub.errors import HFValidationError

    try:
        return datasets.load_dataset(*arguments, keep_in_memory=False, **settings)
    except (ConnectionError, FileNotFoundError, HFValidationError) as error:
        reason = _reason(error)
        raise DataError(f"{where!r} is neither a local path nor a dataset that the hub gives ({reason})") from None
    except Exception as error:  # Each of its formats raises errors of its own.
        raise DataError(f"{where} cannot be loaded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        # The wrapper only says that something went wrong.
        error = error.__cause__
    text = str(error).split("\nExample of usage")[0] or type(error).__name__
    return textwrap.shorten(text, LONGEST_REASON, placeholder=" …")


@contextmanager
def _quiet(errors_too: bool) -> Iterator[None]:
    """No progress bars of `datasets`; errors_too: nor its log of errors, which arrive as a `DataError`."""
    import datasets
    from datasets.utils import are_progress_bars_disabled, logging

    bars, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    if errors_too:
        logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


def _cache(content: str) -> Path:
    """Where rows are kept, by content: `datasets` itself goes by path and time, which a changed file may share."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE, "ptp", content)


def _file_digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
