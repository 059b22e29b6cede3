"""A student as a model of MLflow: in the registry, under an alias, for ``mlflow.pyfunc`` and for diffusers alike."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.models import infer_signature
from mlflow.pyfunc.model import PythonModel
from mlflow.tracking import MlflowClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BEST = "best"
"""Alias of a sweep's best student."""
PIPELINE, HOW = "pipeline", "how"


class StudentModel(PythonModel):
    """Prompts in, pictures or clips out: arrays ``(F, H, W, 3)`` in [0, 1], by the stock pipeline in the artifacts."""

    def load_context(self, context: Any) -> None:
        """See :class:`mlflow.pyfunc.PythonModel`."""
        from diffusers import DiffusionPipeline

        self._how = json.loads(Path(context.artifacts[HOW]).read_text(encoding="utf-8"))
        absent = dict.fromkeys(self._how["absent"])
        self._pipeline = DiffusionPipeline.from_pretrained(context.artifacts[PIPELINE], use_safetensors=True, **absent)
        self._pipeline.set_progress_bar_config(disable=True)

    # Without types: MLflow would make its own signature of them, which knows no params, and so would drop the seed.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Sample a list of prompts; ``params`` are ``seed``, and what the pipeline was made to be called with."""
        import torch

        del context
        options = {**self._how["call"], **(params or {})}
        seed = int(options.pop("seed", 0))
        found = []
        for i, prompt in enumerate(model_input):
            generator = torch.Generator().manual_seed(seed + i)
            with torch.random.fork_rng():
                torch.manual_seed(seed + i)  # stock schedulers that renoise draw from the process's own state
                made = self._pipeline(prompt=str(prompt), generator=generator, output_type="np", **options)
            frames = made.frames if hasattr(made, "frames") else made.images[:, None]
            found.append(frames[0])
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow warns that a model in Python is code, and that its prompts could have narrower types: both are meant."""
    log = logging.getLogger("mlflow.pyfunc")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def register(uri: str, run_id: str, name: str, pipeline: Path, how: Mapping[str, Any]) -> str:
    """Put a student into the registry and point the alias at it, unless it is there already.

    Args:
        uri: of the tracking server.
        run_id: of the run that made it.
        name: of the registered model.
        pipeline: the student's folder, as diffusers reads it.
        how: ``call``, what the pipeline is called with beside a prompt, and ``absent``, its parts that are not there.

    Returns:
        The version.
    """
    client = MlflowClient(uri, registry_uri=uri)
    versions = client.search_model_versions(f"name='{name}'")
    for version in versions:
        if version.run_id == run_id:
            client.set_registered_model_alias(name, BEST, version.version)
            return str(version.version)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="raydmd-") as folder, mlflow.start_run(run_id=run_id):
            file = Path(folder) / "how.json"
            file.write_text(json.dumps(dict(how)), encoding="utf-8")
            logged = mlflow.pyfunc.log_model(
                name="student",
                python_model=StudentModel(),
                artifacts={PIPELINE: str(pipeline), HOW: str(file)},
                signature=infer_signature(params={"seed": 0, **how["call"]}),
                registered_model_name=name,
                pip_requirements=["raydmd", "diffusers", "torch", "transformers"],
            )
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
    made = str(logged.registered_model_version)
    client.set_registered_model_alias(name, BEST, made)
    return made
