"""Every name of ``azureml`` that dtrain answers for: where it lives here, or what to use instead of it.

docs/azureml.md shows these tables; a test compares.
"""

from __future__ import annotations

SDK_VERSION = "1.60.0"
"""What ``azureml.core.VERSION`` begins with: the SDK whose documents these names follow."""

SECRETS = "give jobs secrets as variables, named by `dtrain azureml --secret NAME submit.py`; os.environ[NAME] has them there"
_HERE = "dtrain.azureml"

_CORE = {
    "Workspace": "dtrain.azureml.workspace:Workspace",
    "Experiment": "dtrain.azureml.experiment:Experiment",
    "Run": "dtrain.azureml.run:Run",
    "ScriptRun": "dtrain.azureml.run:Run",
    "ComputeTarget": "dtrain.azureml.compute:ComputeTarget",
    "Dataset": "dtrain.azureml.dataset:Dataset",
    "Datastore": "dtrain.azureml.datastore:Datastore",
    "Environment": "dtrain.azureml.environment:Environment",
    "Model": "dtrain.azureml.model:Model",
    "RunConfiguration": "dtrain.azureml.runconfig:RunConfiguration",
    "ScriptRunConfig": "dtrain.azureml.runconfig:ScriptRunConfig",
}

_TENSORBOARD = {"Tensorboard": "dtrain.azureml.tensorboard:Tensorboard"}
_EXPORT = {"export_to_tensorboard": "dtrain.azureml.tensorboard:export_to_tensorboard"}

_EXPRESSIONS = {
    name: f"{_HERE}.parameters:{name}"
    for name in (
        *("choice", "lognormal", "loguniform", "normal", "qlognormal", "qloguniform", "qnormal", "quniform", "randint"),
        "uniform",
    )
}
_SWEEP = {
    "BanditPolicy": "dtrain.azureml.policies:BanditPolicy",
    "GridParameterSampling": "dtrain.azureml.parameters:GridParameterSampling",
    "HyperDriveConfig": "dtrain.azureml.hyperdrive:HyperDriveConfig",
    "HyperDriveRun": "dtrain.azureml.hyperdrive_run:HyperDriveRun",
    "HyperDriveRunConfig": "dtrain.azureml.hyperdrive:HyperDriveRunConfig",
    "MedianStoppingPolicy": "dtrain.azureml.policies:MedianStoppingPolicy",
    "NoTerminationPolicy": "dtrain.azureml.policies:NoTerminationPolicy",
    "PrimaryMetricGoal": "dtrain.azureml.hyperdrive:PrimaryMetricGoal",
    "RandomParameterSampling": "dtrain.azureml.parameters:RandomParameterSampling",
    "TruncationSelectionPolicy": "dtrain.azureml.policies:TruncationSelectionPolicy",
}

