"""Text that can be had without a hub: three of Debian's packages of documentation, and the standard library.

Debian's own `apt-get` fetches the packages, from where a machine is set up to. What cannot be had is left out.
"""

from __future__ import annotations

import gzip
import pathlib
import shutil
import subprocess
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator

PACKAGES = ("linux-doc", "python3-doc", "dict-gcide")  # the kernel's documents, Python's, and a dictionary
_NOT_OF_LIBRARY = {"site-packages", "dist-packages"}
_ENTRIES = 1 << 16  # bytes of a document of the dictionary


def collect(folder: pathlib.Path) -> tuple[list[dict[str, object]], list[str]]:
  """Writes the texts as files into `folder`, one folder for each source.

  Returns:
    ({"source", "files", "bytes"} of every source, a line for every source that is left out).
  """
  sources, left_out = [], []
  for name in PACKAGES:
    try:
      version = _collect_package(name, folder / name)
    except OSError as error:
      left_out.append(f"{name} is left out: {error}")
      shutil.rmtree(folder / name, ignore_errors=True)
    else:
      sources.append(_counted(f"Debian's {version}", folder / name))
  library = folder / "standard_library"
  shutil.copytree(sysconfig.get_paths()["stdlib"], library, dirs_exist_ok=True, ignore=_no_library_text)
  sources.append(_counted(f"the standard library of Python {sysconfig.get_python_version()}", library))
  return sources, left_out


def _no_library_text(folder: str, names: list[str]) -> set[str]:
  """What of a folder is not copied."""
  return {name for name in names if name in _NOT_OF_LIBRARY
          or not ((pathlib.Path(folder) / name).is_dir() or name.endswith(".py"))}


def _counted(source: str, folder: pathlib.Path) -> dict[str, object]:
  files = [path for path in folder.rglob("*") if path.is_file()]
  return {"source": source, "files": len(files), "bytes": sum(path.stat().st_size for path in files)}


def _collect_package(name: str, folder: pathlib.Path) -> str:
  """Writes the package's texts; its name and version. Raises OSError where it cannot be had."""
  with tempfile.TemporaryDirectory() as temporary:
    inside = pathlib.Path(temporary)
    _run("apt-get", "download", _of_release(name), cwd=inside)
    archives = list(inside.glob("*.deb"))
    if not archives:
      raise OSError("apt-get downloaded nothing")
    _run("dpkg-deb", "-x", archives[0].name, "tree", cwd=inside)
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(_texts(inside / "tree")):
      (folder / f"{i:05}.txt").write_bytes(text)
    return " ".join(archives[0].name.split("_")[:2])


def _of_release(name: str) -> str:
  """The package that has the files, where `name` only depends on that of the release, as linux-doc on linux-doc-6.1."""
  stem, _, kind = name.partition("-")
  for line in _run("apt-cache", "depends", name).splitlines():
    label, _, other = line.strip().partition(": ")
    if label == "Depends" and other.startswith(stem) and f"-{kind}" in other:
      return other
  return name


def _run(*command: str, cwd: pathlib.Path | None = None) -> str:
  """What the command prints. Raises OSError where it is not there or fails, with its last line."""
  try:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
  except subprocess.CalledProcessError as error:
    said = error.stderr.strip().splitlines() or [f"status {error.returncode}"]
    raise OSError(f"{' '.join(command)}: {said[-1]}") from error


def _texts(tree: pathlib.Path) -> Iterator[bytes]:
  """The texts of a package: what is written as plain text, and a dictionary in parts."""
  for path in sorted(tree.rglob("*")):
    if not path.is_file() or path.is_symlink():
      continue
    packed = path.suffix in (".gz", ".dz")
    name = path.with_suffix("") if packed else path
    if name.suffix not in (".txt", ".rst", ".dict"):
      continue
    try:
      text = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    except (OSError, EOFError, zlib.error):
      continue  # damaged
    yield from _parts(text) if name.suffix == ".dict" else [text]


def _parts(text: bytes) -> Iterator[bytes]:
  """A dictionary in documents that begin with an entry, which stands after an empty line."""
  start = 0
  while start < len(text):
    end = text.find(b"\n\n", start + _ENTRIES)
    end = len(text) if end < 0 else end + 2
    yield text[start:end]
    start = end
