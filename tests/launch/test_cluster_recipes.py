"""launch/cluster/: what can be known of the recipes without a cluster; `make cluster` runs them on one."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.runs import CLUSTER, PAGE, ROOT, documented

BLOCKS = ("dry-run", "ssh", "no_ssh", "torchrun", "accelerate", "sbatch", "srun")
# The fields of v1 and batch/v1 that the job may use, with what they hold: a type, fields in turn, or a list of one.
NAMED = {"name": str, "labels": dict}
RULE = {
    "action": str,
    "onExitCodes": {"containerName": str, "operator": str, "values": [int]},
    "onPodConditions": [{"type": str, "status": str}],
}
CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": {"limits": dict, "requests": dict},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
}
VOLUME = {
    "name": str,
    "configMap": {"name": str},
    "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": str},
}
POD = {
    "subdomain": str,
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": NAMED,
    "spec": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "podFailurePolicy": {"rules": [RULE]},
        "template": {"metadata": NAMED, "spec": POD},
    },
}
SERVICE = {
    "apiVersion": str,
    "kind": str,
    "metadata": NAMED,
    "spec": {"clusterIP": str, "publishNotReadyAddresses": bool, "selector": dict},
}


def misfits(value: Any, fields: Any, place: str) -> list[str]:
    """Where a document has a field that its kind does not have, or something of another type in it."""
    if isinstance(fields, type):
        return [] if type(value) is fields else [f"{place} is not {fields.__name__}"]
    if isinstance(fields, list):
        if not isinstance(value, list):
            return [f"{place} is not a list"]
        return [text for number, part in enumerate(value) for text in misfits(part, fields[0], f"{place}.{number}")]
    if not isinstance(value, dict):
        return [f"{place} has no fields"]
    wrong = [f"{place}.{name} is no field" for name in value.keys() - fields.keys()]
    return wrong + [
        text for name in value.keys() & fields.keys() for text in misfits(value[name], fields[name], f"{place}.{name}")
    ]


@pytest.fixture
def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes-job.yaml").read_text())
    return service, job


def test_the_kubernetes_job_has_the_fields_of_its_kind(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    service, job = documents
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert misfits(service, SERVICE, "Service") + misfits(job, JOB, "Job") == []


def test_the_check_of_fields_sees() -> None:
    wrong = misfits({"kind": 1, "metadata": {"nam": "x"}, "spec": {"template": []}}, JOB, "Job")
    assert sorted(wrong) == ["Job.kind is not str", "Job.metadata.nam is no field", "Job.spec.template has no fields"]


def test_the_parts_of_the_kubernetes_job_agree(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    service, job = documents
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(word.lstrip("-").split("=", 1) for word in container["command"] if word.startswith("--"))
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options["rdzv-endpoint"].partition(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it
    saved, disrupted = spec["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [85]}
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert [(ROOT / word).is_file() for word in container["command"] if word.startswith("launch/")] == [True, True]


def test_the_batch_script_is_bash_and_slurm_reads_its_options() -> None:
    script = CLUSTER / "pretrain.sbatch"
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#SBATCH")], "sbatch stops at the first command"
    options = {line.split()[1] for line in lines if line.startswith("#SBATCH")}
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300", "--ntasks-per-node=1"} <= options


def test_the_hostfile_names_hosts_and_slots() -> None:
    lines = [line for line in (CLUSTER / "hostfile").read_text().splitlines() if not line.startswith("#")]
    assert [re.fullmatch(r"node[12] slots=8", line) is not None for line in lines] == [True, True]


@pytest.mark.parametrize("block", BLOCKS)
def test_commands_of_the_page_start_what_is_there(block: str) -> None:
    for command in documented(block, CONFIG="some.yaml"):
        named = [word for word in command if word.startswith("launch/")]
        assert named
        assert all((ROOT / word).is_file() for word in named), shlex.join(command)


def test_every_command_block_of_the_page_is_run_by_a_test() -> None:
    marked = re.findall(r"^<!-- cluster: (\S+) -->$", PAGE.read_text(), re.MULTILINE)
    assert sorted(marked) == sorted(BLOCKS)
    assert PAGE.read_text().count("```bash") == len(marked)
    scripts = "".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("cluster/test_*.py")))
    assert [block for block in BLOCKS if f'documented("{block}"' not in scripts] == []