MODULES: dict[str, dict[str, str]] = {
    "azureml": {},
    "azureml.core": _CORE,
    "azureml.core.authentication": {
        name: f"{_HERE}.authentication:{name}"
        for name in (
            "AzureCliAuthentication",
            "InteractiveLoginAuthentication",
            "MsiAuthentication",
            "ServicePrincipalAuthentication",
        )
    },
    "azureml.core.compute": {
        "ComputeTarget": "dtrain.azureml.compute:ComputeTarget",
        "AmlCompute": "dtrain.azureml.compute:AmlCompute",
    },
    "azureml.contrib": {},
    "azureml.contrib.tensorboard": _TENSORBOARD,
    "azureml.contrib.tensorboard.export": _EXPORT,
    "azureml.core.compute_target": {"ComputeTargetException": "dtrain.azureml.errors:ComputeTargetException"},
    "azureml.core.conda_dependencies": {"CondaDependencies": "dtrain.azureml.environment:CondaDependencies"},
    "azureml.core.container_registry": {},
    "azureml.core.dataset": {"Dataset": "dtrain.azureml.dataset:Dataset"},
    "azureml.core.datastore": {"Datastore": "dtrain.azureml.datastore:Datastore"},
    "azureml.core.environment": {
        "CondaDependencies": "dtrain.azureml.environment:CondaDependencies",
        "Environment": "dtrain.azureml.environment:Environment",
    },
    "azureml.core.experiment": {"Experiment": "dtrain.azureml.experiment:Experiment"},
    "azureml.core.model": {"Model": "dtrain.azureml.model:Model"},
    "azureml.core.run": {"Run": "dtrain.azureml.run:Run", "_OfflineRun": "dtrain.azureml.context:_OfflineRun"},
    "azureml.core.runconfig": {
        "CondaDependencies": "dtrain.azureml.environment:CondaDependencies",
        "DEFAULT_CPU_IMAGE": "dtrain.azureml.environment:DEFAULT_CPU_IMAGE",
        "DEFAULT_GPU_IMAGE": "dtrain.azureml.environment:DEFAULT_GPU_IMAGE",
        "DataReferenceConfiguration": "dtrain.azureml.datastore:DataReferenceConfiguration",
        "DockerConfiguration": "dtrain.azureml.runconfig:DockerConfiguration",
        "Environment": "dtrain.azureml.environment:Environment",
        "MpiConfiguration": "dtrain.azureml.runconfig:MpiConfiguration",
        "RunConfiguration": "dtrain.azureml.runconfig:RunConfiguration",
        "TensorflowConfiguration": "dtrain.azureml.runconfig:TensorflowConfiguration",
    },
    "azureml.core.script_run": {"ScriptRun": "dtrain.azureml.run:Run"},
    "azureml.core.script_run_config": {"ScriptRunConfig": "dtrain.azureml.runconfig:ScriptRunConfig"},
    "azureml.core.workspace": {"Workspace": "dtrain.azureml.workspace:Workspace"},
    "azureml.data": {"FileDataset": "dtrain.azureml.dataset:FileDataset"},
    "azureml.data.data_reference": {"DataReference": "dtrain.azureml.datastore:DataReference"},
    "azureml.data.datapath": {
        "DataPath": "dtrain.azureml.datapath:DataPath",
        "DataPathComputeBinding": "dtrain.azureml.datapath:DataPathComputeBinding",
    },
    "azureml.data.dataset_consumption_config": {
        "DatasetConsumptionConfig": "dtrain.azureml.dataset:DatasetConsumptionConfig",
    },
    "azureml.data.dataset_factory": {"FileDatasetFactory": "dtrain.azureml.dataset:FileDatasetFactory"},
    "azureml.data.file_dataset": {"FileDataset": "dtrain.azureml.dataset:FileDataset"},
    "azureml.exceptions": {
        name: f"{_HERE}.errors:{name}"
        for name in (
            "ActivityFailedException",
            "AuthenticationException",
            "AzureMLException",
            "ComputeTargetException",
            "ExperimentException",
            "ExperimentExecutionException",
            "ModelNotFoundException",
            "ProjectSystemException",
            "RunConfigurationException",
            "RunEnvironmentException",
            "ServiceException",
            "TrainingException",
            "UserErrorException",
            "WebserviceException",
            "WorkspaceException",
        )
    },
    "azureml.telemetry": {
        "set_diagnostics_collection": "dtrain.azureml.telemetry:set_diagnostics_collection",
    },
    "azureml.tensorboard": _TENSORBOARD,
    "azureml.tensorboard.export": _EXPORT,
    "azureml.train": {},
    "azureml.train.dnn": {
        "Chainer": "dtrain.azureml.estimator:Chainer",
        "Mpi": "dtrain.azureml.runconfig:MpiConfiguration",
        "ParameterServer": "dtrain.azureml.runconfig:TensorflowConfiguration",
        "TensorFlow": "dtrain.azureml.estimator:TensorFlow",
    },
    "azureml.train.estimator": {
        "Estimator": "dtrain.azureml.estimator:Estimator",
        "Mpi": "dtrain.azureml.runconfig:MpiConfiguration",
    },
    "azureml.train.hyperdrive": _SWEEP | _EXPRESSIONS,
    "azureml.train.hyperdrive.parameter_expressions": _EXPRESSIONS,
    "azureml.train.hyperdrive.policy": {name: where for name, where in _SWEEP.items() if name.endswith("Policy")},
    "azureml.train.hyperdrive.run": {name: _SWEEP[name] for name in ("HyperDriveRun", "PrimaryMetricGoal")},
    "azureml.train.hyperdrive.runconfig": {
        name: _SWEEP[name] for name in ("HyperDriveConfig", "HyperDriveRunConfig", "PrimaryMetricGoal")
    },
    "azureml.train.hyperdrive.sampling": {name: where for name, where in _SWEEP.items() if name.endswith("Sampling")},
    "azureml.train.sklearn": {"SKLearn": "dtrain.azureml.estimator:SKLearn"},
    "azureml.widgets": {"RunDetails": "dtrain.azureml.widgets:RunDetails"},
}

