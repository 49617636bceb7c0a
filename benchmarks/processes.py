"""Processes that share the machine's cores."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch


def side_by_side(count: int) -> ProcessPoolExecutor:
    """This many new processes, each with its share of torch's threads."""
    threads = max(1, torch.get_num_threads() // count)
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))
