"""What can go wrong for a user: one line of text and one exit code each."""

from enum import IntEnum
from importlib.util import find_spec


class ExitCode(IntEnum):
    """What the program's exit status means; documented in the README, so numbers never change."""

    OK = 0
    BUG = 1
    USAGE = 2
    INPUT = 3
    MISSING = 4
    MODEL = 5
    PLAN = 6
    OUTPUT = 7
    NOT_FINITE = 8
    PARTLY = 9
    INTERRUPTED = 130


class Failure(Exception):
    """Ends the program with this code after printing this line; never a traceback."""

    def __init__(self, code: ExitCode, message: str):
        super().__init__(" ".join(message.split()))
        self.code = code


# the one command that installs the right build of torch on machines with and without an NVIDIA card
REMEDY = "python -m pip install uv && python -m uv pip install --torch-backend auto torch accelerate peft"


def is_installed(package: str) -> bool:
    """Whether a top-level package could be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def require_torch() -> None:
    """Raises `Failure` with the command to type when torch is not installed."""
    if not is_installed("torch"):
        raise Failure(ExitCode.MISSING, f"this needs torch, which is not installed; install it with: {REMEDY}")


def one_line(error: BaseException) -> str:
    """An exception's message on one line of sensible length, its class where it says nothing itself."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."
