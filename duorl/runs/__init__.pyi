from . import allocator, channel, checkpoints, folders, interrupts, jobs, journal, pretraining, processes, training

__all__ = [
    "allocator",
    "channel",
    "checkpoints",
    "folders",
    "interrupts",
    "jobs",
    "journal",
    "pretraining",
    "processes",
    "training",
]
