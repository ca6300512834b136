"""Paths that a caller gives are of this machine: "~" is expanded, and URLs are refused before anything is written."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

import rat_jax
from rat_jax import RATPlusConfig
from rat_jax.paths import local_path
from rat_jax.train import Checkpoints

CONFIG = RATPlusConfig(8, 1, 8, 2)


@pytest.mark.parametrize(("value", "path"), [
    ("~/x", "HOME/x"), (pathlib.Path("~"), "HOME"), ("runs/a", "runs/a"), ("./gs:x", "gs:x"), ("a/~/b", "a/~/b"),
    ("C:/x", "C:/x"), ("12:/x", "12:/x"), ("a/gs://b", "a/gs:/b")])
def test_paths_of_this_machine(tmp_path, monkeypatch, value, path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert local_path(value, "folder") == pathlib.Path(path.replace("HOME", str(tmp_path)))


@pytest.mark.parametrize(("value", "message"), [
    ("gs://b/m", "folder='gs://b/m' is a URL, and only files of this machine are read and written; give a path of this"
                 " machine: mount the storage or copy from and to it."),
    (pathlib.Path("s3://b/m"), "folder='s3:/b/m' is a URL, and only files of this machine are read and written; give a"
                               " path of this machine: mount the storage or copy from and to it."),
    ("file:///data/x", "folder='file:///data/x' is a URL, and only files of this machine are read and written; give the"
                       " path alone, /data/x."),
    ("", "folder='' is empty; give a path, or . for the current folder."),
    ("~no-such-user/x", "folder='~no-such-user/x' starts at the home of a user whom this machine does not know; write"
                        " the path out.")])
def test_other_places_are_refused_in_words(value, message):
  with pytest.raises(ValueError) as raised:
    local_path(value, "folder")
  assert str(raised.value) == message


@pytest.mark.parametrize("url", ["gs://b/m", "HTTPS://b/m", "hf://b/m", "file:/b/m"])
def test_models_and_checkpoints_are_not_written_to_urls(tmp_path, monkeypatch, url):
  monkeypatch.chdir(tmp_path)
  params = {"embedding": np.zeros((8, 8), np.float32)}
  for call in (lambda: rat_jax.save_pretrained(url, CONFIG, params), lambda: rat_jax.load_pretrained(url),
               lambda: Checkpoints(url)):
    with pytest.raises(ValueError, match=f"folder='{url}' is a URL"):
      call()
  assert not list(tmp_path.iterdir())


def test_a_model_is_written_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert Checkpoints("~/run").folder == tmp_path / "run"
  with pytest.raises(FileNotFoundError, match=f"{tmp_path}/model"):
    rat_jax.load_pretrained("~/model")
