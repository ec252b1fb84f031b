"""Errors of one rank end all ranks with the same error: two gloo processes run all cases one after the other."""

import json
import subprocess
import sys

import pytest
from helpers import failing
from helpers.ddp import ENVIRONMENT, TESTS
from helpers.processes import free_ports, run

LOADER = "UserError: in the loader"
CASES = {
    "prepare": "ConfigurationError: ",
    "setup": "UserError: in setup",
    "first_batch": "CalibrationError: NaN or Inf",
    "get_input": "UserError: in get_input",
    "later_batch": LOADER,
    "later_batch_of_rank_0": LOADER,
    "matching": "UserError: in the matcher",
    "merging": "UserError: in the combination",
    "first_refinement_batch": LOADER,
    "later_refinement_batch": LOADER,
    "end_of_refinement": "CalibrationError: NaN or Inf",
    "after_refinement": "UserError: in a callback",
    "statistics_file": LOADER,
    "predict": LOADER,
    "all_ranks": "UserError: caught before",
    "sweep_merge": LOADER,
    "sweep_refinement": LOADER,
    "sweep_validation_step": "UserError: in validation_step",
    "sweep_validation_step_of_rank_0": "UserError: in validation_step",
    "sweep_validation_loader": "UserError: in the validation loader",
    "sweep_all_ranks": "UserError: UserError: in the matcher; ok",
    "sweep_metric_of_rank_0": "UserError: 2.5",
    "exchange_errors_of_both": "UserError: of rank 0",
    "exchange_result_that_cannot_be_pickled": "TypeError: A result of type builtins.function cannot be sent",
    "exchange_results": "UserError: [0, 10]",
    "decide_on_rank_0": "UserError: by rank 0",
    "decide_with_an_error": "UserError: of rank 0",
}
AWKWARD = {  # on the rank that has the error, and on the other
    "error_that_cannot_be_pickled": ("AwkwardError: awkward", "AwkwardError: awkward"),
    "exchange_errors": ("AwkwardError: awkward", "AwkwardError: awkward"),
    "exchange_error_of_a_local_class": ("LocalError: local", "LocalError: local"),
}


ALWAYS = {
    "prepare",
    "later_batch_of_rank_0",
    "matching",
    "end_of_refinement",
    "sweep_validation_step",
    "exchange_errors",
}
"""Cases of the default tests; nightly tests run all."""


def cases(names):
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in names]


@pytest.fixture(scope="module")
def endings(request, tmp_path_factory):
    """Of each selected case, how it has ended on each rank."""
    selected = {getattr(item, "callspec", None) and item.callspec.params.get("name") for item in request.session.items}
    names = [name for name in (*CASES, *AWKWARD) if name in selected]
    ranks = [
        {"LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        for rank in "01"
    ]
    ports = free_ports(len(names))
    folder = tmp_path_factory.mktemp("endings")
    processes = run(failing.run_cases, [(rank, names, ports) for rank in (0, 1)], folder, ranks, timeout=240)
    ended = [
        {(one := json.loads(line))["name"]: one for line in process.printed.splitlines() if line.startswith("{")}
        for process in processes
    ]
    assert [process.code for process in processes] == [0, 0], (processes, ended)
    return {name: tuple(own[name] for own in ended) for name in names}


@pytest.mark.parametrize("name", cases(CASES))
def test_all_ranks_end_with_the_error_of_one(endings, name):
    for ending in endings[name]:
        assert ending["error"].startswith(CASES[name]), endings[name]
        assert ending["left"] in ([], ["sweep.csv"], ["sweep.csv", "sweep.safetensors"]), endings[name]
    first, second = endings[name]
    assert first["error"] == second["error"]


@pytest.mark.parametrize("name", cases(AWKWARD))
def test_an_error_that_cannot_be_sent_arrives_as_text(endings, name):
    other, own = endings[name]
    assert own["error"] == AWKWARD[name][0]
    assert other["error"].startswith("RankError: Rank 1 ended with ") and other["error"].endswith(AWKWARD[name][1])


@pytest.mark.nightly
@pytest.mark.parametrize("case", ["merge", "sweep", "predict"])
def test_both_processes_of_a_script_end_with_the_error_of_one(case, tmp_path):
    errors = run_failing_script(case, "ddp", tmp_path)
    assert "rank 0 raised UserError" in errors and "rank 1 raised UserError" in errors


@pytest.mark.nightly
def test_spawned_processes_end_with_the_error_of_one(tmp_path):
    assert "UserError: in the loader" in run_failing_script("merge", "ddp_spawn", tmp_path)


def run_failing_script(case, strategy, folder):
    command = [sys.executable, str(TESTS / "helpers" / "failing_script.py"), case, strategy]
    result = subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and [path.name for path in folder.iterdir()] == []
    return result.stderr
