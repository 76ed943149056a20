"""What spans rooms: a run from a recipe to its result, scoring, generating, comparing, and the demo.

A folder and not one file, because a run, the use of a model and the demo are three things; see `design/0001-the-house.md`.
"""

from goldsmith.workflows.comparing import compare, compare_models
from goldsmith.workflows.demo import DemoResult, demo
from goldsmith.workflows.inspecting import inspect
from goldsmith.workflows.models import generate
from goldsmith.workflows.reporting import ReportResult, report, serve_report
from goldsmith.workflows.run import train
from goldsmith.workflows.run_result import RunResult
from goldsmith.workflows.scoring import score
from goldsmith.workflows.verifying import verify

__all__ = [
    "DemoResult",
    "ReportResult",
    "RunResult",
    "compare",
    "compare_models",
    "demo",
    "generate",
    "inspect",
    "report",
    "score",
    "serve_report",
    "train",
    "verify",
]
