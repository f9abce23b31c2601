"""Tables as text."""

from __future__ import annotations

from perfit_cloud.text_tables import aligned_table, markdown_table


def test_markdown_cells() -> None:
    made = markdown_table(["a", "b|c"], [[None, 0.12345], ["x|y", 3]])
    assert made == ["| a | b\\|c |", "| --- | --- |", "| – | 0.123 |", "| x\\|y | 3 |"]


def test_columns_are_aligned() -> None:
    made = aligned_table(["", "long"], [["name", "1"], ["n", "12345"]])
    assert made == ["       long", "name      1", "n     12345"]
    assert aligned_table(["only", "head"], []) == ["only  head"]
