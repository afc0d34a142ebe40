"""The place of this process among the processes that a launcher has started: torchrun or SLURM's srun."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from visionattn.errors import UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PORTS = (
    20_000,
    10_000,
)  # first port, and number of ports, for the processes of SLURM; below those that a system gives to other programs


@dataclass(frozen=True)
class Place:
    """The place of a process among all processes of an export.

    Attributes:
        rank: rank of this process; the first process has rank 0.
        size: number of processes.
        local_size: number of processes on this machine.
        address: machine of the first process.
        port: port on which the first process, or torchrun, serves the key-value store that all processes share.
        hosts: whether this process serves the store.
        name: name of the run. It is part of every key in the store, so that runs with the same store do not mix.
    """

    rank: int
    size: int
    local_size: int
    address: str
    port: int
    hosts: bool
    name: str = ""


def launched(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place of this process, given the variables that the launcher has set; None without a launcher.

    torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and other launchers of torch do too. srun sets
    SLURM_PROCID and SLURM_STEP_NUM_TASKS. SLURM_NTASKS is not used, because a job script also has it, and runs in one
    process. The first task of srun, on the first machine in the list of nodes, serves the store; the port depends on
    the job's number. MASTER_ADDR and MASTER_PORT override the machine and the port.

    Raises:
        UsageError: a variable is missing, or is not a number.
    """
    if set(_TORCHRUN) <= environment.keys():
        rank = _number(environment, "RANK")
        return Place(
            rank,
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_WORLD_SIZE", 1),
            environment["MASTER_ADDR"],
            _number(environment, "MASTER_PORT"),
            hosts=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        )
    if "SLURM_PROCID" not in environment:
        return None
    rank = _number(environment, "SLURM_PROCID")
    size = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    if "SLURM_STEP_NUM_TASKS" not in environment and rank:
        raise UsageError(
            f"SLURM_PROCID is {rank}, but SLURM_STEP_NUM_TASKS does not say how many tasks share the work; start the "
            "tasks with srun --ntasks COUNT"
        )
    if size == 1:
        return None
    nodes = next((environment[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST") if n in environment), "")
    nodes = environment.get("MASTER_ADDR") or first_node(nodes or environment.get("SLURM_NODELIST", ""))
    if not nodes:
        raise UsageError("SLURM_STEP_NODELIST is missing, so task 0 cannot be found; set MASTER_ADDR to its machine")
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    digits = int("0" + re.sub(r"\D", "", job + step))
    machines = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))
    return Place(
        rank,
        size,
        -(-size // max(1, machines)),
        nodes,
        _number(environment, "MASTER_PORT", _PORTS[0] + digits % _PORTS[1]),
        hosts=rank == 0,
        name=f"{job}.{step}",
    )


def first_node(nodes: str) -> str:
    """Return the first machine in a list of SLURM, e.g. `node007` for `node[007-009,12],other`."""
    start = re.match(r"([^,\[]*)(?:\[([^,\-\]]*)[^\]]*\])?([^,\[]*)", nodes)
    return "" if start is None else "".join(part or "" for part in start.groups())


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise UsageError(f"the environment variable {name} must be a number, got {text!r}") from error
