"""The data of `hira finetune`: found and checked, then loaded by `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hira.errors import HiraError
from hira.training.finetune.arguments import Arguments
from hira.training.finetune.data_files import check_files, files_of
from hira.training.finetune.rows import Columns


class Data(NamedTuple):
    """Loaded data.

    Args:
        train: what is trained on.
        test: what is evaluated on, if it is wanted.
        names: the data sets, for people.
    """

    train: Any
    test: Any | None
    names: list[str]

    def rows(self) -> str:
        """How many rows there are."""
        parts = [(self.train, "to train on"), *([] if self.test is None else [(self.test, "to evaluate on")])]
        return ", ".join(f"{len(rows) if hasattr(rows, '__len__') else 'streamed'} {what}" for rows, what in parts)


def check(arguments: Arguments) -> None:
    """Check local files row by row.

    Raises:
        HiraError: as `files_of` and `check_files`; no data set is named, or some are named in both ways.
    """
    for path, data_files in _named(arguments):
        if files := files_of(path, data_files):
            check_files(files, _columns(arguments))


def load(arguments: Arguments) -> Data:
    """Load the data, the same at each call.

    Raises:
        HiraError: it cannot be loaded, has no such split, or a value that training reads is missing or of another type.
    """
    import datasets
    from transformers import set_seed
    from trl import get_dataset

    set_seed(arguments.training.seed)  # TRL splits by NumPy's state, which is another one in each process
    training, script, mixture = arguments.training, arguments.script, _mixture(arguments)
    if mixture is not None and mixture.streaming and mixture.test_split_size is not None:
        raise HiraError("test_split_size cannot divide data that is streamed; leave out one of the two.")
    try:
        if mixture is not None:
            loaded, train, test = get_dataset(mixture), "train", "test"
        else:
            name, streaming = script.dataset_name, script.dataset_streaming
            loaded = datasets.load_dataset(name, name=script.dataset_config, streaming=streaming)
            train, test = script.dataset_train_split, script.dataset_test_split
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        absent = [path for path, files in _named(arguments) if not files and not Path(path).exists()]
        hint = f" There is no file or folder {', '.join(absent)} here." if absent else ""
        raise HiraError(f"the data cannot be loaded: {error}{cause}.{hint}") from error
    if train not in loaded:
        raise HiraError(f"the data has no split {train!r}, but {', '.join(loaded)}: use --dataset_train_split.")
    if training.eval_strategy != "no" and test not in loaded:
        raise HiraError(
            f"there is nothing to evaluate on, no split {test!r}: use --test_split_size 0.1, or leave out "
            "eval_strategy."
        )
    wanted = arguments.classifies or training.eval_strategy != "no" or arguments.mixture.test_split_size is not None
    names = [f"{path} {files}" if files else path for path, files in _named(arguments)]
    data = Data(loaded[train], loaded.get(test) if wanted else None, names)
    for split, rows in ((train, data.train), (test, data.test)):
        if rows is not None:
            _check_loaded(rows, _columns(arguments), f"the split {split}")
    return data


def _named(arguments: Arguments) -> list[tuple[str, Any]]:
    """The path and the data_files of each data set."""
    name, mixture = arguments.script.dataset_name, arguments.mixture.datasets
    if name and mixture:
        raise HiraError("dataset_name and datasets both name data; use one of them.")
    if not name and not mixture:
        raise HiraError("no data is named: use --dataset_name FILE, or datasets: in the file of --config.")
    return [(each.path, each.data_files) for each in mixture] or [(name, None)]


def _columns(arguments: Arguments) -> Columns:
    label = arguments.run.dataset_label_field if arguments.classifies else None
    return Columns(arguments.training.dataset_text_field, label)


def _mixture(arguments: Arguments) -> Any | None:
    """TRL's mixture, with files named as `datasets` takes them; None for all splits of one data set."""
    from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

    script, mixture = arguments.script, arguments.mixture
    named, streaming, path = mixture.datasets, mixture.streaming, script.dataset_name
    if path:
        if mixture.test_split_size is None and (Path(path).is_dir() or files_of(path, None) is None):
            return None
        named = [DatasetConfig(path, script.dataset_config, split=script.dataset_train_split)]
        streaming = script.dataset_streaming
    configs = []
    for each in named:
        if each.data_files is None and not Path(each.path).is_dir() and (files := files_of(each.path, None)):
            each = DatasetConfig(**{**vars(each), "path": files.reader, "data_files": [str(p) for p in files.paths]})
        configs.append(each)
    return DatasetMixtureConfig(configs, streaming, mixture.test_split_size)


def _check_loaded(rows: Any, columns: Columns, where: str) -> None:
    """Check the types of the columns that training reads, and that no value is missing."""
    first = next(iter(rows), None)
    if first is None:
        raise HiraError(f"{where} has no rows.")
    columns.check(first, f"{where}, row 1")
    table = getattr(rows, "data", None)  # streamed rows are not there yet
    for name in columns.needed(first.keys(), where):
        if table is not None and table.column(name).null_count:
            for number, value in enumerate(rows[name], 1):
                if value is None:
                    raise HiraError(f"{where}, row {number}: {name} is empty.")
