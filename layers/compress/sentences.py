"""Where sentences end, and scores that spread no further than that."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MAY_END = re.compile(r"[.!?…][\"'”’»)\]}]*\s*$")
_ALWAYS_ENDS = re.compile(r"[\n\r]|[。！？][」』”’）]*$")


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceEnds:
    r"""Tells from token ids which tokens end a sentence.

    A full stop, exclamation mark, question mark or ellipsis (closing quotes and brackets may follow) ends one where the
    next token begins with white space: not that of 3.14. A line break, a control token and the full stop of Chinese and
    Japanese always do. So do abbreviations: nothing here knows words.

    Args:
        may_end_V: bool per token id: ends a sentence if space follows.
        spaced_V: bool: begins with white space, or is a control token.
        always_V: bool: ends a sentence whatever follows.

    Example:
        >>> ends = SentenceEnds.from_texts(["<end>", "It", " is", ".", " 3", "14", "\n"], special=[0])
        >>> ends(torch.tensor([[1, 2, 4, 3, 5, 3, 4], [2, 3, 0, 1, 6, 1, 3]]), [7, 7]).int().tolist()
        [[0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0, 1]]
    """

    may_end_V: Tensor
    spaced_V: Tensor
    always_V: Tensor

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], *, special: Collection[int], device: torch.device | str = "cpu"
    ) -> SentenceEnds:
        """Read the tables off a vocabulary.

        Args:
            texts: of each token alone, with the space that it begins with.
            special: ids of control tokens.
            device: where the tables live.
        """

        def table(flags: list[bool]) -> Tensor:
            return torch.tensor(flags, dtype=torch.bool, device=device)

        return cls(
            may_end_V=table([bool(_MAY_END.search(text)) for text in texts]),
            spaced_V=table([text[:1].isspace() or i in special for i, text in enumerate(texts)]),
            always_V=table([bool(_ALWAYS_ENDS.search(text)) or i in special for i, text in enumerate(texts)]),
        )

    def __call__(self, ids_BT: Tensor, lengths: list[int]) -> Tensor:
        """Which tokens end a sentence.

        Args:
            ids_BT: int64 token ids; padding is on the right.
            lengths: per row, how many ids are real. What follows the last one is not known: it counts as space.

        Returns:
            (B, T) bool; what it says of padding does not matter.
        """
        last_B1 = torch.tensor(lengths, device=ids_BT.device)[:, None] - 1
        is_last_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) == last_B1
        next_spaced_BT = F.pad(self.spaced_V[ids_BT[:, 1:]], (0, 1)) | is_last_BT
        return self.always_V[ids_BT] | self.may_end_V[ids_BT] & next_spaced_BT


def spread_within_sentences(
    score_BHS: Tensor, ends_BHS: Tensor, *, ahead: int, behind: int = 0, always: int = 0
) -> Tensor:
    """Share every token's score with its neighbours in the same sentence.

    With sentences numbered by n, out_j = max score_i over j - ahead <= i <= j + behind with n_i = n_j, and over
    j - always <= i <= j. The cost grows with the logarithm of `ahead` and `behind`.

    Args:
        score_BHS: at least 0, in order of position.
        ends_BHS: bool, tokens that end a sentence.
        ahead: tokens after a hot one that share its score if no sentence ends before them, >= 0.
        behind: tokens before a hot one that share its score if no sentence ends from them on, >= 0.
        always: tokens after a hot one that share its score whatever ends, >= 0.

    Returns:
        (B, H, S) of the same dtype.

    Example:
        >>> score, ends = torch.tensor([[[0.0, 3, 0, 0, 0, 0]]]), torch.tensor([[[0, 0, 1, 0, 0, 0]]]).bool()
        >>> spread_within_sentences(score, ends, ahead=4).tolist()
        [[[0.0, 3.0, 3.0, 0.0, 0.0, 0.0]]]
        >>> spread_within_sentences(score, ends, ahead=4, behind=1, always=2).tolist()
        [[[3.0, 3.0, 3.0, 3.0, 0.0, 0.0]]]
    """
    number_BHS = ends_BHS.cumsum(-1, dtype=torch.int32) - ends_BHS.int()
    spread_BHS = _spread_ahead(score_BHS, number_BHS, ahead)
    if behind:
        spread_BHS = spread_BHS.maximum(_spread_ahead(score_BHS.flip(-1), number_BHS.flip(-1), behind).flip(-1))
    if always:
        spread_BHS = spread_BHS.maximum(F.max_pool1d(F.pad(score_BHS, (always, 0)), always + 1, stride=1))
    return spread_BHS


def _spread_ahead(score_BHS: Tensor, number_BHS: Tensor, ahead: int) -> Tensor:
    """The largest score of the last ahead + 1 tokens with the same number: windows that double, then one that fits."""
    spread_BHS, width = score_BHS, 1
    while width <= min(ahead, score_BHS.shape[-1] - 1):
        step = min(width, ahead + 1 - width)
        same_BHS = number_BHS[..., step:] == number_BHS[..., :-step]
        earlier_BHS = spread_BHS[..., :-step].where(same_BHS, 0.0)
        spread_BHS = spread_BHS.maximum(F.pad(earlier_BHS, (step, 0)))
        width += step
    return spread_BHS
