"""JSON Schemas of the Kubernetes objects in launch/kubernetes/, written by hand from the published ones.

They have the fields that those files use, and a few others. An unknown field is an error, as for
`kubectl apply --validate=strict`. The sources are public:

    Service, Job, pods      the OpenAPI of Kubernetes 1.34
    PyTorchJob              kubeflow/training-operator, pkg/apis/kubeflow.org/v1
    TrainJob                kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go
    TrainingRuntime         the same, trainingruntime_types.go
    the template in it      kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go
"""

from __future__ import annotations

from typing import Any

import jsonschema

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
SWITCH: Schema = {"type": "boolean"}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?([EPTGMk]i?|m)?$"}
QUANTITIES: Schema = {"type": "object", "additionalProperties": QUANTITY}


def record(*required: str, **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def many(items: Schema, at_most: int | None = None) -> Schema:
    return {"type": "array", "items": items} | ({} if at_most is None else {"maxItems": at_most})


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def kind(version: str, name: str, spec: Schema) -> Schema:
    fields = {"apiVersion": one_of(version), "kind": one_of(name), "metadata": METADATA, "spec": spec}
    return record(*fields, **fields)


METADATA = record(
    "name", name={"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}, labels=LABELS
)
RESOURCES = record(limits=QUANTITIES, requests=QUANTITIES)
VARIABLE = record(
    "name",
    name=TEXT,
    value=TEXT,
    valueFrom=record(fieldRef=record("fieldPath", fieldPath=TEXT, apiVersion=TEXT)),
)

# --- core/v1 ------------------------------------------------------------------------------------------------
CONTAINER = record(
    "name",
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    command=many(TEXT),
    args=many(TEXT),
    env=many(VARIABLE),
    resources=RESOURCES,
    volumeMounts=many(record("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=SWITCH, subPath=TEXT)),
)
VOLUME = record(
    "name",
    name=TEXT,
    persistentVolumeClaim=record("claimName", claimName=TEXT, readOnly=SWITCH),
    emptyDir=record(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
)
POD = record(
    "containers",
    containers=many(CONTAINER),
    volumes=many(VOLUME),
    subdomain=TEXT,
    serviceAccountName=TEXT,
    nodeSelector=LABELS,
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    terminationGracePeriodSeconds=COUNT,
    securityContext=record(
        fsGroup=COUNT,
        fsGroupChangePolicy=one_of("Always", "OnRootMismatch"),
        runAsUser=COUNT,
        runAsGroup=COUNT,
    ),
)
POD_TEMPLATE = record(metadata=record(labels=LABELS, annotations=LABELS), spec=POD)
SERVICE = kind(
    "v1", "Service", record(clusterIP=TEXT, publishNotReadyAddresses=SWITCH, selector=LABELS, ports=many({}))
)

# --- batch/v1 -----------------------------------------------------------------------------------------------
FAILURE_RULE = record(
    "action",
    action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
    onExitCodes=record(
        "operator",
        "values",
        containerName=TEXT,
        operator=one_of("In", "NotIn"),
        values=many({"type": "integer"}, 255),
    ),
    # `status` has a default in a Job, but the schemas of Kubernetes up to 1.34 require it.
    onPodConditions=many(record("type", "status", type=TEXT, status=one_of("True", "False", "Unknown")), 20),
)
JOB_SPEC = record(
    "template",
    completionMode=one_of("NonIndexed", "Indexed"),
    completions=COUNT,
    parallelism=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=record("rules", rules=many(FAILURE_RULE, 20)),
    template=POD_TEMPLATE,
)
JOB = kind("batch/v1", "Job", JOB_SPEC)

# --- kubeflow.org/v1 ----------------------------------------------------------------------------------------
REPLICAS = record(
    replicas=COUNT, restartPolicy=one_of("Always", "OnFailure", "Never", "ExitCode"), template=POD_TEMPLATE
)
PYTORCH_JOB = kind(
    "kubeflow.org/v1",
    "PyTorchJob",
    record(
        "pytorchReplicaSpecs",
        nprocPerNode=TEXT,
        runPolicy=record(backoffLimit=COUNT, cleanPodPolicy=one_of("All", "Running", "None")),
        pytorchReplicaSpecs=record(Master=REPLICAS, Worker=REPLICAS),
    ),
)

# --- trainer.kubeflow.org/v1alpha1 --------------------------------------------------------------------------
REPLICATED_JOB = record(
    "name",
    "template",
    name=TEXT,
    groupName=TEXT,
    replicas=COUNT,
    template=record(metadata=record(labels=LABELS, annotations=LABELS), spec=JOB_SPEC),
)
TRAINING_RUNTIME = kind(
    "trainer.kubeflow.org/v1alpha1",
    "TrainingRuntime",
    record(
        mlPolicy=record(
            numNodes=COUNT, torch=record(numProcPerNode={"anyOf": [COUNT, one_of("auto", "cpu", "gpu")]})
        ),
        template=record(spec=record(replicatedJobs=many(REPLICATED_JOB))),
    ),
)
TRAIN_JOB = kind(
    "trainer.kubeflow.org/v1alpha1",
    "TrainJob",
    record(
        "runtimeRef",
        runtimeRef=record(
            "name", apiGroup=TEXT, kind=one_of("TrainingRuntime", "ClusterTrainingRuntime"), name=TEXT
        ),
        suspend=SWITCH,
        trainer=record(
            image=TEXT,
            command=many(TEXT, 128),
            args=many(TEXT, 128),
            env=many(VARIABLE, 128),
            numNodes=COUNT,
            numProcPerNode=COUNT,  # older versions of Trainer also take a string
            resourcesPerNode=RESOURCES,
        ),
    ),
)

OF_KIND = {
    schema["properties"]["kind"]["enum"][0]: schema
    for schema in (SERVICE, JOB, PYTORCH_JOB, TRAINING_RUNTIME, TRAIN_JOB)
}


def check(documents: list[dict[str, Any]]) -> None:
    """Raise jsonschema.ValidationError for an object that its schema refuses."""
    for document in documents:
        jsonschema.validate(document, OF_KIND[document["kind"]])
