"""How CPU threads wait for one another; imported for its effect, before anything imports torch.

By default OpenMP's threads spin while they wait. Where another process wants the core, each short
operation then lasts a time slice of the scheduler: on two busy cores the demo's updates took 1.3 s
instead of 0.2 s. OpenMP reads the setting once, when torch loads it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
