"""Routers: what maps hidden states to actions. Those that need no reinforcement learning are trained here."""

from duorl.routers.base import Router, load
from duorl.routers.budget import BudgetRouter
from duorl.routers.ensemble import EnsembleOptions, EnsembleRouter, train_ensemble
from duorl.routers.heads import HeadRouter
from duorl.routers.knn import KNNOptions, KNNRouter, train_knn
from duorl.routers.simple import ConstantRouter, OracleRouter, PatternRouter, RandomRouter
from duorl.routers.soft import SoftOptions, train_soft
from duorl.routers.supervised import SupervisedOptions, train_supervised

__all__ = [
    "BudgetRouter",
    "ConstantRouter",
    "EnsembleOptions",
    "EnsembleRouter",
    "HeadRouter",
    "KNNOptions",
    "KNNRouter",
    "OracleRouter",
    "PatternRouter",
    "RandomRouter",
    "Router",
    "SoftOptions",
    "SupervisedOptions",
    "load",
    "train_ensemble",
    "train_knn",
    "train_soft",
    "train_supervised",
]
