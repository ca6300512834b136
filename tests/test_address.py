"""Where the repository lies is filled in by one command; until then it is a placeholder, in known files alone."""

from __future__ import annotations

import shutil
import subprocess

from conftest import ROOT

PLACEHOLDER = "https://github.com/OWNER/REPOSITORY"
UNFILLED = {"README.md", "CONTRIBUTING.md", "CITATION.cff", "pyproject.toml", "colab/quickstart.py",
            "colab/quickstart.ipynb", "colab/tpu_check.py", "colab/tpu_check.ipynb"}


def holding(folder):
  """The files with the placeholder that `make address` is about."""
  names = [*UNFILLED, "CHANGELOG.md", "setup.py", *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))]
  found = [name for name in names if (folder / name).exists()]
  return {name for name in found if PLACEHOLDER in (folder / name).read_text(encoding="utf-8")}


def test_make_address_fills_all_in(tmp_path):
  unfilled = holding(ROOT)
  print("unfilled:", *sorted(unfilled))
  assert unfilled in (UNFILLED, set())
  for name in [*UNFILLED, "Makefile"]:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / name)
  url = "https://example.org/somebody/rat_jax"
  refused = subprocess.run(["make", "address"], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert refused.returncode != 0
  assert "make address URL=https://" in refused.stdout
  subprocess.run(["make", "address", f"URL={url}"], cwd=tmp_path, capture_output=True, check=True)
  assert not holding(tmp_path)
  if unfilled:
    assert all(url in (tmp_path / name).read_text(encoding="utf-8") for name in UNFILLED)
