"""`fastdiff doctor`: what is installed, what this machine can do, and what can act on a model. Works without torch."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

import fastdiff
from fastdiff_app.console import out
from fastdiff_app.engine import load_pipeline
from fastdiff_app.failures import REMEDY, is_installed

# package: what it is for, and the command that brings it
PACKAGES = {
    "torch": ("runs the models", REMEDY),
    "diffusers": ("the pipelines", "python -m pip install 'diffusers>=0.42'"),
    "transformers": ("text encoders", "python -m pip install 'transformers>=5'"),
    "accelerate": ("loading large models", REMEDY),
    "peft": ("adapters", REMEDY),
    "av": ("video files", "python -m pip install 'av>=14'"),
    "triton": ("GPU kernels", "python -m pip install 'triton>=3.4'"),
    "torchao": ("quantised weights", "python -m pip install 'torchao>=0.15'"),
    "gradio": ("the web page", "python -m pip install 'gradio>=6,<7' 'websockets>=13'"),
}


def _installed(package: str) -> str | None:
    if not is_installed(package):
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "present"


def doctor(model: str | None, out: Console = out) -> None:
    """Prints the environment, and with torch installed what can act on the model."""
    out.print(f"fastdiff {fastdiff.__version__}, Python {platform.python_version()}, {platform.system()}", markup=False)
    for package, (purpose, remedy) in PACKAGES.items():
        found = _installed(package)
        state = found or f"not installed ({purpose}): {remedy}"
        out.print(f"  {package:<13} {state}", markup=False)
    if not is_installed("torch"):
        return
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            memory = f"{about.total_memory / 2**30:.0f} GiB"
            capability = f"sm_{about.major}{about.minor}"
            out.print(f"  GPU {index}         {about.name}, {memory}, {capability}", markup=False)
    else:
        out.print(f"  GPU           none that torch can use; {os.cpu_count()} CPU cores", markup=False)
    out.print(f"  threads       {torch.get_num_threads()} for torch", markup=False)
    sys.stdout.flush()
    pipe = load_pipeline(model, "text-to-image")
    out.print(f"\n{model or 'the embedded model'}: what can act on it here", markup=False)
    out.print(str(fastdiff.audit(pipe)), markup=False)
