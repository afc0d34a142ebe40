"""The variables of torchrun and of SLURM's srun give each process its place."""

import pytest

from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.overlays.folder.launch import Place, first_node, launched

SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
}  # fmt: skip


def test_srun_gives_each_task_its_place():
    port = 20_000 + 12_345_672 % 10_000
    assert launched(SRUN) == Place(3, 4, 2, "gpu03", port, hosts=False, name="1234567.2")
    first = launched({**SRUN, "SLURM_PROCID": "0", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert first == Place(0, 4, 2, "10.0.0.7", 29_500, hosts=True, name="1234567.2")


def test_the_first_node_of_the_job_serves_if_the_step_names_no_nodes():
    job = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    assert launched(job).address == "gpu01"


JOB_SCRIPT = {name: value for name, value in {**SRUN, "SLURM_PROCID": "0"}.items() if "STEP" not in name}


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_PROCID": "0"}, JOB_SCRIPT, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "2"}]
)
def test_single_process_has_no_place(environment):
    assert launched(environment) is None


def test_variables_of_torchrun_take_precedence_over_those_of_srun():
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched({**SRUN, **torchrun}) == Place(0, 2, 2, "a", 1, hosts=True)
    assert not launched({**torchrun, "TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
            "SLURM_PROCID is 1, but SLURM_STEP_NUM_TASKS does not say how many",
        ),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, "set MASTER_ADDR to its machine"),
        ({**SRUN, "SLURM_PROCID": "one"}, "SLURM_PROCID must be a number, got 'one'"),
        ({**SRUN, "MASTER_PORT": ""}, "MASTER_PORT must be a number"),
    ],
)
def test_missing_and_malformed_variables_are_refused(environment, message):
    refuses(UsageError, message, lambda: launched(environment))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("node7,node9", "node7"), ("node[007-009,12],other", "node007"), ("node[3]", "node3"),
        ("node[3,5]", "node3"), ("rack1-node[1-2]-ib", "rack1-node1-ib"), ("", ""),
    ],
)  # fmt: skip
def test_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first
