"""Scores of generated answers, all from 0 to 100 and not rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
  if len(predictions) != len(references) or not predictions:
    raise ValueError(f"{len(predictions)} predictions and {len(references)} references; give as many of each, one at"
                     " least.")
  for i, answers in enumerate(references):
    if isinstance(answers, str) or not answers:
      raise ValueError(f"references[{i}]={answers!r}; give a list of one or more answers for every prediction.")
  return 100.0 * sum(map(score, predictions, references)) / len(predictions)
