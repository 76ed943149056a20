from __future__ import annotations

import json
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, Outcome, forked

from goldsmith import distributed
from goldsmith.distributed import agree, barrier, is_main, process_group, rank, sum_gradients, sum_tensor, world_size
from goldsmith.errors import MachineError

CPU = torch.device("cpu")

BEGINNING = """
import json, os, signal, sys
import torch
from goldsmith import distributed
from goldsmith.distributed import *

def write(name, value):
    with open(f"{name}.{os.environ['RANK']}.json", "w") as file:
        json.dump(value, file)
"""


def run_ranks(folder: Path, number: int, script: str) -> list[Outcome]:
    """`script` in so many processes that know of each other."""
    command = Command(script=BEGINNING + textwrap.dedent(script), cwd=folder)
    return forked().start(*command.ranks(number)).wait()


def written(folder: Path, name: str, number: int) -> list[Any]:
    return [json.loads((folder / f"{name}.{index}.json").read_text()) for index in range(number)]


# --- one process


def test_a_single_process_sums_nothing_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with process_group(CPU):
        assert (rank(), world_size(), is_main()) == (0, 1, True)
        assert sum_tensor(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert agree(True, CPU) is True
        assert agree(False, CPU) is False
        barrier()


def test_a_missing_gradient_counts_as_zero_in_a_single_process_too() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    used.grad = torch.tensor([1.0, 2.0])
    sum_gradients([used, unused])
    assert used.grad.tolist() == [1.0, 2.0]
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0, 0.0, 0.0]


def test_before_the_group_is_joined_the_environment_says_who_is_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (rank(), world_size(), is_main()) == (1, 2, False)


def test_a_group_of_one_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group(CPU):
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("device", "chosen"), [("cuda", [3]), ("cuda:1", []), ("cpu", [])])
def test_each_process_takes_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, device: str, chosen: list[int]
) -> None:
    backends: list[str] = []
    gpus: list[int] = []
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", backends.append)
    with process_group(torch.device(device)):
        pass
    assert gpus == chosen
    assert backends == ["gloo" if device == "cpu" else "nccl"]


# --- several


def test_sums_and_agreement_over_three_processes(tmp_path: Path) -> None:
    outcomes = run_ranks(
        tmp_path,
        3,
        """
        with process_group(torch.device("cpu")):
            before = (rank(), world_size(), is_main())
            total = sum_tensor(torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank() + 1)).tolist()
            votes = [agree(rank() == 2, torch.device("cpu")), agree(False, torch.device("cpu"))]
            barrier()
            write("sums", [before, total, votes])
        write("left", torch.distributed.is_initialized())
        """,
    )
    assert [outcome.exit_code for outcome in outcomes] == [0, 0, 0]
    for index, (before, total, votes) in enumerate(written(tmp_path, "sums", 3)):
        assert before == [index, 3, index == 0]
        assert total == [6.0, 60.0]
        assert votes == [True, False]
    assert written(tmp_path, "left", 3) == [False, False, False]


def test_gradients_in_buckets_of_several_types(tmp_path: Path) -> None:
    """More than a bucket, a type in between, a shape of its own, and one that only one rank has a gradient for."""
    outcomes = run_ranks(
        tmp_path,
        2,
        """
        distributed.BUCKET_BYTES = 100
        single, double = torch.float32, torch.float64
        shapes = [((5, 5), single), ((30,), single), ((), double), ((7,), double), ((3,), single)]
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
        with process_group(torch.device("cpu")):
            for index, parameter in enumerate(parameters):
                if index != 3 or rank() == 1:
                    parameter.grad = torch.full_like(parameter, 10.0 * index + rank() + 1)
            # Not contiguous, as a transposed weight's gradient may be.
            parameters[0].grad = (torch.arange(25.0).view(5, 5) * (rank() + 1)).T
            sum_gradients(parameters)
            write("gradients", [parameter.grad.reshape(-1).tolist() for parameter in parameters])
            write("types", [str(parameter.grad.dtype) for parameter in parameters])
        """,
    )
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes
    expected = [
        (torch.arange(25.0).view(5, 5).T * 3).reshape(-1).tolist(),
        [23.0] * 30,
        [43.0],
        [32.0] * 7,
        [83.0] * 3,
    ]
    assert written(tmp_path, "gradients", 2) == [expected, expected]
    assert written(tmp_path, "types", 2)[0] == ["torch.float32"] * 2 + ["torch.float64"] * 2 + ["torch.float32"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_for_a_dead_one_ends_and_says_so(tmp_path: Path, victim: int) -> None:
    outcomes = run_ranks(
        tmp_path,
        2,
        f"""
        from goldsmith.errors import MachineError
        try:
            with process_group(torch.device("cpu")):
                barrier()
                if rank() == {victim}:
                    os.kill(os.getpid(), signal.SIGKILL)
                sum_tensor(torch.ones(2))
                barrier()
        except MachineError as error:
            write("error", [error.exit_code, error.message])
        """,
    )
    assert outcomes[victim].exit_code == -signal.SIGKILL
    assert outcomes[1 - victim].exit_code == 0, outcomes[1 - victim].stderr
    code, message = json.loads((tmp_path / f"error.{1 - victim}.json").read_text())
    assert code == 7
    assert f"process {1 - victim} of 2: another process ended" in message


def test_others_that_cannot_be_reached_are_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(backend: str) -> None:
        raise torch.distributed.DistNetworkError("The client socket has failed to connect to 127.0.0.1:1")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "init_process_group", refused)
    with pytest.raises(MachineError, match="process 1 of 2: another process ended, or cannot be reached"):
        process_group(CPU).__enter__()


def test_an_error_of_ones_own_is_not_taken_for_a_lost_process(tmp_path: Path) -> None:
    outcomes = run_ranks(
        tmp_path,
        2,
        """
        try:
            with process_group(torch.device("cpu")):
                barrier()
                raise RuntimeError("shapes cannot be multiplied")
        except RuntimeError as error:
            write("error", str(error))
        """,
    )
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert written(tmp_path, "error", 2) == ["shapes cannot be multiplied"] * 2
