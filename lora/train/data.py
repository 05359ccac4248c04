"""The data of a training run: found, read, checked line by line, brought into one form, and split.

A row is one of three things; other columns are left alone:

    {"prompt": ..., "completion": ...}     text, or lists of messages
    {"messages": [{"role": ..., "content": ...}, ...]}
    {"text": ...}

They become the columns TRL's SFTTrainer takes: conversations where the tokenizer has a chat template, text otherwise.
TRL applies the template, masks the prompts, cuts and packs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from lora.errors import LoRAError, did_you_mean
from lora.train.config import TrainConfig

IGNORED = -100  # the label of a token that is not learnt
FORMS = (("prompt", "completion"), ("messages",), ("text",))
NEEDED = "'prompt' and 'completion', or 'messages', or 'text'"
ROLES = ("system", "user", "assistant", "tool")
SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")  # what datasets' save_to_disk leaves
BUILDERS = {".parquet": "parquet", ".csv": "csv"}  # read by datasets
TEXT_SUFFIXES = (".txt", ".md")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
NOTHING = -1  # the index of an example that holds nothing to learn
SAMPLE_WORDS = 16  # how much of a held-out text is given as the prompt of a sample

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Rows, what they are called in messages (`data.jsonl:7`), and whether they are whole documents to be cut up."""

    rows: list[Row]
    places: list[str]
    documents: bool = False


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt, and the answer in the data where there is one."""

    messages: list[dict[str, str]]  # in the chat template's terms; none where the data is plain text
    text: str  # without a template
    expected: str = ""


@dataclass(frozen=True)
class Data:
    """What a run trains on and is measured on."""

    train: list[Row]
    held_out: list[Row]
    documents: frozenset[str]  # "train", "eval": texts to be cut into pieces of max_length tokens, not cut off there
    notes: list[str]


def load_data(config: TrainConfig) -> Data:
    """The rows of `config.data` and of what is held out, checked.

    Raises: LoRAError naming the file and the line, what was found there and what is needed.
    """
    source = read_source(config.data, config.data_split, "data")
    check_rows(source)
    notes: list[str] = []
    documents = {"train", "eval"} if source.documents else set()
    if config.eval_data is not None:
        held = read_source(config.eval_data, config.eval_split, "eval_data")
        check_rows(held)
        documents = {name for name, part in (("train", source), ("eval", held)) if part.documents}
        train_rows, held_rows = source.rows, held.rows
    elif source.documents:
        train_rows, held_rows = split_documents(source.rows, config.eval_fraction)
    else:
        train_rows, held_rows = split_rows(source.rows, config.eval_fraction, config.seed, config.data)
    known = {canonical(row) for row in train_rows}
    shared = sum(canonical(row) in known for row in held_rows)
    if shared:
        notes.append(f"{shared} of {len(held_rows)} held-out examples are also in the training data")
    return Data(train_rows, held_rows, frozenset(documents), notes)


# ---- reading ---------------------------------------------------------------------------------------------------


def read_source(name: str, split: str, field: str) -> Source:
    """The rows of a file, a directory or a hub id; a path that exists is never looked up on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return read_directory(path, split, field)
    if path.is_file():
        return read_file(path, split, field)
    if path.suffix in (*TEXT_SUFFIXES, *JSON_SUFFIXES, *BUILDERS) or name.startswith((".", "/", "~")):
        near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise LoRAError(f"{field}: there is no file {name}.{did_you_mean(str(path), near)}")
    return _from_datasets(lambda datasets: datasets.load_dataset(name, split=split), name, field)


