"""Phonetic classes from aligned speech, and their exact place in the official quantizer.

Linear discriminant analysis on aligned phones finds the directions of the features that tell
phones apart (and speakers not); k-means divides that space. The official quantizer is three linear
layers with leaky ReLU between them: enough to carry a vector through unchanged, because
``y = (leaky(y) - leaky(-y)) / (1 + slope)``, so its best class is exactly the nearest centroid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch

from stages.phonetic import Quantizer

SLOPE = 0.01
NEVER = -1e4
_SHRINK = 1e-3


@dataclass(frozen=True)
class Clusters:
    """``y = projection @ (x - mean)``; the code is the nearest of ``centroids [K, dims]``."""

    projection: np.ndarray
    mean: np.ndarray
    centroids: np.ndarray

    def project(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) @ self.projection.T

    def codes(self, features: np.ndarray) -> np.ndarray:
        """Nearest centroid of each row of ``[T, width]``, computed in float64."""
        y = self.project(np.asarray(features, np.float64))
        distance = (self.centroids**2).sum(1) - 2 * y @ self.centroids.T
        return distance.argmin(1).astype(np.int64)


def discriminants(features: np.ndarray, labels: np.ndarray, dims: int) -> np.ndarray:
    """The ``dims`` best directions ``[dims, width]``, within-class covariance made the identity.

    ``features [N, width]`` float64, ``labels [N]`` from 0. Solves ``B v = l (W + e tr(W) I) v``.
    """
    count = np.bincount(labels)
    means = np.zeros((len(count), features.shape[1]))
    np.add.at(means, labels, features)
    means /= np.maximum(count, 1)[:, None]
    centred = features - means[labels]
    within = centred.T @ centred / len(features)
    spread = means - features.mean(0)
    between = (spread * count[:, None]).T @ spread / len(features)
    ridge = _SHRINK * np.diag(np.diag(within))
    _, vectors = scipy.linalg.eigh(between, within + ridge)
    return np.ascontiguousarray(vectors[:, ::-1][:, :dims].T)


def fit(
    features: np.ndarray,
    phones: np.ndarray,
    *,
    clusters: int,
    dims: int,
    silence: str = "sil",
    silence_share: float = 0.1,
    seed: int = 0,
) -> Clusters:
    """Fit to frames ``[N, width]`` and the phone of each. Silence is thinned before k-means."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    features = features.astype(np.float64)
    names, labels = np.unique(phones, return_inverse=True)
    mean = features.mean(0)
    projection = discriminants(features - mean, labels, min(dims, len(names) - 1))
    quiet = np.flatnonzero(phones == silence)
    loud = np.flatnonzero(phones != silence)
    kept = min(len(quiet), int(len(loud) * silence_share / (1 - silence_share)))
    chosen = np.concatenate([loud, rng.choice(quiet, kept, replace=False)])
    points = ((features[chosen] - mean) @ projection.T).astype(np.float32)
    model = KMeans(clusters, n_init=2, max_iter=100, random_state=seed).fit(points)
    return Clusters(projection, mean, model.cluster_centers_.astype(np.float64))


def embed(clusters: Clusters, vocabulary: int = 500) -> dict[str, Any]:
    """The official quantizer file whose best class is the nearest centroid.

    Layers 1 and 2 carry ``y`` and ``-y``; layer 3 gives ``2 c y - c c``, the negative squared
    distance but for a constant. Unused classes and the blank never win.
    """
    dims, width = clusters.projection.shape
    network = Quantizer(width, width, vocabulary + 1)
    linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    if 2 * dims > min(layer.out_features for layer in linear[:2]):
        raise ValueError(f"{dims} dimensions do not fit the quantizer's hidden layers")
    for layer in linear:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    first, second, third = linear
    matrix = torch.from_numpy(clusters.projection)
    offset = torch.from_numpy(clusters.projection @ clusters.mean)
    centroids = torch.from_numpy(clusters.centroids)
    pick = torch.eye(dims) / (1 + SLOPE)  # y from the outputs that carry y and -y
    with torch.no_grad():
        for sign, rows in ((1.0, slice(0, dims)), (-1.0, slice(dims, 2 * dims))):
            first.weight[rows] = (sign * matrix).float()
            first.bias[rows] = (-sign * offset).float()
            second.weight[rows, : 2 * dims] = sign * torch.cat([pick, -pick], 1)
            third.weight[: len(centroids), rows] = (sign * 2 * centroids / (1 + SLOPE)).float()
        third.bias.fill_(NEVER)
        third.bias[: len(centroids)] = -(centroids**2).sum(1).float()
    return {
        "model_cfg": {"vocab_size": vocabulary, "dim": width, "upstream_dim": width},
        "model_weight": {k: v.clone() for k, v in network.state_dict().items()},
    }