NO_DATASET = "use Dataset.File, or a Datastore: ws.get_default_datastore().path('...').as_mount() in script_params"
_NO_TABLE = "give the job the file by Dataset.File, and let it read that: pandas.read_csv(path)"
NO_DEPLOY = "models are registered and downloaded here, not deployed; `dtrain pull NAME:VERSION FOLDER` copies one out"
_NO_EXPLAIN = "interpret the model with the library itself, in the training script"
_NO_PIPELINE = "submit the steps one after another from the control script, with wait_for_completion() between them"
_NO_AUTOML = "name the settings that are to be tried: HyperDriveConfig of azureml.train.hyperdrive runs a script with each"
_NO_BAYES = "use RandomParameterSampling, with a policy that ends runs early"
_NO_PARALLEL = "submit one run for each setting, or a HyperDriveConfig of azureml.train.hyperdrive"
_NO_TORCH = "dtrain starts Chainer and TensorFlow ranks; a PyTorch script on one rank runs with Estimator(entry_script=...)"

REFUSED: dict[str, dict[str, str]] = {
    "azureml.core": {
        "ContainerRegistry": "jobs run in this Python environment, not in containers",
        "Image": NO_DEPLOY,
        "Keyvault": SECRETS,
        "LinkedService": "there are no services of Azure's to link",
        "Webservice": NO_DEPLOY,
    },
    "azureml.core.authentication": {
        "TokenAuthentication": "there is no account to log in to; leave auth= out, or give InteractiveLoginAuthentication()",
    },
    "azureml.core.compute": {
        "AksCompute": NO_DEPLOY,
        "BatchCompute": "AmlCompute stands for this machine",
        "ComputeInstance": "AmlCompute stands for this machine",
        "DataFactoryCompute": "AmlCompute stands for this machine",
        "DatabricksCompute": "AmlCompute stands for this machine",
        "HDInsightCompute": "AmlCompute stands for this machine",
        "RemoteCompute": "`dtrain compute add NAME --hosts host:slots` names hosts, for ComputeTarget(ws, NAME)",
    },
    "azureml.core.container_registry": {"ContainerRegistry": "jobs run in this Python environment, not in containers"},
    "azureml.core.environment": {"DockerSection": "jobs run in this Python environment, not in containers"},
    "azureml.core.model": {"InferenceConfig": NO_DEPLOY},
    "azureml.core.runconfig": {
        "PyTorchConfiguration": _NO_TORCH,
        "ParallelTaskConfiguration": _NO_PARALLEL,
    },
    "azureml.data": {"OutputFileDatasetConfig": "let the script write to ./outputs", "TabularDataset": _NO_TABLE},
    "azureml.data.dataset_factory": {"DataType": _NO_TABLE, "TabularDatasetFactory": _NO_TABLE},
    "azureml.train.dnn": {"Gloo": _NO_TORCH, "Nccl": _NO_TORCH, "PyTorch": _NO_TORCH},
    "azureml.train.hyperdrive": {"BayesianParameterSampling": _NO_BAYES},
    "azureml.train.hyperdrive.sampling": {"BayesianParameterSampling": _NO_BAYES},
}

REFUSED_MODULES: dict[str, str] = {
    "azureml._restclient": "no service is asked; Workspace, Experiment and Run of azureml.core tell what it told",
    "azureml.automl": _NO_AUTOML,
    "azureml.core.image": NO_DEPLOY,
    "azureml.contrib.automl": _NO_AUTOML,
    "azureml.contrib.dataset": NO_DATASET,
    "azureml.contrib.explain": _NO_EXPLAIN,
    "azureml.contrib.fairness": _NO_EXPLAIN,
    "azureml.contrib.interpret": _NO_EXPLAIN,
    "azureml.contrib.notebook": "make a script of the notebook (`jupyter nbconvert --to script`), and submit that",
    "azureml.contrib.pipeline": _NO_PIPELINE,
    "azureml.contrib.services": NO_DEPLOY,
    "azureml.contrib.train": "dtrain starts Chainer and TensorFlow ranks; others run on one, by Estimator(entry_script=...)",
    "azureml.core.keyvault": SECRETS,
    "azureml.core.resource_configuration": NO_DEPLOY,
    "azureml.core.webservice": NO_DEPLOY,
    "azureml.data.azure_storage_datastore": "use ws.get_default_datastore(), or Datastore(ws, name)",
    "azureml.data.output_dataset_config": "let the script write to ./outputs",
    "azureml.dataprep": NO_DATASET,
    "azureml.datadrift": NO_DATASET,
    "azureml.explain": _NO_EXPLAIN,
    "azureml.interpret": _NO_EXPLAIN,
    "azureml.mlflow": "log with Run.get_context().log(...); `dtrain metrics RUN --csv` gives what was logged to others",
    "azureml.monitoring": NO_DEPLOY,
    "azureml.opendatasets": NO_DATASET,
    "azureml.pipeline": _NO_PIPELINE,
    "azureml.train.automl": _NO_AUTOML,
}

WORK_BY_IMPORT = frozenset({"azureml.mlflow"})
"""Refused modules that do their work by being imported: there is no later moment to refuse them."""
