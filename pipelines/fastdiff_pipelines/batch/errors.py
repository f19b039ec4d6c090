"""What ends a whole job, each with the exit status a program should leave with."""

INPUT, MODEL, PLAN, OUTPUT, NOT_FINITE, PARTLY, INTERRUPTED = 3, 5, 6, 7, 8, 9, 130


class JobError(Exception):
    """The job cannot go on. The message is one line with the remedy; `code` is the exit status that fits.

    Whatever was finished before is in the manifest, so the same job can be started again.
    """

    def __init__(self, code: int, message: str):
        super().__init__(" ".join(message.split()))
        self.code = code


class Cancelled(Exception):
    """The running batch was given up because the user asked twice to stop."""


class Broken(Exception):
    """The process or its device cannot be used any more (a CUDA fault, say); only a new process helps."""


def one_line(error: BaseException, longest: int = 400) -> str:
    """An exception's message on one line of sensible length, its class where it says nothing itself."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."
