"""docs/backbones.md, which a tool writes, says what is so."""

import re

import pytest

from tools.backbones import PAGE, Found, page, smallest, try_backbone

ROWS = {
    family: Found(family, model, preset.strip("`–"), int(count.replace("–", "0")), "" if said == "works" else said)
    for family, model, preset, count, said in re.findall(
        r"^\| (\w+) \| (\w+) \| (\S+) \| (\S+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE
    )
    if family != "timm"
}


@pytest.mark.parametrize("family", ["convnext", "mobilenetv3", "regnet", "resnet"])
def test_a_row_of_the_page_is_what_the_tool_finds(family: str) -> None:
    row = ROWS[family]
    assert row.problem == "" and row.positions > 3
    assert try_backbone(row.model, family) == row


def test_a_family_without_default_positions_says_so() -> None:
    row = ROWS["coat"]
    found = try_backbone(row.model, "coat")
    assert (found.preset, found.positions) == (row.preset, row.positions) == ("", 0)
    assert found.problem and page([found]).splitlines()[-1].endswith(f"| {row.problem} |")


def test_the_count_above_the_table_is_its_rows() -> None:
    works = sum(not row.problem for row in ROWS.values())
    assert f"\n{works} of {len(ROWS)} families work by default.\n" in PAGE.read_text()
    assert works > 60


def test_a_small_model_of_a_family_is_found() -> None:
    assert smallest("pear_tiny") == "pear_tiny"
    assert smallest("regnet") == ROWS["regnet"].model
