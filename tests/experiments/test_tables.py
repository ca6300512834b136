"""The tables of the pages are those of experiments/results, and what is wrong with a marker is said."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from conftest import ROOT
from experiments import tables
from experiments.shared import page_tables
from experiments.shared.output import markdown_table

PAGES = [path for path in tables.pages() if path.parent.name == "pages"]
BEGIN, END = "<!-- table: one -->\n", "<!-- end -->\n"


def marked(path):
  """The names of a page's tables."""
  return [name for name, _ in page_tables.parts(path.read_text(encoding="utf-8"), path.name) if name]


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: path.name)
def test_tables_are_as_the_results_say(path):
  _, others = page_tables.rewritten(path.read_text(encoding="utf-8"), path.name, tables.made)
  assert not others, "run python -m experiments.tables"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_with_results_has_a_table_that_is_made_of_them(path):
  links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
  files = [link for link in links if not link.startswith("http")]
  assert all((path.parent / file).exists() for file in files), files
  assert marked(path) or not [file for file in files if file.endswith(".json")]


def test_every_table_stands_somewhere():
  assert {name for path in tables.pages() for name in marked(path)} == set(tables.TABLES)


def cells_of(found):
  """The cells of a result of `eval_niah`."""
  for one in found.values():
    yield from [one] if {"accuracy", "blank"} & one.keys() else cells_of(one)


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("niah_*.json")), ids=lambda path: path.stem)
def test_every_cell_of_needles_has_its_count_and_errors(path):
  every = [cell for cell in cells_of(json.loads(path.read_text(encoding="utf-8"))) if "blank" not in cell]
  assert len(every) > 20
  for cell in every:
    right = np.array(cell["accuracy"]) / 100
    np.testing.assert_allclose(right * cell["count"], np.round(right * cell["count"]), atol=0.005)
    of_examples = 100 * np.sqrt(right * (1 - right) / cell["count"])
    np.testing.assert_allclose(cell["error_over_examples"], of_examples, atol=2e-3)
    assert cell["error_over_seeds"] == pytest.approx(100 * right.std(ddof=1) / len(right)**0.5, abs=2e-3)
    assert 0 < cell["tokens_read"] <= 4096


def test_the_index_names_every_module_and_every_page():
  text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
  modules = [path for path in (ROOT / "experiments").rglob("*.py") if path.name != "__init__.py"]
  assert len(modules) > 20
  assert not [path.name for path in modules if f"`{path.stem}`" not in text]
  assert all(f"pages/{path.name}" in text for path in PAGES)
  assert len(text.splitlines()) <= 90


def test_a_table_is_replaced_and_named():
  text = f"Before.\n{BEGIN}| old |\n{END}After.\n"
  new, others = page_tables.rewritten(text, "page", lambda name: f"| {name} |")
  assert new == f"Before.\n{BEGIN}| one |\n{END}After.\n"
  assert others == ["one"]
  assert page_tables.rewritten(new, "page", lambda name: f"| {name} |") == (new, [])


@pytest.mark.parametrize("text, named", [
    (f"x\n{BEGIN}| a |\n", "page, line 2: <!-- table: one -->: no <!-- end --> after it"),
    (f"{BEGIN}{BEGIN}{END}", "page, line 1: <!-- table: one -->: no <!-- end --> before the next table, of line 2"),
    (f"x\n{END}", "page, line 2: <!-- end -->: no table begins before it"),
    ("<!-- table one -->\n", "page, line 1: <!-- table one -->: a table begins with the line"),
    (" <!--end-->\n", "page, line 1: <!--end-->: a table begins with the line"),
])
def test_a_broken_marker_is_named(text, named):
  with pytest.raises(ValueError, match=re.escape(named)):
    page_tables.rewritten(text, "page", lambda name: name)


def test_a_table_that_is_not_there_is_named():
  with pytest.raises(ValueError, match="no table is called 'none'; there are index, needles, "):
    page_tables.rewritten("<!-- table: none -->\n<!-- end -->\n", "page", tables.made)


@pytest.mark.slow
def test_check_says_what_differs_and_writes_nothing(tmp_path, monkeypatch, capsys):
  page = tmp_path / "page.md"
  old = f"<!-- table: near -->\n{END}"
  page.write_text(old)
  monkeypatch.setattr(tables, "ROOT", tmp_path)
  monkeypatch.setattr(tables, "pages", lambda: [page])
  monkeypatch.setattr(tables, "TABLES", {"near": lambda read: markdown_table(["mode"], [["dense"]])})
  with pytest.raises(ValueError, match=r"near in page\.md; run python -m experiments\.tables"):
    tables.main(tables.Settings(workdir=tmp_path, check=True))
  assert page.read_text() == old
  tables.main(tables.Settings(workdir=tmp_path, check=False))
  assert "| dense |" in page.read_text()
  tables.main(tables.Settings(workdir=tmp_path, check=True))
  assert "rewritten: near in page.md" in capsys.readouterr().out
