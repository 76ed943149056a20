"""The figures of docs/objective.md, computed by goldsmith's own objective.

python docs/figures/draw.py            draws new_york.svg, gradient.svg and mean_of_means.svg beside this file

Needs matplotlib (extra `docs`). The numbers are functions of their own, which a test checks without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from goldsmith.objective.cross_entropy import OutputHead, cross_entropy

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREY = (
    "#0072b2",
    "#d55e00",
    "#767676",
)  # told apart by colour-blind eyes; grey reads on white and on black

NEW_YORK = {"A": (0.6, 0.8), "B": (0.9, 0.4)}
TOKENS = ("York", "Jersey", "Orleans", "Delhi", "years")
LOGITS = (2.0, 1.2, 0.6, 0.0, -0.8)
# nll of each gold token of eight rows; the longer a row, the surer the model is of it.
ROWS = tuple(
    np.linspace(2.5, 0.3, 8)[index] * np.ones(length) for index, length in enumerate((1, 2, 2, 4, 6, 9, 14, 22))
)


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Of one gold token.

    Attributes:
        probabilities: of each token of the vocabulary.
        gradient: of nll by each logit, from autograd.
    """

    probabilities: npt.NDArray[np.float64]
    gradient: npt.NDArray[np.float64]


def gradient() -> Gradient:
    """The gradient of -log p(gold) by the logits, where the first token is gold."""
    # Hidden states that are the logits themselves: the output layer is the identity.
    logits_KV = torch.tensor([LOGITS], dtype=torch.float64, requires_grad=True)
    sums = cross_entropy(
        logits_KV,
        OutputHead(weight_VD=torch.eye(len(LOGITS), dtype=torch.float64)),
        torch.tensor([0]),
        torch.ones(1, dtype=torch.float64),
    )
    sums.weighted_nll.backward()
    assert logits_KV.grad is not None
    return Gradient(
        probabilities=torch.softmax(logits_KV.detach()[0], dim=-1).numpy(), gradient=logits_KV.grad[0].numpy()
    )


def losses_by_cut() -> dict[int, tuple[float, float]]:
    """Micro-batches a step is cut into -> (one sum over one count, mean of the micro-batches' means)."""
    found = {}
    for parts in (1, 2, 4, 8):
        cut = [np.concatenate(ROWS[begin : begin + 8 // parts]) for begin in range(0, 8, 8 // parts)]
        one_division = sum(part.sum() for part in cut) / sum(len(part) for part in cut)
        found[parts] = (float(one_division), float(np.mean([part.mean() for part in cut])))
    return found


def draw_new_york(pyplot: Any) -> None:
    figure, axes = pyplot.subplots(figsize=(6.4, 3.0))
    labels = ["p(New | x)", "p( York | x, New)", "P(New York | x)"]
    for offset, (name, (first, second)), colour in zip((-0.19, 0.19), NEW_YORK.items(), (BLUE, ORANGE), strict=True):
        heights = (first, second, first * second)
        axes.bar(np.arange(3) + offset, heights, 0.36, color=colour, label=f"model {name}")
        for place, height in enumerate(heights):
            axes.text(place + offset, height + 0.02, f"{height:.2f}", ha="center", color=GREY)
    axes.set_xticks(range(3), labels)
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("probability")
    axes.legend(frameon=False, labelcolor=GREY)
    save(figure, "new_york")


def draw_gradient(pyplot: Any) -> None:
    found = gradient()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.2, 2.9), sharey=True)
    places = np.arange(len(TOKENS))
    left.barh(places - 0.19, found.probabilities, 0.36, color=BLUE, label="p, the model")
    left.barh(places + 0.19, np.eye(len(TOKENS))[0], 0.36, color=ORANGE, label="one-hot, the gold")
    left.set_yticks(places, TOKENS)
    left.invert_yaxis()
    left.set_xlabel("probability")
    left.legend(frameon=False, loc="lower right", labelcolor=GREY)
    right.barh(places, found.gradient, 0.5, color=[ORANGE if value < 0 else BLUE for value in found.gradient])
    for place, value in enumerate(found.gradient):
        right.text(value, place, f" {value:+.2f} ", va="center", ha="left" if value > 0 else "right", color=GREY)
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set_xlim(-0.75, 0.5)
    right.set_xlabel("gradient by the logit: p - one-hot")
    save(figure, "gradient")


def draw_mean_of_means(pyplot: Any) -> None:
    found = losses_by_cut()
    figure, axes = pyplot.subplots(figsize=(6.4, 3.0))
    parts = list(found)
    axes.plot(range(len(parts)), [found[part][0] for part in parts], "o-", color=BLUE, label="one sum / one count")
    axes.plot(range(len(parts)), [found[part][1] for part in parts], "s--", color=ORANGE, label="mean of means")
    axes.set_xticks(range(len(parts)), [str(part) for part in parts])
    axes.set_xlabel("micro-batches that the same step of 8 rows is cut into")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, labelcolor=GREY)
    save(figure, "mean_of_means")


def save(figure: Any, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    # No date and no random ids: drawn again, the file is the same.
    figure.savefig(FOLDER / f"{name}.svg", transparent=True, metadata={"Date": None})


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "goldsmith", "font.size": 10, **grey})
    draw_new_york(pyplot)
    draw_gradient(pyplot)
    draw_mean_of_means(pyplot)


if __name__ == "__main__":
    main()
