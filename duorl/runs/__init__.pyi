from . import allocator, checkpoints, folders, interrupts, jobs, journal, pretraining, processes, training

__all__ = [
    "allocator",
    "checkpoints",
    "folders",
    "interrupts",
    "jobs",
    "journal",
    "pretraining",
    "processes",
    "training",
]
