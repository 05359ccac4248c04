"""The README's code runs as it stands, its links lead somewhere, and its figures are the measured ones."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_six_lines_train_and_save(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in BLOCKS if "lora.inject" in block]
    names: dict[str, object] = {}
    exec(code, names)
    assert sorted(p.name for p in (tmp_path / "my-adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) == 6


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_links_lead_to_files_of_the_repository(target):
    assert (ROOT / target).exists()


def test_the_measured_table_is_the_card_benchmark_s():
    with (ROOT / "docs/benchmarks/h100.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["name"], row["variant"], row["shape"]): row for row in csv.DictReader(file)}
    found = dict(
        re.findall(r"^\| (without checkpointing: .*|with checkpointing: .*) \| ([\d.]+ \| [\d.]+) \|$", README, re.M)
    )
    expected = {}
    for words, how in (("without checkpointing", "none"), ("with checkpointing", "recompute")):
        pair = [rows["step bf16", f"{who}, {how}", "4 x 2048"] for who in ("peft", "ours")]
        expected[f"{words}: time of a step, ms"] = " | ".join(f"{1000 * float(row['median_s']):.0f}" for row in pair)
        expected[f"{words}: memory, GiB"] = " | ".join(f"{int(row['peak_bytes']) / 2**30:.1f}" for row in pair)
    assert found == expected

    def in_all(row: dict[str, str]) -> str:
        return f"{(int(row['peak_bytes']) + int(row['base_bytes'])) / 2**30:.1f}"

    text = " ".join(README.split())
    (longest,) = (row for key, row in rows.items() if row["tokens"] == "262144" and key[1] == "ours, offload")
    assert f"takes {in_all(rows['step nf4', 'ours, offload', '4 x 2048'])} GiB, the model included" in text
    assert f"262,144 tokens {in_all(longest)} GiB" in text
    assert f"{int(rows['step bf16', 'ours, none', '4 x 2048']['base_bytes']) / 2**30:.1f} GiB of the model" in text
