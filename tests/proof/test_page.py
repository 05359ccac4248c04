"""docs/proof.md keeps its word: the example of a new operation's proof runs, is short, and rejects a wrong backend."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

import lora.fast
import lora.reference
from lora.testing.explore import MARKERS

PAGE = (Path(__file__).parents[2] / "docs" / "proof.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL).group(1)


def scale_rows(x, gain):
    return x * gain[:, None]


def rough(x, gain):
    return (x.to(torch.bfloat16) * gain[:, None]).to(x.dtype)


def proof() -> dict:
    names: dict = {"__name__": "example"}
    source = "<the example of docs/proof.md>"  # no file's name: Hypothesis would read the page as Python
    exec(compile(EXAMPLE, source, "exec", dont_inherit=True), names)
    return names


def run(device: str) -> None:
    names = proof()
    names["test_both_backends_are_within_the_bound"](device=device)
    for backend in ("reference", "fast"):
        names["test_gradients_are_linear_in_dy"](device=device, backend=backend)


@pytest.fixture
def _with_the_operation(monkeypatch):
    for backend in (lora.reference, lora.fast):
        monkeypatch.setattr(backend, "scale_rows", scale_rows, raising=False)


@pytest.mark.usefixtures("_with_the_operation")
def test_the_example_proves_a_right_operation(device):
    run(device)


@pytest.fixture
def _without_shrinking():
    """A failure that is expected need not be made small first, which takes Hypothesis ten times as long."""
    before = settings.get_current_profile_name()
    settings.register_profile("first failure", settings(), phases=[Phase.explicit, Phase.generate])
    settings.load_profile("first failure")
    yield
    settings.load_profile(before)


@pytest.mark.usefixtures("_with_the_operation", "_without_shrinking")
@pytest.mark.parametrize(
    "wrong", [rough, lambda x, gain: x * gain[:, None].detach(), lambda x, gain: x + 0 * gain[:, None]]
)
def test_the_example_rejects_a_wrong_one(device, monkeypatch, wrong):
    monkeypatch.setattr(lora.fast, "scale_rows", wrong)
    with pytest.raises((AssertionError, ExceptionGroup)):  # Hypothesis groups failures that differ
        run(device)


def test_an_operations_proof_is_under_thirty_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) < 30


# what a law's tests are called
LAWS = {
    "on scaling, lora_B and lora_A only": r"the_update_depends_on_s_B_A_alone",
    "the update is linear": r"the_update_(of_down_)?is_linear_in_scaling_and_in_B",
    "tokens, or rows": r"(tokens|rows|sequences)_do_not_see_each_other",
    "a batch is its parts": r"a_batch_is_its_parts",
    "padded with zeros": r"(ranks_can_be_padded|the_basis_and_the_number_of_ranks)",
    "padded with tokens": r"silent_(tokens|rows|sequences)_teach_nothing",
    "A → QA": r"the_basis_(of|and)",
    "merged is adapted": r"(merged_is_adapted|merged_down_is_adapted|a_merged_model_is_the_adapted_one)",
    "several adapters": r"(several_adapters|each_row_is_lora_linear_with_its_adapter|two_adapters_merge)",
    "an NF4 weight": r"(an_)?nf4_",
    "twice dy": r"(gradients_are_linear_in_dy|twice_the_gradient_of_the_loss_is_twice_every_gradient)",
    "a gradient does not depend": r"a_gradient_does_not_depend_on_who_else_wants_one",
    "memory layout": r"memory_layout_does_not_matter",
    "leading dimensions": r"leading_dimensions",
    "two runs": r"two_runs_are_the_same_bits",
    "finite differences": r"gradients_are_those_of_finite_differences",
}


# of an operation that most of these do not apply to, laws that only it has
OWN = {
    "norm": (
        "the_scale_of_a_row_does_not_matter", "a_row_turned_over_is_the_result_turned_over",
        "twice_the_weight_is_twice_the_output", "the_residual_sum_is_a_sum", "nothing_in_gives_nothing_out",
        "features_are_alike", "the_gradient_is_at_right_angles_to_the_row",
    ),
    "rope": (
        "twice_the_input_is_twice_the_output", "no_angle_is_no_rotation", "features_beyond_rot_pass_through",
        "the_gradient_is_the_rotation_back", "turned_and_turned_back_is_what_it_was",
        "scores_depend_on_the_distance_of_positions_only", "positions_are_rows_of_the_table",
        "the_two_layouts_of_pairs_are_one_rotation",
    ),
    "merge": ("no_scaling_is_the_weight_itself", "twice_weight_and_update_is_twice_the_result"),
    "nf4": (
        "decoding_is_a_table_and_a_product", "each_element_gets_the_nearest_code",
        "an_error_is_at_most_half_the_widest_gap", "quantising_again_changes_nothing",
        "twice_the_weight_is_twice_the_result", "blocks_do_not_see_each_other",
        "the_end_of_a_matrix_is_the_start_of_a_longer_one", "zeros_stay_zeros",
        "a_narrow_type_is_the_wide_one_rounded_once", "memory_layout_does_not_matter",
    ),
    "dropout": (
        "a_mask_is_its_definition", "a_longer_mask_begins_with_the_shorter", "a_mask_counts_its_elements_row_by_row",
        "what_a_higher_rate_keeps_a_lower_one_keeps", "seeds_and_streams_have_masks_of_their_own",
        "as_many_are_kept_as_should_be", "a_rate_that_rounds_to_zero_keeps_everything",
        "the_backward_drops_what_the_forward_dropped",
        "the_hidden_of_an_mlp_has_the_next_stream", "the_mean_over_seeds_is_no_dropout",
    ),
}  # fmt: skip


def test_every_operation_has_the_laws_that_the_page_says():
    """A tick is a test of both backends in the operation's file, a dash is none; at least ten laws where they apply."""
    lines = re.search(r"^\| law \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE).group(0).strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == len(LAWS)
    sources = {name: (Path(__file__).parent / f"test_{name}.py").read_text() for name in head[1:]}
    for (law, pattern), (title, *cells) in zip(LAWS.items(), rows, strict=True):
        assert title.startswith(law)
        for name, cell in zip(head[1:], cells, strict=True):
            found = re.search(rf"@both\n(@.*\n)*(\s+.*\n)*def test_{pattern}", sources[name])
            assert bool(found) == (cell == "✓"), (title, name)
    ticks = {name: sum(row[1 + i] == "✓" for row in rows) for i, name in enumerate(head[1:])}
    assert all(count >= 10 for name, count in ticks.items() if name not in OWN), ticks
    for name, laws in OWN.items():
        source = (Path(__file__).parent / f"test_{name}.py").read_text()
        missing = [law for law in laws if not re.search(rf"@both\n(@.*\n)*(\s+.*\n)*def test_{law}\(", source)]
        assert not missing and ticks.get(name, 0) + len(laws) >= 10, (name, missing)


def test_the_figures_have_their_place():
    assert all(PAGE.count(marker) == 1 for marker in MARKERS)
