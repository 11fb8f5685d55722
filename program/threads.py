"""How long CPU threads spin while they wait; imported before torch, for its effect.

OpenMP threads spin before they sleep. By default they spin so long that, if another process wants
the core, each short operation lasts a time slice of the scheduler. On 2 cores an update of the demo
took 0.1 s alone and 1.3 s beside other work; without spinning, 0.2 s in both cases. A short spin
comes close to the better of the two: 0.13 s alone, 0.3 s with both cores busy. GNU OpenMP, which
torch's CPU builds use, reads the setting once, when it is loaded.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")
