"""Whether a run fits its ranks, and how it is laid out there: found before anything is loaded.

Called by `open_run` of training/setup.py.
"""

from program.errors import InputError


def check_layout(config, layers, world):
    """Raise `InputError` unless a model of so many blocks can be laid out as the flags say."""
    if config.recompute is not None and config.recompute > layers:
        raise InputError(
            f"--recompute is {config.recompute}, expected at most {layers}, the model's blocks"
        )
    if world % config.replicas:
        raise InputError(
            f"--replicas is {config.replicas}, expected a divisor of the number of ranks, {world}"
        )