def read_file(path: Path, split: str, field: str) -> Source:
    """The rows of one file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        text = _decoded(path)
        return Source([{"text": text}] if text.strip() else [], [str(path)], documents=True)
    if suffix == ".json":
        return _from_json(path)
    if suffix in JSON_SUFFIXES:
        return _from_jsonl(path)
    if suffix in BUILDERS:
        builder = BUILDERS[suffix]
        return _from_datasets(
            lambda datasets: datasets.load_dataset(builder, data_files=str(path), split="train"), str(path), field
        )
    known = ", ".join((*JSON_SUFFIXES, *TEXT_SUFFIXES, *BUILDERS))
    raise LoRAError(f"{field}: {path} ends in {suffix or 'nothing'}, expected one of {known}.")


def read_directory(path: Path, split: str, field: str) -> Source:
    """A directory that datasets saved, or else all the data files in it, in the order of their names."""
    if any((path / name).is_file() for name in SAVED_BY_DATASETS):
        return _from_datasets(lambda datasets: _on_disk(datasets, path, split), str(path), field)
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in (*TEXT_SUFFIXES, *JSON_SUFFIXES, *BUILDERS))
    if not files:
        raise LoRAError(f"{field}: the directory {path} holds no .jsonl, .json, .txt, .md, .parquet or .csv file.")
    parts = [read_file(file, split, field) for file in files]
    if len({part.documents for part in parts}) > 1:
        raise LoRAError(f"{field}: the directory {path} mixes text files with tables of examples: keep one kind.")
    return Source(
        [row for part in parts for row in part.rows],
        [place for part in parts for place in part.places],
        parts[0].documents,
    )


def _from_jsonl(path: Path) -> Source:
    rows, places = [], []
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            rows.append(_object(place, _parsed(place, line)))
            places.append(place)
    return Source(rows, places)


def _from_json(path: Path) -> Source:
    values = _parsed(str(path), _decoded(path))
    if not isinstance(values, list):
        raise LoRAError(f"{path} holds a JSON {_kind(values)}, expected a list of objects (or .jsonl: one a line).")
    places = [f"{path}[{number}]" for number in range(len(values))]
    return Source([_object(place, value) for place, value in zip(places, values, strict=True)], places)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LoRAError(f"{place} is not JSON: {error.msg} (column {error.colno}).") from None


def _object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise LoRAError(f"{place} is a JSON {_kind(value)}, expected an object with {NEEDED}.")
    return value


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise LoRAError(f"{path}:{line} is not UTF-8 (byte {error.object[error.start]:#04x}): convert it.") from None


def _on_disk(datasets: Any, path: Path, split: str) -> Any:
    loaded = datasets.load_from_disk(str(path))
    if not isinstance(loaded, Mapping):
        return loaded
    if split not in loaded:
        raise LoRAError(
            f"{path} has no split {split!r}.{did_you_mean(split, loaded)} It has: {', '.join(map(repr, loaded))}."
        )
    return loaded[split]


def _from_datasets(load: Any, name: str, field: str) -> Source:
    """Rows read by the `datasets` package; what it raises on a wrong name becomes one line."""
    import datasets

    try:
        loaded = load(datasets)
    except LoRAError:
        raise
    except Exception as error:  # a dozen types, from FileNotFoundError to a parser's own
        reason = str(error).strip().split("\n")[0]
        raise LoRAError(f"{field}: {name} is no file here, and datasets cannot load it: {reason}") from error
    _check_columns(loaded.column_names, name)
    rows = [dict(row) for row in loaded]
    return Source(rows, [f"{name}[{number}]" for number in range(len(rows))])


# ---- checking --------------------------------------------------------------------------------------------------


def check_rows(source: Source) -> None:
    """Every row has one of the three forms, the same one throughout, with text in it."""
    if not source.rows:
        place = source.places[0] if source.places else "the data"
        raise LoRAError(f"{place} holds no examples, expected at least one with {NEEDED}.")
    forms = set()
    for row, place in zip(source.rows, source.places, strict=True):
        form = _check_columns([name for name, value in row.items() if value is not None], place)
        check_row(row, form, place)
        forms.add(form)
        if len(forms) > 1:
            first, second = sorted(forms)
            raise LoRAError(
                f"{place} has {_listed(form)}, but other rows differ ({first} and {second}): keep one form."
            )


def _check_columns(names: Iterable[str], place: str) -> tuple[str, ...]:
    """The form that these columns make."""
    names = list(names)
    found = [form for form in FORMS if set(form) <= set(names)]
    if len(found) == 1:
        return found[0]
    listed = _listed(names) if names else "no columns"
    if not found:
        columns = [column for form in FORMS for column in form]
        hint = next((hint for name in names if name not in columns and (hint := did_you_mean(name, columns))), "")
        raise LoRAError(f"{place} has {listed}, but needs {NEEDED}.{hint}")
    raise LoRAError(f"{place} has {listed}, which is two kinds of example at once: keep one.")


def check_row(row: Row, form: tuple[str, ...], place: str) -> None:
    """The columns of `form` hold text, or conversations with something to learn from."""
    conversations = [isinstance(row[name], list) for name in form]
    if any(conversations) != all(conversations) and form != ("messages",):
        raise LoRAError(f"{place}: prompt and completion are {_kinds_of(row, form)}, expected both text or both lists.")
    for name in form:
        value = row[name]
        if isinstance(value, list) or name == "messages":
            _check_messages(value, name, place)
        elif not isinstance(value, str):
            raise LoRAError(f"{place}: {name} is {_kind(value)}, expected text.")
        elif not value.strip():
            raise LoRAError(f"{place}: {name} is empty, expected text.")
    if isinstance(row[form[-1]], list) and not any(m["role"] == "assistant" for m in row[form[-1]]):
        raise LoRAError(f"{place}: {form[-1]} has no message of the assistant: there is nothing to learn from.")


def _check_messages(value: Any, name: str, place: str) -> None:
    if not isinstance(value, list) or not value:
        raise LoRAError(f"{place}: {name} is {_kind(value)}, expected a list of messages that is not empty.")
    for number, message in enumerate(value):
        where = f"{place}: {name}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            found = _listed(message) if isinstance(message, dict) else _kind(message)
            raise LoRAError(f"{where} has {found}, expected 'role' and 'content'.")
        if message["role"] not in ROLES:
            raise LoRAError(
                f"{where}: role is {message['role']!r}, expected one of {_listed(ROLES)}."
                f"{did_you_mean(str(message['role']), ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise LoRAError(f"{where}: content is {_kind(message['content'])}, expected text.")


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)


def _kinds_of(row: Row, form: Sequence[str]) -> str:
    return " and ".join(_kind(row[name]) for name in form)


def _kind(value: Any) -> str:
    if isinstance(value, (list, dict)) and not value:
        return "empty"
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# ---- order -----------------------------------------------------------------------------------------------------


def order(seed: int, epoch: int, count: int) -> list[int]:
    """In which order one epoch goes through its examples: a function of these three numbers and of nothing else.

    Nothing that was drawn before, no resuming and no number of processes changes it.
    """
    indices: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return indices


class SeededOrder(Sampler[int]):
    """`order` of the epoch that was set last; transformers and accelerate set it as each one begins."""

    def __init__(self, examples: Sized, seed: int) -> None:
        self.count, self.seed, self.epoch = len(examples), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(order(self.seed, self.epoch, self.count))

    def __len__(self) -> int:
        return self.count


class RankBatches(Sampler[list[int]]):
    """The batches of one process: of the epoch's M batches, in order, every `size`-th from `rank` on.

    With N processes and A batches each for a step, a step goes through the batches that one process with N·A goes
    through, and each batch is the same. Where M is no multiple of N, the last processes get a batch of `NOTHING`.
    """

    def __init__(self, examples: SeededOrder | Sequence[int], batch_size: int, rank: int = 0, size: int = 1) -> None:
        self.examples, self.batch_size, self.rank, self.size = examples, batch_size, rank, size

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.examples, SeededOrder):
            self.examples.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.examples)
        for number in range(len(self)):
            start = (number * self.size + self.rank) * self.batch_size
            yield order[start : start + self.batch_size] or [NOTHING]

    def __len__(self) -> int:
        return -(-len(self.examples) // (self.batch_size * self.size))


class WithNothing(Dataset[dict[str, Any]]):
    """A data set, and under `NOTHING` an example of which no token is learnt, so that it changes no gradient."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != NOTHING:
            return self.rows[index]  # type: ignore[no-any-return]
        row = dict(self.rows[0])
        return {**row, "labels": [IGNORED] * len(row["labels"])}

    def __len__(self) -> int:
        return len(self.rows)


