"""Speed and memory of goldsmith beside its peers, on the same rows, in the same run: `make bench`. See README.md.

    .venv/bin/python benchmarks/run.py                                   gsm8k-135m beside the plain loop
    .venv/bin/python benchmarks/run.py --install trl                     an environment for TRL; litgpt: for LitGPT
    .venv/bin/python benchmarks/run.py --workload all --systems goldsmith,plain,trl,litgpt

Each system runs in a process and an environment of its own, one at a time and in turn. Standard library only, so that
the harness takes no memory or time from what it measures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import machine
from tables import setting_text, summarise, to_markdown
from workloads import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
# What is installed, beside the torch of goldsmith, for a system that has an environment of its own.
PEERS = {"trl": ("trl", "peft"), "litgpt": ("litgpt",)}
# Left to everything else on the machine when a system's memory is limited.
RESERVED_BYTES = 600 * 2**20

Json = dict[str, Any]


# Systems: the interpreter of each, and the settings that are tried


def environment_of(peer: str) -> Path:
    return HERE / f".venv-{peer}"


def interpreter(system: str) -> Path:
    """The Python that has the system installed."""
    return environment_of(system) / "bin" / "python" if system in PEERS else Path(sys.executable)


def unavailable(system: str) -> str | None:
    """Why the system cannot run, or None."""
    if not interpreter(system).is_file():
        return f"not installed; `{Path(sys.executable).name} benchmarks/run.py --install {system}` does it"
    return None


def settings_of(system: str, workload: Workload, tokens_per_microbatch: int | None) -> list[Json]:
    """goldsmith has one, for speed and memory. Peers get several, and the fastest counts."""
    if system == "goldsmith":
        return [{"tokens_per_microbatch": tokens_per_microbatch or workload.tokens_per_microbatch}]
    padded: list[Json] = [{"rows_per_microbatch": rows} for rows in workload.rows_per_microbatch]
    if system in ("plain", "litgpt"):
        return padded
    whole = {"rows_per_microbatch": workload.batch_size}
    return [*padded, {**whole, "padding_free": True}, {**whole, "gradient_checkpointing": True}]


SYSTEMS: dict[str, str] = {
    "goldsmith": "system_goldsmith.py",
    "plain": "system_plain.py",
    "trl": "system_trl.py",
    "litgpt": "system_litgpt.py",
}


def install(system: str) -> None:
    """An environment of its own for a peer, with the same torch as goldsmith's."""
    if system not in PEERS:
        raise SystemExit(f"nothing to install for {system!r}; there is: {', '.join(PEERS)}")
    pip = environment_of(system) / "bin" / "pip"
    if not pip.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment_of(system))], check=True)
    torch = f"torch=={metadata.version('torch').partition('+')[0]}"
    subprocess.run([str(pip), "install", "--upgrade", *PEERS[system], torch], check=True)


# One run


