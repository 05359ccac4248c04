"""Pages of checkpoint files are given back while loading: nothing is lost, and a process stays near what it keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import quantise_on_load
from benchmarks.planning import resident
from lora import file_pages
from lora.file_pages import FilePages

SIZE = 32 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, as the module does: elsewhere it is idle")


def mapped(path: Path) -> torch.Tensor:
    """A file as safetensors maps it, every page of it in memory."""
    tensor = torch.UntypedStorage.from_file(str(path), False, SIZE)
    values = torch.tensor([], dtype=torch.uint8).set_(tensor)
    assert int(values.sum(dtype=torch.int64)) > 0
    return values


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights with a space.bin"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def test_pages_go_and_their_values_stay(file):
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    link = file.with_name("link")  # as in the hub's cache
    link.symlink_to(file)
    values, kept = mapped(file), mapped(other)
    before = resident("RssFile")
    FilePages([link]).give_back()
    assert before - resident("RssFile") > 0.9 * SIZE
    assert torch.equal(values, kept)


def test_a_mapping_that_was_written_to_is_left_alone(file):
    values = mapped(file)
    values[5_000_000] = 77  # in memory alone: the file's own is 64
    FilePages([file]).give_back()
    assert int(values[5_000_000]) == 77
    assert file.read_bytes()[5_000_000] == 64


def test_pages_are_given_back_now_and_then(file, monkeypatch):
    called: list[int] = []
    monkeypatch.setattr(FilePages, "give_back", lambda self: called.append(self.read))
    monkeypatch.setattr(file_pages, "EVERY", 1000)
    pages = FilePages([file])
    for count in (400, 500, 99, 1):
        pages.add(count)
    assert called == [1000]


def test_a_real_model_takes_its_quantised_size_to_load():
    """SmolLM2-135M, stored in float32, asked for in bfloat16: 538 MB, quantised 112 MB; every resident page counts.

    Beside what is kept, the largest tensor, and 40 MB: 32 MB that are read until pages are given back, and what
    encoding takes. The other ways are in the table that `benchmarks/quantise_on_load.py` writes.
    """
    found = quantise_on_load.measured(quantise_on_load.CASES[2])
    assert found["shards"] > 3
    assert found["held"] < 120e6 and found["stored"] > 2.2 * found["held"]
    assert found["peak"] < found["held"] + found["largest"] + 40e6
    assert found["peak"] < found["stored"] - 40e6
