"""Weighted k-nearest-neighbour accuracy on frozen features.

Source: instance discrimination (arXiv 1805.01978) with the settings that DINO (arXiv 2104.14294) made customary: cosine
similarity s, 20 neighbours, votes weighted by exp(s / 0.07).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of queries whose weighted vote is right.

    Args:
        bank: ``[M, D]`` features with known labels; ``k`` is cut to M.
        bank_labels: ``[M]`` class numbers.
        queries: ``[N, D]``.
        query_labels: ``[N]``.
        k: neighbours.
        temperature: of the votes.

    Returns:
        Percent.
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    right = 0
    for part, labels in zip(queries.split(1024), query_labels.split(1024), strict=True):
        similarity, neighbours = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, bank_labels[neighbours], (similarity / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(queries)