def run_python(python: Path, arguments: Sequence[str], *, environment: dict[str, str]) -> tuple[int, str, float]:
    """Run a program to its end; exit code, what it printed, and seconds of processor time that it used."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [str(python), *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HERE
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return process.returncode, output.read(), usage.ru_utime + usage.ru_stime


def run_system(
    system: str, work_folder: Path, setting: Json, *, steps: int | None, environment: dict[str, str]
) -> Json:
    """One measured run of a system in a process of its own."""
    available = machine.available_bytes()
    limit = None if available is None else available - RESERVED_BYTES
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "result.json"
        child_setting = {**setting, "steps": steps, "memory_limit_bytes": limit}
        before = machine.ProcessorTime.now()
        code, output, own_seconds = run_python(
            interpreter(system),
            [SYSTEMS[system], str(work_folder), json.dumps(child_setting), str(result_file)],
            environment=environment,
        )
        after = machine.ProcessorTime.now()
        if code == 0 and result_file.is_file():
            result: Json = json.loads(result_file.read_text())
        elif code in (-9, 137):
            result = {"outcome": "out of memory"}
        else:
            result = {"outcome": f"failed with exit code {code}", "output": output[-4000:]}
            print(output[-4000:], file=sys.stderr)
    result["setting"] = setting
    result["memory_limit_bytes"] = limit
    result["foreign_cores"] = result["stolen_cores"] = None
    if before is not None and after is not None:
        result["foreign_cores"], result["stolen_cores"] = after.since(before, own_seconds)
    return result


def measure_matmul(device: str, *, environment: dict[str, str]) -> Json:
    code, output, _ = run_python(
        Path(sys.executable), ["measure_matmul.py", "--device", device], environment=environment
    )
    if code != 0:
        raise SystemExit(f"measure_matmul.py failed:\n{output}")
    rate: Json = json.loads(output.splitlines()[-1])
    return rate


# One workload


def run_workload(name: str, options: argparse.Namespace, *, warning: str | None) -> Json:
    """Prepare, try the peers' settings, measure the rounds, and sum up."""
    workload = WORKLOADS[name]
    environment = dict(os.environ)
    if options.threads:
        environment |= {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    reasons = {system: unavailable(system) for system in options.systems}
    systems = [system for system in options.systems if reasons[system] is None]
    for system, reason in reasons.items():
        if reason is not None:
            say(f"{name}: {system}: not available: {reason}")
    if not systems:
        return {}
    with tempfile.TemporaryDirectory(prefix="goldsmith-bench-") as folder:
        work_folder = Path(folder)
        arguments = ["workloads.py", name, folder, "--device", options.device]
        if options.rows:
            arguments += ["--rows", str(options.rows)]
        code, output, _ = run_python(Path(sys.executable), arguments, environment=environment)
        if code != 0:
            raise SystemExit(f"workloads.py failed:\n{output}")
        work: Json = json.loads((work_folder / "work.json").read_text())
        say(
            f"{name}: {work['num_rows']} rows, {work['num_tokens']:,} tokens, {work['num_steps']} steps; {work['origin']}"
        )

        def measure(system: str, setting: Json, steps: int | None) -> Json:
            result = run_system(system, work_folder, setting, steps=steps, environment=environment)
            figures = (
                f"{result['seconds']:.1f} s, {result['peak_bytes'] / 1e9:.2f} GB, "
                f"losses {', '.join(f'{loss:.5f}' for loss in result['losses'][:3])}"
                if result["outcome"] == "done"
                else result["outcome"]
            )
            say(f"  {system} ({setting_text(setting)}): {figures}")
            return result

        chosen, trials = choose_settings(systems, workload, options, measure)
        rounds: list[Json] = []
        for number in range(1, options.rounds + 1):
            matmul = measure_matmul(options.device, environment=environment)
            say(f"round {number} of {options.rounds}; matrix products {matmul['flops_per_second'] / 1e9:.1f} GFLOP/s")
            runs = {system: measure(system, chosen[system], None) for system in chosen}
            rounds.append({"matmul": matmul, "runs": runs})

    result: Json = {
        "schema": 1,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "machine": machine.describe(),
        "repository": commit(),
        "workload": work,
        "note": workload.note,
        "warning": warning,
        "trials": trials,
        "rounds": rounds,
    }
    result["summary"] = summarise(result)
    for system, reason in reasons.items():
        if reason is not None:
            result["summary"][system] = {"outcome": f"not available: {reason}"}
    return result


def choose_settings(
    systems: Sequence[str],
    workload: Workload,
    options: argparse.Namespace,
    measure: Callable[[str, Json, int | None], Json],
) -> tuple[dict[str, Json], list[Json]]:
    """The setting that each system is measured with, and every trial that led to it."""
    chosen: dict[str, Json] = {}
    trials: list[Json] = []
    for system in systems:
        settings = settings_of(system, workload, options.tokens_per_microbatch)[: options.settings]
        if len(settings) == 1:
            chosen[system] = settings[0]
            continue
        say(f"trials of {system}, {options.trial_steps} steps each")
        results = [measure(system, setting, options.trial_steps) for setting in settings]
        trials += [{"system": system, "steps": options.trial_steps, **result} for result in results]
        done = [result for result in results if result["outcome"] == "done"]
        if done:
            chosen[system] = min(done, key=lambda result: result["seconds"])["setting"]
        else:
            say(f"{system}: no setting works")
    return chosen, trials


def commit() -> str:
    """The commit of this repository, and whether files were changed since."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(REPOSITORY)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
        return f"commit {head.stdout.strip()}" + (", with uncommitted changes" if status.stdout.strip() else "")
    return "an unknown commit"


def write(result: Json, folder: Path) -> Path:
    """NAME-DATE.json and NAME-DATE.md."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{result['workload']['name']}-{result['date']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    page = stem.with_suffix(".md")
    page.write_text(to_markdown(result))
    return page


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="gsm8k-135m", help=f"all, or some of: {', '.join(WORKLOADS)}")
    parser.add_argument("--systems", default="goldsmith,plain", help=f"some of: {', '.join(SYSTEMS)}; in this order")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="in place of the workload's own number; a multiple of its batch size")
    parser.add_argument("--trial-steps", type=int, default=2, help="steps by which the settings of a peer are compared")
    parser.add_argument("--settings", type=int, help="try a peer's first so many settings only, where time is short")
    parser.add_argument("--tokens-per-microbatch", type=int, help="goldsmith's setting, in place of the workload's own")
    parser.add_argument("--threads", type=int, help="OpenMP threads of every system")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--force", action="store_true", help="measure although something else runs; the result says so")
    parser.add_argument("--install", metavar="SYSTEM", help="make the environment of a peer, and end")
    options = parser.parse_args(arguments)
    options.workload = (
        [name for name, workload in WORKLOADS.items() if workload.in_all]
        if options.workload == "all"
        else options.workload.split(",")
    )
    options.systems = options.systems.split(",")
    for given, known in ((options.workload, WORKLOADS), (options.systems, SYSTEMS)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.install:
        install(options.install)
        return 0
    warning = machine.idle_check()
    if warning is not None:
        say(f"something else runs on this machine: {warning}")
        if not options.force:
            say("measure when it is idle, or give --force: the figures will be marked")
            return 2
    for name in options.workload:
        result = run_workload(name, options, warning=warning)
        if result:
            page = write(result, options.output)
            print(page.read_text())
            say(f"written: {page} and {page.with_suffix('.json').name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
