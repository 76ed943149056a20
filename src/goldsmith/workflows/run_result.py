"""What a run ends with: the model as a folder that anything loads, the proof that it is what was trained, and the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from goldsmith.data.dataset import Dataset
from goldsmith.data.tokenizer import load_tokenizer
from goldsmith.models.adapters import Adapter
from goldsmith.models.likelihood import LikelihoodModel
from goldsmith.models.load import load_causal_lm
from goldsmith.models.precision import DtypeName, stored_dtype
from goldsmith.report.run_files import DATA, METRICS, RESULT
from goldsmith.scoring.display import data_frame, html_table
from goldsmith.storage import write_atomic
from goldsmith.training.result import Parity, check_merged, check_parity, save_adapter, save_model
from goldsmith.training.trainer import TrainingResult
from goldsmith.workflows.reporting import REPORT, write_run_report
from goldsmith.workflows.run_folder import TOKENIZER

__all__ = ["RunResult", "finished_result", "write_result"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run ended with.

    Attributes:
        output_dir: the run folder; `model/` inside it is the result.
        already_finished: the command found the run finished and did nothing.
        training: steps, nll before and after, the best.
        parity: how the saved model compares with the trained one; None on ranks that wrote nothing.
        rows: rows of the training data read, and used.
        report: the page that shows the run; None where it was not written.
    """

    output_dir: Path
    already_finished: bool
    training: TrainingResult
    parity: Parity | None
    rows: dict[str, int]
    report: Path | None = None

    @property
    def model_dir(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.output_dir / "model"

    def to_json(self) -> dict[str, Any]:
        """One machine-readable object."""
        return {
            **asdict(self),
            "output_dir": str(self.output_dir),
            "model_dir": str(self.model_dir),
            "report": None if self.report is None else str(self.report),
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of `metrics.jsonl`: a row for each step and evaluation, `kind` says which.

        Raises:
            ConfigError: pandas is not installed.
        """
        lines = (self.output_dir / METRICS).read_text(encoding="utf-8").splitlines()
        return data_frame([json.loads(line) for line in lines])

    def _repr_html_(self) -> str:
        """A small table, for a notebook."""
        training = self.training
        rows = [["run", str(self.output_dir)], ["model", str(self.model_dir)], ["steps", f"{training.steps:,}"]]
        rows.append(["rows", f"{self.rows['used']:,} of {self.rows['read']:,}"])
        if training.nll_before is not None and training.nll_after is not None:
            rows.append(
                ["held-out nll, nats a token", f"{training.nll_before:.4f} before, {training.nll_after:.4f} after"]
            )
        rows.append(["seconds", f"{training.seconds:,.0f}"])
        return html_table(rows)

    def __str__(self) -> str:
        training = self.training
        lines = [f"{self.output_dir}: finished before, nothing done"] if self.already_finished else []
        early = " (stopped early)" if training.stopped_early else ""
        lines.append(f"{training.steps:,} steps{early} on {self.rows['used']:,} rows in {training.seconds:,.0f} s")
        if training.nll_before is not None and training.nll_after is not None:
            lines.append(f"held-out nll {training.nll_before:.4f} -> {training.nll_after:.4f} nats a token")
        lines.append(f"model: {self.model_dir}")
        if self.parity is not None:
            lines.append(
                f"  loaded with transformers its log-probabilities are equal to {self.parity.largest_difference:.0e}; "
                f"rounding to its precision cost {self.parity.rounding_cost:+.1e} nats a token"
            )
            if self.parity.merge_difference is not None:
                lines.append(
                    f"adapter: {self.output_dir / 'adapter'}, in the form of peft; merged into the model above, which before "
                    f"rounding is equal to {self.parity.merge_difference:.0e}"
                )
        if self.report is not None:
            lines.append(f"report: {self.report}")
        return "\n".join(lines)


def finished_result(folder: Path) -> RunResult:
    values = json.loads((folder / RESULT).read_text())
    return RunResult(
        output_dir=folder,
        already_finished=True,
        training=TrainingResult(**values["training"]),
        parity=Parity(**values["parity"]),
        rows=values["rows"],
        report=folder / REPORT if (folder / REPORT).is_file() else None,
    )


def write_result(
    outcome: RunResult,
    model: LikelihoodModel,
    adapter: Adapter | None,
    examples: Dataset,
    device: torch.device,
    *,
    dtype: DtypeName,
    end_token_ids: list[int],
    silenced: dict[str, float | bool],
    data_report: dict[str, Any] | None,
) -> RunResult:
    """Write the trained model, its adapter, what the run ended with, and its report; by the main process.

    Args:
        outcome: of the training; the result has the parity and the report in addition.
        examples: what the parity is judged on.
        dtype: of the recipe.
        data_report: of a streamed run, whose rows are counted at the end.
    """
    folder = outcome.output_dir
    # As the run keeps it: what is written of one that was just learnt differs from what a resumed run writes.
    kept_tokenizer = load_tokenizer(str(folder / TOKENIZER))
    merge_difference = None
    result_lm = model.causal_lm
    if adapter is not None:
        save_adapter(adapter, kept_tokenizer, folder / "adapter")
        # From the written folder, as a user would, but into what was trained: weights of 4 bits as they were.
        result_lm = load_causal_lm(folder / "adapter", dtype=dtype, device=device, frozen_weights=model.causal_lm)
        merge_difference = check_merged(result_lm, model.eval(), examples)
    save_model(
        result_lm,
        kept_tokenizer,
        outcome.model_dir,
        dtype=stored_dtype(result_lm),
        end_token_ids=end_token_ids,
        silenced=silenced,
    )
    del result_lm
    parity = check_parity(outcome.model_dir, model, examples)
    outcome = replace(outcome, parity=replace(parity, merge_difference=merge_difference), report=folder / REPORT)
    write_atomic(folder / RESULT, json.dumps(outcome.to_json(), indent=1) + "\n")
    if data_report is not None:
        write_atomic(folder / DATA, json.dumps(data_report, indent=1) + "\n")
    write_run_report(folder)
    return outcome
