"""The launches of docs/multi_host.md: their form, by schema and by shell, and that they start what they say."""

import argparse
import copy
import pathlib
import re
import shlex
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml

from wan_jax.cli.options import OPTIONS, add_options, options_of
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.presets import get_preset
from wan_jax.runtime.distributed import Cluster, find_cluster

pytestmark = pytest.mark.quick

DOCUMENT = (pathlib.Path(__file__).parents[2] / "docs" / "multi_host.md").read_text()
(MANIFEST,) = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)]
(SCRIPT,) = re.findall(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)


def fields(required: str, **more: Any) -> dict[str, Any]:
    """A schema of an object with these fields and no others."""
    return {"type": "object", "required": required.split(), "properties": more, "additionalProperties": False}


def lists(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


STRING = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
LABEL = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
QUANTITY = {"anyOf": [COUNT, {"type": "string", "pattern": r"^[0-9.]+([KMGTPE]i?|k|m)?$"}]}
PATH = {"type": "string", "pattern": r"^/[^:]*$"}

# Of these types all that the manifest uses, named and required as there; a field that is not here is an error.
#   JobSet, ReplicatedJob, FailurePolicy    sigs.k8s.io/jobset/api/jobset/v1alpha2/jobset_types.go
#   JobSpec, PodTemplateSpec                k8s.io/api/batch/v1, k8s.io/api/core/v1; in pods of a Job restartPolicy must
#                                           be Never or OnFailure, and the API server refuses numbers as values of env
CONTAINER = fields(
    "name image",
    name=LABEL,
    image=STRING,
    command=lists(STRING, minItems=1),
    args=lists(STRING),
    env=lists(fields("name", name={"type": "string", "pattern": r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"}, value=STRING)),
    ports=lists(fields("containerPort", name=LABEL, containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=fields(
        "", **{name: {"type": "object", "additionalProperties": QUANTITY} for name in ("limits", "requests")}
    ),
    volumeMounts=lists(fields("name mountPath", name=LABEL, mountPath=PATH, readOnly={"type": "boolean"})),
)
VOLUME = fields(
    "name",
    name=LABEL,
    persistentVolumeClaim=fields("claimName", claimName=LABEL, readOnly={"type": "boolean"}),
    emptyDir=fields("", medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
) | {"minProperties": 2, "maxProperties": 2}  # a name and one source
POD = fields(
    "containers restartPolicy",
    restartPolicy={"enum": ["Never", "OnFailure"]},
    containers=lists(CONTAINER, minItems=1),
    volumes=lists(VOLUME),
)
JOB = fields(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["NonIndexed", "Indexed"]},
    backoffLimit=COUNT,
    template=fields("spec", metadata={"type": "object"}, spec=POD),
)
JOB_SET = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields("name", name=LABEL, namespace=LABEL),
    spec=fields(
        "replicatedJobs",
        failurePolicy=fields(
            "", maxRestarts=COUNT, restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]}
        ),
        replicatedJobs=lists(
            fields("name template", name=LABEL, replicas=COUNT, template=fields("spec", spec=JOB)), minItems=1
        ),
    ),
)
VALIDATOR = jsonschema.Draft202012Validator(JOB_SET)


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]


def test_the_manifest_has_the_form_of_a_job_set():
    jsonschema.Draft202012Validator.check_schema(JOB_SET)
    assert [error.message for error in VALIDATOR.iter_errors(MANIFEST)] == []


def misplace_volumes(manifest):
    job_of(manifest)["volumes"] = pod_of(manifest).pop("volumes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: pod_of(manifest).update(restartPolicy="Always"), "'Always' is not one of"),
        (lambda manifest: pod_of(manifest).pop("containers"), "'containers' is a required property"),
        (misplace_volumes, "'volumes' was unexpected"),
        (lambda manifest: pod_of(manifest)["containers"][0]["env"][1].update(value=2), "2 is not of type 'string'"),
        (lambda manifest: pod_of(manifest)["containers"][0]["ports"][0].update(containerPort="9473"), "not of type"),
        (lambda manifest: pod_of(manifest)["volumes"][0].pop("persistentVolumeClaim"), "does not have enough"),
        (lambda manifest: manifest["spec"]["failurePolicy"].update(maxRestarts="none"), "not of type 'integer'"),
        (lambda manifest: manifest.update(apiVersion="jobset.x-k8s.io/v1"), "was expected"),
    ],
)
def test_what_the_schema_refuses(change, message):
    manifest = copy.deepcopy(MANIFEST)
    change(manifest)
    (error,) = VALIDATOR.iter_errors(manifest)
    assert message in error.message


def test_the_pods_of_the_manifest_find_each_other():
    name, (replicated,) = MANIFEST["metadata"]["name"], MANIFEST["spec"]["replicatedJobs"]
    job, pod = job_of(MANIFEST), pod_of(MANIFEST)
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"  # gives each pod its name and JOB_COMPLETION_INDEX
    assert job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0
    assert MANIFEST["spec"]["failurePolicy"]["maxRestarts"] == 0
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]) == job["completions"]
    # JobSet's name of the first pod: jobset-replicatedjob-job-pod, in a domain of the jobset's name.
    assert environment["JAX_COORDINATOR_ADDRESS"] == f"{name}-{replicated['name']}-0-0.{name}:9473"
    assert container["ports"] == [{"containerPort": 9473}]
    cluster = find_cluster(environment=environment | {"JOB_COMPLETION_INDEX": "1"})
    assert cluster == Cluster(environment["JAX_COORDINATOR_ADDRESS"], job["completions"], 1)
    volumes = [each["name"] for each in pod["volumes"]]
    assert sorted(each["name"] for each in container["volumeMounts"]) == sorted(set(volumes))
    check_command(container["command"], job["completions"] * container["resources"]["limits"]["nvidia.com/gpu"])


def test_the_script_for_slurm():
    done = subprocess.run(["bash", "-n"], input=SCRIPT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert SCRIPT.startswith("#!/bin/bash\n#SBATCH ")  # sbatch reads options up to the first command
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT, re.MULTILINE))
    assert len(options) == SCRIPT.count("#SBATCH")
    assert options.keys() <= {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time"}
    assert options["ntasks-per-node"] == "1"  # a process takes all GPUs that it sees
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    (step,) = [shlex.split(line) for line in SCRIPT.replace("\\\n", "").splitlines() if line.startswith("srun ")]
    assert step[1] == "--kill-on-bad-exit=1"  # one that fails ends the others, which would wait for it
    check_command(step[2:], int(options["nodes"]) * int(options["gpus-per-node"]))


def check_command(command: list[str], devices: int) -> None:
    """wan-jax takes the arguments, and the mesh has all devices."""
    assert command[:2] == ["wan-jax", "generate"]
    parser = argparse.ArgumentParser()
    add_options(parser, list(OPTIONS))
    mesh_spec = MeshSpec.parse(options_of(parser.parse_args(command[2:])).mesh)
    mesh_spec.check(get_preset("t2v-a14b"), prompts=1)
    assert mesh_spec.devices == devices
