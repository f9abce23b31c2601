"""Which people learn alike: k-means on the gradients of the seed, and the least size of a cluster."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from perfit_shared.shifts import ShiftTensors

__all__ = ["assign", "cluster"]

_COMPONENTS = 8  # of the gradients; more of them are noise of single examples

Floats = npt.NDArray[np.float64]


def cluster(gradients: Sequence[ShiftTensors], count: int, *, least: int, seed: int) -> list[int]:
    """The cluster of each person, by the direction in which the seed would move for them.

    k-means on the leading principal components of the gradients of W and b, each scaled to length 1, so
    that a person counts by direction, not by how badly the seed suits them.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    features = np.stack([_direction(each) for each in gradients])  # (people, numbers)
    components = min(_COMPONENTS, *features.shape)
    found = PCA(components, svd_solver="full").fit_transform(features)  # (people, components)
    distances = KMeans(count, n_init=10, random_state=seed).fit(found).transform(found)
    return assign(distances, least=least)


def assign(costs: Floats, *, least: int) -> list[int]:
    """The cheapest cluster of each person, `costs` being (people, clusters); none with under `least` people.

    The smallest cluster is dissolved until all are large enough, and its people go where it costs them
    least. The numbers of those that stay are unchanged.
    """
    left = list(range(costs.shape[1]))
    while True:
        chosen = [left[i] for i in costs[:, left].argmin(axis=1)]
        smallest = min(left, key=chosen.count)
        if len(left) == 1 or chosen.count(smallest) >= least:
            return chosen
        left.remove(smallest)


def _direction(gradient: ShiftTensors) -> Floats:
    parts = [part.ravel() for layer in gradient.layers.values() for part in (layer.source, layer.bias)]
    flat = np.concatenate(parts).astype(np.float64)
    length = np.linalg.norm(flat)
    return flat / length if length > 0 else flat
