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


def test_tasks_are_counted_by_the_step_and_else_by_the_job():
    job = {name: value for name, value in SRUN.items() if "STEP" not in name}
    place = launched(job)
    assert (place.size, place.address) == (8, "gpu01")


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_PROCID": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {"WORLD_SIZE": "2"}]
)
def test_process_without_others_has_no_place(environment):
    assert launched(environment) is None


def test_torchrun_goes_before_srun_which_may_have_started_it():
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched({**SRUN, **torchrun}) == Place(0, 2, 2, "a", 1, hosts=True)
    assert not launched({**torchrun, "TORCHELASTIC_USE_AGENT_STORE": "True"}).hosts


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is 1, but neither SLURM_STEP_NUM_TASKS nor SLURM_NTASKS"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "set MASTER_ADDR to its machine"),
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
