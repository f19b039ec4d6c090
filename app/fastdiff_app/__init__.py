"""Programs: the command line, and sources and sinks of frames."""

import os

# A thread of GNU OpenMP that waits at the end of a parallel region spins some milliseconds before it sleeps. On a core
# that somebody else wants too it is suspended while it spins and everybody waits for it: a stream of small models falls
# to a fortieth of its pace beside one busy process. This is read when torch is imported, so it is said before.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