# ---- splitting and bringing into form --------------------------------------------------------------------------


def split_rows(rows: list[Row], fraction: float, seed: int, name: str) -> tuple[list[Row], list[Row]]:
    """(to train on, held out), both in the data's order; the choice depends on the seed and the number of rows."""
    if fraction == 0:
        return rows, []
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise LoRAError(
            f"{name} has {len(rows)} example{'s' * (len(rows) > 1)}, of which eval_fraction={fraction:g} would hold "
            f"out {count} and leave none to train on: give more data, --eval-data, or --eval-fraction 0."
        )
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def split_documents(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(to train on, held out): the end of each document, from a line's start on, is held out."""
    if fraction == 0:
        return rows, []
    train, held = [], []
    for row in rows:
        text = row["text"]
        cut = text.find("\n", int(len(text) * (1 - fraction))) + 1 or int(len(text) * (1 - fraction))
        train.append({"text": text[:cut]})
        held.append({"text": text[cut:]})
    parts = [[row for row in part if row["text"].strip()] for part in (train, held)]
    if not all(parts):
        raise LoRAError(
            f"the text is too short for eval_fraction={fraction:g} of it to be held out: give more text, --eval-data, "
            "or --eval-fraction 0."
        )
    return parts[0], parts[1]


def canonical(row: Row) -> str:
    """A row's learnable content, to compare rows by."""
    return json.dumps([row.get(column) for form in FORMS for column in form], sort_keys=True, default=str)


def to_columns(rows: Iterable[Row], *, chat: bool, completion_only: bool) -> list[Row]:
    """The rows as TRL takes them; with `completion_only` a conversation is one example for each assistant turn.

    Args:
        chat: whether the tokenizer has a chat template, to write plain prompts and completions with too.
    """
    out: list[Row] = []
    for row in rows:
        if row.get("text") is not None:
            out.append({"text": row["text"]})
        elif isinstance(row.get("prompt"), str):
            prompt, completion = row["prompt"], row["completion"]
            out.append(
                {"prompt": _message("user", prompt), "completion": _message("assistant", completion)}
                if chat
                else {"prompt": prompt, "completion": completion}
            )
        else:
            out.extend(_turns(row, completion_only))
    return out


def _turns(row: Row, completion_only: bool) -> list[Row]:
    """A conversation as examples: (what was said so far, what the assistant says next), or whole."""
    if row.get("messages") is None:
        return [{"prompt": _plain(row["prompt"]), "completion": _plain(row["completion"])}]
    messages = _plain(row["messages"])
    if not completion_only:
        return [{"messages": messages}]
    starts = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [{"prompt": messages[:i], "completion": [messages[i]]} for i in starts]


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def prompts_of(rows: Iterable[Row], count: int) -> list[Prompt]:
    """The prompts of the first `count` rows: all but the last answer, or the first words of a text."""
    prompts = []
    for row in list(rows)[:count]:
        if row.get("text") is not None:
            words = row["text"].split()
            start = " ".join(words[:SAMPLE_WORDS])
            prompts.append(Prompt([], start, " ".join(words[SAMPLE_WORDS : 4 * SAMPLE_WORDS])))
        elif isinstance(row.get("prompt"), str):
            prompts.append(Prompt(_message("user", row["prompt"]), row["prompt"], row["completion"]))
        else:
            example = _turns(row, completion_only=True)[-1]
            text = "\n".join(message["content"] for message in example["prompt"])
            prompts.append(Prompt(example["prompt"], text, example["completion"][0]["content"]))
    return prompts
