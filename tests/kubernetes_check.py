"""Compares deploy/kubernetes with Kubernetes' own schemas, and with what Prefect's worker makes of it.

In an environment of its own, with prefect-kubernetes and kubernetes-validate; prints what is wrong. See
tests/test_kubernetes.py.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import kubernetes_validate
import yaml
from kubernetes_validate.utils import all_versions
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import find_placeholders
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration, KubernetesWorkerVariables

FILES = Path(__file__).parent.parent / "deploy" / "kubernetes"
# Three releases of Kubernetes are maintained at a time.
NEWEST = 3


def documents() -> list[dict[str, Any]]:
    """All objects of the example."""
    return [found for file in sorted(FILES.glob("*.yml")) for found in yaml.safe_load_all(file.read_text())]


async def job() -> dict[str, Any]:
    """What Prefect's worker would send to Kubernetes for a run."""
    template = json.loads((FILES / "job-template.json").read_text())
    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(template, {})
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), name="upload prince", flow_id=uuid4()))
    assert not find_placeholders(configuration.job_manifest)
    manifest: dict[str, Any] = configuration.job_manifest
    return manifest


def check_variables() -> None:
    """Each variable of the job template is Prefect's own, with the same type."""
    ours = json.loads((FILES / "job-template.json").read_text())["variables"]["properties"]
    theirs = KubernetesWorkerVariables.model_json_schema()["properties"]
    assert ours.keys() <= theirs.keys(), ours.keys() - theirs.keys()
    for name in ours:
        kinds = {one.get("type") for one in theirs[name].get("anyOf", [theirs[name]])}
        assert ours[name]["type"] in kinds, name


def check_worker() -> None:
    """Its environment has it refer to the secret, and watch its own namespace."""
    (deployment,) = [one for one in documents() if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    for entry in container["env"]:
        os.environ[entry["name"]] = entry.get("value", "archiver:password-of-the-tests")
    settings = KubernetesSettings()
    (secret,) = [one["valueFrom"]["secretKeyRef"] for one in container["env"] if "valueFrom" in one]
    worker = settings.worker
    assert (worker.api_auth_string_secret_name, worker.api_auth_string_secret_key) == (secret["name"], secret["key"])
    assert settings.observer.namespaces == {deployment["metadata"]["namespace"]}


def main() -> None:
    check_variables()
    check_worker()
    sent = asyncio.run(job())
    assert sent["metadata"]["namespace"] == "archiver"
    pod = sent["spec"]["template"]["spec"]
    # Prefect's worker insists on both in a place where Kubernetes does not know them, and ignores them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    (container,) = pod["containers"]
    assert container["args"], "the job has no command"
    for version in all_versions()[-NEWEST:]:
        for found in (*documents(), sent):
            kubernetes_validate.validate(found, version, strict=True)
            print(version, found["kind"], found["metadata"].get("name", "of a run"))


if __name__ == "__main__":
    main()
