"""fastdiff: faster diffusers pipelines. Apply a plan, see what it did, take it off again.

Importing this package needs neither torch nor diffusers: the modules below import them inside the functions that use
them. They are imported here and not looked up on demand, because `load`, `accelerate` and `audit` name both a function
and the module it lives in, and Python would otherwise put the module in the function's place.
"""

from fastdiff.accelerate import accelerate
from fastdiff.acceleration import Acceleration, Unsupported, Verdict
from fastdiff.audit import audit
from fastdiff.load import load
from fastdiff.plan import Plan

__version__ = "0.1.0"

__all__ = ["Acceleration", "Plan", "Unsupported", "Verdict", "accelerate", "audit", "load"]
