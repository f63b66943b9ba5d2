"""How answers are judged, as RULER, LongBench and SCBench do it; every score is from 0 to 1.

Sources: RULER arXiv 2404.06654, LongBench arXiv 2308.14508, SCBench arXiv 2412.10319. ROUGE is Google's (`rouge-score`,
Apache-2.0, which lm-eval brings along), without stemming; LongBench's own figures used another implementation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

Metric = Callable[[str, Sequence[str], Sequence[str]], float]


def found(answer: str, golds: Sequence[str]) -> list[bool]:
    """Which of some strings an answer contains, whatever their case."""
    return [gold.lower() in answer.lower() for gold in golds]


def string_match(answer: str, golds: Sequence[str], metric: str) -> float:
    """RULER's score.

    Args:
        answer: what the model wrote.
        golds: what it should contain.
        metric: "all" for the share of them that are found, "part" for whether any is.

    Returns:
        The score.

    Raises:
        ValueError: no such metric.

    Example:
        >>> string_match("It is 12.", ["12", "34"], "all")
        0.5
        >>> string_match("It is 12.", ["12", "34"], "part")
        1.0
    """
    if metric not in ("all", "part"):
        raise ValueError(f"there is no metric {metric!r}: choose all or part")
    hits = found(answer, golds)
    return sum(hits) / len(hits) if metric == "all" else float(any(hits))


def _best(score: Callable[[str, str], float]) -> Metric:
    return lambda answer, golds, classes: max(score(answer, gold) for gold in golds)


def _plain_words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words, without case, punctuation and articles.

    Example:
        >>> round(f1("The red house!", "a red car"), 3)
        0.5
    """
    said, wanted = _plain_words(answer), _plain_words(gold)
    same = sum((Counter(said) & Counter(wanted)).values())
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def rouge_l(answer: str, gold: str) -> float:
    """F-measure of the longest common subsequence of words, over the whole text."""
    return _rouge("rougeL", answer, gold)


def rouge_l_sum(answer: str, gold: str) -> float:
    """The same, line by line of the gold text."""
    return _rouge("rougeLsum", answer, gold)


def _rouge(kind: str, answer: str, gold: str) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs the package rouge-score: pip install -c constraints.txt -e '.[eval]'") from None
    return float(RougeScorer([kind], use_stemmer=False).score(gold, answer)[kind].fmeasure)


def classification(answer: str, golds: Sequence[str], classes: Sequence[str]) -> float:
    """One over the number of classes that are named, if the right one is among them.

    Classes that are part of the right one's name are not counted.
    """

    def score(gold: str) -> float:
        named = [name for name in classes if name in answer and (name == gold or name not in gold)]
        return 1 / len(named) if gold in named else 0.0

    return max(map(score, golds))


def counting(answer: str, gold: str) -> float:
    """The share of the numbers in an answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(gold) / len(numbers) if numbers else 0.0


def retrieval(answer: str, gold: str) -> float:
    """The same for the number of a paragraph, "Paragraph 7"."""
    number = re.search(r"Paragraph (\d+)", gold)
    if number is None:
        raise ValueError(f'the right answer of a retrieval task must read "Paragraph NUMBER", not {gold!r}')
    return counting(answer, number[1])


def code_similarity(answer: str, gold: str) -> float:
    """Likeness of the first line of code to the right one; lines with a backtick, # or // are no code."""
    lines = (line for line in answer.split("\n") if line.strip() and not re.search("`|#|//", line))
    return SequenceMatcher(None, next(lines, ""), gold, autojunk=False).ratio()


def contains_all(answer: str, golds: Sequence[str], classes: Sequence[str]) -> float:
    """The share of the right strings that the answer contains."""
    return string_match(answer, golds, "all")


def contains_any(answer: str, golds: Sequence[str], classes: Sequence[str]) -> float:
    """Whether the answer contains any of the right strings."""
    return string_match(answer, golds, "part")


def choice(answer: str, golds: Sequence[str], classes: Sequence[str]) -> float:
    """Whether the first letter A to D that stands alone is the right one."""
    letter = re.search(r"\b([ABCD])\b", answer)
    return float(letter is not None and letter[1] in golds)


def first_number(answer: str, gold: str) -> float:
    """Whether the first number in an answer is the right one."""
    right, number = float(gold), re.search(r"-?\d+(\.\d+)?", answer)
    return float(number is not None and float(number[0]) == right)


METRICS: dict[str, Metric] = {
    "f1": _best(f1),
    "rouge-l": _best(rouge_l),
    "rouge-l-sum": _best(rouge_l_sum),
    "classification": classification,
    "counting": _best(counting),
    "retrieval": _best(retrieval),
    "code-similarity": _best(code_similarity),
    "contains-all": contains_all,
    "contains-any": contains_any,
    "choice": choice,
    "first-number": _best(first_number),
}
