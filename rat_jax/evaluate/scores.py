"""Scores of generated answers, all from 0 to 100 and not rounded.

All raise ValueError unless every prediction is a text, and has a list of one or more references that are no empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

References = Sequence[Sequence[str]]  # the answers of every example


def string_match_all(predictions: Sequence[str], references: References) -> float:
  """RULER's score: the share of an example's references that are in its prediction as substrings, whatever the case.

  Source: github.com/NVIDIA/RULER, scripts/eval/synthetic/constants.py. A value inside a longer number counts.
  """
  return _mean(predictions, references, lambda prediction, answers: sum(
      answer.lower() in prediction.lower() for answer in answers) / len(answers))


def string_match_part(predictions: Sequence[str], references: References) -> float:
  """RULER's score of its qa tasks: the share of predictions with a reference as a substring, whatever the case.

  Each reference is a right answer; the best one counts. Source: as of `string_match_all`.
  """
  return _mean(predictions, references, lambda prediction, answers: float(
      any(answer.lower() in prediction.lower() for answer in answers)))


def comma_recall(predictions: Sequence[str], references: References) -> float:
  """The RAT+ authors' score: the share of references among the prediction's parts between commas, as sets.

  Duplicate references count once above the line and each below it, as in their code.
  """
  return _mean(predictions, references, lambda prediction, answers: len(
      {part.strip() for part in prediction.split(",")} & set(answers)) / len(answers))


def exact_match(predictions: Sequence[str], references: References) -> float:
  """The share of predictions whose parts between commas are the references, all of them and in their order."""
  return _mean(predictions, references, lambda prediction, answers: float(
      [part.strip() for part in prediction.split(",")] == [answer.strip() for answer in answers]))


def _mean(predictions: Sequence[str], references: References, score: Callable[[str, Sequence[str]], float]) -> float:
  for name, given in (("predictions", predictions), ("references", references)):
    if not _is_list(given):
      raise ValueError(f"{name}={given!r}; give a list with one entry for every example.")
  if len(predictions) != len(references) or len(predictions) == 0:
    raise ValueError(f"{len(predictions)} predictions and {len(references)} references; give as many of each, one at"
                     " least.")
  for i, (prediction, answers) in enumerate(zip(predictions, references, strict=True)):
    if not isinstance(prediction, str):
      raise ValueError(f"predictions[{i}]={prediction!r}; give a text.")
    if not _is_list(answers) or len(answers) == 0:
      raise ValueError(f"references[{i}]={answers!r}; give a list of one or more answers for every prediction.")
    for j, answer in enumerate(answers):
      if not isinstance(answer, str) or not answer:
        raise ValueError(f"references[{i}][{j}]={answer!r}; give a text that is not empty.")
  return 100.0 * sum(map(score, predictions, references)) / len(predictions)


def _is_list(given: object) -> bool:
  return isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | bytes)
