"""How long CPU threads spin for one another; imported before torch, for its effect.

OpenMP's threads spin before they sleep, by default so long that where another process wants the
core, each short operation lasts a time slice of the scheduler. On 2 cores an update of the demo
took 0.1 s alone and 1.3 s beside other work; without spinning 0.2 s either way. A short spin comes
close to the better of both: 0.13 s alone, 0.3 s with both cores taken. GNU's OpenMP, which torch's
CPU builds bring, reads the setting once, when it is loaded.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
