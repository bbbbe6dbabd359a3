"""Linear-probe accuracy on frozen features, with all labels or with a few per class (scikit-learn's logistic regression).

Features are standardised with the mean and deviation of the features probed on; the regularisation is scikit-learn's
default (C = 1), never tuned.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def fit_linear_probe(train: Tensor, train_labels: Tensor) -> Pipeline:
    """Fit on ``[M, D]`` features with ``[M]`` labels; its ``predict`` takes an ``[N, D]`` array."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(train.numpy(), train_labels.numpy())


def linear_probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Fit on ``[M, D]`` features and score on ``[N, D]``, in percent."""
    return 100 * float(fit_linear_probe(train, train_labels).score(test.numpy(), test_labels.numpy()))


def few_shot_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    shots: int = 5,
    draws: int = 20,
    seed: int = 0,
) -> float:
    """`linear_probe_accuracy` with ``shots`` labels per class, the mean over ``draws`` draws of which ones, in percent.

    The draws depend on ``seed`` and the labels alone, so every model is probed with the same ones.
    """
    labels = train_labels.numpy()
    scores = []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        chosen = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
        index = np.concatenate(chosen)
        scores.append(linear_probe_accuracy(train[index], train_labels[index], test, test_labels))
    return float(np.mean(scores))
