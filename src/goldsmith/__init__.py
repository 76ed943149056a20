"""goldsmith: supervised fine-tuning of language models by maximum likelihood.

The public names, each loaded when it is first used, so that `import goldsmith` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from goldsmith.errors import GoldsmithError
    from goldsmith.recipe import Recipe, load_recipe
    from goldsmith.scoring.compare import Comparison, scores_from_probabilities
    from goldsmith.scoring.files import read_scores
    from goldsmith.scoring.ranking import Ranking, compare
    from goldsmith.scoring.summary import ScoreSummary
    from goldsmith.types import TokenScore, TokenScores
    from goldsmith.workflows import compare_models, generate, inspect, score, train, verify

__all__ = [
    "Comparison",
    "GoldsmithError",
    "Ranking",
    "Recipe",
    "ScoreSummary",
    "TokenScore",
    "TokenScores",
    "compare",
    "compare_models",
    "generate",
    "inspect",
    "load_recipe",
    "read_scores",
    "score",
    "scores_from_probabilities",
    "train",
    "verify",
]

_HOME = {
    "Comparison": "goldsmith.scoring.compare",
    "GoldsmithError": "goldsmith.errors",
    "Ranking": "goldsmith.scoring.ranking",
    "Recipe": "goldsmith.recipe",
    "ScoreSummary": "goldsmith.scoring.summary",
    "TokenScore": "goldsmith.types",
    "TokenScores": "goldsmith.types",
    "compare": "goldsmith.scoring.ranking",
    "compare_models": "goldsmith.workflows",
    "generate": "goldsmith.workflows",
    "inspect": "goldsmith.workflows",
    "load_recipe": "goldsmith.recipe",
    "read_scores": "goldsmith.scoring.files",
    "score": "goldsmith.workflows",
    "scores_from_probabilities": "goldsmith.scoring.compare",
    "train": "goldsmith.workflows",
    "verify": "goldsmith.workflows",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("goldsmith")
    if name not in _HOME:
        raise AttributeError(f"module 'goldsmith' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
