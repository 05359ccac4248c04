"""The data of a training run: every form that is read, every error with its place, and the split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_text import write_jsonl

from lora.errors import LoRAError
from lora.train.config import TrainConfig
from lora.train.data import (
    check_rows,
    load_data,
    prompts_of,
    read_source,
    split_documents,
    split_rows,
    to_columns,
)

PAIR = {"prompt": "what is one ?", "completion": "one ."}
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]


def config(data: Path | str, **options: Any) -> TrainConfig:
    return TrainConfig(model="unused", data=str(data), **options)


def many(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"prompt {i}", "completion": f"completion {i}"} for i in range(count)]


# ---- what is read ----------------------------------------------------------------------------------------------


def test_jsonl_in_its_three_forms(tmp_path: Path) -> None:
    for row in (PAIR, {"messages": CHAT}, {"text": "hello"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}):
        path = write_jsonl(tmp_path / "d.jsonl", [row, row])
        path.write_text("\n" + path.read_text())  # a blank line at the start still counts as a line
        source = read_source(str(path), "train", "data")
        check_rows(source)
        assert source.rows == [row, row]
        assert source.places == [f"{path}:2", f"{path}:3"]
        assert not source.documents


def test_json_csv_parquet_and_what_datasets_saved(tmp_path: Path) -> None:
    import datasets

    rows = many(3)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "d.csv")
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    for name in ("d.json", "d.csv", "d.parquet", "saved", "splits"):
        assert read_source(str(tmp_path / name), "train", "data").rows == rows, name
    assert read_source(str(tmp_path / "splits"), "test", "data").rows == rows[1:2]


def test_a_directory_is_all_its_files_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", many(3)[1:])
    write_jsonl(tmp_path / "a.jsonl", many(1))
    (tmp_path / "notes.bin").write_bytes(b"\x00")
    assert read_source(str(tmp_path), "train", "data").rows == many(3)


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    source = read_source(str(tmp_path / "d.txt"), "train", "data")
    assert source.documents
    assert source.rows == [{"text": "one\ntwo\n"}]


# ---- what is refused: (file, contents, what the message must say) ----------------------------------------------

REFUSED = {
    "not JSON": ("d.jsonl", '{"text": "a"}\n{"text": \n', ("d.jsonl:2", "not JSON", "column")),
    "a list in a line": ("d.jsonl", '["a"]\n', ("d.jsonl:1", "a list", "expected an object")),
    "a number in a line": ("d.jsonl", "3\n", ("d.jsonl:1", "a number")),
    "no known column": ("d.jsonl", '{"question": "a", "answer": "b"}\n', ("'question', 'answer'", "needs 'prompt'")),
    "a misspelt column": ("d.jsonl", '{"prompt": "a", "completions": "b"}\n', ("Did you mean 'completion'?",)),
    "half a pair": ("d.jsonl", '{"prompt": "a"}\n', ("has 'prompt', but needs",)),
    "an empty object": ("d.jsonl", "{}\n", ("no columns",)),
    "two forms in a row": ("d.jsonl", '{"text": "a", "prompt": "a", "completion": "b"}\n', ("two kinds",)),
    "two forms in a file": (
        "d.jsonl",
        '{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
        ("d.jsonl:2", "one form"),
    ),
    "an empty prompt": ("d.jsonl", '{"prompt": " ", "completion": "b"}\n', ("d.jsonl:1: prompt is empty",)),
    "an empty completion": ("d.jsonl", '{"prompt": "a", "completion": ""}\n', ("completion is empty",)),
    "a number for text": ("d.jsonl", '{"text": 5}\n', ("text is a number, expected text",)),
    "null for text": ("d.jsonl", '{"text": null}\n', ("no columns",)),
    "text and messages": ("d.jsonl", json.dumps({"prompt": "a", "completion": CHAT}), ("text and a list",)),
    "messages that are text": ("d.jsonl", '{"messages": "hello"}\n', ("messages is text", "list of messages")),
    "no messages": ("d.jsonl", '{"messages": []}\n', ("messages is empty",)),
    "a message without content": ("d.jsonl", '{"messages": [{"role": "user"}]}\n', ("messages[0] has 'role'",)),
    "an unknown role": (
        "d.jsonl",
        '{"messages": [{"role": "asistant", "content": "a"}]}\n',
        ("role is 'asistant'", "Did you mean 'assistant'?"),
    ),
    "content that is no text": (
        "d.jsonl",
        '{"messages": [{"role": "user", "content": 1}]}\n',
        ("content is a number",),
    ),
    "nobody answers": ("d.jsonl", json.dumps({"messages": CHAT[:1]}), ("no message of the assistant",)),
    "an empty file": ("d.jsonl", "", ("no examples",)),
    "blank lines only": ("d.jsonl", "\n \n", ("no examples",)),
    "an empty text file": ("d.txt", " \n", ("no examples",)),
    "a JSON object, not a list": ("d.json", '{"text": "a"}', ("an object, expected a list",)),
    "an unknown suffix": ("d.xml", "<a/>", ("ends in .xml", ".jsonl")),
    "another encoding": ("d.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ("d.jsonl:2", "not UTF-8", "0xe9")),
    "one example": ("d.jsonl", '{"text": "a"}\n', ("1 example", "--eval-fraction 0")),
    "a damaged parquet file": ("d.parquet", b"PAR1 no", ("datasets cannot load it",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    name, contents, said = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(LoRAError) as caught:
        load_data(config(path))
    for part in said:
        assert part in str(caught.value), f"{part!r} not in {caught.value}"
    assert "\n" not in str(caught.value)


def test_places_that_hold_no_data(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", many(2))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed" / "a.jsonl", many(2))
    (tmp_path / "mixed" / "b.txt").write_text("hello")
    for name, said in {
        "trian.jsonl": "Did you mean",
        "nowhere/d.jsonl": "there is no file",
        "empty": "holds no .jsonl",
        "mixed": "mixes text files",
    }.items():
        with pytest.raises(LoRAError, match=said):
            load_data(config(tmp_path / name))


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(many(2))}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(LoRAError, match=r"has no split 'trian'.*Did you mean 'train'"):
        load_data(config(tmp_path / "d", data_split="trian"))


# ---- splitting -------------------------------------------------------------------------------------------------


def test_split_is_a_seeded_partition() -> None:
    rows = many(50)
    train, held = split_rows(rows, 0.1, 3, "d")
    assert len(held) == 5
    assert sorted([*train, *held], key=rows.index) == rows
    assert (train, held) == split_rows(rows, 0.1, 3, "d")
    assert held != split_rows(rows, 0.1, 4, "d")[1]
    assert split_rows(rows, 0, 3, "d") == (rows, [])


def test_documents_hold_out_their_ends() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (held,) = split_documents([{"text": text}], 0.1)
    assert train["text"] + held["text"] == text
    assert held["text"].startswith("line ")
    assert 0.05 < len(held["text"]) / len(text) < 0.11
    with pytest.raises(LoRAError, match="too short"):
        split_documents([{"text": ""}], 0.1)


def test_held_out_examples_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", many(5))
    held = write_jsonl(tmp_path / "held.jsonl", [*many(2), PAIR])
    data = load_data(config(train, eval_data=str(held)))
    assert (len(data.train), len(data.held_out)) == (5, 3)
    assert data.notes == ["2 of 3 held-out examples are also in the training data"]
    assert load_data(config(train, eval_fraction=0.2)).notes == []


# ---- TRL's columns ---------------------------------------------------------------------------------------------


def test_columns() -> None:
    long = [*CHAT, {"role": "user", "content": "more", "id": 7}, {"role": "assistant", "content": "no"}]
    asked, answered = [{"role": "user", "content": "what is one ?"}], [{"role": "assistant", "content": "one ."}]
    both = {"chat": True, "completion_only": True}
    assert to_columns([PAIR], **both) == [{"prompt": asked, "completion": answered}]
    assert to_columns([PAIR], chat=False, completion_only=True) == [PAIR]
    assert to_columns([{"text": "a", "id": 1}], **both) == [{"text": "a"}]
    turns = to_columns([{"messages": long}], **both)
    assert [turn["completion"] for turn in turns] == [[CHAT[1]], [{"role": "assistant", "content": "no"}]]
    assert turns[1]["prompt"] == [*CHAT, {"role": "user", "content": "more"}]  # and no stray "id"
    (whole,) = to_columns([{"messages": long}], chat=True, completion_only=False)
    assert [message["content"] for message in whole["messages"]] == ["hello", "bye", "more", "no"]


def test_prompts_of_held_out_rows() -> None:
    pair, chat, text = prompts_of([PAIR, {"messages": CHAT}, {"text": " ".join(map(str, range(99)))}, PAIR], 3)
    assert (pair.text, pair.expected) == (PAIR["prompt"], PAIR["completion"])
    assert (chat.messages, chat.expected) == (CHAT[:1], "bye")
    assert text.text.split()[-1] == "15"
    assert text.expected.startswith("16 ")
    assert text.messages == []
