"""The ways to stream, and which options belong to which: one that does not act where it was given is refused."""

from collections.abc import Collection

from fastdiff_app.failures import ExitCode, Failure

MODES = {
    "file": "a file (--input)",
    "noise": "video from a prompt alone (a video model without --input)",
    "demo": "the demonstration (--demo)",
    "live": "a live stream (--source)",
}

# every other option acts in all of them
OPTIONS = {
    "input": ("file",),
    "prompt": ("file", "noise", "live"),
    "output": ("file", "noise"),
    "json": ("file", "noise", "live"),
    "sheet": ("file",),
    "strength": ("file", "demo", "live"),
    "frame_buffer": ("file", "demo"),
    "baseline": ("file", "demo"),
    "demo": ("demo",),
    "source": ("live",),
    "sink": ("live",),
    "fps": ("live",),
    "seconds": ("live",),
    "target_ms": ("live",),
    "record": ("live",),
}


def mode_of(demo: bool, live: bool, file: bool, video: bool) -> str:
    """Which way to stream was asked for.

    Args:
        demo, live, file: whether --demo, --source and --input were given.
        video: whether the model makes video, which needs no file.
    """
    if demo:
        return "demo"
    if live:
        return "live"
    return "noise" if video and not file else "file"


def check_options(mode: str, given: Collection[str]) -> None:
    """Raises `Failure` for the first of the options given, by their parameters' names, that does not act in a mode."""
    for name in given:
        where = OPTIONS.get(name, (mode,))
        if mode not in where:
            option, others = f"--{name.replace('_', '-')}", " and ".join(MODES[one] for one in where)
            raise Failure(ExitCode.USAGE, f"{option} belongs to {others}, not to {MODES[mode]}; leave it out")
