"""Processes side by side: the machine's cores are divided among them, for more threads than cores slow all of them."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from duorl.allocator import keep_freed_memory


def side_by_side(processes: int) -> ProcessPoolExecutor:
    """A pool of so many fresh processes, each with its share of this one's threads."""
    threads = max(1, torch.get_num_threads() // processes)
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, (threads,))


def _begin(threads: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads)
