"""What the towers are good for on families that were held out.

Classification is into Unicode's groups. A group has 16 to 52 of the held-out families, a family 1 to 150 variants: an
accuracy is the mean over groups of means over families of means over variants, which for a guess is 1 / len(NAMES).

    zero-shot      the group whose prompts are the nearest to the image, by the shared embeddings
    k-shot         the nearest mean of the features of k families' images, on average over draws of these
    linear probe   logistic regression on the features of all training images
    retrieval      the image's own caption among those of all held-out pairs, variants too, and the other way round
"""

from __future__ import annotations

from statistics import mean

import contrastile as ct
import torch
from contrastile.demo.models import tokenize
from contrastile.demo.train import CHUNK, RECALL_AT, Dataset, embed
from torch import Tensor, nn
from torch.nn import functional as F

from examples.two_tower.corpus import Corpus
from examples.two_tower.groups import NAMES, PROMPTS
from examples.two_tower.towers import HeadedTowers

SHOTS = (1, 5, 10)
DRAWS = 50  # of a k-shot classifier's families
PROBE_DECAY = 1e-3
PROBE_STEPS = 100


@torch.no_grad()
def measure(towers: HeadedTowers, data: Corpus, chance: torch.Generator) -> dict[str, float]:
    """Shares, 0 to 1; and of the held-out pairs' geometry the mean cosine and the distance of the modalities' means."""
    train, held_out = data.dataset.train, data.dataset.held_out
    v, t = embed(towers, data.dataset, held_out)
    known, asked = (_image_features(towers, data.dataset, which) for which in (train, held_out))
    groups, families = data.groups[train], data.families[train]
    weights = balanced(data.groups[held_out], data.families[held_out])

    def accuracy(scores: Tensor) -> float:
        """Of scores (held out, groups)."""
        return float((weights * (scores.argmax(1) == data.groups[held_out])).sum())

    found = {"zero-shot": accuracy(v @ prompts(towers).T)}
    for shots in SHOTS:
        means = [class_means(known, groups, families, shots, chance) for _ in range(DRAWS)]
        found[f"{shots}-shot"] = mean(accuracy(asked @ each.T) for each in means)
    found["linear probe"] = accuracy(probe(known, groups, balanced(groups, families))(asked))
    for name, (x, y) in {"image to text": (v, t), "text to image": (t, v)}.items():
        recalls = ct.recall_at_k(ct.retrieval_ranks(x, y), RECALL_AT)
        found |= {f"{name} R@{k}": recall for k, recall in recalls.items()}
    found["cosine of pairs"] = float((v * t).sum(1).mean())
    found["gap"] = float((v.mean(0) - t.mean(0)).norm())
    return found


def balanced(groups: Tensor, families: Tensor) -> Tensor:
    """(n,) weights that sum to 1: groups count alike, in a group families, in a family variants."""
    weights = torch.zeros(len(groups), dtype=torch.float64)
    present = groups.unique()
    for group in present:
        own = groups == group
        members = families[own]
        weights[own] = 1 / (members.bincount()[members].double() * len(members.unique()) * len(present))
    return weights


def prompts(towers: HeadedTowers) -> Tensor:
    """(groups, D) unit rows: each group's prompts on average."""
    return F.normalize(torch.stack([towers.text(tokenize(PROMPTS[name])).mean(0) for name in NAMES]), dim=1)


def class_means(features: Tensor, groups: Tensor, families: Tensor, shots: int, chance: torch.Generator) -> Tensor:
    """(groups, D) unit rows: mean of one variant each of `shots` families of every group, or of all where fewer are."""
    order = torch.randperm(len(features), generator=chance)
    member = torch.tensor(list(dict(zip(families[order].tolist(), order.tolist(), strict=True)).values()))
    member = member[torch.randperm(len(member), generator=chance)]
    means = [features[member[groups[member] == group][:shots]].mean(0) for group in range(len(NAMES))]
    return F.normalize(torch.stack(means), dim=1)


def probe(features: Tensor, groups: Tensor, weights: Tensor) -> nn.Linear:
    """Multinomial logistic regression of the groups (n,) on features (n, D), rows weighted by `weights` (n,)."""
    layer = nn.Linear(features.shape[1], len(NAMES))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def objective() -> float:
        optimizer.zero_grad()
        losses = F.cross_entropy(layer(features), groups, reduction="none")
        loss = (weights * losses).sum() + PROBE_DECAY * layer.weight.square().sum()
        loss.backward()
        return loss.item()

    with torch.enable_grad():
        optimizer.step(objective)
    return layer


def _image_features(towers: HeadedTowers, dataset: Dataset, which: Tensor) -> Tensor:
    """(len(which), D) unit rows, what the heads are given."""
    return torch.cat([towers.image.features(dataset.images[part]) for part in which.split(CHUNK)])
